"""How far exported weights are from trained ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Deviation(NamedTuple):
    """The Frobenius norm of an error, as a share of the trained weight's and of its update's (edit included).

    A share of zero is infinite, unless there is no error.
    """

    of_weight: float
    of_update: float


class Deviations(dict[str, Deviation]):
    """Deviations by module."""

    @property
    def worst(self) -> str:
        """The module with the largest error of its weight."""
        return max(self, key=lambda name: self[name].of_weight)


def deviation(exported: Tensor, trained: Tensor, update: float) -> Deviation:
    """Compare two versions of a weight, in place of the first.

    Args:
        exported: ``(d_out, d_in)`` float32.
        trained: likewise.
        update: norm of what was added to the base's weight.
    """
    error = torch.linalg.vector_norm(exported.sub_(trained)).item()
    weight = torch.linalg.vector_norm(trained).item()
    return Deviation(
        *(
            0.0 if error == 0 else error / norm if norm else float("inf")
            for norm in (weight, update)
        )
    )
