"""Strict loading of configs: YAML, overrides from the command line, defaults, and every check that can be made before a model loads.

    @config.parse(config.FINETUNE)
    def recipe_main(cfg: DictConfig) -> int: ...

All problems are reported at once, each with its key, the value given, what is allowed and the nearest name.
"""

import copy
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kasa_tune import registry, rules
from kasa_tune.schema import (
    FINETUNE,
    GENERATE,
    REQUIRED,
    SCHEMAS,
    Check,
    Component,
    ConfigError,
    Key,
    OneOrMany,
    Problem,
    Schema,
    Section,
    above,
    at_least,
    show,
)
from kasa_tune.validation import Checker

__all__ = ["FINETUNE", "GENERATE", "REQUIRED", "Check", "Component", "ConfigError", "Key", "OneOrMany", "Section"]
__all__ += ["above", "at_least", "instantiate", "load", "parse", "validate_file"]

Recipe = Callable[[DictConfig], Any]
_USAGE = "usage: {program} --config NAME_OR_PATH [key=value ...] [~key ...]\n\nKeys:"


def parse(schema: Schema) -> Callable[[Recipe], Callable[[], Any]]:
    """Decorator of a recipe's main function: called without arguments, it reads `--config NAME_OR_PATH key=value ~key` from sys.argv.

    The function gets the checked config, with interpolations resolved and defaults filled in, and its result is returned. A config
    error is printed to stderr (by rank 0 alone) and ends the process with status 2.
    """
    if not isinstance(schema, Mapping):
        raise TypeError("config.parse takes the recipe's schema: write @config.parse(config.FINETUNE)")

    def decorate(recipe_main: Recipe) -> Callable[[], Any]:
        @functools.wraps(recipe_main)
        def main() -> Any:
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(_USAGE.format(program=os.path.basename(sys.argv[0])), *_help(schema), sep="\n")
                return 0
            try:
                name, overrides = _command_line(sys.argv[1:])
                cfg = load(name, overrides, schema, about_to_run=True)
            except ConfigError as error:
                if os.environ.get("RANK", "0") == "0":
                    print(error, file=sys.stderr)
                sys.exit(2)
            return recipe_main(cfg)

        return main

    return decorate


def validate_file(
    path: str | Path, overrides: Iterable[str] = (), schema: Schema | None = None, *, check_files: bool = True
) -> None:
    """Check the config at `path` (or of that name) without importing torch. `schema` follows from the file's name when not given.

    `check_files=False` leaves out files and folders, for a config whose model is not on this machine.

    Raises:
        ConfigError: with all problems.
    """
    load(path, overrides, schema, check_files=check_files)


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    schema: Schema | None = None,
    *,
    check_files: bool = True,
    about_to_run: bool = False,
) -> DictConfig:
    """The checked config at `path` (or of that name), overrides applied, interpolations resolved, defaults filled in.

    `about_to_run` allows what needs torch: components that only an import can tell about, and whether the device is there.

    Raises:
        ConfigError: with all problems.
    """
    try:
        file = registry.find_config(path)
    except LookupError as error:
        raise ConfigError("--config", [Problem("", str(error.args[0]))]) from None
    except OSError as error:
        raise ConfigError("--config", [Problem("", str(error))]) from None
    if schema is None:
        schema = next(schema for suffix, schema in SCHEMAS.items() if file.stem.endswith(suffix))
    tree, problems = _read(file), []
    for override in overrides:
        try:
            _override(tree, override, schema)
        except ValueError as error:
            problems.append(Problem(override, str(error)))
    check = Checker(problems, may_import=about_to_run)
    tree = check.resolve(_create(file, _fill(tree, schema)))
    good = check.mapping(tree, schema)
    applied = [rules.KEY_RULES, rules.FILE_RULES * check_files, rules.MACHINE_RULES * about_to_run]
    for rule in sum(applied, ()):
        problems += rule(good)
    if problems:
        raise ConfigError(str(file), problems)
    return OmegaConf.create(_each_string(good, lambda text: text.replace("${", "\\${")))


def instantiate(node: DictConfig | None, *args: Any, **kwargs: Any) -> Any:
    """Torchtune's `config.instantiate`: the object that a node with a `_component_` describes; None for None."""
    from torchtune.config import instantiate

    return instantiate(node, *args, **kwargs)


# --- reading ------------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and truth values of YAML 1.2, None for null, and no key twice.

    PyYAML's 1.1 reads 2e-4 as a string, `no` as False, 010 as eight and 1:30 as ninety.
    """

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_TAG = "tag:yaml.org,2002:"
_KEY_TAGS = (f"{_TAG}str", f"{_TAG}int", f"{_TAG}merge")
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+|[-+]?([0-9]+\.[0-9]*|\.[0-9]+)|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), list(_first))


def _read(file: Path) -> dict[str, Any]:
    """The YAML mapping in `file`."""
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(str(file), [Problem("", f"not valid YAML, {where}{error.problem}")]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), [Problem("", f"not valid YAML: {error}")]) from None
    except OSError as error:
        raise ConfigError(str(file), [Problem("", f"cannot be read: {error.strerror}")]) from None
    if tree is None:
        raise ConfigError(str(file), [Problem("", "the file is empty")])
    if not isinstance(tree, dict):
        raise ConfigError(
            str(file), [Problem("", f"expected a mapping of keys to values, the file holds {show(tree)}")]
        )
    return tree


def _command_line(arguments: list[str]) -> tuple[str, list[str]]:
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
                Problem(argument, "unknown option; --config NAME_OR_PATH is the only one, keys are set with key=value")
            )
        else:
            overrides.append(argument)
    if not name:
        problems.append(
            Problem(
                "--config", "missing; give the name of a config (`kasa-tune ls` lists them) or the path of a YAML file"
            )
        )
    if problems:
        raise ConfigError("command line", problems)
    return name, overrides


def _override(tree: dict[str, Any], override: str, schema: Schema) -> None:
    """Apply `a.b=value`, `a.0.b=value` or `~a.b` to `tree`; ValueError saying what is wrong with it."""
    remove = override.startswith("~")
    path, equals, text = override.removeprefix("~").partition("=")
    if not path or not (remove or equals):
        raise ValueError("expected key=value to set a key, or ~key to remove one")
    if not (remove or text):
        raise ValueError("no value given; write null for none, '' for an empty string")
    *parents, last = path.split(".")
    node: Any = tree
    for depth, name in enumerate(parents):
        node = _child(node, name, path.split(".")[:depth], create=not remove)
    last = _index(node, last, parents)
    present = last < len(node) if isinstance(node, list) else last in node
    if not present and (remove or isinstance(node, list)):
        raise ValueError(f"there is no {path}. {registry.did_you_mean(str(last), map(str, node))}".strip())
    if remove:
        del node[last]
        return
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"the value is not valid YAML ({getattr(error, 'problem', error)}); quote it") from None
    old = node[last] if present else None
    is_component = (isinstance(old, dict) and "_component_" in old) or (
        not parents and isinstance(schema.get(last), (Component, OneOrMany)) and not isinstance(old, list)
    )
    if is_component and isinstance(value, str):
        value = (old or {}) | {"_component_": value}
    node[last] = value


def _child(node: Any, name: str, above: list[str], *, create: bool) -> Any:
    """The mapping or list under `name`; an absent or null one is created."""
    key = _index(node, name, above)
    if isinstance(node, dict) and node.get(key) is None and create:
        node[key] = {}
    if key not in (range(len(node)) if isinstance(node, list) else node):
        raise ValueError(
            f"there is no {'.'.join([*above, name])}. {registry.did_you_mean(name, map(str, node))}".strip()
        )
    if not isinstance(node[key], (dict, list)):
        raise ValueError(f"{'.'.join([*above, name])} is {show(node[key])}, which has no keys")
    return node[key]


def _index(node: Any, name: str, above: list[str]) -> Any:
    if isinstance(node, list) and not name.isdigit():
        raise ValueError(
            f"{'.'.join(above)} is a list; name one of its entries, 0 to {len(node) - 1}, as in {'.'.join([*above, '0'])}"
        )
    return int(name) if isinstance(node, list) else name


def _fill(tree: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """`tree` in the order of the schema, with defaults for what is absent; unknown keys stay, last."""
    filled = {}
    for name, spec in schema.items():
        given = tree.get(name)
        if isinstance(spec, Section):
            given = {} if given is None else given
            filled[name] = _fill(given, spec.keys) if isinstance(given, dict) else given
        elif name not in tree:
            if spec.default is not REQUIRED:
                filled[name] = copy.deepcopy(spec.default)
        elif isinstance(given, dict) and "_component_" not in given and isinstance(spec.default, dict):
            filled[name] = spec.default | given
        else:
            filled[name] = given
    return filled | {name: value for name, value in tree.items() if name not in schema}


def _create(file: Path, tree: dict[str, Any]) -> DictConfig:
    try:
        return OmegaConf.create(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(
            str(file), [Problem(str(error.full_key or error.key or ""), str(error.msg or error).split("\n")[0])]
        ) from None


def _each_string(tree: Any, change: Callable[[str], str]) -> Any:
    if isinstance(tree, dict):
        return {key: _each_string(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_each_string(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree


def _help(schema: Schema, indent: str = "  ") -> Iterator[str]:
    for name, spec in schema.items():
        kind = (
            spec.allowed
            if isinstance(spec, Key)
            else {Component: "a component", OneOrMany: "one component or a list"}.get(type(spec), "")
        )
        default = getattr(spec, "default", {})
        shown = "required" if default is REQUIRED else f"default {'null' if default is None else default}"
        yield f"{indent}{name}: {kind} ({shown})" + (f"; {spec.help}" if spec.help else "")
        if isinstance(spec, Section):
            yield from _help(spec.keys, indent + "  ")
