"""Texts of others in a model card: as text, whatever they hold."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

_LONGEST = 200
_PLAIN = re.compile(r"[\w./:@+,=~ -]*")  # means itself in Markdown, in code spans and in tables
# Not in a word's or number's place; an underscore within a word is no emphasis.
_MARKUP = re.compile(r"[^\w ./:,()%+=-]|(?<![^\W_])_|_(?![^\W_])")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def text(value: Any) -> str:
    """A text in a line or a table: one line, nothing of it Markdown or HTML."""
    line = " ".join(str(value).split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", line)


def code(value: Any) -> str:
    """A name or path in a code span."""
    line = " ".join(str(value).split())
    if len(line) <= _LONGEST and _PLAIN.fullmatch(line):
        return f"`{line}`"
    return f"<code>{text(line)}</code>"


def block(value: str) -> str:
    """Lines of an indented code block, which nothing in them ends."""
    return "\n".join(f"    {line}" for line in value.splitlines())


def argument(value: str) -> str:
    """A word of a shell command, on one line."""
    return shlex.quote(" ".join(value.split()))


def dumped(tree: Mapping[str, Any]) -> str:
    """YAML in which every text is data."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=100).rstrip()


def is_repository(name: Any) -> bool:
    """Whether a name can be a repository's of the Hugging Face hub: ``<name>`` or ``<owner>/<name>``."""
    return (
        isinstance(name, str)
        and _REPOSITORY.fullmatch(name) is not None
        and len(name) <= 96
        and "--" not in name
        and ".." not in name
    )
