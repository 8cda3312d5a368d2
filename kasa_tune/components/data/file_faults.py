"""What is wrong with a local file that the reader of data sets could not take.

The reader's own words name no file, and count rows within a block of it, not within all of it.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from datasets.exceptions import DatasetGenerationError

from kasa_tune.components.data.sources import files_read

_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_NO_ROWS = "no samples"  # which the reader takes beside files that have some
_LARGEST_ARRAY = 1 << 27  # bytes of an array that is looked into; it takes some ten times as much
_GZIP = b"\x1f\x8b"
_COMPRESSED = (b"BZh", b"\xfd7zX", b"PK\x03\x04", b"(\xb5/\xfd")  # the reader takes them too


def file_fault(node: Mapping[str, Any], error: Exception) -> str | None:
    """The file of a dataset node that is at fault, where, and what to do; None if none is found.

    Args:
        node: as ``sources.prepared`` gives it.
        error: what the reader raised; one that is not about content is not looked into.
    """
    about_content = isinstance(error, DatasetGenerationError) or "no data" in str(error)
    if not about_content or node.get("encoding"):
        return None
    faults = []
    try:
        for path in files_read(node):
            fault = _fault(path, str(node.get("source") or "json"))
            if fault and not fault.startswith(_NO_ROWS):
                return fault
            faults.append(fault)
    except Exception:  # a file that cannot be read at all: what the reader said stands
        return None
    return faults[0] if faults and all(faults) else None


def _fault(path: Path, source: str) -> str | None:
    with opened(path) as file:
        head = file.read(4)
    if head == b"PAR1" and source != "parquet":
        return f"{path} is a Parquet file. Set source: parquet."
    if source == "json" and path.suffix in (".csv", ".tsv"):
        return f"{path} is no JSON. Set source: csv, or data_files to the files that are."
    if source not in ("csv", "json", "text") or head.startswith(_COMPRESSED):
        return None
    if head[:2] in _UTF_16 and source != "csv":
        return f"{path} is not in UTF-8 but in UTF-16. Save it in UTF-8."
    return _json_fault(path) if source == "json" else _encoding_fault(path, source)


def opened(path: Path) -> IO[bytes]:
    """Open a file, unpacked if it is packed with gzip."""
    with open(path, "rb") as file:
        compressed = file.read(2) == _GZIP
    return cast(IO[bytes], gzip.open(path)) if compressed else open(path, "rb")


def _encoding_fault(path: Path, source: str) -> str | None:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                name = "utf-16" if line[:2] in _UTF_16 else "latin-1"
                return (
                    f"{path}, line {number} is not in UTF-8. Save the file in UTF-8, or name what "
                    f"it is in, such as encoding: {name}."
                )
    return None


def _json_fault(path: Path) -> str | None:
    rows = 0
    with opened(path) as file:
        begins = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        file.seek(0)
        if begins == b"[" and len(file.read(_LARGEST_ARRAY + 1)) > _LARGEST_ARRAY:
            return None
    for number, line in _json_lines(path):
        if not rows and line.strip().startswith(b"{") and b"}" not in line:
            return None  # an object over several lines
        rows += line.strip() != b"{}"
        if fault := _line_fault(line):
            at = f"line {number}" if number else "its array"
            return f"{path}, {at} {fault}"
    return None if rows else f"{_NO_ROWS}: {path} holds no rows."


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank and their numbers from 1; a whole array has number 0."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if line.lstrip().startswith(b"["):
                text = b"\n" * (number - 1) + line + file.read(_LARGEST_ARRAY)
                if text.split() not in ([b"[]"], [b"[", b"]"]):
                    yield 0, text
                return
            yield number, line


def _line_fault(line: bytes) -> str | None:
    if line.rstrip().endswith(b"},"):
        return "ends in a comma. Take the commas out, or put all rows into [ and ]."
    try:
        json.loads(line.decode("utf-8"), object_pairs_hook=_checked_object)
    except UnicodeDecodeError:
        return "is not in UTF-8. Save the file in UTF-8."
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"is no JSON at {at}column {error.colno}: {error.msg}. Mend it or take it out."
    except _ObjectError as error:
        return f"{error}. Mend it or take it out."
    except RecursionError:
        return "is nested too deeply."
    return None


class _ObjectError(Exception):
    """An object that Python's reader of JSON takes, and the reader of data sets does not."""


def _checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _ObjectError(f"holds the key {key!r} twice")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _ObjectError(f"holds half of a surrogate pair in {key!r}")
        found[key] = value
    return found
