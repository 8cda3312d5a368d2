"""Architectures of decoders as data, and how they are read from a checkpoint's config.json.

Nothing here needs torch, so that a config can be checked in no time.
"""

from kasa_tune.architectures.architecture import (
    ATTENTION,
    MLP,
    Architecture,
    Difference,
    Dropouts,
    Experts,
    Layer,
    Rotary,
    Vision,
    differences,
)
from kasa_tune.architectures.names import Part, is_transposed, parts_of, usual_name
from kasa_tune.architectures.reading import (
    FAMILIES,
    UnsupportedArchitectureError,
    architecture_of,
    read_architecture,
    read_dropouts,
    unknown_keys,
)

__all__ = [
    "ATTENTION",
    "FAMILIES",
    "MLP",
    "Architecture",
    "Difference",
    "Dropouts",
    "Experts",
    "Layer",
    "Part",
    "Rotary",
    "UnsupportedArchitectureError",
    "Vision",
    "architecture_of",
    "differences",
    "is_transposed",
    "parts_of",
    "read_architecture",
    "read_dropouts",
    "unknown_keys",
    "usual_name",
]
