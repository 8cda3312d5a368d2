"""Solvers for singular subspaces. Each matrix is given to the cheapest solver that is accurate for
its shape.

All computation is in float64. The smallest singular values of a trained weight are 1e-3 to 1e-5 of
the largest. A float32 Gram matrix squares them, and would hold no correct digit of them. The
singular values of a weight times a covariance span an even wider range.
:func:`extreme_singular_subspace` therefore squares nothing.

Shapes: W is ``(n, m)`` with ``n <= m``, and ``G = W Wᵀ`` is ``(n, n)``. There are k wanted vectors,
b vectors in a block, and p vectors in a basis.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kasa_tune.components.linalg.fallback import is_no_room

log = logging.getLogger(__name__)


# Below this n, or for k above this share of n, a full decomposition is cheaper than a search.
EXACT_BELOW = 640
EXACT_ABOVE_SHARE = 1 / 16
# A block holds this many vectors more than are wanted, because these speed up the convergence.
OVERSAMPLING = 8
# The search for the smallest subspace stops when the next correction to every unit vector is
# shorter than this. The relative error of E is then about 1e-6.
TOLERANCE = 1e-6
MAX_STEPS = 40
# At this step the smallest values are known well enough to place a shift just below them.
SHIFT_AT = 5
# Number of blocks a basis may hold. A fuller basis is reduced to its best two blocks.
MAX_BLOCKS = 12
# The search for extreme subspaces stops when ‖A v - θ v‖ is below this share of θ for every vector.
RELATIVE_RESIDUAL = 1e-6
# A σ² below this share of ‖W‖_F² is rounding noise of float32 weights. Vectors of such values need
# no further convergence, because none of them is better than another.
NOISE = 1e-15


@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis of a singular subspace, and how it was found.

    Args:
        vectors: ``(n, k)`` float64 with orthonormal columns, the most extreme singular value first.
        singular_values: ``(k,)`` float64.
        solver: name of the method that found them.
        residual: how far from convergence the search stopped, see TOLERANCE and RELATIVE_RESIDUAL.
            It is 0 for an exact method.
    """

    vectors: Tensor
    singular_values: Tensor
    solver: str
    residual: float


def smallest_singular_subspace(matrix: Tensor, k: int, *, solver: str = "auto") -> Subspace:
    """Compute the left singular vectors of the ``k`` smallest of the ``n`` singular values of a
    wide matrix.

    If a CUDA device runs out of memory, the CPU does the work. If the search does not converge, the
    exact method does it on the CPU. Each leaves a line in the log.

    Args:
        matrix: ``(n, m)`` with ``n <= m``, any floating dtype and device.
        k: number of vectors, ``1 <= k <= n``.
        solver: ``auto`` chooses by shape. ``gram_eigh`` computes all n eigenvectors of the Gram
            matrix, which is exact. ``inverse_krylov`` searches the block Krylov space of the Gram
            matrix's inverse, for ``k`` at most ``n / 4 - 8``.

    Returns:
        The subspace, ``(n, k)`` in float64, on the matrix's device.

    Raises:
        ValueError: ``n > m``, ``k`` is out of the solver's range, or the solver is unknown.
    """
    n, m = matrix.shape
    if n > m or not 1 <= k <= n:
        raise ValueError(
            "smallest_singular_subspace needs n <= m and 1 <= k <= n; "
            f"got a {n} x {m} matrix and k = {k}."
        )
    if solver not in ("auto", "gram_eigh", "inverse_krylov"):
        raise ValueError(f"Unknown solver {solver!r}: use auto, gram_eigh or inverse_krylov.")
    if solver == "inverse_krylov" and n < 4 * (k + OVERSAMPLING):
        raise ValueError(
            f"inverse_krylov needs n >= 4 (k + {OVERSAMPLING}); got n = {n}, k = {k}. "
            "Use gram_eigh."
        )
    if solver == "auto":
        solver = "gram_eigh" if n < EXACT_BELOW or k > n * EXACT_ABOVE_SHARE else "inverse_krylov"
    method = _inverse_krylov if solver == "inverse_krylov" else _gram_eigh
    again: Callable[[Tensor, int], Subspace] = partial(smallest_singular_subspace, solver=solver)
    try:
        return method(matrix, k)
    except RuntimeError as error:
        if is_no_room(error):
            words = "No room on %s for %s of a %d x %d matrix; doing it on the CPU."
            log.warning(words, matrix.device, solver, n, m)
        elif isinstance(error, torch.linalg.LinAlgError):
            words = "%s failed for a %d x %d matrix (%s); doing it exactly on the CPU, in minutes."
            log.warning(words, solver, n, m, str(error))
            again = _gram_eigh
        else:
            raise
    found = again(matrix.cpu(), k)
    vectors, values = found.vectors.to(matrix.device), found.singular_values.to(matrix.device)
    return Subspace(vectors, values, found.solver, found.residual)


def extreme_singular_subspace(
    matrix: Tensor, k: int, *, largest: bool, solver: str = "auto"
) -> Subspace:
    """Compute the left singular vectors of the ``k`` largest, or smallest, singular values of a
    matrix of any condition.

    If the search does not converge, ``svd`` does the work, and a line in the log says so.

    Args:
        matrix: ``(n, m)`` with ``n <= m``, float64.
        k: number of vectors, ``1 <= k <= n``.
        largest: True for the largest singular values, False for the smallest.
        solver: ``auto`` chooses by shape. ``svd`` computes all singular vectors. ``krylov``
            searches, for ``k`` at most ``n / 4 - 8``. It applies ``M Mᵀ`` for the largest, and the
            inverse of ``M Mᵀ`` through the LU factors of M for the smallest. The product ``M Mᵀ``
            is never formed.

    Returns:
        The subspace, ``(n, k)`` in float64, on the matrix's device.

    Raises:
        ValueError: ``n > m``, ``k`` is out of the solver's range, or the solver is unknown.
    """
    n, m = matrix.shape
    if n > m or not 1 <= k <= n:
        raise ValueError(
            "extreme_singular_subspace needs n <= m and 1 <= k <= n; "
            f"got a {n} x {m} matrix and k = {k}."
        )
    if solver not in ("auto", "svd", "krylov"):
        raise ValueError(f"Unknown solver {solver!r}: use auto, svd or krylov.")
    if solver == "krylov" and n < 4 * (k + OVERSAMPLING):
        raise ValueError(
            f"krylov needs n >= 4 (k + {OVERSAMPLING}); got n = {n}, k = {k}. Use svd."
        )
    if solver == "auto":
        solver = "svd" if n < EXACT_BELOW or k > n * EXACT_ABOVE_SHARE else "krylov"
    if n < m and (not largest or solver == "svd"):
        # The square triangle has the same left vectors and singular values. It has LU factors, and
        # its SVD finds no right vectors of length m, which nobody needs.
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    if solver == "krylov":
        try:
            return _krylov(matrix, k, largest=largest)
        except torch.linalg.LinAlgError as error:
            log.warning(
                "krylov failed for a %d x %d matrix (%s). The full SVD does it instead.",
                n,
                m,
                error,
            )
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    if not largest:
        U, S = U.flip(1), S.flip(0)
    return Subspace(U[:, :k].contiguous(), S[:k].clone(), "svd", 0.0)


def gram_matrix(matrix: Tensor, *, column_chunk: int = 4096) -> Tensor:
    """Compute ``W Wᵀ (n, n)`` in float64 from ``W (n, m)``. Only ``column_chunk`` columns are
    converted at a time.
    """
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(column_chunk, dim=1):
        add_lower_gram(gram, columns.double())
    return mirror_lower(gram)


def mirror_lower(matrix: Tensor, *, chunk: int = 1024) -> Tensor:
    """Copy the lower triangle of a square matrix onto the upper one, in place and ``chunk`` rows at a time: no second
    matrix is needed.
    """
    for start in range(0, len(matrix), chunk):
        end = start + chunk
        square = matrix[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).T)
        matrix[start:end, end:].copy_(matrix[end:, start:end].T)
    return matrix


def add_lower_gram(gram: Tensor, rows: Tensor) -> None:
    """Add ``X Xᵀ`` to the lower triangle of ``gram (n, n)``, in place, for ``rows`` X ``(n, m)``.
    Most of the upper triangle is skipped, which halves the work.
    """
    half = len(rows) // 2
    if half < 192:
        gram.addmm_(rows, rows.T)
        return
    add_lower_gram(gram[:half, :half], rows[:half])
    add_lower_gram(gram[half:, half:], rows[half:])
    gram[half:, :half].addmm_(rows[half:], rows[:half].T)


def _gram_eigh(matrix: Tensor, k: int) -> Subspace:
    """Compute all eigenvectors of ``W Wᵀ (n, n)`` and return the k smallest of them, for ``matrix``
    W ``(n, m)``.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram_matrix(matrix))
    return Subspace(vectors[:, :k], eigenvalues[:k].clamp_min(0).sqrt(), "gram_eigh", 0.0)


def _inverse_krylov(matrix: Tensor, k: int) -> Subspace:
    """Run Rayleigh-Ritz on a growing basis. Each step adds ``G⁻¹ r`` for the residuals
    ``r = G v − σ² v`` of the best vectors.

    With an exact inverse the basis spans the block Krylov space of ``G⁻¹``. In this form, the
    length of a correction also tells how far a vector is from convergence, whatever the condition
    of W.

    Raises:
        torch.linalg.LinAlgError: there is no factorization, or the search does not converge.
    """
    n, m = matrix.shape
    inverse = _SquareInverse(matrix) if n == m else _WideInverse(matrix)
    block = k + OVERSAMPLING
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, block, generator=generator, dtype=torch.float64).to(matrix.device)
    newest = torch.linalg.qr(inverse.solve(start)).Q  # [n, b]
    basis = images = newest[:, :0]  # [n, p]: V and G V
    for step in range(1, MAX_STEPS + 1):
        basis, images = (
            torch.cat((basis, newest), dim=1),
            torch.cat((images, inverse.apply(newest)), dim=1),
        )
        ritz, rotation = torch.linalg.eigh(basis.T @ images)
        vectors = basis @ rotation[:, :block]
        # The residuals are orthogonal to the basis except for rounding. The inverse of a nearly
        # singular W would amplify that rounding, so it is removed first.
        residuals = _outside(images @ rotation[:, :block] - vectors * ritz[:block], basis)
        if step == SHIFT_AT:
            inverse.shift_below(ritz[0], ritz[k - 1] - ritz[0])
        correction = _outside(inverse.solve(residuals), basis)
        residual = torch.linalg.vector_norm(correction[:, :k], dim=0).max()
        if residual < TOLERANCE or ritz[k - 1] <= NOISE * inverse.trace:
            return Subspace(
                vectors[:, :k], ritz[:k].clamp_min(0).sqrt(), "inverse_krylov", float(residual)
            )
        if basis.shape[1] + block > min(n, MAX_BLOCKS * block):
            basis, images = basis @ rotation[:, : 2 * block], images @ rotation[:, : 2 * block]
        # Orthogonalizing twice is enough (Kahan). Once is not enough for a correction that lies
        # almost inside the basis.
        newest = torch.linalg.qr(_outside(torch.linalg.qr(_outside(correction, basis)).Q, basis)).Q
    raise torch.linalg.LinAlgError(
        f"no convergence in {MAX_STEPS} steps, last correction {residual:.1e}"
    )


def _krylov(matrix: Tensor, k: int, *, largest: bool) -> Subspace:
    """Run Rayleigh-Ritz on the block Krylov space of ``A = M Mᵀ`` for the largest singular values,
    or of ``A⁻¹`` for the smallest.

    Raises:
        torch.linalg.LinAlgError: the search does not converge.
    """
    inverse = None if largest else _SquareInverse(matrix)
    block = k + OVERSAMPLING
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), block, generator=generator, dtype=torch.float64).to(
        matrix.device
    )
    newest = torch.linalg.qr(start).Q  # [n, b]
    basis = images = newest[:, :0]  # [n, p]: V and A V
    for _ in range(MAX_STEPS):
        image = matrix @ (matrix.T @ newest) if inverse is None else inverse.solve(newest)
        basis, images = torch.cat((basis, newest), dim=1), torch.cat((images, image), dim=1)
        projected = basis.T @ images
        ritz, rotation = (
            part.flip(-1) for part in torch.linalg.eigh((projected + projected.T) / 2)
        )
        vectors = basis @ rotation[:, :block]
        residuals = images @ rotation[:, :block] - vectors * ritz[:block]
        lengths = torch.linalg.vector_norm(residuals[:, :k], dim=0)
        residual = (lengths / ritz[:k].clamp_min(1e-14 * ritz[0])).max()
        if residual < RELATIVE_RESIDUAL:
            values = ritz[:k].clamp_min(0).sqrt() if largest else ritz[:k].rsqrt()
            return Subspace(vectors[:, :k], values, "krylov", float(residual))
        if basis.shape[1] + block > min(len(matrix), MAX_BLOCKS * block):
            basis, images = basis @ rotation[:, : 2 * block], images @ rotation[:, : 2 * block]
        newest = torch.linalg.qr(_outside(torch.linalg.qr(_outside(residuals, basis)).Q, basis)).Q
    raise torch.linalg.LinAlgError(
        f"no convergence in {MAX_STEPS} steps, last residual {residual:.1e}"
    )


def _outside(vectors: Tensor, basis: Tensor) -> Tensor:
    """Return the part of ``vectors (n, b)`` that is orthogonal to the orthonormal ``basis (n, p)``,
    as a tensor ``(n, b)``.
    """
    return vectors - basis @ (basis.T @ vectors)


class _SquareInverse:
    """``G`` and ``G⁻¹ = W⁻ᵀ W⁻¹`` of a square W by its LU factors, which cost a third of forming
    and factoring G.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.double()
        self.trace = torch.linalg.vector_norm(self.matrix).square()
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(self.matrix)
        diagonal = self.lu.diagonal()
        # This replaces a zero pivot of a singular W, so that solutions are large and not infinite.
        tiny = 1e-16 * diagonal.abs().max()
        diagonal.copy_(torch.where(diagonal.abs() < tiny, tiny, diagonal))

    def apply(self, x: Tensor) -> Tensor:
        return self.matrix @ (self.matrix.T @ x)

    def solve(self, x: Tensor) -> Tensor:
        inner = torch.linalg.lu_solve(self.lu, self.pivots, x)
        return torch.linalg.lu_solve(self.lu, self.pivots, inner, adjoint=True)

    def shift_below(self, smallest: Tensor, spread: Tensor) -> None:
        """Do nothing, because the smallest singular values of a square matrix are far enough apart
        without a shift.
        """


class _WideInverse:
    """``G`` and ``(G − μI)⁻¹`` of a wide W by a Cholesky factor. The shift μ is 0 until
    :meth:`shift_below` is called.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.gram = gram_matrix(matrix)
        self.trace = self.gram.trace()
        # A rank-deficient G has a Cholesky factor only with something added to its diagonal.
        for lift in (0.0, 1e-15, 1e-13, 1e-11, 1e-9):
            if self._factorize(-lift * self.trace):
                return
        raise torch.linalg.LinAlgError(
            "the Gram matrix has no Cholesky factor even after lifting its diagonal"
        )

    def _factorize(self, shift: Tensor) -> bool:
        shifted = self.gram.clone()
        shifted.diagonal().sub_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if info == 0:
            self.factor = factor
        return bool(info == 0)

    def apply(self, x: Tensor) -> Tensor:
        return self.gram @ x

    def solve(self, x: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(self.factor, x, upper=False)
        return torch.linalg.solve_triangular(self.factor.mT, inner, upper=True)

    def shift_below(self, smallest: Tensor, spread: Tensor) -> None:
        """Move the shift to a little under the smallest eigenvalue, because a wide W has many close
        ones there.

        If the shift is above the smallest eigenvalue, the Cholesky factorization fails. A shift
        four times as far below is tried next.
        """
        for distance in (0.5, 2.0):
            shift = smallest - distance * spread
            if shift <= 0 or self._factorize(shift):
                return
