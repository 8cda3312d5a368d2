"""Digests of whole tensors, found by several threads and kept for as long as the files stay the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

log = logging.getLogger(__name__)

THREADS = 8
_MOST_FILES = 4096  # that the cache remembers


def digest_line(name: str, tensor: Tensor) -> str:
    """``<name> <dtype> [<shape>] <sha256 of its bytes>`` and a newline."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    shape = ", ".join(map(str, tensor.shape))
    return f"{name} {tensor.dtype} [{shape}] {hashlib.sha256(data.data).hexdigest()}\n"


def digest_lines(paths: Mapping[str, Path]) -> dict[str, str]:
    """The lines of tensors in safetensors files, by name.

    Args:
        paths: which file each tensor is read from.
    """
    cache = _read_cache()
    known: dict[str, dict[str, str]] = {}
    for path in set(paths.values()):
        known[_key(path)] = dict(cache.get(_key(path), {}))
    missing = [name for name, path in paths.items() if name not in known[_key(path)]]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda name: _line_of(paths[name], name), missing)
        for name, line in zip(missing, found, strict=True):
            known[_key(paths[name])][name] = line
    if missing:
        _write_cache(_read_cache() | known)
    return {name: known[_key(path)][name] for name, path in paths.items()}


def cache_file() -> Path:
    """``weights_digests.json`` in the user's cache folder, ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kasa_tune" / "weights_digests.json"


def _line_of(path: Path, name: str) -> str:
    with safe_open(path, framework="pt") as file:
        return digest_line(name, file.get_tensor(name))


def _key(path: Path) -> str:
    """What a file is known by: another path, size or time of change makes it another file."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _read_cache() -> dict[str, dict[str, str]]:
    try:
        content = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: there is no home
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: lines for key, lines in content.items() if _are_lines(lines)}


def _are_lines(lines: object) -> bool:
    return isinstance(lines, dict) and all(
        isinstance(line, str) and line.startswith(f"{name} torch.") and line.endswith("\n")
        for name, line in lines.items()
    )


def _write_cache(content: Mapping[str, Mapping[str, str]]) -> None:
    """Replace the file at once; a folder that cannot be written only costs time the next time."""
    newest = dict(list(content.items())[-_MOST_FILES:])
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(newest, file)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except (OSError, RuntimeError) as error:
        log.info(f"Digests of the base's weights could not be kept in the cache folder: {error}")
