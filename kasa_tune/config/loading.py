"""Strict configs: YAML, overrides, defaults, and every check that can be made before a model loads.

    @config.parse(config.FINETUNE)
    def recipe_main(cfg: DictConfig) -> int: ...

All problems are reported at once, each with its key, the value given, what is allowed and the nearest name.
"""

import copy
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kasa_tune import registry
from kasa_tune.config import data_kinds, folders, reading, rules, rules_of_files, sizes
from kasa_tune.config.checker import Checker
from kasa_tune.config.command_line import help_lines, split_arguments
from kasa_tune.config.entries import (
    REQUIRED,
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
)
from kasa_tune.config.recipe_schemas import of_another_recipe
from kasa_tune.config.references import check_references
from kasa_tune.config.rules_of_architecture import OF_ARCHITECTURE
from kasa_tune.config.schemas import (
    CLASSIFY,
    COMPARE,
    CORDA,
    EVALUATE,
    EXPORT,
    FINETUNE,
    GENERATE,
    IMPORT,
    JUDGE,
    QCORDA,
    REPORT,
    SYNTHESIZE,
    schema_of,
)
from kasa_tune.errors import INTERRUPTED, STATUS_INTERRUPTED, is_expected, sentence

__all__ = [
    "CLASSIFY",
    "COMPARE",
    "CORDA",
    "EVALUATE",
    "EXPORT",
    "FINETUNE",
    "GENERATE",
    "IMPORT",
    "JUDGE",
    "QCORDA",
    "REPORT",
    "REQUIRED",
    "SYNTHESIZE",
    "Check",
    "Component",
]
__all__ += [
    "ConfigError",
    "Key",
    "OneOrMany",
    "Section",
    "above",
    "at_least",
    "instantiate",
    "load",
    "parse",
]
__all__ += ["validate_file"]

Recipe = Callable[[DictConfig], Any]


def parse(schema: Schema | None) -> Callable[[Recipe], Callable[[], Any]]:
    """Decorator of a recipe's main function, which is then called without arguments and reads the command line.

    The command line is `--config NAME_OR_PATH key=value ... ~key ...`. The function gets the checked config, overrides
    applied, interpolations resolved and defaults filled in, and its result is returned. A config error is printed to
    stderr (by rank 0 alone) and ends the process with status 2. Without a schema (None) any recipe's config is taken.
    """
    if not isinstance(schema, Mapping | None):
        raise TypeError(
            "config.parse takes the recipe's schema: write @config.parse(config.FINETUNE)"
        )

    def decorate(recipe_main: Recipe) -> Callable[[], Any]:
        @functools.wraps(recipe_main)
        def main() -> Any:
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(*help_lines(schema or FINETUNE), sep="\n")
                return 0
            try:
                return recipe_main(_given_config(schema))
            except KeyboardInterrupt:
                if os.environ.get("KASA_TUNE_TRACEBACK"):
                    raise
                if os.environ.get("RANK", "0") == "0":
                    print(INTERRUPTED, file=sys.stderr)
                sys.exit(STATUS_INTERRUPTED)
            except Exception as error:
                if not is_expected(error):
                    raise
                if os.environ.get("KASA_TUNE_TRACEBACK"):
                    raise
                print(
                    f"{sentence(error)}\n(KASA_TUNE_TRACEBACK=1 shows where.)",
                    file=sys.stderr,
                )
                sys.exit(1)

        return main

    return decorate


def validate_file(
    path: str | Path,
    overrides: Sequence[str] = (),
    schema: Schema | None = None,
    *,
    check_files: bool = True,
) -> None:
    """Check the config at `path` without importing torch; arguments as those of `load`.

    Raises:
        ConfigError: with all problems.
    """
    load(path, overrides, schema, check_files=check_files)


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    schema: Schema | None = None,
    *,
    check_files: bool = True,
    about_to_run: bool = False,
) -> DictConfig:
    """Read and check a config.

    Args:
        path: a YAML file, or the name of a shipped config.
        overrides: as on the command line: `key=value`, `section.key=value`, `list.0.key=value`, `~key`.
        schema: what it may contain; None: what the end of the file's name stands for, or else what its keys tell.
        check_files: look for the files and folders it names.
        about_to_run: also check what needs torch: components that only an import tells about, and the device.

    Returns:
        The config with interpolations resolved and defaults filled in, in the schema's order.

    Raises:
        ConfigError: with all problems.
    """
    file, given = _read(path)
    own = schema_of(file.stem, given)
    schema = schema or own
    problems = _apply(overrides, given, schema)
    data_kinds.infer_sources(given)
    check = Checker(problems, may_import=about_to_run)
    filled = _fill(given, schema)
    for name, spec in schema.items():
        if isinstance(spec, Key) and spec.verbatim:
            filled[name] = _each_string(filled.get(name), _escaped)
    try:
        check_references(filled)
    except ValueError as error:
        raise ConfigError(str(file), [*problems, Problem("", str(error))]) from None
    good = check.mapping(check.resolve(_create(file, filled)), schema)
    sizes.shorten_calibration(good, overrides)
    of_files = rules_of_files.FILES * check_files + rules_of_files.MACHINE * about_to_run
    for rule in rules.BETWEEN_KEYS + sizes.RULES + of_files:
        problems += rule(good)
    for rule in OF_ARCHITECTURE if check_files else ():
        problems += () if problems else rule(good)
    problems = of_another_recipe(own, schema, problems) or problems
    if problems:
        raise ConfigError(str(file), _without_echoes(problems, filled))
    return OmegaConf.create(_each_string(good, _escaped))


def read_unchecked(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a config and apply overrides, but check nothing and resolve no interpolation.

    Raises:
        ConfigError: the config cannot be read, or an override cannot be applied.
    """
    file, given = _read(path)
    override_unchecked(given, overrides, str(file))
    return given


def override_unchecked(tree: dict[str, Any], overrides: Iterable[str], source: str) -> None:
    """Apply overrides to a config in plain containers, in place.

    Raises:
        ConfigError: an override cannot be applied.
    """
    if problems := _apply(overrides, tree, schema_of(Path(source).stem, tree)):
        raise ConfigError(source, problems)


def instantiate(node: DictConfig | None, *args: Any, **kwargs: Any) -> Any:
    """Torchtune's `config.instantiate`: the object that a node with a `_component_` describes; None for None."""
    from torchtune.config import instantiate

    return instantiate(node, *args, **kwargs)


def _read(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a config, and what it holds."""
    try:
        file = registry.find_config(path)
    except (OSError, ValueError) as error:
        raise ConfigError("--config", [Problem("", str(error))]) from None
    try:
        return file, reading.read(file)
    except ValueError as error:
        raise ConfigError(str(file), [Problem("", str(error))]) from None


def _apply(overrides: Iterable[str], tree: dict[str, Any], schema: Schema) -> list[Problem]:
    """Apply overrides in place, and return what is wrong with them."""
    problems: list[Problem] = []
    folder = tree.get("checkpoint_dir")
    for override in overrides:
        try:
            _override(tree, override, schema)
        except ValueError as error:
            problems.append(Problem(override, str(error)))
    if tree.get("checkpoint_dir") != folder and "checkpoint_dir" in schema:
        folders.put_folder(tree)
    return problems


# --- steps ------------------------------------------------------------------------------------------------------------


def _given_config(schema: Schema | None) -> DictConfig:
    """The config of this process's command line; problems of it are printed, and end the process."""
    try:
        name, overrides = split_arguments(sys.argv[1:])
        return load(name, overrides, schema, about_to_run=True)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        sys.exit(2)


def _override(tree: dict[str, Any], text: str, schema: Schema) -> None:
    """`reading.override`, with components inside sections set the way those at the top are.

    Raises:
        ValueError: it cannot be applied.
    """
    section, _, rest = text.partition(".")
    path, _, value = rest.partition("=")
    name, _, inner = path.partition(".")
    spec, given = schema.get(section), tree.get(section) or {}
    keys = spec.keys if isinstance(spec, Section) else {}
    is_component = isinstance(keys.get(name), (Component, OneOrMany))
    if not is_component or not isinstance(given, dict):
        return reading.override(tree, text, schema)
    if inner and _is_reference(given.get(name)):
        raise ValueError(
            f"{section}.{name} is {given[name]}, another key's; set {section}.{name} to a component first"
        )
    tree[section] = given
    if not inner and _is_reference(value):
        given[name] = value
    else:
        reading.override(given, rest, keys)


def _is_reference(value: Any) -> bool:
    """Whether a value is another key's as a whole, such as `${dataset}`."""
    return isinstance(value, str) and re.fullmatch(r"\$\{[\w.]+\}", value) is not None


def _fill(tree: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """`tree` in the schema's order, with defaults for what is absent; unknown keys stay, last."""
    filled = {}
    for name, spec in schema.items():
        given = tree.get(name)
        if isinstance(spec, Section):
            given = {} if given is None else given
            filled[name] = _fill(given, spec.keys) if isinstance(given, dict) else given
        elif name in tree:
            filled[name] = given
            if isinstance(spec.default, dict) and isinstance(given, dict):
                default_component = spec.default["_component_"]
                if given.get("_component_", default_component) in (None, default_component):
                    filled[name] = spec.default | given
        elif spec.default is not REQUIRED:
            filled[name] = copy.deepcopy(spec.default)
    return filled | {name: value for name, value in tree.items() if name not in schema}


def _create(file: Path, tree: dict[str, Any]) -> DictConfig:
    try:
        return OmegaConf.create(tree)
    except RecursionError:
        raise ConfigError(
            str(file), [Problem("", "an interpolation is nested too deeply")]
        ) from None
    except OmegaConfBaseException as error:  # an interpolation that is none
        key, reason = str(error.full_key or ""), " ".join(str(error.msg or error).splitlines()[:1])
        raise ConfigError(str(file), [Problem(key, reason)]) from None


def _without_echoes(problems: list[Problem], tree: dict[str, Any]) -> list[Problem]:
    """The problems without those of values that refer to a key which has a problem itself."""
    keys = {problem.key for problem in problems}
    return [
        p for p in problems if not _references(tree, p.key) & (keys - {p.key})
    ] or problems  # all: in a circle


def _references(tree: Any, key: str) -> set[str]:
    """The keys that the value at dotted `key` refers to; where a whole node is another's, the key in that one."""
    name, _, rest = key.partition(".")
    if isinstance(tree, str):
        return {f"{other}.{key}" if key else other for other in re.findall(r"\$\{([\w.]+)\}", tree)}
    if isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
        return _references(tree[int(name)], rest)
    return _references(tree[name], rest) if isinstance(tree, dict) and name in tree else set()


def _escaped(text: str) -> str:
    """A text of which OmegaConf resolves nothing."""
    return text.replace("${", r"\${")


def _each_string(tree: Any, change: Callable[[str], str]) -> Any:
    if isinstance(tree, dict):
        return {key: _each_string(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_each_string(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
