"""CSV files, read so that every cell is text as it is written.

The reader guesses a type for each column, so that 007 becomes 7 and 1.50 becomes 1.5, and it gives a name that stands
twice in the header to the first of its columns alone.
"""

import csv
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Features, Value

from kasa_tune.components.data.file_faults import opened
from kasa_tune.components.data.sources import files_read

# Options of the reader with which the first line is not the names of the columns, or not all of them.
_OTHER_HEADER = ("names", "column_names", "header", "skiprows", "usecols", "index_col", "features")


def header_of(path: Path, node: Mapping[str, Any]) -> list[str] | None:
    """The names in the first line of a CSV file. None if options of the node say that it has none."""
    if any(node.get(option) is not None for option in _OTHER_HEADER):
        return None
    delimiter = node.get("sep") or node.get("delimiter") or ","
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        return None
    encoding = node.get("encoding") or "utf-8"
    with opened(path) as file:
        first = file.readline(1 << 16)
    try:
        text = first.decode(encoding).lstrip("\ufeff")
        return next(csv.reader([text], delimiter=delimiter), None)
    except (UnicodeDecodeError, LookupError, csv.Error):
        return None  # the reader says what is wrong


def check_names(path: Path, node: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a CSV file has two columns of one name."""
    counted = Counter(header_of(path, node) or ())
    twice = [column for column, count in counted.items() if count > 1]
    if twice:
        raise ValueError(
            f"{name}: {path} has {counted[twice[0]]} columns with the name {twice[0]!r}. Give each its own."
        )


def as_text(node: Mapping[str, Any]) -> dict[str, Any]:
    """Options with which the reader takes every cell of a local CSV as text. None for other data, for files with
    different headers, and where the node has types of its own.
    """
    if node.get("source") != "csv":
        return {}
    headers = [header_of(path, node) for path in files_read(node) if path.stat().st_size]
    if not headers or None in headers or any(header != headers[0] for header in headers):
        return {}
    columns = [column for column in headers[0] or () if column]
    if len(columns) != len(headers[0] or ()):
        return {}
    return {"features": Features({column: Value("string") for column in columns})}
