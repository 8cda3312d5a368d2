"""The one currency between decomposition, linears, checkpoints and export: a matrix held as two thin factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix ``out @ into`` of shape ``(d_out, d_in)`` and rank at most ``k``, never formed unless asked for.

    Args:
        out: ``(d_out, k)``, the factor on the output side.
        into: ``(k, d_in)``, the factor on the input side.

    Raises:
        ValueError: the factors are not matrices or their inner sizes differ.
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
        """Number of columns of ``out``: an upper bound of the matrix's rank."""
        return self.out.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` of the matrix."""
        return self.out.shape[0], self.into.shape[1]

    def dense(self) -> Tensor:
        """The full matrix ``(d_out, d_in)``."""
        return self.out @ self.into

    def balanced(self, tolerance: float = 0.0) -> LowRank:
        """The same matrix as ``U √S`` and ``√S Vᵀ`` of its singular value decomposition, in float64.

        Factors whose products cancel, such as those of a difference, become factors as small as what is left.

        Args:
            tolerance: singular values of at most this share of the largest are left out; 0 leaves out none.
        """
        q_out, r_out = torch.linalg.qr(self.out.double())
        q_into, r_into = torch.linalg.qr(self.into.double().T)
        u, s, vt = torch.linalg.svd(r_out @ r_into.T, full_matrices=False)
        if tolerance and len(s):
            kept = int((s > tolerance * s[0]).sum())
            u, s, vt = u[:, :kept], s[:kept], vt[:kept]
        return LowRank(q_out @ (u * s.sqrt()), s.sqrt()[:, None] * vt @ q_into.T)

    def norm(self) -> float:
        """Frobenius norm of the matrix, from the factors' Gram matrices in float64: ``sum(outᵀ out ∘ into intoᵀ)``."""
        out, into = self.out.double(), self.into.double()
        return ((out.T @ out) * (into @ into.T)).sum().clamp_min(0).sqrt().item()

    def padded(self, rank: int) -> LowRank:
        """The same matrix with zeros appended to its factors up to ``rank``."""
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return LowRank(pad(self.out, (0, more)), pad(self.into, (0, 0, 0, more)))

    def to(self, *args, **kwargs) -> LowRank:
        """Both factors after ``Tensor.to``."""
        return LowRank(self.out.to(*args, **kwargs), self.into.to(*args, **kwargs))

    @staticmethod
    def empty(
        d_out: int,
        d_in: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LowRank:
        """The zero matrix, held as factors of rank 0."""
        return LowRank(
            torch.zeros(d_out, 0, dtype=dtype, device=device),
            torch.zeros(0, d_in, dtype=dtype, device=device),
        )
