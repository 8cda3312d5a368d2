"""Linears with an SVD-based adapter: ``W_eff = W0 - E + s · B diag(d) A``.

``W0`` is frozen, ``E`` is a low-rank edit of it, ``A``, ``B`` and (for KaSA) ``d`` are trained. LoRA is the case of
E = 0 and d = 1; PiSSA, MiLoRA and CorDA are that of E = s · B A at the start and d = 1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.linalg.decomposition import num_truncated, smallest_triplets
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize, is_quantized
from kasa_tune.components.linalg.solvers import Subspace

EDIT_STORAGES = ("auto", "folded", "factored")
DIAG_INITS = ("normal", "ones")


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
        _check_rank(rank, in_dim, out_dim)
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
                _add_product(y, F.linear(x, self.lora_edit_in.to(x)), self.lora_edit_out.to(x))
                if self.folded
                else y
            )
        if self.lora_edit_in.shape[0] and not self.folded:
            y = _add_product(y, -F.linear(x, self.lora_edit_in.to(x.dtype)), self.lora_edit_out)
        h = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))  # [..., r]
        return _add_product(y, h * self._scale(), self.lora_b.weight)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W_eff`` ``(d_out, d_in)`` in float32."""
        weight = dequantize(self.weight)
        if not self.folded:
            weight = torch.addmm(weight, self.lora_edit_out, self.lora_edit_in, alpha=-1.0)
        return torch.addmm(
            weight, self.lora_b.weight.float() * self._scale(), self.lora_a.weight.float()
        )


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
        y = _add_product(F.linear(x, self.weight), h, self.lora_b.weight)
        y = y * self._row_scale().to(y.dtype)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W_eff`` ``(d_out, d_in)`` in float32."""
        merged = super().merged_weight()
        return merged * self._row_scale()[:, None] if self.use_dora else merged


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
        _check_rank(rank, self.in_dim, self.out_dim, least=0)
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
        _check_rank(rank, self.in_dim, self.out_dim, least=0)
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


class KaSALinear(AdapterLinear):
    """Knowledge-aware singular-value adaptation (arXiv 2412.06071): the edit is the weight's smallest singular
    triplets, the update has a trained diagonal.

    Args:
        in_dim, out_dim, rank, alpha, dropout, use_bias, edit_storage: as :class:`AdapterLinear`.
        truncation_rank: ``k``, smallest singular triplets removed from the weight; default ``rank``, 0 removes none.
        truncation: ``paper`` or ``published``, see :func:`~kasa_tune.components.linalg.decomposition.num_truncated`.
        diag_init: ``normal`` draws ``d ~ N(0, 1)`` as published, ``ones`` starts as LoRA does.
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
        truncation_rank: int | None = None,
        truncation: str = "paper",
        diag_init: str = "normal",
        edit_storage: str = "auto",
    ) -> None:
        if diag_init not in DIAG_INITS:
            raise ValueError(
                f"Unknown diag_init {diag_init!r}: use one of {', '.join(DIAG_INITS)}."
            )
        _check_rank(rank, in_dim, out_dim)
        k = num_truncated(
            out_dim, in_dim, rank if truncation_rank is None else truncation_rank, truncation
        )
        self.diag_init = diag_init
        super().__init__(
            in_dim, out_dim, rank, alpha, dropout, use_bias, edit_rank=k, edit_storage=edit_storage
        )

    @torch.no_grad()
    def reset_update(self) -> None:
        """A Kaiming-uniform, B zero, d standard normal or ones."""
        super().reset_update()
        if "lora_diag" not in self._parameters:
            self.lora_diag = nn.Parameter(torch.empty(self.rank))
        nn.init.normal_(self.lora_diag) if self.diag_init == "normal" else nn.init.ones_(
            self.lora_diag
        )

    def initialize(self) -> Subspace | None:
        """Remove the loaded weight's smallest singular triplets and start the update; returns how they were found."""
        edit, subspace = smallest_triplets(self.weight, self.lora_edit_in.shape[0])
        self.set_edit(edit)
        self.reset_update()
        return subspace

    def adapter_params(self) -> list[str]:
        """Names of the trained parameters (torchtune's adapter protocol)."""
        return ["lora_a.weight", "lora_b.weight", "lora_diag"]

    def _scale(self) -> Tensor:
        return self.scaling * self.lora_diag


def _check_rank(rank: int, in_dim: int, out_dim: int, least: int = 1) -> None:
    if not least <= rank <= min(in_dim, out_dim):
        raise ValueError(
            f"rank must be between {least} and min(in_dim, out_dim) = {min(in_dim, out_dim)}; got {rank}."
        )


def _add_product(y: Tensor, h: Tensor, factor: Tensor) -> Tensor:
    """``y + h factorᵀ`` in one kernel, writing into y: ``y [..., n]``, ``h [..., k]``, ``factor (n, k)``."""
    n, k = factor.shape
    rows = y.reshape(-1, n)
    return rows.addmm_(h.to(y.dtype).reshape(len(rows), k), factor.to(y.dtype).T).view_as(y)
