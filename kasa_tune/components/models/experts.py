"""Mixtures of experts.

Shapes: n tokens, e width of a hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchtune.modules import FeedForward

from kasa_tune.architectures import Architecture, Experts


class Router(nn.Module):
    """Scores of the experts for each token. It is no ``nn.Linear``, so that it gets no adapter and
    is not quantized.

    Args:
        width: of a hidden state.
        count: experts.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, x: Tensor) -> Tensor:
        """``x [n, e]`` to probabilities ``[n, count]`` in float32."""
        return (x @ self.weight.T).softmax(-1, dtype=torch.float32)


class MixtureOfExperts(nn.Module):
    """An MLP that sends each token through the experts which the router likes best.

    Args:
        architecture: of the model.
        experts: how many, and how many work on a token.
        build: makes one expert of a given inner width.
    """

    def __init__(
        self,
        architecture: Architecture,
        experts: Experts,
        build: Callable[[Architecture, int], FeedForward],
    ) -> None:
        super().__init__()
        self.active, self.normalized = experts.active, experts.normalized
        self.router = Router(architecture.embed_dim, experts.count)
        self.experts = nn.ModuleList(
            build(architecture, experts.intermediate_dim) for _ in range(experts.count)
        )

        self.valid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x [b, s, e]`` to ``[b, s, e]``. Every expert is called, if with no token, so that all
        processes of a distributed run find gradients of the same parameters.
        """
        flat = x.flatten(0, -2)  # [n, e]
        shares, chosen = self.router(flat).topk(self.active, dim=-1)  # both [n, active]
        if self.valid is not None:
            chosen = chosen.masked_fill(~self.valid.flatten()[:, None], -1)
        if self.normalized:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            tokens, place = self._tokens_of(index, chosen)
            share = shares[tokens, place, None].type_as(flat)
            out = out.index_add(0, tokens, expert(flat[tokens]) * share)
        return out.view_as(x)

    def _tokens_of(self, index: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens an expert works on, and the place it has among each token's experts. On
        meta, where that is unknown, it is an even share of the tokens.
        """
        if chosen.is_meta:
            count = -(-chosen.numel() // len(self.experts))
            even = torch.zeros(count, dtype=torch.long, device="meta")
            return even, even
        tokens, place = (chosen == index).nonzero(as_tuple=True)
        return tokens, place


def mixtures_of(module: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts in a module."""
    return [inner for inner in module.modules() if isinstance(inner, MixtureOfExperts)]


@contextlib.contextmanager
def only_valid(mixtures: Sequence[MixtureOfExperts], valid: Tensor) -> Iterator[None]:
    """While active, experts get the tokens where ``valid [b, s]``, and no padding.

    Calibration sums over the inputs of an expert, where nothing tells padding from text.
    """
    for mixture in mixtures:
        mixture.valid = valid
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.valid = None
