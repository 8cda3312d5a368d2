"""Plots of a finished or running fine-tuning run."""

from kasa_tune.components.reports.plots import (
    DrawnSpectrum,
    layer_ranks,
    loss_curve,
    singular_values,
)

__all__ = [
    "DrawnSpectrum",
    "layer_ranks",
    "loss_curve",
    "singular_values",
]
