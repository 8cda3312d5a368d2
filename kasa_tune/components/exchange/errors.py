"""How far exported weights are from trained ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RelativeError(NamedTuple):
    """The Frobenius norm of an error, as a share of the trained weight's and of what training and edit changed in it.

    The second is infinite where nothing was changed.
    """

    of_weight: float
    of_change: float


class Errors(dict[str, RelativeError]):
    """Errors by module."""

    @property
    def worst(self) -> str:
        """The module with the largest error of its weight."""
        return max(self, key=lambda name: self[name].of_weight)


def relative_errors(exported: Tensor, trained: Tensor, base: Tensor) -> RelativeError:
    """Compare three versions of a weight, ``(d_out, d_in)`` float32 each, in place of ``exported``."""
    norm = torch.linalg.vector_norm
    error = norm(exported.sub_(trained), dtype=torch.float64).item()
    change = norm(trained - base, dtype=torch.float64).item()
    if error == 0:
        return RelativeError(0.0, 0.0)
    weight = norm(trained, dtype=torch.float64).item()
    return RelativeError(error / weight if weight else float("inf"), error / change if change else float("inf"))
