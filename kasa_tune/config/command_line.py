"""The command line of a recipe: `--config NAME_OR_PATH key=value ... ~key ...`, and its `--help`."""

import os
import sys
from collections.abc import Iterator

from kasa_tune.config.entries import (
    REQUIRED,
    Component,
    ConfigError,
    Ignored,
    Key,
    OneOrMany,
    Problem,
    Schema,
    Section,
)

_USAGE = "usage: {program} --config NAME_OR_PATH [key=value ...] [~key ...]\n\nKeys:"


def help_lines(schema: Schema) -> Iterator[str]:
    """How a recipe is called, and its keys."""
    yield _USAGE.format(program=os.path.basename(sys.argv[0]))
    yield from _help(schema)


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """The config's name and the overrides."""
    name, overrides, rest = None, [], iter(arguments)
    problems = []
    for argument in rest:
        if argument == "--config":
            name = next(rest, None)
        elif argument.startswith("--config="):
            name = argument.partition("=")[2]
        elif argument.startswith("-"):
            problems.append(
                Problem(
                    argument,
                    "unknown option; --config NAME_OR_PATH is the only one, keys are set with key=value",
                )
            )
        else:
            overrides.append(argument)
    if not name:
        problems.append(
            Problem(
                "--config",
                "missing; give the name of a config (`kasa-tune ls` lists them) or the path of a YAML file",
            )
        )
    if problems or not name:
        raise ConfigError("command line", problems)
    return name, overrides


def _help(schema: Schema, indent: str = "  ") -> Iterator[str]:
    """A line for each key: what it takes, the default, what it is for."""
    for name, spec in schema.items():
        if isinstance(spec, Ignored):
            continue
        if isinstance(spec, Section):
            yield f"{indent}{name}: {spec.help}"
            yield from _help(spec.keys, indent + "  ")
            continue
        kinds = {Component: "a component", OneOrMany: "a component or a list of them"}
        kind = spec.allowed if isinstance(spec, Key) else kinds[type(spec)]
        default = (
            spec.default.get("_component_") if isinstance(spec.default, dict) else spec.default
        )
        shown = (
            "required"
            if default is REQUIRED
            else f"default {'null' if default is None else default}"
        )
        yield f"{indent}{name}: {kind} ({shown})" + (f"; {spec.help}" if spec.help else "")
