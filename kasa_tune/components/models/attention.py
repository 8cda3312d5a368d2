"""Causal self-attention with what today's families need: head norms, windows, caps, any scale.

Shapes: b batch, s tokens, h heads, k key and value heads, d width of a head, m tokens in a cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)
from torchtune.modules import KVCache

from kasa_tune.architectures import Architecture, Layer
from kasa_tune.components.models.norms import Norm
from kasa_tune.components.models.rotary import RotaryEmbedding

Mask = Tensor | BlockMask | None


class Attention(nn.Module):
    """Grouped-query attention of one layer, with torchtune's interface and names.

    Args:
        architecture: of the model.
        layer: what this layer has to itself.
        rotary: its position embedding, which layers may share. None if it has none.
        dropout: of the attention weights in training.
    """

    def __init__(
        self,
        architecture: Architecture,
        layer: Layer,
        rotary: RotaryEmbedding | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        a, self.dropout = architecture, dropout
        self.num_heads, self.num_kv_heads, self.head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        self.scale = a.attention_scale * layer.attention_scale
        self.cap, self.window = a.attention_cap, layer.window
        self.temperature = a.query_temperature
        queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        self.q_proj = nn.Linear(a.embed_dim, queries, bias="q_proj" in a.biases)
        self.k_proj = nn.Linear(a.embed_dim, keys, bias="k_proj" in a.biases)
        self.v_proj = nn.Linear(a.embed_dim, keys, bias="v_proj" in a.biases)
        self.output_proj = nn.Linear(queries, a.embed_dim, bias="output_proj" in a.biases)
        self.qk_norm, self.norm_after_rotary = a.qk_norm, a.qk_norm_after_rotary
        if a.qk_norm != "none":
            full = a.qk_norm == "full"
            self.q_norm = Norm(a, queries if full else a.head_dim)
            self.k_norm = Norm(a, keys if full else a.head_dim)
        self.pos_embeddings = rotary
        self.kv_cache: KVCache | None = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Make a key-value cache for ``max_seq_len`` tokens, if there is none yet."""
        if self.kv_cache is None:
            self.kv_cache = KVCache(
                batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype
            )
            self.cache_enabled = True

    def reset_cache(self) -> None:
        """Empty the cache.

        Raises:
            RuntimeError: there is none.
        """
        if self.kv_cache is None:
            raise RuntimeError("There is no key-value cache: call setup_caches first.")
        self.kv_cache.reset()

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Mask = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend from every token of ``x [b, s, e]`` to those that the mask lets it see.

        Args:
            x: the layer's input, normalized.
            y: the same, as torchtune's layers pass it; not read.
            mask: bool ``[b, s, s]`` or, with a cache, ``[b, s, m]``, or a block mask of flex
                attention. None for causal attention.
            input_pos: positions ``[b, s]`` of the tokens in their samples, or ``[s]`` of all rows,
                or ``[b]`` of one token a row. None if they count from 0.

        Returns:
            ``[b, s, e]``.
        """
        b, s, _ = x.shape
        if input_pos is None:
            input_pos = torch.arange(s, device=x.device)
        input_pos = input_pos.view(-1, s)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(b, s, -1, self.head_dim) for t in (q, k, v))
        q, k = self._positioned(q, k, input_pos)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [b, heads, s, d]
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        mask = windowed(mask, self.window, s, x.device)
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, mask, scale=self.scale, cap=self.cap, dropout=dropout)
        return self.output_proj(out.transpose(1, 2).reshape(b, s, -1))

    def _positioned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize and rotate queries and keys ``[b, s, heads, d]``."""
        by_head = self.qk_norm == "head"
        if by_head and not self.norm_after_rotary:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.pos_embeddings is not None:
            angles = self.pos_embeddings(positions)
            q, k = (self.pos_embeddings.rotate(t, *angles) for t in (q, k))
        if by_head and self.norm_after_rotary:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.temperature is not None:
            beta, length = self.temperature
            grown = 1 + beta * torch.log1p((positions / length).floor())
            q = q * grown[..., None, None].type_as(q)
        return q, k


def windowed(mask: Mask, window: int | None, length: int, device: torch.device) -> Mask:
    """Let each token look back ``window`` tokens at most, itself included.

    A token is the last that it sees, so its own place in a row of a mask is the last True. That
    holds for packed rows, for rows padded on the left, and for a cache.

    Args:
        mask: of :class:`Attention`.
        window: None changes nothing.
        length: s.
        device: of the tokens.
    """
    if window is None:
        return mask
    if isinstance(mask, BlockMask):
        return _windowed_blocks(mask, window)
    if mask is None:
        if length <= window:
            return None
        mask = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    width = mask.shape[-1]
    own = width - 1 - mask.flip(-1).int().argmax(-1, keepdim=True)  # [b, s, 1]
    return mask & (torch.arange(width, device=mask.device) > own - window)


def _windowed_blocks(mask: BlockMask, window: int) -> BlockMask:
    """The same of a block mask, made once for all layers that share it."""
    made = mask.__dict__.setdefault("_windowed", {})
    if window not in made:
        inside = and_masks(mask.mask_mod, lambda b, h, q, k: q - k < window)
        rows, _, width, height = *mask.kv_num_blocks.shape[:2], *mask.seq_lengths
        device = str(mask.kv_num_blocks.device)
        made[window] = create_block_mask(inside, rows, None, width, height, device=device)
    return made[window]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float,
    cap: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of ``q [b, h, s, d]`` to ``k`` and ``v [b, k, m, d]``: ``[b, h, s, d]``.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: of :class:`Attention`; None for causal attention.
        scale: what scores are multiplied by.
        cap: soft bound of the scores.
        dropout: share of the weights that become zero. Caps and block masks have none.
    """
    if isinstance(mask, BlockMask):
        return _flex(q, k, v, mask, scale, cap)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    if mask is not None:
        mask = mask[:, None]  # [b, 1, s, m]
    if cap is None:
        causal = mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout
        )
    scores = cap * torch.tanh(q @ k.mT * (scale / cap))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).type_as(v) @ v


# Compiled once, on first use. A model that is compiled itself must not look inside.
_compiled_flex = torch.compile(flex_attention, dynamic=False)


@torch.compiler.disable(recursive=False)
def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, cap: float | None):
    run = _compiled_flex if q.is_cuda else flex_attention

    score_mod = None
    if cap is not None:
        bound = cap

        def score_mod(score: Tensor, *_: Tensor) -> Tensor:
            return bound * torch.tanh(score / bound)

    grouped = q.shape[1] != k.shape[1]
    out = run(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out
