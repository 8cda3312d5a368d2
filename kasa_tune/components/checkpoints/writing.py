"""Writing a checkpoint: under a temporary name, flushed to the disk, sealed with a manifest, and only then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kasa_tune.components.checkpoints.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    PREFIX,
    CheckpointError,
    list_checkpoints,
    put_back,
    step_of,
    verify_checkpoint,
)
from kasa_tune.components.checkpoints.files import (
    error_number,
    is_running,
    size_and_digest,
    sync_folder,
    write_synced,
)
from kasa_tune.components.checkpoints.serialization import encode

log = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path, step: int, parts: Mapping[str, Any], *, keep_last: int | None = None
) -> Path:
    """Write ``parts`` as checkpoint ``folder/step_<step>`` in one atomic act.

    Args:
        folder: holds all checkpoints of a run; made if missing.
        step: optimizer steps done.
        parts: name to a tree of dicts, lists, tuples, tensors, strings, numbers, booleans and None.
        keep_last: of this checkpoint and those of earlier steps, all but the newest this many are removed afterwards;
            None keeps all. Those of later steps stay and do not count: they may be damaged ones that a run fell back
            from.

    Returns:
        The checkpoint's path.

    Raises:
        OSError: the disk is full or the folder cannot be written. Earlier checkpoints are untouched and no partial one
        is left.
    """
    final = folder / f"{PREFIX}{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    replaced = folder / f".{final.name}.replaced.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    try:
        temporary.mkdir()
        for name, tree in parts.items():
            _write_part(temporary, name, tree)
        files = {path.name: size_and_digest(path) for path in sorted(temporary.iterdir())}
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "parts": list(parts),
            "files": files,
        }
        write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        _replace(final, temporary, replaced)
        sync_folder(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(
                error_number(error),
                f"Could not write {final} ({error}). Earlier checkpoints are untouched.",
            ) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    if keep_last is not None:
        not_later = [path for path in list_checkpoints(folder) if step_of(path) <= step]
        _remove(not_later[:-keep_last])
    return final


def clean_up(folder: Path, *, keep_last: int) -> None:
    """Remove what a run left behind that was killed between writing a checkpoint and removing old ones.

    Args:
        folder: holds the checkpoints of a run, whose lock this process holds.
        keep_last: the newest this many intact checkpoints stay, and so do damaged ones that are newer than these.
    """
    _clear_leftovers(folder)
    found = list_checkpoints(folder)
    if len(found) <= keep_last:
        return
    intact = 0
    for path in reversed(found):
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(path)
            intact += 1
        if intact == keep_last:
            _remove([old for old in found if step_of(old) < step_of(path)])
            return


def check_saveable(tree: Any) -> None:
    """See now, before any training, that :func:`save_checkpoint` can write ``tree``, an optimizer's state say.

    Raises:
        TypeError: it cannot; the message says what and where.
    """
    json.dumps(encode(tree, "", {}))


def _replace(final: Path, temporary: Path, replaced: Path) -> None:
    """Give ``temporary`` its final name; what had that name is moved aside first."""
    for attempt in range(10):
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except (
            OSError
        ) as error:  # a reader took the moment between for a crash and put the old one back
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 9:
                raise
        else:
            return


def _remove(checkpoints: list[Path]) -> None:
    """Remove old checkpoints; one that cannot be removed costs disk space but not the new one."""
    for old in checkpoints:
        try:
            shutil.rmtree(
                old.rename(old.parent / f".{old.name}.removed.tmp")
            )  # hidden first: never seen half removed
        except OSError as error:
            log.warning(f"Could not remove the old checkpoint {old} ({error}).")


def _clear_leftovers(folder: Path) -> None:
    """Remove what writers that are gone left behind."""
    put_back(folder)
    for leftover in folder.glob(f".{PREFIX}*.tmp"):
        writer = leftover.name.split(".")[-2]
        if not writer.isdigit() or int(writer) == os.getpid() or not is_running(int(writer)):
            shutil.rmtree(leftover)


def _write_part(folder: Path, name: str, tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    document = encode(tree, "", tensors)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
        with (folder / f"{name}.safetensors").open("rb+") as file:
            os.fsync(file.fileno())
    write_synced(folder / f"{name}.json", json.dumps(document).encode())
