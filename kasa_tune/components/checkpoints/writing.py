"""Writing a checkpoint. It is written under a temporary name, flushed to the disk, sealed with a
manifest, and only then renamed.
"""

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

BEST = "best"  # name of the link to the best checkpoint


def save_checkpoint(
    folder: Path,
    step: int,
    parts: Mapping[str, Any],
    *,
    keep_last: int | None = None,
    best: int | None = None,
) -> Path:
    """Write ``parts`` as the checkpoint ``folder/step_<step>``. It appears complete or not at all.

    Args:
        folder: folder of all checkpoints of a run. It is created if it is missing.
        step: number of optimizer steps done.
        parts: each part by name: nested dicts, lists, tuples, tensors, strings, numbers, booleans
            and None.
        keep_last: how many checkpoints up to this step stay. Older ones are removed afterwards.
            None keeps all. Checkpoints of later steps are neither removed nor counted, because they
            may be damaged ones that the run could not resume from.
        best: step of the best checkpoint, which stays besides and gets the name ``best``. None if
            there is none.

    Returns:
        The checkpoint's path.

    Raises:
        OSError: the disk is full or the folder cannot be written. Earlier checkpoints are
            untouched, and no partial one is left.
    """
    final = folder / f"{PREFIX}{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    replaced = folder / f".{final.name}.replaced.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    try:
        temporary.mkdir()
        _write_parts(temporary, step, parts)
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
    point_to_best(folder, best)
    if keep_last is not None:
        not_later = [path for path in list_checkpoints(folder) if step_of(path) <= step]
        _remove(not_later[:-keep_last], best)
    return final


def point_to_best(folder: Path, step: int | None) -> None:
    """Let the link ``folder/best`` lead to the checkpoint of a step, in place of where it led. If there is no
    such checkpoint, there is no link.
    """
    link, target = folder / BEST, f"{PREFIX}{step:08d}" if step is not None else None
    try:
        if target is None or not (folder / target).is_dir():
            link.unlink(missing_ok=True)
        elif not link.is_symlink() or os.readlink(link) != target:
            temporary = folder / f".{BEST}.tmp"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            os.replace(temporary, link)
    except OSError as error:  # some file systems have no links
        log.warning(f"{link} could not be set to {target} ({error}).")


def clean_up(folder: Path, *, keep_last: int, best: int | None = None) -> None:
    """Remove the files of a run that was killed after writing a checkpoint and before removing old
    ones.

    Args:
        folder: folder of a run's checkpoints. This process holds its lock.
        keep_last: how many of the newest intact checkpoints stay. Damaged ones that are newer than
            these stay as well.
        best: step of the best checkpoint, which stays besides.
    """
    _clear_leftovers(folder)
    point_to_best(folder, best)
    found = list_checkpoints(folder)
    if len(found) <= keep_last:
        return
    intact = 0
    for path in reversed(found):
        with contextlib.suppress(CheckpointError):
            verify_checkpoint(path)
            intact += 1
        if intact == keep_last:
            _remove([old for old in found if step_of(old) < step_of(path)], best)
            return


def check_saveable(tree: Any) -> None:
    """Check before any training that :func:`save_checkpoint` can write ``tree``, such as an
    optimizer's state.

    Raises:
        ValueError: it cannot. The message says what it cannot write and where that is.
    """
    json.dumps(encode(tree, "", {}))


def _replace(final: Path, temporary: Path, replaced: Path) -> None:
    """Give ``temporary`` its final name. A checkpoint that has this name already is moved aside
    first.
    """
    for attempt in range(10):
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError as error:
            # Between the two renames a reader may have taken the missing name for a crash and put
            # the old checkpoint back.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 9:
                raise
        else:
            return


def _remove(checkpoints: list[Path], best: int | None) -> None:
    """Remove old checkpoints but the best one. If one cannot be removed, a warning is logged and the run goes on."""
    for old in (path for path in checkpoints if step_of(path) != best):
        try:
            # It is renamed first, so that nobody finds a checkpoint that is half removed.
            shutil.rmtree(old.rename(old.parent / f".{old.name}.removed.tmp"))
        except OSError as error:
            log.warning(f"Could not remove the old checkpoint {old} ({error}).")


def _clear_leftovers(folder: Path) -> None:
    """Remove the temporary folders of writers that no longer run."""
    put_back(folder)
    for leftover in folder.glob(f".{PREFIX}*.tmp"):
        writer = leftover.name.split(".")[-2]
        if not writer.isdecimal() or int(writer) == os.getpid() or not is_running(int(writer)):
            shutil.rmtree(leftover)


def _write_parts(folder: Path, step: int, parts: Mapping[str, Any]) -> None:
    """Write all parts into an empty folder, and then the manifest."""
    for name, tree in parts.items():
        _write_part(folder, name, tree)
    files = {path.name: size_and_digest(path) for path in sorted(folder.iterdir())}
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "parts": list(parts),
        "files": files,
    }
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(folder)


def _write_part(folder: Path, name: str, tree: Any) -> None:
    """Write one part as ``<name>.json`` and, if it holds tensors, ``<name>.safetensors``."""
    tensors: dict[str, Tensor] = {}
    document = encode(tree, "", tensors)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
        with (folder / f"{name}.safetensors").open("rb+") as file:
            os.fsync(file.fileno())
    write_synced(folder / f"{name}.json", json.dumps(document).encode())
