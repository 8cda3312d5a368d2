"""Where in its files a row of a data set stands, for messages about it."""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kasa_tune.components.data.file_faults import opened
from kasa_tune.components.data.sources import files_read

_LARGEST = 1 << 28  # bytes of a file that is looked through for a row


def place_of(node: Mapping[str, Any] | None, index: int) -> str:
    """A sentence on where a row is.

    Args:
        node: the config's node of the data set.
        index: of the row, from 0.

    Returns:
        The file and the line, from 1. For rows of the hub, of a part of the data, or of files without lines, that rows
        are counted from 0.
    """
    unknown = "Rows count from 0."
    if not node or "[" in str(node.get("split", "")):
        return unknown
    source = node.get("source") or "json"
    try:
        for path in files_read(node):
            if source not in ("json", "csv") or path.stat().st_size > _LARGEST:
                return unknown
            for line in _first_lines(path, source):
                if line is None:
                    return unknown
                if index == 0:
                    return f"It is line {line} of {path}."
                index -= 1
    except (OSError, ValueError, csv.Error):  # the row has been read, and its place is a help
        return unknown
    return unknown


def _first_lines(path: Path, source: str) -> Iterator[int | None]:
    """The line in which each row begins. None where a file has its rows in other ways."""
    with opened(path) as file:
        if source == "json":
            for number, line in enumerate(file, 1):
                text = line.removeprefix(b"\xef\xbb\xbf").strip()
                if text:
                    yield number if text.startswith(b"{") and text.endswith(b"}") else None
            return
        rows = csv.reader(io.TextIOWrapper(file, "utf-8", newline=""))
        before = 0
        for number, row in enumerate(rows):
            if number and row:
                yield before + 1
            before = rows.line_num
