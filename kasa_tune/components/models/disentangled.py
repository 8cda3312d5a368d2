"""The attention of encoders: that of BERT and RoBERTa, and DeBERTa's with relative positions.

Shapes: b batch, s sequence length, h heads, d width, p rows of the table of positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.architectures.encoder import EncoderArchitecture, RelativePositions


class EncoderAttention(nn.Module):
    """Attention of every token to every token that is no padding.

    Args:
        a: the architecture.
    """

    def __init__(self, a: EncoderArchitecture) -> None:
        super().__init__()
        self.num_heads, self.head_dim = a.num_heads, a.embed_dim // a.num_heads
        self.attn_dropout = a.attn_dropout
        self.q_proj = nn.Linear(a.embed_dim, a.embed_dim)
        self.k_proj = nn.Linear(a.embed_dim, a.embed_dim)
        self.v_proj = nn.Linear(a.embed_dim, a.embed_dim)
        self.output_proj = nn.Linear(a.embed_dim, a.embed_dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map ``x [b, s, d]`` to ``[b, s, d]``. ``mask [b, s]`` is true where a token is."""
        q, k, v = (self._heads(linear(x)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        bias, scale = self._scores(q, k, mask)
        dropout = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale
        )  # [b, h, s, d / h]
        return self.output_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """Split ``x [..., s, d]`` into heads: ``[..., h, s, d / h]``."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def _scores(self, q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """Return what is added to the scores or which of them count, and their scale."""
        return mask[:, None, None, :], self.head_dim**-0.5


class RelativeTable(nn.Module):
    """DeBERTa's table of relative positions, which all layers share.

    Args:
        relative: the sizes.
        width: columns.
        eps: what the layer norm adds to a variance.
        dropout: of the table; each layer draws anew.
    """

    def __init__(self, relative: RelativePositions, width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.buckets, self.longest = relative.buckets, relative.longest
        self.table = nn.Embedding(2 * self.buckets, width)
        self.norm = nn.LayerNorm(width, eps=eps) if relative.normalized else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self) -> Tensor:
        """Return the table ``[p, d]`` as a layer reads it."""
        return self.dropout(self.norm(self.table.weight))

    def rows(self, length: int, device: torch.device) -> Tensor:
        """The row ``[s, s]`` of the table for token i and token j."""
        position = torch.arange(length, device=device)
        bucket = log_bucket(position[:, None] - position[None, :], self.buckets, self.longest)
        return (bucket + self.buckets).clamp(0, 2 * self.buckets - 1)


def log_bucket(distance: Tensor, buckets: int, longest: int) -> Tensor:
    """Bucket of a distance: itself up to half the buckets, then on a logarithmic scale.

    Args:
        distance: whole numbers of any shape and sign.
        buckets: of one direction.
        longest: the distance at which the last bucket begins.
    """
    middle = buckets // 2
    size = distance.abs()
    far = size.clamp(min=middle + 1).double()  # the logarithm of what is near is not used
    ratio = torch.log(far / middle) / math.log((longest - 1) / middle)
    logarithmic = torch.ceil(ratio * (middle - 1)).long() + middle
    return torch.where(size <= middle, distance, distance.sign() * logarithmic)


class DisentangledAttention(EncoderAttention):
    """DeBERTa's attention (arXiv 2006.03654), with keys shared by contents and positions:
    ``score = (Q_i·K_j + Q_i·Kr[i−j] + K_j·Qr[i−j]) / √(3 d/h)``.

    The last term is that of the published code, and so of its checkpoints. The paper has ``j−i``
    there. ``Kr`` and ``Qr`` are projections of the table by ``k_proj`` and ``q_proj``, adapters
    included.

    Args:
        a: the architecture.
        relative: the table, which the model owns.
    """

    def __init__(self, a: EncoderArchitecture, relative: RelativeTable) -> None:
        super().__init__(a)
        self._relative = [relative]  # in a list, so that it is not one more module of each layer

    def _scores(self, q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        relative, length = self._relative[0], q.shape[2]
        table, rows = relative(), relative.rows(length, q.device)
        # Hooks on the linears, such as those of a calibration, see hidden states alone.
        q_table = self._heads(self.q_proj.forward(table))  # [h, p, d / h]
        k_table = self._heads(self.k_proj.forward(table))
        wide = rows.expand(len(q), self.num_heads, length, length)
        to_position = (q @ k_table.mT).gather(-1, wide)  # [b, h, i, j]
        # K_j·Qr[i−j]: gathered for token j along its own scores, so i and j change places.
        to_content = (k @ q_table.mT).gather(-1, wide.mT).mT
        scale = (3 * self.head_dim) ** -0.5
        bias = (to_position + to_content) * scale
        return bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min), scale
