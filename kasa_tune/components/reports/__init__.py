"""The page of a run, or of several side by side, and its plots."""

from kasa_tune.components.reports.measuring import (
    about_run,
    diagonals_of,
    layer_inputs,
    ranks_of,
    words_of,
)
from kasa_tune.components.reports.plots import (
    DrawnSpectrum,
    layer_ranks,
    loss_curve,
    singular_values,
)
from kasa_tune.components.reports.run_files import ReportedRun, read_folder
from kasa_tune.components.reports.sections import run_page

__all__ = [
    "DrawnSpectrum",
    "ReportedRun",
    "about_run",
    "diagonals_of",
    "layer_inputs",
    "layer_ranks",
    "loss_curve",
    "ranks_of",
    "read_folder",
    "run_page",
    "singular_values",
    "words_of",
]
