"""Numerical linear algebra on plain tensors: low-rank matrices, singular subspaces, decompositions
of weights, and NF4 quantization.
"""

from kasa_tune.components.linalg.decomposition import (
    Component,
    check_finite,
    co_svd,
    smallest_triplets,
    split_component,
)
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize, is_quantized, quantize
from kasa_tune.components.linalg.solvers import (
    extreme_singular_subspace,
    smallest_singular_subspace,
)

__all__ = [
    "Component",
    "LowRank",
    "check_finite",
    "co_svd",
    "dequantize",
    "extreme_singular_subspace",
    "is_quantized",
    "quantize",
    "smallest_singular_subspace",
    "smallest_triplets",
    "split_component",
]
