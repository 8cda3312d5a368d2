"""Paths of local files in configs: one function that every key of data and tokenizers goes through."""

import os
from typing import Any


def local_path(given: Any, key: str) -> str:
    """The path a config means: ``~`` is the home folder.

    Raises:
        ValueError: what is given is no path: empty, not text, or with a NUL byte in it.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise ValueError(f"{key} must be a path, got {type(given).__name__} {given!r:.60}.")
    text = os.fspath(given)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key} must be a path, got {given!r}, which is empty.")
    if "\0" in text:
        raise ValueError(f"{key} must be a path, got {given!r:.60}, which holds a NUL byte.")
    return os.path.expanduser(text)
