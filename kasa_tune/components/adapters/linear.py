"""The base class of linears with an SVD-based adapter: ``W_eff = W0 - E + s · B diag(d) A``.

``W0`` is frozen, and ``E`` is a low-rank edit of it. ``A``, ``B`` and, for KaSA, ``d`` are trained.
LoRA has E = 0 and d = 1. PiSSA, MiLoRA and CorDA have d = 1, and E is the initial ``s · B A``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.adapters.product import Parts, products
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize, is_quantized
from kasa_tune.components.linalg.solvers import Subspace

EDIT_STORAGES = ("auto", "folded", "factored")


class AdapterLinear(nn.Module):
    """A frozen linear with a low-rank edit of its weight and a trained low-rank update. The other
    adapter linears derive from it.

    ``y = W x + bias - E_out (E_in x) + s · B (d ⊙ (A dropout(x)))`` with ``s = alpha / rank``, for
    ``x [..., d_in]`` and ``y [..., d_out]``.

    The edit can be stored in two ways, which compute the same function. With ``folded``, ``weight``
    holds ``W0 - E``. With ``factored``, ``weight`` holds ``W0``, and the forward pass subtracts
    ``E_out (E_in x)``. This is exact in every dtype, and disabling the adapter undoes it bit for
    bit.

    ``auto`` folds the edit into float32 weights. It keeps the edit factored for half-precision and
    quantized weights, because folding would round most of a small edit away.

    Args:
        in_dim: ``d_in``.
        out_dim: ``d_out``.
        rank: ``r``, at least 1 and at most ``min(d_in, d_out)``.
        alpha: the update is scaled by ``s = alpha / rank``.
        dropout: dropout probability of the update's input.
        use_bias: whether the frozen linear has a bias.
        edit_rank: ``k``, rank of the edit. 0 for no edit.
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
        self.shared_input: SharedInput | None = None
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
        """Initialize the update as in LoRA: A is Kaiming-uniform, and B is zero, so that the update
        is zero. On the meta device there is nothing to initialize.
        """
        if self.lora_a.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)

    @torch.no_grad()
    def materialize(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Allocate the adapter's own tensors of a linear that was built on the meta device. The
        update gets ``dtype``, and the edit gets float32.
        """
        for name in self.adapter_params():
            owner, _, leaf = name.rpartition(".")
            storage = torch.empty(self.get_parameter(name).shape, dtype=dtype, device=device)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(storage))
        self.lora_edit_out = torch.zeros(self.lora_edit_out.shape, device=device)
        self.lora_edit_in = torch.zeros(self.lora_edit_in.shape, device=device)
        self.reset_update()

    def initialize(self) -> Subspace | None:
        """Initialize the adapter on a loaded weight. A plain low-rank update does not depend on the
        weight.
        """
        self.reset_update()

    @property
    def edit(self) -> LowRank:
        """The low-rank part ``E (d_out, d_in)`` that is taken out of the frozen weight."""
        return LowRank(self.lora_edit_out, self.lora_edit_in)

    @torch.no_grad()
    def set_edit(self, edit: LowRank, *, taken_out: bool = False) -> None:
        """Take ``edit`` out of the frozen weight. This may be done once for a loaded weight.

        Args:
            edit: float32 factors of shape ``(d_out, d_in)`` and any rank.
            taken_out: True if the weight was loaded without this part already, as a quantized
                residual is.

        Raises:
            ValueError: the shape of the edit is not that of the weight.
            RuntimeError: an edit is folded into the weight already, or this edit would have to be
                folded into a quantized weight.
        """
        if edit.shape != (self.out_dim, self.in_dim):
            raise ValueError(
                f"The edit has shape {edit.shape}, the weight {(self.out_dim, self.in_dim)}."
            )
        self.check_unfolded()
        fold = edit.rank > 0 and not taken_out and self.folds
        if fold and is_quantized(self.weight):
            raise RuntimeError(
                "The weight is quantized: take the edit out of it before quantizing it."
            )
        self.lora_edit_out = edit.out.to(self.weight.device)
        self.lora_edit_in = edit.into.to(self.weight.device)
        if fold:
            weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
            # The result is a new tensor, because the old one may be shared with its checkpoint.
            out, into = self.lora_edit_out.to(weight.dtype), self.lora_edit_in.to(weight.dtype)
            folded = torch.addmm(weight, out, into, alpha=-1.0)
            self.weight = nn.Parameter(folded.to(self.weight.dtype), requires_grad=False)
        self.folded = fold or taken_out

    @property
    def folds(self) -> bool:
        """Whether an edit is folded into the frozen weight. Otherwise it is kept beside
        the weight.
        """
        full_precision = self.weight.dtype in (torch.float32, torch.float64) and not is_quantized(
            self.weight
        )
        return self.edit_storage == "folded" or (self.edit_storage == "auto" and full_precision)

    def check_unfolded(self) -> None:
        """Raise RuntimeError if an edit has been folded into the weight already."""
        if self.folded:
            raise RuntimeError(
                "The weight already has an edit folded in. First load the base weight again."
            )

    def adapter_params(self) -> list[str]:
        """Return the names of the trained parameters, as torchtune's adapter protocol asks."""
        return ["lora_a.weight", "lora_b.weight"]

    @property
    def diagonal(self) -> Tensor | None:
        """The diagonal ``d (rank,)`` of the update. None if it has none."""
        return None

    def _scale(self) -> Tensor | float:
        """Return the factor of the update: ``s``, or ``s · d (rank,)``."""
        diagonal = self.diagonal
        return self.scaling if diagonal is None else self.scaling * diagonal

    @property
    def is_plain(self) -> bool:
        """Whether the output is that of :func:`~kasa_tune.components.adapters.product.products`.
        A compiler makes kernels of its own and is given the formula.
        """
        return not (torch.compiler.is_compiling() or self.disabled or not self.rank)

    @property
    def _drops(self) -> bool:
        return isinstance(self.dropout, nn.Dropout) and self.dropout.training

    def parts(self) -> Parts:
        """Return the tensors that the output is made from. With dropout the update is left out."""
        a, b, diagonal = self.lora_a.weight, self.lora_b.weight, self.diagonal
        if self._drops:
            a, b, diagonal = a.detach()[:0], b.detach()[:, :0], None
        is_edited = len(self.lora_edit_in) > 0 and not self.folded
        edit_out, edit_in = (self.lora_edit_out, self.lora_edit_in) if is_edited else (None, None)
        return Parts(self.weight, self.bias, a, b, diagonal, edit_out, edit_in, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., d_in]`` to ``y [..., d_out]``."""
        if self.is_plain:
            if self.shared_input is not None and self.shared_input.x is x:
                y = self.shared_input.output(self)
            else:
                (y,) = products(x, [self.parts()])
            return self._add_update(y, x) if self._drops else y
        y = F.linear(x, self.weight, self.bias)
        if self.disabled:
            return (
                add_product(y, F.linear(x, self.lora_edit_in.to(x)), self.lora_edit_out.to(x))
                if self.folded
                else y
            )
        if self.lora_edit_in.shape[0] and not self.folded:
            y = add_product(y, -F.linear(x, self.lora_edit_in.to(x.dtype)), self.lora_edit_out)
        return self._add_update(y, x)

    def _add_update(self, y: Tensor, x: Tensor) -> Tensor:
        h = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))  # [..., r]
        return add_product(y, h * self._scale(), self.lora_b.weight)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Compute ``W_eff (d_out, d_in)`` in float32."""
        weight = dequantize(self.weight)
        if not self.folded:
            weight = torch.addmm(weight, self.lora_edit_out, self.lora_edit_in, alpha=-1.0)
        return torch.addmm(
            weight, self.lora_b.weight.float() * self._scale(), self.lora_a.weight.float()
        )


class SharedInput:
    """An input that several plain linears read, and their outputs once one of them is asked for.

    Args:
        x: ``[..., d_in]``.
        linears: that will be asked, each once.
    """

    def __init__(self, x: Tensor, linears: Sequence[AdapterLinear]) -> None:
        self.x, self._linears = x, linears
        self._outputs: dict[AdapterLinear, Tensor] = {}

    def output(self, linear: AdapterLinear) -> Tensor:
        """Return the output ``[..., d_out]`` of one of them."""
        if linear not in self._outputs:
            computed = products(self.x, [linear.parts() for linear in self._linears])
            self._outputs = dict(zip(self._linears, computed, strict=True))
        return self._outputs.pop(linear)


def check_rank(rank: int, in_dim: int, out_dim: int, least: int = 1) -> None:
    """Raise ValueError if a rank is below ``least`` or above ``min(in_dim, out_dim)``."""
    if not least <= rank <= min(in_dim, out_dim):
        raise ValueError(
            f"rank must be between {least} and min(in_dim, out_dim) = {min(in_dim, out_dim)}; "
            f"got {rank}."
        )


def add_product(y: Tensor, h: Tensor, factor: Tensor) -> Tensor:
    """Compute ``y + h factorᵀ`` in one kernel, in place in y. The shapes are ``y [..., n]``,
    ``h [..., k]`` and ``factor (n, k)``.
    """
    n, k = factor.shape
    rows = y.reshape(-1, n)
    return rows.addmm_(h.to(y.dtype).reshape(len(rows), k), factor.to(y.dtype).T).view_as(y)
