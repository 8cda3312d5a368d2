"""Folders that appear with all their files or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kasa_tune.components.files import is_running, sync_folder


def check_new(path: Path) -> None:
    """Refuse to write over what exists, before any long work.

    Raises:
        FileExistsError: something lies at ``path``.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already; choose another output_dir, or remove it.")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` to write into, which gets that name when the block ends; an error removes it.

    Args:
        path: of the folder to be; its parents are made.

    Raises:
        FileExistsError: ``path`` exists.
        OSError: the disk is full or the place cannot be written.
    """
    check_new(path)
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.[0-9]*.tmp"):  # of a process that was killed
        writer = int(leftover.name.split(".")[-2])
        if writer == os.getpid() or not is_running(writer):
            shutil.rmtree(leftover)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _sync_files(temporary)
        check_new(path)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_files(folder: Path) -> None:
    readable = folder.stat().st_mode & 0o666  # as the umask has it; safetensors lets nobody else read its files
    for name in folder.rglob("*"):
        if name.is_file():
            name.chmod(readable)
            with name.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(name)
    sync_folder(folder)
