"""LoRA's linear, with DoRA as an option: ``W_eff = W0 + s · B A``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.adapters.linear import AdapterLinear, add_product


class LoRALinear(AdapterLinear):
    """Low-rank adaptation (arXiv 2106.09685): no edit, ``y = W x + s · B A dropout(x)``; DoRA as an option.

    DoRA (arXiv 2402.09353, equation 5) trains a magnitude ``m (d_out,)`` besides: row i of ``W + s B A`` is scaled to
    the length ``m_i``, which starts as that of W's row. The length it had is a constant to the gradient, as published.

    Args:
        in_dim, out_dim, rank, alpha, dropout, use_bias: as :class:`AdapterLinear`.
        use_dora: train magnitudes besides.
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
        """Start of LoRA; DoRA's magnitudes are the lengths of the loaded weight's rows."""
        self.reset_update()
        if self.use_dora:
            self.lora_magnitude.copy_(self._row_norms())

    def adapter_params(self) -> list[str]:
        """Names of the trained parameters (torchtune's adapter protocol)."""
        return super().adapter_params() + ["lora_magnitude"] * self.use_dora

    def materialize(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """As :class:`AdapterLinear`; magnitudes stay float32, or their rounding would change the output at once."""
        super().materialize(device, dtype)
        if self.use_dora:
            self.lora_magnitude = nn.Parameter(self.lora_magnitude.detach().float())

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """Lengths of the rows of ``W + s B A``, ``(d_out,)`` float32, from ``|w + c|² = |w|² + 2 w·c + |c|²``."""
        a, b = self.lora_a.weight.float(), self.scaling * self.lora_b.weight.float()
        inner = (self.weight @ a.to(self.weight.dtype).T).float()  # [d_out, r]
        squares = torch.linalg.vector_norm(self.weight, dim=1, dtype=torch.float32).square()
        return (squares + ((2 * inner + b @ (a @ a.T)) * b).sum(dim=1)).clamp_min(0).sqrt()

    def _row_scale(self) -> Tensor:
        """``m / ‖row of W + s B A‖``, ``(d_out,)``; 0 for a row that is zero."""
        return self.lora_magnitude / self._row_norms().clamp_min(torch.finfo(torch.float32).tiny)

    def forward(self, x: Tensor) -> Tensor:
        if not self.use_dora or self.disabled:
            return super().forward(x)
        h = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype)) * self.scaling  # [..., r]
        y = add_product(F.linear(x, self.weight), h, self.lora_b.weight)
        y = y * self._row_scale().to(y.dtype)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W_eff`` ``(d_out, d_in)`` in float32."""
        merged = super().merged_weight()
        return merged * self._row_scale()[:, None] if self.use_dora else merged
