"""Singular subspaces, each by the cheapest way that is accurate for its shape.

Everything runs in float64: the smallest singular values of a trained weight are 1e-3 to 1e-5 of the largest, and
squaring them into a float32 Gram matrix would leave no correct digit. Those of a weight times a covariance span more
still; for them nothing is squared at all (`extreme_singular_subspace`).

Shapes: W ``(n, m)`` with ``n <= m``, ``G = W Wᵀ``, k vectors wanted, b in a block, p in a basis.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Below this size, or for more than a sixteenth of all vectors, a full eigendecomposition of G costs less than a search.
EXACT_BELOW = 640
EXACT_ABOVE_SHARE = 1 / 16
# Vectors of a block beyond the wanted ones; they make the wanted ones converge faster.
OVERSAMPLING = 8
# The search stops when the correction it proposes to every unit vector is below this; E is then good to some 1e-6.
TOLERANCE = 1e-6
MAX_STEPS = 40
# By this step the smallest values are known well enough to put a shift just under them.
SHIFT_AT = 5
# Blocks a basis may hold; beyond, its best two are kept and the others dropped.
MAX_BLOCKS = 12
# The search for extreme subspaces stops when ‖A v - θ v‖ is below this share of θ for every wanted vector.
RELATIVE_RESIDUAL = 1e-6
# σ² below this share of ‖W‖_F² is the rounding of float32 weights: any vectors from there are as good as the others.
NOISE = 1e-15
# How CUDA's libraries say that a card is full. Torch passes their words on as plain RuntimeErrors. A handle that finds
# no room is "not initialized" (cuBLAS) or an "internal error" (cuSOLVER).
FULL_CARD = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_INTERNAL_ERROR",
)


@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis of a singular subspace and how it was found.

    Args:
        vectors: ``(n, k)`` float64, orthonormal columns, ascending singular value.
        singular_values: ``(k,)`` float64.
        solver: the name of the method that produced them.
        residual: length of the largest correction one more step would have made to a vector; 0 for the exact method.
    """

    vectors: Tensor
    singular_values: Tensor
    solver: str
    residual: float


def smallest_singular_subspace(matrix: Tensor, k: int, *, solver: str = "auto") -> Subspace:
    """Left singular vectors of the ``k`` smallest of the ``n`` singular values of a wide matrix.

    Args:
        matrix: ``(n, m)`` with ``n <= m``, any floating dtype and device.
        k: number of vectors, ``1 <= k <= n``.
        solver: ``auto`` chooses by shape; ``gram_eigh`` (all n eigenvectors of the Gram matrix, exact) or
            ``inverse_krylov`` (search in the block Krylov space of its inverse, for ``k`` at most ``n / 4 - 8``).

    Returns:
        The subspace in float64 on the matrix's device.

    Raises:
        ValueError: ``n > m``, ``k`` outside what the solver can do, or an unknown solver.

    A CUDA device out of memory is answered by the CPU, a search that does not converge by the exact method on the CPU,
    both with a line in the log.
    """
    n, m = matrix.shape
    if n > m or not 1 <= k <= n:
        raise ValueError(
            f"smallest_singular_subspace needs n <= m and 1 <= k <= n; got a {n} x {m} matrix and k = {k}."
        )
    if solver not in ("auto", "gram_eigh", "inverse_krylov"):
        raise ValueError(f"Unknown solver {solver!r}: use auto, gram_eigh or inverse_krylov.")
    if solver == "inverse_krylov" and n < 4 * (k + OVERSAMPLING):
        raise ValueError(
            f"inverse_krylov needs n >= 4 (k + {OVERSAMPLING}); got n = {n}, k = {k}. Use gram_eigh."
        )
    if solver == "auto":
        solver = "gram_eigh" if n < EXACT_BELOW or k > n * EXACT_ABOVE_SHARE else "inverse_krylov"
    method = _inverse_krylov if solver == "inverse_krylov" else _gram_eigh
    again = partial(smallest_singular_subspace, solver=solver)
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
    """Left singular vectors of the ``k`` largest, or smallest, singular values, whatever the matrix's condition.

    Args:
        matrix: ``(n, m)`` with ``n <= m``, float64.
        k: number of vectors, ``1 <= k <= n``.
        largest: which end; the most extreme vector comes first.
        solver: ``auto`` chooses by shape; ``svd`` (all of them) or ``krylov`` (a search, for ``k`` at most
            ``n / 4 - 8``: for the largest of ``M Mᵀ``, for the smallest of its inverse through the LU factors of M, so
            that the product is never formed).

    Raises:
        ValueError: ``n > m``, ``k`` outside what the solver can do, or an unknown solver.

    A search that does not converge is answered by ``svd`` and a line in the log.
    """
    n, m = matrix.shape
    if n > m or not 1 <= k <= n:
        raise ValueError(
            f"extreme_singular_subspace needs n <= m and 1 <= k <= n; got a {n} x {m} matrix, k = {k}."
        )
    if solver not in ("auto", "svd", "krylov"):
        raise ValueError(f"Unknown solver {solver!r}: use auto, svd or krylov.")
    if solver == "krylov" and n < 4 * (k + OVERSAMPLING):
        raise ValueError(
            f"krylov needs n >= 4 (k + {OVERSAMPLING}); got n = {n}, k = {k}. Use svd."
        )
    if solver == "auto":
        solver = "svd" if n < EXACT_BELOW or k > n * EXACT_ABOVE_SHARE else "krylov"
    if (
        not largest and n < m
    ):  # the small side's triangle has the same left vectors and values, and an LU factor
        matrix = torch.linalg.qr(matrix.T, mode="r").R.T
    if solver == "krylov":
        try:
            return _krylov(matrix, k, largest=largest)
        except torch.linalg.LinAlgError as error:
            log.warning(
                "krylov failed for a %d x %d matrix (%s); taking the whole SVD.", n, m, error
            )
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    if not largest:
        U, S = U.flip(1), S.flip(0)
    return Subspace(U[:, :k].contiguous(), S[:k].clone(), "svd", 0.0)


def on_cpu_if_no_room(work: Callable[..., Result], *tensors: Tensor | None, what: str) -> Result:
    """``work(*tensors)``; where a GPU has no room for it or its solver fails, the same on the CPU, with a line in the
    log. The result is where the work was done.
    """
    try:
        return work(*tensors)
    except RuntimeError as error:
        on_gpu = any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors)
        unsolved = isinstance(error, torch.linalg.LinAlgError) and on_gpu
        if not (unsolved or is_no_room(error)):
            raise
        words = "The GPU has no room for %s or cannot solve it; doing it on the CPU. (%s)"
        log.warning(words, what, str(error))
    # After the handler, whose traceback holds all that the first try had allocated.
    return work(*(tensor.cpu() if tensor is not None else None for tensor in tensors))


def is_no_room(error: BaseException) -> bool:
    """Whether an error says that a GPU is full, in the words of torch, cuBLAS or cuSOLVER."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL_CARD)


def gram_matrix(matrix: Tensor, *, column_chunk: int = 4096) -> Tensor:
    """``W Wᵀ`` in float64 of a ``(n, m)`` matrix, converting ``column_chunk`` columns at a time."""
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
    """Add ``X Xᵀ`` to the lower triangle of ``gram``, in place; leaving most of the upper one out halves the work."""
    half = len(rows) // 2
    if half < 192:
        gram.addmm_(rows, rows.T)
        return
    add_lower_gram(gram[:half, :half], rows[:half])
    add_lower_gram(gram[half:, half:], rows[half:])
    gram[half:, :half].addmm_(rows[half:], rows[:half].T)


def _gram_eigh(matrix: Tensor, k: int) -> Subspace:
    eigenvalues, vectors = torch.linalg.eigh(gram_matrix(matrix))
    return Subspace(vectors[:, :k], eigenvalues[:k].clamp_min(0).sqrt(), "gram_eigh", 0.0)


def _inverse_krylov(matrix: Tensor, k: int) -> Subspace:
    """Rayleigh-Ritz on a growing basis: a step adds ``G⁻¹ r`` for the residuals ``r = G v − σ² v`` of the best vectors.

    With an exact inverse that is the block Krylov space of ``G⁻¹``; written as a correction, a step also tells how far
    the vectors still are from their goal, whatever the condition of W.

    Raises:
        torch.linalg.LinAlgError: no factorization, or no convergence.
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
        # Orthogonal to the basis but for rounding, which the inverse of a nearly singular W would blow up.
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
        # Twice is enough (Kahan): one pass loses orthogonality where the correction lies almost inside the basis.
        newest = torch.linalg.qr(_outside(torch.linalg.qr(_outside(correction, basis)).Q, basis)).Q
    raise torch.linalg.LinAlgError(
        f"no convergence in {MAX_STEPS} steps, last correction {residual:.1e}"
    )


def _krylov(matrix: Tensor, k: int, *, largest: bool) -> Subspace:
    """Rayleigh-Ritz on the block Krylov space of ``A = M Mᵀ``, or of ``A⁻¹``, whose largest eigenvectors are wanted.

    Raises:
        torch.linalg.LinAlgError: no convergence.
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
    """The part of ``vectors (n, b)`` that is orthogonal to the orthonormal ``basis (n, p)``."""
    return vectors - basis @ (basis.T @ vectors)


class _SquareInverse:
    """``G`` and ``G⁻¹ = W⁻ᵀ W⁻¹`` of a square W by its LU factors: a third of the work of forming and factoring G."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix.double()
        self.trace = torch.linalg.vector_norm(self.matrix).square()
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(self.matrix)
        diagonal = self.lu.diagonal()
        tiny = 1e-16 * diagonal.abs().max()  # of a singular W: solutions become large, not infinite
        diagonal.copy_(torch.where(diagonal.abs() < tiny, tiny, diagonal))

    def apply(self, x: Tensor) -> Tensor:
        return self.matrix @ (self.matrix.T @ x)

    def solve(self, x: Tensor) -> Tensor:
        inner = torch.linalg.lu_solve(self.lu, self.pivots, x)
        return torch.linalg.lu_solve(self.lu, self.pivots, inner, adjoint=True)

    def shift_below(self, smallest: Tensor, spread: Tensor) -> None:
        """Nothing: a square matrix's smallest singular values are spread out enough."""


class _WideInverse:
    """``G`` and ``(G − μI)⁻¹`` of a wide W by a Cholesky factor; μ = 0 until :meth:`shift_below`."""

    def __init__(self, matrix: Tensor) -> None:
        self.gram = gram_matrix(matrix)
        self.trace = self.gram.trace()
        for lift in (0.0, 1e-15, 1e-13, 1e-11, 1e-9):  # a rank-deficient G has no factor of its own
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
        """Take the inverse about a shift a little under the smallest eigenvalue, where a wide W has many close ones.

        A shift that is not under it shows as a failed Cholesky; then one four times as far is tried.
        """
        for distance in (0.5, 2.0):
            shift = smallest - distance * spread
            if shift <= 0 or self._factorize(shift):
                return
