"""Small file operations that checkpoints rely on: writing that survives a power cut, checksums, and
whether a process still runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any


def parse_json(text: str) -> Any:
    """Read JSON whose texts can be written again.

    Raises:
        ValueError: it is no JSON, or a text in it holds half of a surrogate pair, which is no
            character and fits in no file.
        RecursionError: it is nested too deeply.
    """
    content = json.loads(text)
    if "\\ud" in text.lower():  # only an escape can give half of a pair
        json.dumps(content, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return content


def write_synced(path: Path, data: bytes) -> None:
    """Write a file, and return when its content is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when a folder's list of names is on the disk, so that a rename survives a
    power cut.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def error_number(error: Exception) -> int | None:
    """Return the operating system's number of an error, or None. safetensors gives the number only
    in its message.
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def is_endless(path: Path) -> bool:
    """Tell whether a path leads to a pipe, a socket or a device. Reading one may never end."""
    mode = path.stat().st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def size_and_digest(path: Path) -> dict[str, Any]:
    """Return ``size`` in bytes and ``sha256`` of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def is_running(process: int) -> bool:
    """Tell whether a process with this number runs, whoever owns it."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # no process has a number as large as that
        return False
    except PermissionError:
        pass
    return True
