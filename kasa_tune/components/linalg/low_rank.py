"""A matrix held as two thin factors. Decompositions, linears, checkpoints and exports pass low-rank
matrices to each other in this form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix ``out @ into`` of shape ``(d_out, d_in)`` and rank at most ``k``. The full matrix
    is computed only by :meth:`dense`.

    Args:
        out: ``(d_out, k)``, the factor on the output side.
        into: ``(k, d_in)``, the factor on the input side.

    Raises:
        ValueError: the factors are not matrices, or their inner sizes differ.
    """

    out: Tensor
    into: Tensor

    def __post_init__(self) -> None:
        if self.out.ndim != 2 or self.into.ndim != 2 or self.out.shape[1] != self.into.shape[0]:
            raise ValueError(
                f"LowRank needs out (d_out, k) and into (k, d_in); got {tuple(self.out.shape)} and "
                f"{tuple(self.into.shape)}."
            )

    @property
    def rank(self) -> int:
        """Number of columns of ``out``, which is an upper bound of the matrix's rank."""
        return self.out.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of the matrix."""
        return self.out.shape[0], self.into.shape[1]

    def dense(self) -> Tensor:
        """Compute the full matrix ``(d_out, d_in)``."""
        return self.out @ self.into

    def balanced(self, tolerance: float = 0.0) -> LowRank:
        """Return the same matrix with the factors ``U √S`` and ``√S Vᵀ`` of its singular value
        decomposition, in float64.

        The factors of a difference can be large although their product is small. The factors
        returned here are as small as the product.

        Args:
            tolerance: singular values of at most this share of the largest are left out. With 0
                none is left out.
        """
        q_out, r_out = torch.linalg.qr(self.out.double())
        q_into, r_into = torch.linalg.qr(self.into.double().T)
        u, s, vt = torch.linalg.svd(r_out @ r_into.T, full_matrices=False)
        if tolerance and len(s):
            kept = int((s > tolerance * s[0]).sum())
            u, s, vt = u[:, :kept], s[:kept], vt[:kept]
        return LowRank(q_out @ (u * s.sqrt()), s.sqrt()[:, None] * vt @ q_into.T)

    def norm(self) -> float:
        """Compute the Frobenius norm of the matrix as the square root of
        ``sum(outᵀ out ∘ into intoᵀ)``, in float64.
        """
        out, into = self.out.double(), self.into.double()
        return ((out.T @ out) * (into @ into.T)).sum().clamp_min(0).sqrt().item()

    def padded(self, rank: int) -> LowRank:
        """Return the same matrix with zeros appended to its factors: ``(d_out, rank)`` and
        ``(rank, d_in)``.
        """
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return LowRank(pad(self.out, (0, more)), pad(self.into, (0, 0, 0, more)))

    def to(self, *args, **kwargs) -> LowRank:
        """Return the matrix with ``Tensor.to`` applied to both factors."""
        return LowRank(self.out.to(*args, **kwargs), self.into.to(*args, **kwargs))

    @staticmethod
    def empty(
        d_out: int,
        d_in: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LowRank:
        """Return the zero matrix ``(d_out, d_in)`` with factors of rank 0."""
        return LowRank(
            torch.zeros(d_out, 0, dtype=dtype, device=device),
            torch.zeros(0, d_in, dtype=dtype, device=device),
        )
