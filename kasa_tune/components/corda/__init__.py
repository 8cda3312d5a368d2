"""Calibration, covariances, ranks and decompositions of CorDA and CorDA++, and their cache."""

from kasa_tune.components.corda.all_layers import decompose
from kasa_tune.components.corda.allocation import LayerSpectrum, allocate_ranks
from kasa_tune.components.corda.cache import (
    DecompositionCache,
    decomposition_key,
    open_cache,
    write_decomposition,
)
from kasa_tune.components.corda.calibration import (
    Wanted,
    add_up,
    calibration_bytes,
    damped_covariances,
    shared_inputs,
)
from kasa_tune.components.corda.calibration_data import batched, draw_rounds, rows_digest
from kasa_tune.components.corda.calibrator import Calibrator
from kasa_tune.components.corda.text_calibrator import TextCalibrator

__all__ = [
    "Calibrator",
    "DecompositionCache",
    "LayerSpectrum",
    "TextCalibrator",
    "Wanted",
    "add_up",
    "allocate_ranks",
    "batched",
    "calibration_bytes",
    "damped_covariances",
    "decompose",
    "decomposition_key",
    "draw_rounds",
    "open_cache",
    "rows_digest",
    "shared_inputs",
    "write_decomposition",
]
