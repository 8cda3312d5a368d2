"""Linears with an SVD-based adapter: ``W_eff = W0 - E + s · B diag(d) A``.

``W0`` is frozen, ``E`` is a low-rank edit of it, ``A``, ``B`` and (for KaSA) ``d`` are trained. LoRA is the case of
E = 0 and d = 1; PiSSA, MiLoRA and CorDA are that of E = s · B A at the start and d = 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize, is_quantized
from kasa_tune.components.linalg.solvers import Subspace

EDIT_STORAGES = ("auto", "folded", "factored")


class AdapterLinear(nn.Module):
    """A frozen linear with an edit and a trained low-rank update: what every adapter linear here is made of.

    ``y = W x + bias - E_out (E_in x) + s · B (d ⊙ (A dropout(x)))`` with ``s = alpha / rank``, for x ``[..., d_in]``.

    The edit has two storages with the same function. ``folded``: ``weight`` holds ``W0 - E``. ``factored``: ``weight``
    keeps ``W0`` and the forward subtracts ``E_out (E_in x)``, exact in every dtype and bit-exactly undone when the
    adapter is disabled. ``auto`` folds float32 weights; with half-precision and quantized ones, where folding would
    round most of a small edit away, it is factored.

    Args:
        in_dim: ``d_in``.
        out_dim: ``d_out``.
        rank: ``r``, at least 1 and at most ``min(d_in, d_out)``.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability applied to the update's input.
        use_bias: whether the frozen linear has a bias.
        edit_rank: ``k``, columns of the edit; 0 for none.
        edit_storage: ``auto``, ``folded`` or ``factored``.

    Raises:
        ValueError: an argument is out of its range.
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
        edit_rank: int = 0,
        edit_storage: str = "auto",
    ) -> None:
        super().__init__()
        check_rank(rank, in_dim, out_dim)
        if edit_storage not in EDIT_STORAGES:
            raise ValueError(
                f"Unknown edit_storage {edit_storage!r}: use one of {', '.join(EDIT_STORAGES)}."
            )
        self.in_dim, self.out_dim, self.rank, self.alpha = in_dim, out_dim, rank, alpha
        self.scaling = alpha / rank
        self.edit_storage = edit_storage
        self.disabled = False  # torchtune's disable_adapter() sets it
        self.folded = False
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_dim), requires_grad=False) if use_bias else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_a = nn.Linear(in_dim, rank, bias=False)
        self.lora_b = nn.Linear(rank, out_dim, bias=False)
        self.register_buffer("lora_edit_out", torch.zeros(out_dim, edit_rank))
        self.register_buffer("lora_edit_in", torch.zeros(edit_rank, in_dim))
        self.reset_update()

    @torch.no_grad()
    def reset_update(self) -> None:
        """Start of LoRA: A Kaiming-uniform, B zero, so that the update is zero."""
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    @torch.no_grad()
    def materialize(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Give a linear built on the meta device storage for its own tensors: the update in ``dtype``, the edit in
        float32.
        """
        for name in self.adapter_params():
            owner, _, leaf = name.rpartition(".")
            storage = torch.empty(self.get_parameter(name).shape, dtype=dtype, device=device)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(storage))
        self.lora_edit_out = torch.zeros(self.lora_edit_out.shape, device=device)
        self.lora_edit_in = torch.zeros(self.lora_edit_in.shape, device=device)
        self.reset_update()

    def initialize(self) -> Subspace | None:
        """Start the adapter on a loaded weight; a plain low-rank update needs nothing from it."""
        self.reset_update()

    @property
    def edit(self) -> LowRank:
        """The low-rank part taken out of the frozen weight."""
        return LowRank(self.lora_edit_out, self.lora_edit_in)

    @torch.no_grad()
    def set_edit(self, edit: LowRank, *, taken_out: bool = False) -> None:
        """Take ``edit`` out of the frozen weight, once in the life of a loaded weight.

        Args:
            edit: float32 factors of shape ``(d_out, d_in)``, any rank.
            taken_out: the weight has come without it, as a quantized residual does.

        Raises:
            ValueError: the edit's shape is not the weight's.
            RuntimeError: an edit is folded into the weight already, or would have to be into a quantized one.
        """
        if edit.shape != (self.out_dim, self.in_dim):
            raise ValueError(f"The edit is {edit.shape}, the weight {(self.out_dim, self.in_dim)}.")
        self.check_unfolded()
        fold = edit.rank > 0 and not taken_out and self.folds
        if fold and is_quantized(self.weight):
            raise RuntimeError("The weight is quantized: take the edit out of it before it is.")
        self.lora_edit_out = edit.out.to(self.weight.device)
        self.lora_edit_in = edit.into.to(self.weight.device)
        if fold:
            weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
            # A new tensor: the old one may be shared with the checkpoint it was loaded from.
            out, into = self.lora_edit_out.to(weight.dtype), self.lora_edit_in.to(weight.dtype)
            folded = torch.addmm(weight, out, into, alpha=-1.0)
            self.weight = nn.Parameter(folded.to(self.weight.dtype), requires_grad=False)
        self.folded = fold or taken_out

    @property
    def folds(self) -> bool:
        """Whether an edit goes into the frozen weight, and is not kept beside it."""
        full_precision = self.weight.dtype in (torch.float32, torch.float64) and not is_quantized(
            self.weight
        )
        return self.edit_storage == "folded" or (self.edit_storage == "auto" and full_precision)

    def check_unfolded(self) -> None:
        """Raise RuntimeError if an edit has been folded into the weight already."""
        if self.folded:
            raise RuntimeError(
                "The weight already has an edit folded in; load the base weight again first."
            )

    def adapter_params(self) -> list[str]:
        """Names of the trained parameters (torchtune's adapter protocol)."""
        return ["lora_a.weight", "lora_b.weight"]

    def _scale(self) -> Tensor | float:
        return self.scaling

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.disabled:
            return (
                add_product(y, F.linear(x, self.lora_edit_in.to(x)), self.lora_edit_out.to(x))
                if self.folded
                else y
            )
        if self.lora_edit_in.shape[0] and not self.folded:
            y = add_product(y, -F.linear(x, self.lora_edit_in.to(x.dtype)), self.lora_edit_out)
        h = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))  # [..., r]
        return add_product(y, h * self._scale(), self.lora_b.weight)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W_eff`` ``(d_out, d_in)`` in float32."""
        weight = dequantize(self.weight)
        if not self.folded:
            weight = torch.addmm(weight, self.lora_edit_out, self.lora_edit_in, alpha=-1.0)
        return torch.addmm(
            weight, self.lora_b.weight.float() * self._scale(), self.lora_a.weight.float()
        )


def check_rank(rank: int, in_dim: int, out_dim: int, least: int = 1) -> None:
    if not least <= rank <= min(in_dim, out_dim):
        raise ValueError(
            f"rank must be between {least} and min(in_dim, out_dim) = {min(in_dim, out_dim)}; got {rank}."
        )


def add_product(y: Tensor, h: Tensor, factor: Tensor) -> Tensor:
    """``y + h factorᵀ`` in one kernel, writing into y: ``y [..., n]``, ``h [..., k]``, ``factor (n, k)``."""
    n, k = factor.shape
    rows = y.reshape(-1, n)
    return rows.addmm_(h.to(y.dtype).reshape(len(rows), k), factor.to(y.dtype).T).view_as(y)
