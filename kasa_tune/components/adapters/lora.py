"""The linear of LoRA, with DoRA as an option: ``W_eff = W0 + s · B A``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.adapters.linear import AdapterLinear, add_product


class LoRALinear(AdapterLinear):
    """Low-rank adaptation (arXiv 2106.09685) without an edit, ``y = W x + s · B A dropout(x)``,
    with DoRA as an option.

    DoRA (arXiv 2402.09353, equation 5) also trains a magnitude ``m (d_out,)``. Row i of
    ``W + s B A`` is scaled to the length ``m_i``, which starts as the length of W's row. As
    published, no gradient flows through the length of the row.

    Args:
        in_dim, out_dim, rank, alpha, dropout, use_bias: as in :class:`AdapterLinear`.
        use_dora: whether to train magnitudes as well.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_bias: bool = False,
        *,
        use_dora: bool = False,
    ) -> None:
        self.use_dora = use_dora
        super().__init__(in_dim, out_dim, rank, alpha, dropout, use_bias)
        if use_dora:
            self.lora_magnitude = nn.Parameter(torch.ones(out_dim))

    @torch.no_grad()
    def initialize(self) -> None:
        """Initialize the update as in LoRA, and DoRA's magnitudes as the lengths of the loaded
        weight's rows.
        """
        self.reset_update()
        if self.use_dora:
            self.lora_magnitude.copy_(self._row_norms())

    def adapter_params(self) -> list[str]:
        """Return the names of the trained parameters, as torchtune's adapter protocol asks."""
        return super().adapter_params() + ["lora_magnitude"] * self.use_dora

    def materialize(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Allocate the adapter's tensors as in :class:`AdapterLinear`. Magnitudes stay in float32,
        because rounding them would change the initial output.
        """
        super().materialize(device, dtype)
        if self.use_dora:
            self.lora_magnitude = nn.Parameter(self.lora_magnitude.detach().float())

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Compute the lengths ``(d_out,)`` of the rows of ``W + s B A`` in float32, from
        ``|w + c|² = |w|² + 2 w·c + |c|²``.
        """
        a, b = self.lora_a.weight.float(), self.scaling * self.lora_b.weight.float()
        inner = (self.weight @ a.to(self.weight.dtype).T).float()  # [d_out, r]
        squares = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32).square()
        return (squares + ((2 * inner + b @ (a @ a.T)) * b).sum(dim=1)).clamp_min(0).sqrt()

    def _row_scale(self) -> Tensor:
        """Compute ``m / ‖row of W + s B A‖``, ``(d_out,)``. It is 0 for a row of zeros."""
        return self.lora_magnitude / self._row_norms().clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def is_plain(self) -> bool:
        """As in :class:`AdapterLinear`. DoRA scales the sum."""
        return super().is_plain and not self.use_dora

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., d_in]`` to ``y [..., d_out]``."""
        if not self.use_dora or self.disabled:
            return super().forward(x)
        h = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype)) * self.scaling  # [..., r]
        y = add_product(F.linear(x, self.weight), h, self.lora_b.weight)
        y = y * self._row_scale().to(y.dtype)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Compute ``W_eff (d_out, d_in)`` in float32."""
        merged = super().merged_weight()
        return merged * self._row_scale()[:, None] if self.use_dora else merged
