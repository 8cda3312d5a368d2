"""References between the keys of a config, `${key}`: how much they stand for, before any is replaced."""

import re
from typing import Any

MOST_REPLACED = 5_000
_REFERENCE = re.compile(r"\$\{([\w.\[\]]+)\}")
_COMPUTED = re.compile(r"\$\{[\w.\[\]]*\$\{")

Path = tuple[str, ...]


def check_references(tree: dict[str, Any]) -> None:
    """See that the references stand for a bounded number of values.

    Raises:
        ValueError: they multiply, each standing for several others, or one computes the key it refers to.
    """
    numbers: dict[Path, int] = {}
    if _number(tree, (), tree, numbers) > MOST_REPLACED:
        raise ValueError(
            f"its ${{...}} stand for more than {MOST_REPLACED} values, each of which is another"
        )


def _number(tree: dict[str, Any], path: Path, value: Any, numbers: dict[Path, int]) -> int:
    """How many references have to be followed for the value at `path`; those of a circle count once."""
    if path in numbers:
        return numbers[path]
    numbers[path] = 0
    total = 0
    if isinstance(value, dict):
        total = sum(_number(tree, (*path, str(k)), item, numbers) for k, item in value.items())
    elif isinstance(value, list):
        total = sum(_number(tree, (*path, str(i)), item, numbers) for i, item in enumerate(value))
    elif isinstance(value, str) and "${" in value:
        if _COMPUTED.search(value):
            raise ValueError("a ${...} inside the name of another; write the key's name out")
        for name in _REFERENCE.findall(value):
            target = _target(path, name)
            total += 1 + _number(tree, target, _at(tree, target), numbers)
    numbers[path] = min(total, MOST_REPLACED + 1)
    return numbers[path]


def _target(path: Path, name: str) -> Path:
    """The path that a reference in the value at `path` names; a leading dot is the value's own mapping."""
    dots = len(name) - len(name.lstrip("."))
    parts = tuple(part for part in re.split(r"[.\[\]]+", name) if part)
    return (*path[:-dots], *parts) if dots else parts


def _at(tree: Any, path: Path) -> Any:
    """The value at `path`, or None where there is none."""
    for name in path:
        if isinstance(tree, dict):
            tree = tree.get(name, tree.get(int(name)) if name.isdecimal() else None)
        elif isinstance(tree, list) and name.isdecimal() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            return None
    return tree
