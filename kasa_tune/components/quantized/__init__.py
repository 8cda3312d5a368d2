"""Frozen weights in NF4: which linears are quantized, how their adapters are initialized, and how
the weights are stored on disk.
"""

from kasa_tune.components.quantized.base import (
    FOLDER,
    base_bytes,
    keep_quantized,
    load_quantized,
    quantized_linears,
    read_quantized,
)
from kasa_tune.components.quantized.start import QuantizedStart, quantized_start

__all__ = [
    "FOLDER",
    "QuantizedStart",
    "base_bytes",
    "keep_quantized",
    "load_quantized",
    "quantized_linears",
    "quantized_start",
    "read_quantized",
]
