"""Reads a config as plain containers: its YAML, and the overrides of the command line."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from kasa_tune import registry
from kasa_tune.config.entries import Component, OneOrMany, Schema, listed, shortened, show

_TAG = "tag:yaml.org,2002:"
# A config is small. What is larger comes from anchors that multiply, or is no config.
MOST_BYTES, MOST_LEVELS, MOST_VALUES, MOST_MERGED = 1_000_000, 40, 20_000, 100


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and truth values of YAML 1.2, None for null, and no key twice.

    PyYAML reads YAML 1.1, where 2e-4 is a string, `no` is False, 010 is eight and 1:30 is ninety.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}
    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node with all below it, down to the deepest level that is allowed."""
        if self.levels >= MOST_LEVELS:
            raise ValueError(f"nested more than {MOST_LEVELS} levels deep")
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what `<<` names, unless that is more than a config can hold."""
        for key, value in node.value:
            if key.tag == f"{_TAG}merge" and len(value.value) > MOST_MERGED:
                raise ValueError(f"<< merges more than {MOST_MERGED} keys or mappings")
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise ValueError(f"a mapping has more than {MOST_VALUES} keys")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            wrong = None
            if key.tag not in (f"{_TAG}str", f"{_TAG}int", f"{_TAG}merge"):
                wrong = f"a key must be a name, not {show(key.value)}"
            elif key.value in seen:
                wrong = f"the key {show(key.value)} is there twice"
            if wrong:
                raise yaml.constructor.ConstructorError(None, None, wrong, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(str(node.value)) > 80:  # Python takes long over many digits, and refuses the most
        raise ValueError("a number has more than 64 bits")
    return loader.construct_yaml_int(node)


_Loader.add_constructor(f"{_TAG}int", _integer)
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+", "-+.0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), list(_first))


def read(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file cannot be read, is empty, not YAML, or holds something else.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"the file is larger than {MOST_BYTES} bytes, so it is no config")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid YAML: {_in_one_line(error)}") from None
    try:
        tree = _parsed(text)
    except ValueError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    if tree is None:
        raise ValueError("the file is empty")
    if not isinstance(tree, dict):
        raise ValueError(f"expected a mapping of keys to values, the file holds {show(tree)}")
    return tree


def _parsed(text: str) -> Any:
    """The containers and values in a YAML text.

    Raises:
        ValueError: it is no YAML, is nested too deeply, holds itself, or has too many values once its anchors are
            replaced by what they stand for.
    """
    try:
        tree = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_in_one_line(error)) from None
    except (LookupError, AttributeError, TypeError) as error:  # PyYAML's, of `!!bool maybe`
        raise ValueError(f"a tag does not fit its value: {error!r}") from None
    if _num_values(tree, {}) > MOST_VALUES:
        raise ValueError(f"its anchors stand for more than {MOST_VALUES} values")
    return tree


def _num_values(tree: Any, counted: dict[int, int | None]) -> int:
    """Number of values in a tree, those of an anchor counted wherever it is used."""
    if not isinstance(tree, (dict, list)):
        return 1
    if id(tree) not in counted:
        counted[id(tree)] = None  # entered, and not left yet
        inner = tree.values() if isinstance(tree, dict) else tree
        counted[id(tree)] = 1 + sum(_num_values(value, counted) for value in inner)
    number = counted[id(tree)]
    if number is None:
        raise ValueError("an anchor stands for something that holds the anchor itself")
    return number


def _in_one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return shortened(where + (getattr(error, "problem", None) or str(error)), 160)


def override(tree: dict[str, Any], text: str, schema: Schema) -> None:
    """Apply one override to a config, in place.

    Args:
        tree: the config.
        text: `a.b=value`, `list.0.b=value` or `~a.b`; the value is YAML and may contain `=`. Where a component stands
            or belongs, a string is its `_component_`, and its other keys stay.
        schema: tells where a component belongs.

    Raises:
        ValueError: it cannot be applied.
    """
    remove = text.startswith("~")
    path, equals, value_text = text.removeprefix("~").partition("=")
    if not path or not (remove or equals):
        raise ValueError("expected key=value to set a key, or ~key to remove one")
    *parents, last = path.split(".")
    if len(parents) > MOST_LEVELS:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep")
    node: Any = tree
    for depth, name in enumerate(parents, start=1):
        node = _enter(node, name, ".".join(parents[:depth]), create=not remove)
    key = _key(node, last, path)
    if remove:
        if isinstance(node, dict) and key not in node:
            raise ValueError(_absent(node, last, path))
        del node[key]
        return
    value = _value(value_text)
    old = node.get(key) if isinstance(node, dict) else node[key]
    belongs = (
        not parents
        and isinstance(schema.get(last), (Component, OneOrMany))
        and not isinstance(old, list)
    )
    if isinstance(value, str) and (belongs or (isinstance(old, dict) and "_component_" in old)):
        value = (old if isinstance(old, dict) else {}) | {"_component_": value}
    node[key] = value


def _value(text: str) -> Any:
    if not text:
        raise ValueError("no value given; write null for none, '' for an empty string")
    try:
        return _parsed(text)
    except ValueError as error:
        raise ValueError(f"the value is not valid YAML ({error}); quote it") from None


def _enter(node: Any, name: str, path: str, *, create: bool) -> Any:
    """The mapping or list under `name`, which `path` leads to; an absent or null one is created."""
    key = _key(node, name, path)
    if isinstance(node, dict) and node.get(key) is None:
        if not create:
            raise ValueError(_absent(node, name, path))
        node[key] = {}
    if not isinstance(node[key], (dict, list)):
        raise ValueError(f"{path} is {show(node[key])}, which has no keys")
    return node[key]


def _key(node: Any, name: str, path: str) -> str | int:
    where = path.rpartition(".")[0]
    if isinstance(node, dict):
        if name.isdigit() and "_component_" in node:
            raise ValueError(f"{where} is one component, not a list; leave out .{name}")
        return name
    if name.isdigit() and int(name) < len(node):
        return int(name)
    entries = listed([f"{where}.{i}" for i in range(len(node))])
    raise ValueError(f"{where} is a list with the entries {entries}")


def _absent(node: dict[str, Any], name: str, path: str) -> str:
    return f"there is no {path}. {registry.did_you_mean(name, map(str, node))}".strip()
