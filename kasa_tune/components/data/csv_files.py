"""CSV files, read so that every cell is text as it is written.

The reader guesses a type for each column, so that 007 becomes 7 and 1.50 becomes 1.5, and it gives a name that stands
twice in the header to the first of its columns alone.
"""

import csv
import io
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Features, Value

from kasa_tune.components.data.file_faults import opened
from kasa_tune.components.data.sources import files_read, more_cells

# Options of the reader with which the first line is not the names of the columns, or not all of them.
_OTHER_HEADER = ("names", "column_names", "header", "skiprows", "usecols", "index_col", "features")


def first_rows(path: Path, node: Mapping[str, Any]) -> list[list[str]] | None:
    """The names in the first line of a CSV file, and the cells of the next row if there is one. None if options of the
    node say that the first line holds no names.
    """
    if any(node.get(option) is not None for option in _OTHER_HEADER):
        return None
    delimiter = node.get("sep") or node.get("delimiter") or ","
    if not isinstance(delimiter, str) or len(delimiter) != 1:
        return None
    encoding = node.get("encoding") or "utf-8"
    try:
        with io.TextIOWrapper(opened(path), encoding, errors="replace", newline="") as file:
            rows = (row for row in csv.reader(file, delimiter=delimiter) if row)
            found = list(islice(rows, 2))
    except (UnicodeDecodeError, LookupError, csv.Error):
        return None  # the reader says what is wrong
    if found:
        found[0][:1] = [found[0][0].lstrip("\ufeff")]
    return found


def check_columns(path: Path, node: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a CSV file has two columns of one name, or if its rows have more cells than its header.

    The reader takes the first cells of such rows for its index, so every other cell is read as the column before its
    own.
    """
    header, *rows = first_rows(path, node) or [[]]
    twice = [column for column, count in Counter(header).items() if count > 1]
    if twice:
        raise ValueError(
            f"{name}: {path} has {header.count(twice[0])} columns with the name {twice[0]!r}. Give each its own."
        )
    if rows and len(rows[0]) > len(header):
        raise ValueError(more_cells(str(path), header, name))


def as_text(node: Mapping[str, Any]) -> dict[str, Any]:
    """Options with which the reader takes every cell of a local CSV as text. None for other data, for files with
    different headers, and where the node has types of its own.
    """
    if node.get("source") != "csv":
        return {}
    rows = [first_rows(path, node) for path in files_read(node) if path.stat().st_size]
    headers = [row[0] for row in rows if row]
    if not headers or len(headers) < len(rows) or any(header != headers[0] for header in headers):
        return {}
    columns = headers[0]
    if not all(columns) or len(set(columns)) < len(columns):
        return {}
    return {"features": Features({column: Value("string") for column in columns})}
