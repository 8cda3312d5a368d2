"""CorDA's linear, whose update can start as a part of its weight: ``W_eff = W0 - s · B0 A0 + s · B A``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.adapters.linear import AdapterLinear, check_rank
from kasa_tune.components.linalg.low_rank import LowRank


class CorDALinear(AdapterLinear):
    """A linear whose update can start as a part of its own weight: CorDA (arXiv 2406.05223), PiSSA, MiLoRA.

    ``y = W x + bias - s · B0 (A0 x) + s · B (A dropout(x))``, where ``A0, B0`` are where ``A, B`` started: at first the
    output is that of W. With a factored edit and no dropout it is so bit for bit. Until :meth:`start_from` it is
    LoRA's linear.

    Args:
        in_dim, out_dim, rank, alpha, dropout, use_bias, edit_storage: as :class:`AdapterLinear`; ``auto`` folds in
            every dtype, since what is taken out of the weight is large.
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
        edit_storage: str = "auto",
    ) -> None:
        super().__init__(in_dim, out_dim, rank, alpha, dropout, use_bias, edit_storage=edit_storage)
        if edit_storage == "auto":
            self.edit_storage = "folded"

    @torch.no_grad()
    def start_from(self, start: LowRank, *, taken_out: bool = False) -> None:
        """Start the update as ``s · out @ into`` and take the same out of the frozen weight.

        A start whose ``out`` is zero takes nothing out, and the edit then has rank 0.

        Args:
            start: ``(d_out, d_in)`` of any rank, which becomes the linear's.
            taken_out: the weight has come without it, as a quantized residual does.

        Raises:
            ValueError: the shape is not the weight's.
            RuntimeError: an edit is folded into the weight already.
        """
        if start.shape != (self.out_dim, self.in_dim):
            raise ValueError(
                f"The start is {start.shape}, the weight {(self.out_dim, self.in_dim)}."
            )
        self.check_unfolded()
        self.set_rank(start.rank)
        self.lora_b.weight.copy_(start.out)
        self.lora_a.weight.copy_(start.into)
        # Of the parameters, which may be bfloat16: what is taken out is exactly what the update puts back.
        edit = LowRank(
            self.lora_b.weight.float() * self.scaling, self.lora_a.weight.float().clone()
        )
        if not start.out.any():
            edit = LowRank.empty(*edit.shape, device=edit.out.device)
        self.set_edit(edit, taken_out=taken_out)

    def set_edit(self, edit: LowRank, *, taken_out: bool = False) -> None:
        """As :class:`AdapterLinear`; once folded, the edit's factors, large as the update, wait on the host."""
        super().set_edit(edit, taken_out=taken_out)
        if self.folded:
            self.lora_edit_out, self.lora_edit_in = (
                self.lora_edit_out.cpu(),
                self.lora_edit_in.cpu(),
            )

    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """Make room for an update of another rank, at the same scaling.

        Raises:
            ValueError: the rank is negative or above ``min(d_in, d_out)``.
        """
        check_rank(rank, self.in_dim, self.out_dim, least=0)
        if rank == self.rank:
            return
        like = {"device": self.lora_a.weight.device, "dtype": self.lora_a.weight.dtype}
        self.rank, self.alpha = rank, self.scaling * rank
        self.lora_a.out_features = self.lora_b.in_features = rank
        self.lora_a.weight = nn.Parameter(torch.zeros(rank, self.in_dim, **like))
        self.lora_b.weight = nn.Parameter(torch.zeros(self.out_dim, rank, **like))
        if rank:
            self.reset_update()

    def adapter_shapes(self, rank: int, edit_rank: int) -> dict[str, tuple[int, int]]:
        """Shapes of the adapter's tensors at other ranks; raises ValueError as :meth:`set_rank`."""
        check_rank(rank, self.in_dim, self.out_dim, least=0)
        return {
            "lora_a.weight": (rank, self.in_dim),
            "lora_b.weight": (self.out_dim, rank),
            "lora_edit_out": (self.out_dim, edit_rank),
            "lora_edit_in": (edit_rank, self.in_dim),
        }

    def forward(self, x: Tensor) -> Tensor:
        if self.disabled or self.folded or not self.lora_edit_in.shape[0]:
            return super().forward(x)
        h = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))  # [..., r]
        update = F.linear(h, (self.lora_b.weight.float() * self.scaling).to(x.dtype))
        # The same products in the same order as the update's, so that equal factors cancel to zero.
        edit = F.linear(F.linear(x, self.lora_edit_in.to(x.dtype)), self.lora_edit_out.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + (update - edit)
