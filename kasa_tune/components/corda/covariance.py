"""Covariances of a layer's inputs: their sums, whether the data fill them, their damping, their extreme eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kasa_tune.components.linalg.fallback import on_cpu_if_no_room
from kasa_tune.components.linalg.solvers import add_lower_gram, mirror_lower

# Up to this width all eigenvalues cost less than a search for the first and the last.
ALL_BELOW = 1024
LANCZOS_STEPS = 60
PUBLISHED_INVERSE_ERROR = 0.05


@dataclass
class Covariance:
    """``Σ x xᵀ`` of the input that some linears share, over the tokens of a round.

    Args:
        layers: names of the linears.
        round: index of the round, or POOLED for all of them.
        matrix: ``(d, d)``, uncentred.
        num_tokens: how many x were summed.
        num_samples: of how many rows.
    """

    layers: tuple[str, ...]
    round: int
    matrix: Tensor
    num_tokens: int = 0
    num_samples: int = 0

    def add(self, x: Tensor, valid: Tensor, *, per_sample: bool) -> None:
        """Add the inputs ``x [b, s, d]`` at the tokens where ``valid [b, s]``; the lower triangle alone is summed.

        The inputs ``x [t, d]`` of an expert are valid tokens of all rows. They count as one sample.
        """
        if x.ndim == 2:
            x, valid = x[None], valid.new_ones(1, len(x))
            if not x.shape[1]:
                return
        x = x.to(self.matrix.dtype)
        if per_sample:
            x = (
                x
                / torch.stack([row[kept].max().abs() for row, kept in zip(x, valid, strict=True)])[
                    :, None, None
                ]
            )
        rows = x[valid]  # [t, d]
        self.num_tokens, self.num_samples = (
            self.num_tokens + len(rows),
            self.num_samples + len(valid),
        )
        if rows.device.type == "cpu":  # half the work; a GPU is faster at one large product
            add_lower_gram(self.matrix, rows.T)
        else:
            self.matrix.addmm_(rows.T, rows)

    def add_sum(self, other: Covariance, share: int) -> None:
        """Add another sum's matrix divided by ``share``, and its tokens."""
        self.matrix.add_(other.matrix, alpha=1 / share)
        self.num_tokens += other.num_tokens

    def finish(self, *, per_sample: bool) -> None:
        """Mirror the lower triangle, divide by the number of samples if that is wanted, look for damage.

        Raises:
            ValueError: the sums hold NaN or infinity, or there were no tokens.
        """
        if not self.num_tokens and ".experts." in self.layers[0]:
            # The router sent it nothing: its inputs are as good as unknown, none before another.
            self.matrix.fill_diagonal_(1.0)
            return
        if not self.num_tokens:
            raise ValueError(f"{self.layers[0]}: no calibration token reached it.")
        mirror_lower(self.matrix)
        if per_sample:
            self.matrix /= self.num_samples
        if not self.matrix.diagonal().any():
            raise ValueError(
                f"{self.layers[0]}: every calibration input is zero; the checkpoint is damaged."
            )
        if not self.matrix.sum().isfinite():
            raise ValueError(
                f"{self.layers[0]}: its inputs hold NaN or infinity in calibration round {self.round + 1}. The "
                "checkpoint is damaged, or dtype overflows: try dtype=fp32."
            )


def shortage(covariance: Covariance) -> str | None:
    """What is wrong with a covariance that its data do not fill, in words; None when it has full rank.

    The rank is judged at 1e-7 of the mean diagonal, which is what float32 sums can tell from zero.
    """
    width = len(covariance.matrix)
    if covariance.num_tokens < width:
        return f"{covariance.num_tokens:,} tokens for {width:,} inputs"

    def work(matrix: Tensor) -> int:
        scaled = matrix / matrix.diagonal().mean()
        scaled.diagonal().sub_(1e-7)
        return torch.linalg.cholesky_ex(scaled).info.item()

    what = f"the rank of a covariance of {width} inputs"
    first = on_cpu_if_no_room(work, covariance.matrix, what=what)
    return (
        f"inputs of deficient rank: number {first:,} of {width:,} follows from those before it"
        if first
        else None
    )


@torch.no_grad()
def damped(
    covariance: Tensor, damping: float = 0.01, *, normalize: bool = True, search: bool = False
) -> Tensor:
    """``C + λ · mean(diag C) · I``: positive definite, so that the decomposition orders what no input excited.

    Args:
        covariance: ``C (d, d)``, symmetric and not negative.
        damping: ``λ``.
        normalize: divide C by its mean diagonal first; U does not depend on the scale of C, but π and the ``paper``
            split do.
        search: as the published code, double λ until ``‖C_ C_⁻¹ - I‖_F < 0.05`` in float32.

    Returns:
        A new matrix, on the device of C, or on the CPU where that has no room for it.

    Raises:
        ValueError: the mean diagonal is zero: no input was other than zero.
    """
    mean = covariance.diagonal().mean(dtype=torch.float64).item()
    if not mean > 0:
        raise ValueError("The covariance of the inputs is zero: every input was zero.")
    unit = 1.0 if normalize else mean

    def work(covariance: Tensor) -> Tensor:
        scaled = covariance / mean if normalize else covariance.clone()
        lift = _searched(scaled, damping, unit) if search else damping
        scaled.diagonal().add_(lift * unit)
        return scaled

    return on_cpu_if_no_room(work, covariance, what=f"damping {len(covariance)} inputs")


def _searched(covariance: Tensor, damping: float, unit: float) -> float:
    damping = damping or 1e-12  # zero cannot be doubled
    while True:
        lifted = covariance.to(torch.float32, copy=True)
        lifted.diagonal().add_(damping * unit)
        inverse, info = torch.linalg.inv_ex(lifted)
        if info == 0:
            error = lifted @ inverse
            error.diagonal().sub_(1)
            if torch.linalg.matrix_norm(error) < PUBLISHED_INVERSE_ERROR:
                return damping
            del error
        del inverse  # before there is another
        damping *= 2


@torch.no_grad()
def extreme_eigenvalues(covariance: Tensor) -> tuple[float, float]:
    """The smallest and the largest eigenvalue of a positive definite ``(d, d)`` matrix, to some 1e-3.

    Narrow ones by all eigenvalues, wide ones by Lanczos, for the smallest on the inverse through a Cholesky factor.

    Raises:
        ValueError: the matrix is not positive definite.
    """
    return on_cpu_if_no_room(
        _extreme_eigenvalues, covariance, what=f"eigenvalues of {len(covariance)} x as many"
    )


def _extreme_eigenvalues(covariance: Tensor) -> tuple[float, float]:
    matrix = covariance.double()
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info != 0:
        raise ValueError(
            "The damped covariance is not positive definite; raise adapter.damping (0.01 by default)."
        )
    if len(matrix) <= ALL_BELOW:
        eigenvalues = torch.linalg.eigvalsh(matrix)
        return eigenvalues[0].item(), eigenvalues[-1].item()
    largest = _lanczos(lambda x: matrix @ x, len(matrix), matrix.device)
    return 1 / _lanczos(
        lambda x: torch.cholesky_solve(x, factor), len(matrix), matrix.device
    ), largest


def covariance_workspace(width: int, itemsize: int, *, search: bool, spectra: bool) -> int:
    """Bytes that the functions of this file take beside the covariance they are given and the damped one.

    Args:
        width: of the covariance.
        itemsize: bytes of one of its entries.
        search: of :func:`damped`: in float32 the lifted matrix, its factors or product, and its inverse.
        spectra: :func:`extreme_eigenvalues` is asked for: in float64 the matrix, its factor, and Lanczos' vectors.
    """
    rank = 2 * itemsize * width * width  # of `shortage`: the scaled matrix and its factor
    searched = 3 * 4 * width * width if search else 0
    eigenvalues = 8 * (2 * width + 4 * LANCZOS_STEPS) * width if spectra else 0
    return max(rank, searched, eigenvalues)


def _lanczos(apply: Callable[[Tensor], Tensor], size: int, device: torch.device) -> float:
    """The largest eigenvalue of a symmetric operator, with full orthogonalization of the few vectors."""
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(size, 1, generator=generator, dtype=torch.float64).to(device)

    basis = images = torch.zeros(size, 0, dtype=torch.float64, device=device)
    newest = random()
    for _ in range(min(LANCZOS_STEPS, size)):
        length = torch.linalg.vector_norm(newest)
        newest = newest - basis @ (basis.T @ newest)
        if torch.linalg.vector_norm(newest) <= 1e-10 * length:
            newest = random()  # the basis holds all that the operator makes of the start
        for _ in range(2):  # once loses orthogonality, twice is enough (Kahan)
            newest = newest - basis @ (basis.T @ newest)
        newest = newest / torch.linalg.vector_norm(newest)
        basis, images = torch.cat((basis, newest), dim=1), torch.cat((images, apply(newest)), dim=1)
        newest = images[:, -1:]
    return torch.linalg.eigvalsh(basis.T @ images)[-1].item()
