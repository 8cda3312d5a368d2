"""Frozen weight (and the covariance of its inputs) in, low-rank term out. The linears decide what to do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.solvers import (
    Subspace,
    extreme_singular_subspace,
    on_cpu_if_no_room,
    smallest_singular_subspace,
)

TRUNCATIONS = ("paper", "published")
MODES = ("ipm", "kpm")
SPLITS = ("balanced", "paper", "unscaled")


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
def smallest_triplets(
    weight: Tensor, k: int, *, solver: str = "auto"
) -> tuple[LowRank, Subspace | None]:
    """The part of a weight that its ``k`` smallest singular triplets carry: ``E = Σ_{i>R-k} σ_i u_i v_iᵀ``.

    With ``U_k`` the singular vectors of the smaller side, ``E = U_k (U_kᵀ W)`` (or ``(W V_k) V_kᵀ``): the other side's
    vectors and the singular values are never needed.

    Args:
        weight: ``(d_out, d_in)``, any floating dtype.
        k: number of triplets, ``0 <= k <= min(d_out, d_in)``.
        solver: see :func:`~kasa_tune.components.linalg.solvers.smallest_singular_subspace`.

    Returns:
        ``E`` with float32 factors on the weight's device, and the subspace found (None for ``k = 0``).

    Raises:
        ValueError: the weight holds NaN or infinity, or ``k`` is out of range.
    """
    if k == 0:
        return LowRank.empty(*weight.shape, device=weight.device), None
    check_finite(weight)
    d_out, d_in = weight.shape
    small_side_first = weight if d_out <= d_in else weight.T
    subspace = smallest_singular_subspace(small_side_first, k, solver=solver)
    what = f"the projection of a {d_out} x {d_in} weight"
    projected = on_cpu_if_no_room(_project, subspace.vectors, small_side_first, what=what)
    projected = projected.to(weight.device)
    if d_out <= d_in:
        return LowRank(subspace.vectors.float(), projected.float()), subspace
    return LowRank(
        projected.T.float().contiguous(), subspace.vectors.T.float().contiguous()
    ), subspace


def _project(vectors: Tensor, matrix: Tensor, *, column_chunk: int = 4096) -> Tensor:
    """``Uᵀ W`` in float64, ``(k, m)``, converting ``column_chunk`` columns of W at a time."""
    return torch.cat(
        [vectors.T @ columns.double() for columns in matrix.split(column_chunk, dim=1)], dim=1
    )


@dataclass(frozen=True)
class Component:
    """The part ``U Uᵀ W`` of a weight along some directions of its outputs, the most extreme one first.

    :func:`input_component` is the exception: it has directions of the inputs as ``projection``, and U is zero.

    Args:
        vectors: ``U (d_out, k)`` float32, orthonormal columns; of :func:`co_svd` left singular vectors of ``W C^p``.
        singular_values: ``(k,)`` float64, what the directions count for; of :func:`co_svd` those of ``W C^p``.
        projection: ``Uᵀ W (k, d_in)`` float32.
        solver: what found U.
    """

    vectors: Tensor
    singular_values: Tensor
    projection: Tensor
    solver: str

    @property
    def rank(self) -> int:
        """Number of vectors."""
        return len(self.singular_values)

    def first(self, rank: int) -> Component:
        """The component of the ``rank`` most extreme vectors."""
        cut = self.vectors[:, :rank], self.singular_values[:rank], self.projection[:rank]
        return Component(*cut, self.solver)

    def without_vectors(self) -> Component:
        """What is known of it alone: singular values and solver, with factors of no size."""
        return Component(
            self.vectors[:, :0].clone(),
            self.singular_values,
            self.projection[:0].clone(),
            self.solver,
        )

    def to(self, device: torch.device | str) -> Component:
        """The same on a device."""
        return Component(
            self.vectors.to(device),
            self.singular_values.to(device),
            self.projection.to(device),
            self.solver,
        )


@torch.no_grad()
def co_svd(
    weight: Tensor,
    covariance: Tensor | None,
    rank: int,
    mode: str,
    *,
    covariance_power: float = 1.0,
    solver: str = "auto",
) -> Component:
    """Context-oriented SVD (CorDA, arXiv 2406.05223, equations 2 to 5) without the covariance's inverse.

    ``W C = U S Vᵀ`` gives ``S Vᵀ C⁻¹ = Uᵀ W``: the component of some left vectors is ``U Uᵀ W``, and neither V nor
    ``C⁻¹`` is formed. For ``d_out > d_in`` the weight is first reduced, ``W = Q R``, so that the bottom vectors are
    those of the ``d_in`` singular values there are and not of the null space.

    Args:
        weight: ``(d_out, d_in)``, any floating dtype.
        covariance: ``C (d_in, d_in)``, symmetric and positive definite (see
            :func:`~kasa_tune.components.corda.covariance.damped`); None stands for the identity: PiSSA (``ipm``, arXiv
            2404.02948) and MiLoRA (``kpm``, arXiv 2406.09044).
        rank: ``k``, ``0 <= k <= min(d_out, d_in)``.
        mode: ``ipm`` the largest singular values, ``kpm`` the smallest.
        covariance_power: ``p``, U is that of ``W C^p``: 1 is CorDA, 0 PiSSA and MiLoRA, 1/2 the least error of the
            outputs.
        solver: see :func:`~kasa_tune.components.linalg.solvers.extreme_singular_subspace`.

    Returns:
        The component, on the weight's device.

    Raises:
        ValueError: the weight holds NaN or infinity, or an argument is out of its range.

    Everything before the result is float64. A GPU without room for it is answered by the CPU and a line in the log.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}: use ipm or kpm.")
    d_out, d_in = weight.shape
    if not 0 <= rank <= min(d_out, d_in):
        raise ValueError(
            f"rank must be between 0 and min(d_out, d_in) = {min(d_out, d_in)}; got {rank}."
        )
    check_finite(weight)
    if rank == 0:
        empty = LowRank.empty(d_out, d_in, device=weight.device)
        return Component(empty.out, torch.zeros(0, dtype=torch.float64), empty.into, "none")

    def work(weight: Tensor, covariance: Tensor | None) -> Component:
        rows, lift = _short_side_first(weight)
        matrix = _oriented(rows, covariance, covariance_power)  # [n, d_in]
        subspace = extreme_singular_subspace(matrix, rank, largest=mode == "ipm", solver=solver)
        projection = (subspace.vectors.T @ rows).float()
        left = lift(subspace.vectors).float()
        return Component(left, subspace.singular_values, projection, subspace.solver)

    what = f"the CO-SVD of a {d_out} x {d_in} weight"
    return on_cpu_if_no_room(work, weight, covariance, what=what).to(weight.device)


@torch.no_grad()
def qr_component(weight: Tensor, rank: int) -> Component:
    """The first columns of Q and the first rows of R in ``W = Q R`` (OLoRA, arXiv 2406.01775, algorithm 1).

    The first columns of Q follow from those of W alone, and the rows of R are ``Qᵀ W``.

    Args:
        weight: ``(d_out, d_in)``, any floating dtype.
        rank: ``k``, ``0 <= k <= min(d_out, d_in)``.

    Returns:
        ``vectors`` Q, ``projection`` R, and as ``singular_values`` the lengths of R's rows; on the weight's device.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    check_finite(weight)

    def work(weight: Tensor) -> Component:
        wide = weight.double()
        q = torch.linalg.qr(wide[:, :rank]).Q  # [d_out, k]
        r = (q.T @ wide).triu()  # [k, d_in]
        return Component(q.float(), torch.linalg.vector_norm(r, dim=1), r.float(), "qr")

    what = f"the QR decomposition of a {len(weight)} x {weight.shape[1]} weight"
    return on_cpu_if_no_room(work, weight, what=what).to(weight.device)


@torch.no_grad()
def input_component(weight: Tensor, covariance: Tensor, rank: int) -> Component:
    """The leading right singular vectors of a layer's inputs, with nothing of its weight (EVA, arXiv 2410.07170).

    They are the leading eigenvectors of ``C = Σ x xᵀ``. With the ``unscaled`` split A holds them and B is zero.

    Args:
        weight: ``(d_out, d_in)``, of which only the shape and the device count.
        covariance: ``C (d_in, d_in)``, symmetric and not negative. Damping moves no eigenvector.
        rank: ``k``, ``0 <= k <= min(d_out, d_in)``.

    Returns:
        ``vectors`` zero, ``projection`` ``(k, d_in)`` with orthonormal rows, and as ``singular_values`` those of the
        inputs; on the weight's device.
    """
    zero = LowRank.empty(*weight.shape, device=weight.device).padded(rank)
    if rank == 0:
        return Component(zero.out, torch.zeros(0, dtype=torch.float64), zero.into, "none")

    def work(covariance: Tensor) -> Component:
        found = extreme_singular_subspace(covariance.double(), rank, largest=True)
        directions = found.vectors.T.float().contiguous()  # [k, d_in]
        return Component(zero.out, found.singular_values.sqrt(), directions, found.solver)

    what = f"the eigenvectors of a covariance of {len(covariance)} inputs"
    return on_cpu_if_no_room(work, covariance, what=what).to(weight.device)


def co_svd_workspace(d_out: int, d_in: int, covariance_power: float = 1.0) -> int:
    """Bytes that :func:`co_svd` takes at most, all float64: the weight, its reflectors, the covariance, their product
    and that one's factors or basis.

    Before that, a power other than 0 and 1 takes the covariance, its eigenvectors and a workspace of twice their size.
    """
    n = min(d_out, d_in)
    factors = d_in * d_in + n * d_in + 4 * n * n
    if covariance_power not in (0, 1):
        factors = max(factors, 4 * d_in * d_in)
    return 8 * (2 * d_out * d_in + factors)


@torch.no_grad()
def oriented_matrix(
    weight: Tensor, covariance: Tensor | None, covariance_power: float = 1.0
) -> Tensor:
    """A matrix ``(n, d_in)`` float64, ``n = min(d_out, d_in)``, with the singular values of ``W C^p``."""
    return _oriented(_short_side_first(weight)[0], covariance, covariance_power)


def _short_side_first(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``R`` of ``W = Q R`` for a tall weight, else W, in float64; and the map of its left vectors to those of W."""
    wide = weight.double()
    d_out, d_in = wide.shape
    if d_out <= d_in:
        return wide, lambda vectors: vectors
    reflectors, tau = torch.geqrf(wide)

    def lift(vectors: Tensor) -> Tensor:
        padded = torch.cat((vectors, vectors.new_zeros(d_out - d_in, vectors.shape[1])))
        return torch.ormqr(reflectors, tau, padded)

    return reflectors[:d_in].triu(), lift


def _oriented(rows: Tensor, covariance: Tensor | None, power: float) -> Tensor:
    if covariance is None or power == 0:
        return rows
    if power == 1:
        return rows @ covariance.to(rows)
    eigenvalues, vectors = torch.linalg.eigh(covariance.to(rows))
    # The vectors on the right would change no left vector.
    return (rows @ vectors).mul_(eigenvalues.clamp_min(0) ** power)


@torch.no_grad()
def split_component(component: Component, scaling: float, split: str = "balanced") -> LowRank:
    """``B (d_out, k)`` and ``A (k, d_in)`` with ``s · B A = U Uᵀ W``, unless the split is ``unscaled``.

    ``balanced`` gives ``b_i`` and ``a_i`` the same length, with ``t_i = ‖u_iᵀ W‖``: ``b_i = u_i √(t_i / s)``,
    ``a_i = u_iᵀ W / √(t_i s)``. ``paper`` (arXiv 2406.05223, equation 6) uses the singular value of ``W C`` in place of
    ``t_i``, so that the lengths depend on the scale of C. ``unscaled`` (arXiv 2406.01775, algorithm 1) gives B and A as
    ``U`` and ``Uᵀ W`` themselves, so that ``s · B A`` is s times the component.

    Args:
        component: from :func:`co_svd`.
        scaling: ``s = alpha / rank``.
        split: ``balanced``, ``paper`` or ``unscaled``.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: use balanced, paper or unscaled.")
    if split == "unscaled":
        return LowRank(component.vectors, component.projection)
    lengths = component.singular_values.to(component.projection.device)
    if split == "balanced":
        lengths = torch.linalg.vector_norm(component.projection, dim=1, dtype=torch.float64)
    # A direction the weight does not use at all would start at B = A = 0 and never move.
    lengths = lengths.clamp_min(1e-6 * lengths.mean() + 1e-30)[:, None]
    out = component.vectors.double() * (lengths.T / scaling).sqrt()
    into = component.projection.double() / (lengths * scaling).sqrt()
    return LowRank(out.float(), into.float())


def check_finite(weight: Tensor, name: str = "The weight") -> None:
    """Raise ValueError if a weight holds NaN or infinity."""
    # A part at a time, because the sum of a half-precision tensor on a CPU first makes a float32 copy of it.
    sums = [part.sum(dtype=torch.float32) for part in weight.split(1024)]
    if not all(torch.stack(sums).isfinite()):
        raise ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged.")
