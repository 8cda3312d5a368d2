"""Frozen weight in, low-rank term out. The linears decide what to do with it."""

from __future__ import annotations

import torch
from torch import Tensor

from kasa_tune.components.low_rank import LowRank
from kasa_tune.components.solvers import Subspace, smallest_singular_subspace

TRUNCATIONS = ("paper", "published")


def num_truncated(d_out: int, d_in: int, truncation_rank: int, truncation: str = "paper") -> int:
    """How many singular triplets KaSA removes from a ``(d_out, d_in)`` weight.

    ``paper`` counts from the end of the ``min(d_out, d_in)`` singular values (KaSA, arXiv 2412.06071, equation 5).
    ``published`` is the authors' code, which keeps the first ``d_in - truncation_rank`` values and so removes fewer,
    often none, from a weight with ``d_out < d_in`` such as Llama's ``k_proj``, ``v_proj`` and ``down_proj``.

    Raises:
        ValueError: ``truncation_rank`` is negative or not below ``min(d_out, d_in)``, or ``truncation`` is unknown.
    """
    full_rank = min(d_out, d_in)
    if truncation not in TRUNCATIONS:
        raise ValueError(f"Unknown truncation {truncation!r}: use one of {', '.join(TRUNCATIONS)}.")
    if not 0 <= truncation_rank < full_rank:
        raise ValueError(
            f"truncation_rank must be at least 0 and below min(d_out, d_in) = {full_rank}; got {truncation_rank} for a "
            f"{d_out} x {d_in} weight."
        )
    if truncation == "published":
        return max(0, full_rank - (d_in - truncation_rank))
    return truncation_rank


@torch.no_grad()
def smallest_triplets(weight: Tensor, k: int, *, solver: str = "auto") -> tuple[LowRank, Subspace | None]:
    """The part of a weight that its ``k`` smallest singular triplets carry: ``E = Σ_{i>R-k} σ_i u_i v_iᵀ``.

    With ``U_k`` the singular vectors of the smaller side, ``E = U_k (U_kᵀ W)`` (or ``(W V_k) V_kᵀ``): the other side's
    vectors and the singular values are never needed.

    Args:
        weight: ``(d_out, d_in)``, any floating dtype.
        k: number of triplets, ``0 <= k <= min(d_out, d_in)``.
        solver: see :func:`~kasa_tune.components.solvers.smallest_singular_subspace`.

    Returns:
        ``E`` with float32 factors on the weight's device, and the subspace found (None for ``k = 0``).

    Raises:
        ValueError: the weight holds NaN or infinity, or ``k`` is out of range.
    """
    if k == 0:
        return LowRank.empty(*weight.shape, device=weight.device), None
    if not weight.sum(dtype=torch.float32).isfinite():  # one pass, and no mask as large as the weight
        raise ValueError("The weight holds NaN or infinity; the checkpoint is damaged.")
    d_out, d_in = weight.shape
    small_side_first = weight if d_out <= d_in else weight.T
    subspace = smallest_singular_subspace(small_side_first, k, solver=solver)
    projected = _project(subspace.vectors, small_side_first)
    if d_out <= d_in:
        return LowRank(subspace.vectors.float(), projected.float()), subspace
    return LowRank(projected.T.float().contiguous(), subspace.vectors.T.float().contiguous()), subspace


def _project(vectors: Tensor, matrix: Tensor, *, column_chunk: int = 4096) -> Tensor:
    """``Uᵀ W`` in float64, ``(k, m)``, converting ``column_chunk`` columns of W at a time."""
    return torch.cat([vectors.T @ columns.double() for columns in matrix.split(column_chunk, dim=1)], dim=1)
