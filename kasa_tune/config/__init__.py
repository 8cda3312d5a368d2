"""Strict configs: reading YAML, applying overrides, and every check that can be made before a model loads."""

from kasa_tune.config.entries import (
    REQUIRED,
    Check,
    Component,
    ConfigError,
    Key,
    OneOrMany,
    Section,
    above,
    at_least,
)
from kasa_tune.config.loading import instantiate, load, parse, validate_file
from kasa_tune.config.schemas import (
    CLASSIFY,
    CORDA,
    EVALUATE,
    EXPORT,
    FINETUNE,
    GENERATE,
    IMPORT,
    QCORDA,
    REPORT,
)

__all__ = [
    "CLASSIFY",
    "CORDA",
    "EVALUATE",
    "EXPORT",
    "FINETUNE",
    "GENERATE",
    "IMPORT",
    "QCORDA",
    "REPORT",
    "REQUIRED",
    "Check",
    "Component",
    "ConfigError",
    "Key",
    "OneOrMany",
    "Section",
    "above",
    "at_least",
    "instantiate",
    "load",
    "parse",
    "validate_file",
]
