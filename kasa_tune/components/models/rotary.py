"""Rotary position embeddings: ours, and the caches of torchtune's on the meta device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kasa_tune.architectures import Rotary


def build_rotary_caches(model: nn.Module) -> None:
    """Build the cache of torchtune's Llama 3.1 embedding on a model on the meta device, where it
    was left unbuilt and would refuse to run.
    """
    for module in model.modules():
        if getattr(module, "is_cache_built", True) is False:
            with torch.device("cpu"):
                module.rope_init()
            module.to("meta")


class RotaryEmbedding(nn.Module):
    """Rotate pairs of each head's values by angles that grow with the position.

    Angles are computed in float32 in each call, so any position can be asked for.

    Args:
        rotary: what is rotated, and how fast.
        head_dim: width of a head.
    """

    def __init__(self, rotary: Rotary, head_dim: int) -> None:
        super().__init__()
        self.rotary, self.width = rotary, int(head_dim * rotary.fraction)
        self.register_buffer("frequencies", torch.empty(self.width // 2), persistent=False)
        if rotary.scaling == "longrope":
            long = torch.empty(self.width // 2)
            self.register_buffer("long_frequencies", long, persistent=False)
        self.rope_init()

    def rope_init(self) -> None:
        """Compute the frequencies again, on the device that is the default now."""
        self.frequencies = frequencies(self.rotary, self.width)
        if self.rotary.scaling == "longrope":
            self.long_frequencies = frequencies(self.rotary, self.width, long=True)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles at ``positions [b, s]``, both ``[b, s, 1, width / 2]``."""
        by = self.frequencies
        if self.rotary.scaling == "longrope":
            # The longest position decides for the whole batch, as in transformers.
            original = self.rotary.options["original_max_position_embeddings"]
            by = torch.where(positions.max() + 1 > original, self.long_frequencies, by)
        angles = positions[..., None, None].float() * by
        size = self.rotary.options.get("attention_factor", 1.0)
        return angles.cos() * size, angles.sin() * size

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotate ``x [b, s, heads, head_dim]`` by what :meth:`forward` gave."""
        rotated, rest = x[..., : self.width].float(), x[..., self.width :]
        if self.rotary.interleaved:
            one, other = rotated.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            one, other = rotated.chunk(2, dim=-1)
        pairs = (one * cosine - other * sine, other * cosine + one * sine)
        if self.rotary.interleaved:
            rotated = torch.stack(pairs, dim=-1).flatten(-2)
        else:
            rotated = torch.cat(pairs, dim=-1)
        return torch.cat((rotated.type_as(x), rest), dim=-1)


def frequencies(rotary: Rotary, width: int, *, long: bool = False) -> Tensor:
    """Angles per position of each pair, ``(width / 2,)`` float32.

    Args:
        rotary: which embedding.
        width: values of a head that are rotated.
        long: of ``longrope``, those of sequences beyond the original length.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / rotary.base**exponents
    if rotary.scaling == "linear":
        return plain / rotary.options["factor"]
    if rotary.scaling == "llama3":
        return _llama3(rotary, plain)
    if rotary.scaling == "yarn":
        return _yarn(rotary, plain, width)
    if rotary.scaling == "longrope":
        factors = torch.tensor(rotary.options["long_factor" if long else "short_factor"])
        return 1.0 / (factors * rotary.base**exponents)
    return plain


def _llama3(rotary: Rotary, plain: Tensor) -> Tensor:
    """Llama 3.1: slow pairs are slowed by the factor, fast ones kept, those between blended."""
    options = rotary.options
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = options["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / options["factor"] + kept * plain


def _yarn(rotary: Rotary, plain: Tensor, width: int) -> Tensor:
    """YaRN (arXiv 2309.00071): a linear ramp over the pairs between two numbers of turns."""
    options = rotary.options

    def pair(turns: float) -> float:
        """The pair that makes so many turns in the original length."""
        length = options["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(rotary.base))

    first, last = pair(options["beta_fast"]), pair(options["beta_slow"])
    if options["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0.0  # or the ramp has no width
    slowed = ((torch.arange(width // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return plain / options["factor"] * slowed + plain * (1 - slowed)
