"""Singular subspaces, each by the cheapest way that is accurate for its shape.

Everything runs in float64: the smallest singular values of a trained weight are 1e-3 to 1e-5 of the largest, and squaring
them into a float32 Gram matrix would leave no correct digit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Below this size a full eigendecomposition of the Gram matrix costs less than building a Krylov space.
EXACT_BELOW = 640
# The Krylov search stops when its slowest wanted direction has this residual relative to the largest eigenvalue's scale.
RESIDUAL_TOLERANCE = 1e-7
MAX_BASIS_BLOCKS = 24


@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis of a singular subspace and how it was found.

    Args:
        vectors: ``(n, k)`` float64, orthonormal columns, ascending singular value.
        singular_values: ``(k,)`` float64.
        solver: the name of the method that produced them.
        residual: largest ``‖G v − σ² v‖ / ‖G‖`` over the columns, 0 for the exact method.
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
        solver: ``auto`` chooses by shape; ``gram_eigh`` (all n eigenvectors of the Gram matrix, exact) or ``inverse_krylov``
            (block Krylov space of the inverse Gram matrix, for ``k`` much smaller than ``n``).

    Returns:
        The subspace in float64 on the matrix's device.

    Raises:
        ValueError: ``n > m``, ``k`` outside ``1..n`` or an unknown solver.

    Out of memory on CUDA and a solver that does not converge are answered by the exact method on the CPU, with a log line.
    """
    n, m = matrix.shape
    if n > m or not 1 <= k <= n:
        raise ValueError(
            f"smallest_singular_subspace needs n <= m and 1 <= k <= n; got a {n} x {m} matrix and k = {k}."
        )
    if solver not in ("auto", "gram_eigh", "inverse_krylov"):
        raise ValueError(f"Unknown solver {solver!r}: use auto, gram_eigh or inverse_krylov.")
    if solver == "auto":
        solver = "gram_eigh" if n < EXACT_BELOW or k * 16 > n else "inverse_krylov"
    try:
        gram = gram_matrix(matrix)
        found = _inverse_krylov(gram, k) if solver == "inverse_krylov" else _gram_eigh(gram, k)
    except (torch.cuda.OutOfMemoryError, torch.linalg.LinAlgError) as error:
        log.warning("%s failed on %s (%s); using the exact method on the CPU.", solver, matrix.device, error)
        found = None
    if found is None:
        found = _gram_eigh(gram_matrix(matrix.cpu()), k)
    return Subspace(
        found.vectors.to(matrix.device), found.singular_values.to(matrix.device), found.solver, found.residual
    )


def gram_matrix(matrix: Tensor, *, column_chunk: int = 4096) -> Tensor:
    """``W Wᵀ`` in float64 of a ``(n, m)`` matrix, converting ``column_chunk`` columns at a time."""
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(column_chunk, dim=1):
        columns = columns.double()
        gram.addmm_(columns, columns.T)
    return gram


def _gram_eigh(gram: Tensor, k: int) -> Subspace:
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return Subspace(vectors[:, :k], eigenvalues[:k].clamp_min(0).sqrt(), "gram_eigh", 0.0)


def _inverse_krylov(gram: Tensor, k: int) -> Subspace | None:
    """Rayleigh-Ritz on span{X, G⁻¹X, G⁻²X, …}; None when the residual is still too large with the largest basis.

    After the first blocks the inverse is taken about a shift just below the smallest Ritz value, which spreads the crowded
    lower edge of a rectangular matrix's spectrum; a shift that overshoots shows as a failed Cholesky and is halved away.
    """
    n, block = gram.shape[0], k + 8
    scale = torch.linalg.vector_norm(gram.diagonal(), ord=float("inf"))
    factor = _shifted_cholesky(gram, -1e-14 * scale)
    generator = torch.Generator().manual_seed(0)
    newest = torch.randn(n, block, generator=generator, dtype=torch.float64).to(gram.device)
    basis = torch.empty(n, 0, dtype=torch.float64, device=gram.device)
    for step in range(1, MAX_BASIS_BLOCKS + 1):
        newest = torch.cholesky_solve(newest, factor)
        for _ in range(2):  # twice is enough (Kahan): one pass loses orthogonality against a nearly converged basis
            newest = torch.linalg.qr(newest - basis @ (basis.T @ newest)).Q
        basis = torch.cat((basis, newest), dim=1)
        if step % 3:
            continue
        projected = gram @ basis
        ritz, rotation = torch.linalg.eigh(basis.T @ projected)
        vectors = basis @ rotation[:, :k]
        residual = torch.linalg.vector_norm(projected @ rotation[:, :k] - vectors * ritz[:k], dim=0).max() / scale
        if (
            residual < RESIDUAL_TOLERANCE * ritz[:k].clamp_min(0).sqrt().mean() / scale.sqrt()
            or step == MAX_BASIS_BLOCKS
        ):
            break
        if step == 3 and ritz[0] > 0:
            shift = _shift_below(gram, ritz, k)
            if shift is not None:
                factor, newest, basis = shift, basis @ rotation[:, :block], basis[:, :0]
    if residual > 1e-6:
        return None
    return Subspace(vectors, ritz[:k].clamp_min(0).sqrt(), "inverse_krylov", float(residual))


def _shift_below(gram: Tensor, ritz: Tensor, k: int) -> Tensor | None:
    """Cholesky factor of ``G − μI`` with μ a little under the smallest Ritz value, or None if no such shift is positive."""
    spread = ritz[k - 1] - ritz[0]
    for distance in (0.5, 2.0, 8.0):
        shift = ritz[0] - distance * spread
        if shift <= 0:
            return None
        factor, info = torch.linalg.cholesky_ex(
            gram - shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )
        if info == 0:
            return factor
    return None


def _shifted_cholesky(gram: Tensor, shift: Tensor) -> Tensor:
    """Cholesky factor of ``G − shift·I``; a singular matrix is lifted by ten times more until it has one."""
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(8):
        factor, info = torch.linalg.cholesky_ex(gram - shift * identity)
        if info == 0:
            return factor
        shift = shift * 10
    raise torch.linalg.LinAlgError("the Gram matrix has no Cholesky factor even after lifting its diagonal")
