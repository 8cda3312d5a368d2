"""KaSA's two regularizers, one batched kernel per shape instead of a loop over layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kasa_tune.components.adapters.kasa import KaSALinear
from kasa_tune.components.processes.sharding import full_tensor

ORTHOGONAL_GRAMS = ("thin", "full")
REDUCTIONS = ("mean", "sum")


def kasa_regularization(
    linears: Iterable[nn.Module], *, orthogonal_gram: str = "thin", reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """The unweighted terms of KaSA's loss (arXiv 2412.06071, equations 9 to 11), to be added as ``β·L2 + γ·L3``.

    ``L2 = Σ_j d_j²`` and ``L3 = ‖BᵀB − I_r‖_F + ‖A Aᵀ − I_r‖_F`` per layer, norms not squared, in float32.

    Args:
        linears: modules of the model; those that are not :class:`KaSALinear` are passed over. Cut factors are gathered.
        orthogonal_gram: ``thin`` is the equation above; ``full`` the published training script, whose Gram matrices are
            ``d_out × d_out`` and ``d_in × d_in`` (computed from the thin ones, never formed).
        reduction: ``mean`` over layers as in the published script, or ``sum`` as in PEFT.

    Returns:
        ``L2`` and ``L3``, scalars with gradients; both are zero without KaSA layers.

    Raises:
        ValueError: an unknown option.
    """
    if orthogonal_gram not in ORTHOGONAL_GRAMS or reduction not in REDUCTIONS:
        raise ValueError(
            f"orthogonal_gram must be one of {ORTHOGONAL_GRAMS} and reduction one of {REDUCTIONS}; "
            f"got {orthogonal_gram!r} and {reduction!r}."
        )
    layers = [linear for linear in linears if isinstance(linear, KaSALinear)]
    if not layers:
        return torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    diagonals = torch.cat([full_tensor(layer.lora_diag).float() for layer in layers])
    thin_factors = [full_tensor(layer.lora_a.weight) for layer in layers] + [
        full_tensor(layer.lora_b.weight).T for layer in layers
    ]
    l2 = diagonals.square().sum()
    l3 = orthogonality_defect(thin_factors, full=orthogonal_gram == "full").sum()
    return (l2 / len(layers), l3 / len(layers)) if reduction == "mean" else (l2, l3)


def orthogonality_defect(factors: Sequence[Tensor], *, full: bool) -> Tensor:
    """``‖X Xᵀ − I_r‖_F`` of each ``X (r, n)``, or ``‖XᵀX − I_n‖_F`` when ``full``; float32, in no particular order.

    ``‖XᵀX − I_n‖² = ‖X Xᵀ − I_r‖² + n − r``, because both Grams share their non-zero eigenvalues. The gradient is
    finite everywhere, zero where the norm is.
    """
    by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for factor in factors:
        by_shape[tuple(factor.shape)].append(factor)
    defects = []
    for (rank, n), group in by_shape.items():
        stacked = torch.stack(group).float()  # [l, r, n]
        gram = torch.bmm(stacked, stacked.mT) - torch.eye(rank, device=stacked.device)
        thin = torch.linalg.vector_norm(gram.flatten(1), dim=1)  # [l]
        defects.append((thin.square() + (n - rank)).sqrt() if full and n > rank else thin)
    return torch.cat(defects)
