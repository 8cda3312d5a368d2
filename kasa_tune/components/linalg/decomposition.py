"""Decompositions of a frozen weight into a low-rank part, some of them weighted by the covariance
of the layer's inputs. The adapter linears decide what happens to that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kasa_tune.components.linalg.fallback import on_cpu_if_no_room
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.solvers import (
    Subspace,
    extreme_singular_subspace,
    smallest_singular_subspace,
)

TRUNCATIONS = ("paper", "published")
MODES = ("ipm", "kpm")
SPLITS = ("balanced", "paper", "unscaled")


def num_truncated(d_out: int, d_in: int, truncation_rank: int, truncation: str = "paper") -> int:
    """Compute how many singular triplets KaSA removes from a ``(d_out, d_in)`` weight.

    ``paper`` counts from the end of the ``min(d_out, d_in)`` singular values (KaSA, arXiv
    2412.06071, equation 5). ``published`` is the rule of the authors' code, which keeps the first
    ``d_in - truncation_rank`` values. That removes fewer, often none, from a weight with
    ``d_out < d_in`` such as Llama's ``k_proj``, ``v_proj`` and ``down_proj``.

    Raises:
        ValueError: ``truncation_rank`` is negative or not below ``min(d_out, d_in)``, or
            ``truncation`` is unknown.
    """
    full_rank = min(d_out, d_in)
    if truncation not in TRUNCATIONS:
        raise ValueError(f"Unknown truncation {truncation!r}: use one of {', '.join(TRUNCATIONS)}.")
    if not 0 <= truncation_rank < full_rank:
        raise ValueError(
            f"truncation_rank must be at least 0 and below min(d_out, d_in) = {full_rank}; "
            f"got {truncation_rank} for a {d_out} x {d_in} weight."
        )
    if truncation == "published":
        return max(0, full_rank - (d_in - truncation_rank))
    return truncation_rank


@torch.no_grad()
def smallest_triplets(
    weight: Tensor, k: int, *, solver: str = "auto"
) -> tuple[LowRank, Subspace | None]:
    """Compute the part of a weight that belongs to its ``k`` smallest singular values:
    ``E = Σ_{i>R-k} σ_i u_i v_iᵀ``.

    The singular vectors of the smaller side suffice. If ``U_k`` are the left ones,
    ``E = U_k (U_kᵀ W)``. If ``V_k`` are the right ones, ``E = (W V_k) V_kᵀ``.

    Args:
        weight: ``(d_out, d_in)``, any floating dtype.
        k: number of triplets, ``0 <= k <= min(d_out, d_in)``.
        solver: see :func:`~kasa_tune.components.linalg.solvers.smallest_singular_subspace`.

    Returns:
        ``E (d_out, d_in)`` with float32 factors on the weight's device, and the singular subspace
        it came from. The subspace is None for ``k = 0``.

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
    """Compute ``Uᵀ W (k, m)`` in float64. Only ``column_chunk`` columns of W are converted at a
    time.
    """
    return torch.cat(
        [vectors.T @ columns.double() for columns in matrix.split(column_chunk, dim=1)], dim=1
    )


@dataclass(frozen=True)
class Component:
    """The part ``U Uᵀ W`` of a weight along some directions of its outputs, with the most extreme
    direction first.

    A component from :func:`input_component` is different: its projection holds directions of the
    layer's inputs, and U is zero.

    Args:
        vectors: ``U (d_out, k)`` float32 with orthonormal columns. From :func:`co_svd` they are
            left singular vectors of ``W C^p``.
        singular_values: ``(k,)`` float64, one for each direction. From :func:`co_svd` they are
            those of ``W C^p``.
        projection: ``Uᵀ W (k, d_in)`` float32.
        solver: name of the method that found U.
    """

    vectors: Tensor
    singular_values: Tensor
    projection: Tensor
    solver: str

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.singular_values)

    def first(self, rank: int) -> Component:
        """Return the component of the first ``rank`` directions."""
        cut = self.vectors[:, :rank], self.singular_values[:rank], self.projection[:rank]
        return Component(*cut, self.solver)

    def without_vectors(self) -> Component:
        """Return a component with the singular values ``(k,)`` and the solver's name, whose factors
        are empty.
        """
        return Component(
            self.vectors[:, :0].clone(),
            self.singular_values,
            self.projection[:0].clone(),
            self.solver,
        )

    def to(self, device: torch.device | str) -> Component:
        """Return the component on another device."""
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
    """Compute CorDA's context-oriented SVD (arXiv 2406.05223, equations 2 to 5) without ``C⁻¹``.

    The paper takes the singular triplets of ``W C = U S Vᵀ`` and multiplies by ``C⁻¹``. Since
    ``S Vᵀ C⁻¹ = Uᵀ W``, the component of some left singular vectors is ``U Uᵀ W``. Neither V nor
    ``C⁻¹`` is needed.

    A weight with ``d_out > d_in`` is first reduced to the R of ``W = Q R``. The smallest singular
    vectors then belong to the ``d_in`` existing singular values, and not to the null space.

    It computes in float64. If a GPU has no room for that, the CPU does it, and the log says so.

    Args:
        weight: ``(d_out, d_in)``, any floating dtype.
        covariance: ``C (d_in, d_in)``, symmetric and positive definite, see
            :func:`~kasa_tune.components.corda.covariance.damped`. None stands for the identity.
            That gives PiSSA (``ipm``, arXiv 2404.02948) and MiLoRA (``kpm``, arXiv 2406.09044).
        rank: ``k``, ``0 <= k <= min(d_out, d_in)``.
        mode: ``ipm`` takes the largest singular values, ``kpm`` the smallest.
        covariance_power: ``p``; U holds singular vectors of ``W C^p``. 1 is CorDA. 0 is PiSSA and
            MiLoRA. 1/2 gives the smallest error of the layer's outputs.
        solver: see :func:`~kasa_tune.components.linalg.solvers.extreme_singular_subspace`.

    Returns:
        The component of rank ``k``, on the weight's device.

    Raises:
        ValueError: the weight holds NaN or infinity, or an argument is out of its range.
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
    """Compute the first columns of Q and the first rows of R in ``W = Q R`` (OLoRA, arXiv
    2406.01775, algorithm 1).

    The first columns of Q depend on the first columns of W alone. The rows of R are then ``Qᵀ W``.

    Args:
        weight: ``(d_out, d_in)``, any floating dtype.
        rank: ``k``, ``0 <= k <= min(d_out, d_in)``.

    Returns:
        A component on the weight's device. Its ``vectors (d_out, k)`` are Q, its
        ``projection (k, d_in)`` is R, and its ``singular_values (k,)`` are the lengths of R's rows.

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
    """Compute the leading right singular vectors of a layer's inputs (EVA, arXiv 2410.07170).

    They are the leading eigenvectors of ``C = Σ x xᵀ`` and do not depend on the weight. With the
    ``unscaled`` split A holds them and B is zero.

    Args:
        weight: ``(d_out, d_in)``. Only its shape and its device are used.
        covariance: ``C (d_in, d_in)``, symmetric and positive semidefinite. Damping does not change
            the eigenvectors.
        rank: ``k``, ``0 <= k <= min(d_out, d_in)``.

    Returns:
        A component on the weight's device. Its ``vectors (d_out, k)`` are zero and its
        ``projection (k, d_in)`` has orthonormal rows. Its ``singular_values (k,)`` are those of the
        inputs.
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
    """Compute the largest number of bytes that :func:`co_svd` takes, all in float64.

    They are the weight, its Householder reflectors, the covariance, and the product of weight and
    covariance. The factors or the basis of that product come on top. Before that, a power other
    than 0 and 1 takes the covariance, its eigenvectors, and a workspace of twice their size.
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
    """Compute a matrix that has the singular values of ``W C^p`` and no more rows than W has
    columns.

    Args:
        weight: ``W (d_out, d_in)``.
        covariance: ``C (d_in, d_in)``, or None for the identity.
        covariance_power: ``p``.

    Returns:
        ``(n, d_in)`` float64 with ``n = min(d_out, d_in)``.
    """
    return _oriented(_short_side_first(weight)[0], covariance, covariance_power)


def _short_side_first(weight: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return, in float64, R of ``W = Q R`` for a tall W and W itself otherwise. The second value is
    a function that turns left singular vectors of the result into those of W.
    """
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
    """Compute ``R C^p (n, d_in)`` of ``rows`` R ``(n, d_in)``, up to a rotation of its columns,
    which no left singular vector depends on.
    """
    if covariance is None or power == 0:
        return rows
    if power == 1:
        return rows @ covariance.to(rows)
    eigenvalues, vectors = torch.linalg.eigh(covariance.to(rows))
    # A rotation of the columns changes no left vector, so that `vectors.T` on the right is omitted.
    return (rows @ vectors).mul_(eigenvalues.clamp_min(0) ** power)


@torch.no_grad()
def split_component(component: Component, scaling: float, split: str = "balanced") -> LowRank:
    """Split a component into ``B (d_out, k)`` and ``A (k, d_in)``, where an adapter's update
    starts.

    ``balanced`` gives ``b_i`` and ``a_i`` the same length. With ``t_i = ‖u_iᵀ W‖`` they are
    ``b_i = u_i √(t_i / s)`` and ``a_i = u_iᵀ W / √(t_i s)``. ``paper`` (arXiv 2406.05223, equation
    6) uses the singular value of ``W C`` in place of ``t_i``. The lengths then depend on the scale
    of C. Both splits give ``s · B A = U Uᵀ W``.

    ``unscaled`` (arXiv 2406.01775, algorithm 1) takes ``U`` and ``Uᵀ W`` themselves as B and A.
    Then ``s · B A`` is s times the component.

    Args:
        component: from :func:`co_svd`, :func:`qr_component` or :func:`input_component`.
        scaling: ``s = alpha / rank``.
        split: ``balanced``, ``paper`` or ``unscaled``.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: use balanced, paper or unscaled.")
    if split == "unscaled":
        return LowRank(component.vectors, component.projection)
    lengths = component.singular_values.to(component.projection.device)
    if split == "balanced":
        lengths = torch.linalg.vector_norm(component.projection, dim=1, dtype=torch.float64)
    # A direction that the weight does not use would start at B = A = 0, with gradients of zero.
    lengths = lengths.clamp_min(1e-6 * lengths.mean() + 1e-30)[:, None]
    out = component.vectors.double() * (lengths.T / scaling).sqrt()
    into = component.projection.double() / (lengths * scaling).sqrt()
    return LowRank(out.float(), into.float())


def check_finite(weight: Tensor, name: str = "The weight") -> None:
    """Raise ValueError if a weight ``(d_out, d_in)`` holds NaN or infinity."""
    # Rows are summed in parts, because a CPU copies a half-precision tensor to float32 to sum it.
    sums = [part.sum(dtype=torch.float32) for part in weight.split(1024)]
    if not all(torch.stack(sums).isfinite()):
        raise ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged.")
