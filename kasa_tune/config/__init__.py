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
from kasa_tune.config.loading import (
    instantiate,
    load,
    override_unchecked,
    parse,
    read_unchecked,
    validate_file,
)
from kasa_tune.config.schemas import (
    COMPARE,
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
    "COMPARE",
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
    "override_unchecked",
    "parse",
    "read_unchecked",
    "validate_file",
]
