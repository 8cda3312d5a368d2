"""The data of a task: rows of a local file, each checked before any weight is read, and prompts made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
_FIELD = re.compile(r"\{(\w+)\}")


class RowError(ValueError):
    """A row that a task cannot use."""


def read_rows(path: str, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the rows of a JSON Lines file, of a JSON file with an array, or a text file as one row.

    Args:
        path: of the file. One that ends in ``.txt`` becomes the row ``{"text": <all of it>}``.
        limit: only read so many rows.

    Raises:
        FileNotFoundError: there is no such file.
        RowError: it holds no rows, is not in UTF-8, or a line is no JSON object; the line is named.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"data_file {path} {what}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise RowError(f"{path}, line {line} is not in UTF-8. Save the file in UTF-8.") from None
    if file.suffix == ".txt":
        rows = [{"text": text}] if text.strip() else []
    elif text.lstrip().startswith("["):
        rows = [_object(row, f"{path}, item {i}") for i, row in enumerate(_parsed(text, path))]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [
            _object(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")
            for number, line in lines
            if line.strip()
        ]
    if not rows:
        raise RowError(f"{path} holds no rows.")
    return rows[:limit]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"is no JSON: {error}" if isinstance(error, ValueError) else "is nested too deeply"
        raise RowError(f"{where} {reason}.") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{where} is {value!r:.60}, and must be an object such as {{...}}.")
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{where} holds half of a surrogate pair.") from None
    except RecursionError:
        raise RowError(f"{where} is nested too deeply.") from None
    return value


def text_of(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        RowError: the row lacks the column, or it holds something else.
    """
    value = _value(row, column)
    if not isinstance(value, str):
        raise RowError(f"{column!r} must hold text, got {value!r:.60}.")
    return value


def texts_of(row: Row, column: str) -> list[str]:
    """The texts in a column: one, a list, SQuAD's ``{"text": [...]}``, TriviaQA's ``{"value": ..., "aliases": [...]}``.

    Raises:
        RowError: the column is missing, holds something else, or no text.
    """
    value = _value(row, column)
    texts = value
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, Mapping) and "text" in value:
        texts = value["text"]
    elif isinstance(value, Mapping) and "value" in value:
        aliases = value.get("aliases", [])
        texts = [value["value"], *aliases] if isinstance(aliases, list) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowError(f"{column!r} must hold a text or a list of texts, got {value!r:.60}.")
    if not texts:
        raise RowError(f"{column!r} holds no text; an answer needs at least one reference.")
    return list(dict.fromkeys(texts))


def filled(template: str, row: Row) -> str:
    """The template with the row's texts in place of ``{column}``. Numbers are written out.

    Raises:
        RowError: the row lacks a column, or it holds neither text nor a number.
    """

    def text(match: re.Match[str]) -> str:
        value = _value(row, match[1])
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RowError(f"{match[1]!r} must hold text for the prompt, got {value!r:.60}.")
        return str(value)

    return _FIELD.sub(text, template)


def columns_in(template: str) -> list[str]:
    """The columns that a template names."""
    return list(dict.fromkeys(_FIELD.findall(template)))


def _value(row: Row, column: str) -> Any:
    if column in row:
        return row[column]
    near = get_close_matches(column, row, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RowError(f"has no column {column!r}; its columns are {_listed(row)}.{hint}")


def _listed(names: Iterable[str]) -> str:
    shown: Sequence[str] = [f"{name:.40}" for name in names]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")
