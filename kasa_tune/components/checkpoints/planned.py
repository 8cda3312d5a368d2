"""Folders of planned runs: whether what lies there was made as planned now, and moving aside what was not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write_whole(path: Path, text: str) -> None:
    """Write a text file, which is there as a whole or not at all, also after a kill."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def as_yaml(tree: Mapping[str, Any]) -> str:
    """Plain containers as YAML, in their order."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def changed_keys(path: Path, tree: Mapping[str, Any]) -> list[str]:
    """Keys of the top level in which the YAML file ``path`` differs from ``tree``; none if there is no file."""
    if not path.exists():
        return []
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    now = yaml.safe_load(as_yaml(tree))
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def move_aside(folder: Path) -> Path:
    """Rename a folder to ``<name>.aside<n>`` and return its new path."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.aside{number}")).exists():
        number += 1
    return folder.rename(aside)
