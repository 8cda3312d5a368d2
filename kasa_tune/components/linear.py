"""Linears with an SVD-based adapter: ``W_eff = W0 - E + s · B diag(d) A``.

``W0`` is frozen, ``E`` is a low-rank edit of it, ``A``, ``B`` and (for KaSA) ``d`` are trained. LoRA is the case of
E = 0 and d = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kasa_tune.components.decomposition import num_truncated, smallest_triplets
from kasa_tune.components.low_rank import LowRank
from kasa_tune.components.solvers import Subspace

EDIT_STORAGES = ("auto", "folded", "factored")
DIAG_INITS = ("normal", "ones")


class AdapterLinear(nn.Module):
    """A frozen linear with an edit and a trained low-rank update: what every adapter linear here is made of.

    ``y = W x + bias - E_out (E_in x) + s · B (d ⊙ (A dropout(x)))`` with ``s = alpha / rank``.

    The edit has two storages with the same function. ``folded``: ``weight`` holds ``W0 - E``. ``factored``: ``weight``
    keeps ``W0`` and the forward subtracts ``E_out (E_in x)``, exact in every dtype and bit-exactly undone when the
    adapter is disabled. ``auto`` folds float32 weights and keeps half-precision ones factored, where folding would
    round most of a small edit away.

    Args:
        in_dim: ``d_in``.
        out_dim: ``d_out``.
        rank: ``r``, at least 1 and at most ``min(d_in, d_out)``.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability applied to the update's input.
        use_bias: whether the frozen linear has a bias.
        edit_rank: ``k``, columns of the edit; 0 for none.
        edit_storage: ``auto``, ``folded`` or ``factored``.

    Shapes:
        input ``[..., d_in]``, output ``[..., d_out]``.

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
            raise ValueError(f"Unknown edit_storage {edit_storage!r}: use one of {', '.join(EDIT_STORAGES)}.")
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
        """Start the adapter on a loaded weight; a plain low-rank update needs nothing from the weight."""
        self.reset_update()
        return None

    @property
    def edit(self) -> LowRank:
        """The low-rank part taken out of the frozen weight."""
        return LowRank(self.lora_edit_out, self.lora_edit_in)

    @torch.no_grad()
    def set_edit(self, edit: LowRank) -> None:
        """Take ``edit`` out of the frozen weight, once in the life of a loaded weight.

        Args:
            edit: float32 factors of shape ``(d_out, d_in)``, any rank.

        Raises:
            ValueError: the edit's shape is not the weight's.
            RuntimeError: an edit is folded into the weight already.
        """
        if edit.shape != (self.out_dim, self.in_dim):
            raise ValueError(f"The edit is {edit.shape}, the weight {(self.out_dim, self.in_dim)}.")
        if self.folded:
            raise RuntimeError("The weight already has an edit folded in; load the base weight again first.")
        self.lora_edit_out = edit.out.to(self.weight.device)
        self.lora_edit_in = edit.into.to(self.weight.device)
        full_precision = self.weight.dtype in (torch.float32, torch.float64)
        if edit.rank and (self.edit_storage == "folded" or (self.edit_storage == "auto" and full_precision)):
            weight = self.weight if full_precision else self.weight.float()
            # A new tensor: the old one may be shared with the checkpoint it was loaded from.
            out, into = self.lora_edit_out.to(weight.dtype), self.lora_edit_in.to(weight.dtype)
            folded = torch.addmm(weight, out, into, alpha=-1.0).to(self.weight.dtype)
            self.weight = nn.Parameter(folded, requires_grad=False)
            self.folded = True

    def adapter_params(self) -> list[str]:
        """Names of the trained parameters (torchtune's adapter protocol)."""
        return ["lora_a.weight", "lora_b.weight"]

    def _scale(self) -> Tensor | float:
        return self.scaling

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.disabled:
            return _add_product(y, F.linear(x, self.lora_edit_in.to(x.dtype)), self.lora_edit_out) if self.folded else y
        if self.lora_edit_in.shape[0] and not self.folded:
            y = _add_product(y, -F.linear(x, self.lora_edit_in.to(x.dtype)), self.lora_edit_out)
        h = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))  # [..., r]
        return _add_product(y, h * self._scale(), self.lora_b.weight)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W_eff`` ``(d_out, d_in)`` in float32."""
        weight = self.weight.float()
        if not self.folded:
            weight = weight - self.edit.dense()
        return weight + self.lora_b.weight.float() @ (self.lora_a.weight.float() * _column(self._scale()))


class LoRALinear(AdapterLinear):
    """Low-rank adaptation (arXiv 2106.09685): no edit, ``y = W x + s · B A dropout(x)``.

    Args:
        in_dim, out_dim, rank, alpha, dropout, use_bias: as :class:`AdapterLinear`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_bias: bool = False,
    ) -> None:
        super().__init__(in_dim, out_dim, rank, alpha, dropout, use_bias)


class KaSALinear(AdapterLinear):
    """Knowledge-aware singular-value adaptation (arXiv 2412.06071): the edit is the weight's smallest singular
    triplets, the update has a trained diagonal.

    Args:
        in_dim, out_dim, rank, alpha, dropout, use_bias, edit_storage: as :class:`AdapterLinear`.
        truncation_rank: ``k``, smallest singular triplets removed from the weight; default ``rank``, 0 removes none.
        truncation: ``paper`` or ``published``, see :func:`~kasa_tune.components.decomposition.num_truncated`.
        diag_init: ``normal`` draws ``d ~ N(0, 1)`` as published, ``ones`` starts as LoRA does.

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
        truncation_rank: int | None = None,
        truncation: str = "paper",
        diag_init: str = "normal",
        edit_storage: str = "auto",
    ) -> None:
        if diag_init not in DIAG_INITS:
            raise ValueError(f"Unknown diag_init {diag_init!r}: use one of {', '.join(DIAG_INITS)}.")
        _check_rank(rank, in_dim, out_dim)
        k = num_truncated(out_dim, in_dim, rank if truncation_rank is None else truncation_rank, truncation)
        self.diag_init = diag_init
        super().__init__(in_dim, out_dim, rank, alpha, dropout, use_bias, edit_rank=k, edit_storage=edit_storage)

    @torch.no_grad()
    def reset_update(self) -> None:
        """A Kaiming-uniform, B zero, d standard normal or ones."""
        super().reset_update()
        if "lora_diag" not in self._parameters:
            self.lora_diag = nn.Parameter(torch.empty(self.rank))
        nn.init.normal_(self.lora_diag) if self.diag_init == "normal" else nn.init.ones_(self.lora_diag)

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


def adapter_linears(model: nn.Module) -> Iterator[tuple[str, AdapterLinear]]:
    """Names and modules of every adapter linear in the model, in the model's order.

    The names are those of the bare model, without the parts that activation checkpointing puts between.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            yield name.replace("_checkpoint_wrapped_module.", ""), module


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Update and edit factors of every adapter linear, ``<module>.lora_*`` to tensor: all that a base needs to become
    the model.
    """
    return {
        f"{name}.{key}": value
        for name, linear in adapter_linears(model)
        for key, value in linear.state_dict().items()
        if key.startswith("lora_")
    }


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a saved adapter onto a model that holds the untouched base weights.

    Raises:
        ValueError: names or shapes differ from the model's adapter; the first differences are listed.
    """
    expected = {name: tuple(value.shape) for name, value in adapter_state_dict(model).items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if expected != given:
        wrong = [
            f"{name}: model {expected.get(name, 'has none')}, adapter {given.get(name, 'has none')}"
            for name in sorted(expected.keys() | given.keys())
            if expected.get(name) != given.get(name)
        ]
        raise ValueError(f"The adapter does not fit the model in {len(wrong)} tensors: " + "; ".join(wrong[:3]))
    for name, linear in adapter_linears(model):
        for parameter in linear.adapter_params():
            linear.get_parameter(parameter).copy_(state[f"{name}.{parameter}"])
        linear.set_edit(LowRank(state[f"{name}.lora_edit_out"].clone(), state[f"{name}.lora_edit_in"].clone()))


def _check_rank(rank: int, in_dim: int, out_dim: int) -> None:
    if not 1 <= rank <= min(in_dim, out_dim):
        raise ValueError(f"rank must be between 1 and min(in_dim, out_dim) = {min(in_dim, out_dim)}; got {rank}.")


def _add_product(y: Tensor, h: Tensor, factor: Tensor) -> Tensor:
    """``y + h factorᵀ`` in one kernel, writing into y: ``y [..., n]``, ``h [..., k]``, ``factor (n, k)``."""
    n, k = factor.shape
    return y.reshape(-1, n).addmm_(h.to(y.dtype).reshape(-1, k), factor.to(y.dtype).T).view_as(y)


def _column(scale: Tensor | float) -> Tensor | float:
    return scale[:, None].float() if isinstance(scale, Tensor) else scale
