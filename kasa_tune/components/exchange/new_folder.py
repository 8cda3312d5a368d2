"""Folders that appear with all their files or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from kasa_tune.components.checkpoints.files import is_running, sync_folder


def check_new(path: Path) -> None:
    """Refuse to write over what exists, before any long work.

    Raises:
        FileExistsError: something lies at ``path``.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already; choose another output_dir, or remove it.")


def check_outside(path: Path, source: Path, name: str) -> None:
    """Refuse to write into what is read, or among a run's checkpoints.

    Args:
        path: of the folder to be.
        source: what is read.
        name: the key that says so.

    Raises:
        ValueError: ``path`` lies in ``source`` or in a folder of checkpoints.
    """
    path = path.resolve()
    if path.is_relative_to(source.resolve()) or path.parent.name == "checkpoints":
        raise ValueError(
            f"output_dir {path} lies within {name} or among checkpoints; choose a place outside."
        )


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
    for leftover in path.parent.glob(
        f".{glob.escape(path.name)}.*.tmp"
    ):  # of a process that was killed
        writer = leftover.name.split(".")[-2]
        if (
            leftover.is_dir()
            and writer.isdecimal()
            and (int(writer) == os.getpid() or not is_running(int(writer)))
        ):
            shutil.rmtree(leftover)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with _terminated_by_exception():
            yield temporary
            _sync_files(temporary)
            check_new(path)
            temporary.rename(path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """While active, SIGTERM ends the process as an exception does, so that what was begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _sync_files(folder: Path) -> None:
    readable = (
        folder.stat().st_mode & 0o666
    )  # as the umask has it; safetensors lets nobody else read its files
    for name in folder.rglob("*"):
        if name.is_file():
            name.chmod(readable)
            with name.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(name)
    sync_folder(folder)
