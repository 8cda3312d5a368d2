"""The linear of CorDA, whose update can start as a part of its weight:
``W_eff = W0 - s · B0 A0 + s · B A``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.adapters.linear import AdapterLinear, check_rank
from kasa_tune.components.linalg.low_rank import LowRank


class CorDALinear(AdapterLinear):
    """A linear whose update can start as a part of its own weight, as in CorDA (arXiv 2406.05223),
    PiSSA and MiLoRA.

    ``y = W x + bias - s · B0 (A0 x) + s · B (A dropout(x))``, where ``A0, B0`` are the initial
    values of ``A, B``. The initial output is therefore that of W. With a factored edit and no
    dropout it is equal bit for bit. Before :meth:`start_from` is called, the linear is that of
    LoRA.

    Args:
        in_dim, out_dim, rank, alpha, dropout, use_bias: as in :class:`AdapterLinear`.
        edit_storage: as in :class:`AdapterLinear`, but ``auto`` folds in every dtype. What is taken
            out of the weight is large, so that rounding does not erase it.
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
        """Start the update as ``s · out @ into``, and subtract the same from the frozen weight.

        If ``out`` is zero, nothing is subtracted, and the edit has rank 0.

        Args:
            start: ``(d_out, d_in)`` of any rank. The linear takes over this rank.
            taken_out: True if the weight was loaded without this part already, as a quantized
                residual is.

        Raises:
            ValueError: the shape is not that of the weight.
            RuntimeError: an edit is folded into the weight already.
        """
        if start.shape != (self.out_dim, self.in_dim):
            raise ValueError(
                f"The start has shape {start.shape}, the weight {(self.out_dim, self.in_dim)}."
            )
        self.check_unfolded()
        self.set_rank(start.rank)
        self.lora_b.weight.copy_(start.out)
        self.lora_a.weight.copy_(start.into)
        # The parameters may be bfloat16. The edit is made from them, so that it equals the update.
        edit = LowRank(
            self.lora_b.weight.float() * self.scaling, self.lora_a.weight.float().clone()
        )
        if not start.out.any():
            edit = LowRank.empty(*edit.shape, device=edit.out.device)
        self.set_edit(edit, taken_out=taken_out)

    def set_edit(self, edit: LowRank, *, taken_out: bool = False) -> None:
        """Set the edit ``(d_out, d_in)`` as in :class:`AdapterLinear`. The factors of a folded edit
        are kept on the CPU, because they are as large as the update.
        """
        super().set_edit(edit, taken_out=taken_out)
        if self.folded:
            self.lora_edit_out, self.lora_edit_in = (
                self.lora_edit_out.cpu(),
                self.lora_edit_in.cpu(),
            )

    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """Change the rank of the update and keep its scaling.

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
        """Return the shapes that the adapter's tensors have at other ranks.

        Raises:
            ValueError: as :meth:`set_rank`.
        """
        check_rank(rank, self.in_dim, self.out_dim, least=0)
        return {
            "lora_a.weight": (rank, self.in_dim),
            "lora_b.weight": (self.out_dim, rank),
            "lora_edit_out": (self.out_dim, edit_rank),
            "lora_edit_in": (edit_rank, self.in_dim),
        }

    @property
    def is_plain(self) -> bool:
        """As in :class:`AdapterLinear`. A factored edit and an equal update cancel bit for bit only
        where their products have the same order.
        """
        return super().is_plain and (self.folded or not len(self.lora_edit_in))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., d_in]`` to ``y [..., d_out]``."""
        if self.disabled or self.folded or not self.lora_edit_in.shape[0]:
            return super().forward(x)
        h = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))  # [..., r]
        update = F.linear(h, (self.lora_b.weight.float() * self.scaling).to(x.dtype))
        # The products have the same order as in the update, so that equal factors cancel to zero.
        edit = F.linear(F.linear(x, self.lora_edit_in.to(x.dtype)), self.lora_edit_out.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + (update - edit)
