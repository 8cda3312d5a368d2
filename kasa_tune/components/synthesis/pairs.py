"""Pairs of an instruction and a response, from files of the usual layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kasa_tune.json_text import read_json_lines

_COLUMNS = (
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("input", "output"),
)


class Pair(NamedTuple):
    """What is asked, and what is answered."""

    instruction: str
    response: str


def read_pairs(path: str | Path, limit: int | None = None) -> list[Pair]:
    """Read pairs from JSON Lines.

    A row has ``messages`` in OpenAI's layout, of which the first of the user and the answer to it are taken; or
    ``instruction`` and ``response`` (or ``output``, after an ``input`` that may be there); or ``prompt`` and
    ``completion``; or ``input`` and ``output``.

    Args:
        path: of the file.
        limit: only read so many rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is no such pair; it is named.
    """
    pairs = []
    for number, row in enumerate(read_json_lines(path, limit), 1):
        pair = _of_messages(row["messages"]) if "messages" in row else _of_columns(row)
        if pair is None or not all(isinstance(text, str) and text.strip() for text in pair):
            known = "; ".join(" and ".join(columns) for columns in (("messages",), *_COLUMNS))
            raise ValueError(
                f"{path}, row {number} is no pair of an instruction and a response. Its columns are "
                f"{', '.join(f'{name:.40}' for name in row)}; known are {known}, with texts in them."
            )
        pairs.append(pair)
    return pairs


def _of_messages(messages: Any) -> Pair | None:
    if not isinstance(messages, list) or not all(isinstance(each, Mapping) for each in messages):
        return None
    turns = [each for each in messages if each.get("role") != "system"]
    if [each.get("role") for each in turns[:2]] != ["user", "assistant"]:
        return None
    return Pair(*(each.get("content") for each in turns[:2]))


def _of_columns(row: Mapping[str, Any]) -> Pair | None:
    for columns in _COLUMNS:
        if {*columns} <= {*row}:
            pair = Pair(*(row[name] for name in columns))
            more = row.get("input") if columns[0] == "instruction" else None
            if isinstance(more, str) and more.strip() and isinstance(pair.instruction, str):
                pair = pair._replace(instruction=f"{pair.instruction}\n\n{more}")
            return pair
    return None
