"""Gemma 2 as it was published.

torchtune 0.6.1's Gemma 2 is not the published model. It caps the last hidden state where the logits should be capped,
reads the norms before and after the MLP from a checkpoint into each other's place, and its 2B, 9B and 27B swap the two
caps (50 belongs to attention, 30 to the logits). With a key-value cache it misplaces the window of local attention. The
``gemma2`` builders here put that right, under torchtune's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchtune.models import gemma2 as torchtune_gemma2
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from kasa_tune.components.models.decoder import CappedTiedLinear


class Gemma2Layer(TransformerSelfAttentionLayer):
    """A Gemma 2 layer by the names torchtune's converter gives: ``mlp_scale`` before the MLP, ``mlp_norm`` after it."""

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None, **kwargs
    ) -> Tensor:
        """``x [b, s, d]`` to ``[b, s, d]``."""
        h = self.sa_norm(x)
        h = x + self.sa_scale(self.attn(h, h, mask=mask, input_pos=input_pos))
        return h + self.mlp_norm(self.mlp(self.mlp_scale(h)))


class WindowedAttention(Gemma2Attention):
    """Gemma 2's attention whose window ends at the token itself, with a key-value cache too.

    torchtune takes the first row of the mask for the first token. In a step of generation it is the newest one.
    """

    sliding_window_size: int | None

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """``x [b, s, d]`` to ``[b, s, d]``; ``mask [b, s, length]`` is of booleans where there is a cache."""
        window = self.sliding_window_size
        if window is None or mask is None or self.kv_cache is None or not self.cache_enabled:
            return super().forward(x, y, mask=mask, input_pos=input_pos)
        columns = torch.arange(mask.shape[-1], device=mask.device)
        rows = columns[: x.shape[1]] + self.kv_cache.size
        self.sliding_window_size = None
        try:
            near = columns > rows[:, None] - window  # [s, length]
            return super().forward(x, y, mask=mask & near, input_pos=input_pos)
        finally:
            self.sliding_window_size = window


def _corrected(
    model: TransformerDecoder, *, attention_cap: float, logit_cap: float
) -> TransformerDecoder:
    """Make torchtune's Gemma 2 the published one, in place."""
    norms = ("sa_norm", "sa_scale", "mlp_norm", "mlp_scale")
    for i, layer in enumerate(model.layers):
        layer.attn.softcapping = attention_cap
        layer.attn.__class__ = WindowedAttention
        model.layers[i] = Gemma2Layer(
            layer.attn, layer.mlp, **{name: getattr(layer, name) for name in norms}
        )
    model.norm.capping_value, model.norm.logit_capping = logit_cap, nn.Identity()
    model.output = CappedTiedLinear(model.tok_embeddings, logit_cap)
    return model


def gemma2(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: int = 10_000,
    hidden_capping_value: float = 50.0,
    final_capping_value: float = 30.0,
    sliding_window_size: int = 4096,
    query_pre_attn_scalar: int | None = None,
) -> TransformerDecoder:
    """Gemma 2 of any size; arguments of torchtune's ``gemma2``: ``hidden_capping_value`` caps the attention scores,
    ``final_capping_value`` the logits.
    """
    model = torchtune_gemma2.gemma2(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope_base=rope_base,
        sliding_window_size=sliding_window_size,
        query_pre_attn_scalar=query_pre_attn_scalar,
    )
    return _corrected(model, attention_cap=hidden_capping_value, logit_cap=final_capping_value)


def gemma2_2b() -> TransformerDecoder:
    """Gemma 2 2B."""
    return _corrected(torchtune_gemma2.gemma2_2b(), attention_cap=50.0, logit_cap=30.0)


def gemma2_9b() -> TransformerDecoder:
    """Gemma 2 9B."""
    return _corrected(torchtune_gemma2.gemma2_9b(), attention_cap=50.0, logit_cap=30.0)


def gemma2_27b() -> TransformerDecoder:
    """Gemma 2 27B."""
    return _corrected(torchtune_gemma2.gemma2_27b(), attention_cap=50.0, logit_cap=30.0)
