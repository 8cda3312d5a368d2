"""Architectures of decoders as data, and how they are read from a checkpoint's config.json.

Nothing here needs torch, so that a config can be checked in no time.
"""

from kasa_tune.architectures.architecture import (
    ATTENTION,
    MLP,
    Architecture,
    Difference,
    Experts,
    Layer,
    Rotary,
    Vision,
    differences,
)
from kasa_tune.architectures.names import Part, parts_of
from kasa_tune.architectures.reading import (
    FAMILIES,
    UnsupportedArchitectureError,
    architecture_of,
    read_architecture,
    unknown_keys,
)

__all__ = [
    "ATTENTION",
    "FAMILIES",
    "MLP",
    "Architecture",
    "Difference",
    "Experts",
    "Layer",
    "Part",
    "Rotary",
    "UnsupportedArchitectureError",
    "Vision",
    "architecture_of",
    "differences",
    "parts_of",
    "read_architecture",
    "unknown_keys",
]
