"""Step checkpoints that are whole or absent, and carry everything a run needs to go on bit for bit.

A checkpoint is a folder ``step_<n>`` of safetensors and JSON files. It is written under a temporary name, flushed to
the disk, sealed with a manifest of sizes and SHA-256 sums, and only then renamed; what does not match its manifest is
never read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kasa_tune.components.checkpoints.files import (
    error_number,
    is_running,
    size_and_digest,
    sync_folder,
    write_synced,
)
from kasa_tune.components.checkpoints.serialization import decode, encode

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = "step_"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another kind."""


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
        not_later = [path for path in list_checkpoints(folder) if _step_of(path) <= step]
        _remove(not_later[:-keep_last])
    return final


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


def _put_back(folder: Path) -> None:
    """Give checkpoints that a killed writer had moved aside and not yet replaced their names again."""
    for aside in folder.glob(f".{PREFIX}*.replaced.tmp"):
        final = folder / aside.name[1:].split(".")[0]
        if not final.exists():
            with contextlib.suppress(FileNotFoundError):  # another reader was faster
                aside.rename(final)


def _clear_leftovers(folder: Path) -> None:
    """Remove what writers that are gone left behind."""
    _put_back(folder)
    for leftover in folder.glob(f".{PREFIX}*.tmp"):
        writer = leftover.name.split(".")[-2]
        if not writer.isdigit() or int(writer) == os.getpid() or not is_running(int(writer)):
            shutil.rmtree(leftover)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to ``folder`` (made if missing) until the end of the block or of this process.

    Raises:
        ValueError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Cannot start: another run is writing to {folder}. Wait for its end or set another output_dir."
            ) from None
        except OSError as error:  # some network file systems know no locks
            log.warning(
                f"{folder} cannot be locked ({error}); make sure that no other run writes to it."
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(
                    file, fcntl.LOCK_UN
                )  # at once, even if a data worker still has the file open


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders that look like checkpoints, oldest first; none of them verified."""
    found = [
        path
        for path in folder.glob(f"{PREFIX}*")
        if path.is_dir() and path.name[len(PREFIX) :].isdigit()
    ]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that matches its manifest, and why newer ones were passed over."""
    with contextlib.suppress(OSError):  # a folder one may only read
        _put_back(folder)
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return path, passed_over
    return None, passed_over


def find_checkpoint(path: Path) -> Path:
    """A checkpoint that is whole: the newest of a run's ``output_dir``, or ``path`` itself.

    Raises:
        CheckpointError: there is none; the message says what was passed over.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no folder: give a run's output_dir or one of its checkpoints."
        )
    if not (path / "checkpoints").is_dir():
        if not (path / MANIFEST).exists():
            raise CheckpointError(
                f"{path} is no complete checkpoint (it has no {MANIFEST}) and no run's output_dir (no checkpoints/)."
            )
        verify_checkpoint(path)
        return path
    newest, passed_over = latest_checkpoint(path / "checkpoints")
    if newest is None:
        raise CheckpointError(" ".join([f"{path} holds no finished checkpoint.", *passed_over]))
    if passed_over:
        log.warning(f"Using {newest}. {' '.join(passed_over)}")
    return newest


def check_belongs(checkpoint: Path, *, base_fingerprint: str, model: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was trained on another base or with another model section.

    Args:
        checkpoint: with a part ``run`` that holds ``base`` and ``config``.
        base_fingerprint: of the base weights at hand, see :func:`weights_fingerprint`.
        model: the resolved model section of the config; ``dropout`` may differ.

    Raises:
        CheckpointError: they differ; the message names the key, the saved and the given value.
    """
    run = load_part(checkpoint, "run")
    if run["base"] != base_fingerprint:
        raise CheckpointError(
            f"{checkpoint} belongs to other base weights than those given. Set checkpointer.checkpoint_dir (of an "
            "export: checkpoint_dir) to the base that it was trained on."
        )
    saved, unset = run["config"]["model"], "unset"
    wrong = [
        f"model.{key}: checkpoint {saved.get(key, unset)!r}, config {model.get(key, unset)!r}"
        for key in sorted(saved.keys() | model.keys())
        if key != "dropout" and saved.get(key) != model.get(key)
    ]
    if wrong:
        raise CheckpointError(f"{checkpoint} belongs to another model: {'; '.join(wrong)}.")


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file with the manifest and return the manifest.

    Raises:
        CheckpointError: the manifest is missing, unreadable or another checkpoint's, a file is missing, too short or
        changed.
    """
    manifest = read_manifest(path)
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest['format_version']}, this version reads {FORMAT_VERSION}."
        )
    unlisted = [name for name in manifest["parts"] if f"{name}.json" not in manifest["files"]]
    named_step = path.name.removeprefix(PREFIX)
    if unlisted or (
        path.name != named_step and named_step.isdigit() and int(named_step) != manifest["step"]
    ):
        raise CheckpointError(
            f"{path} is damaged: its {MANIFEST} is of step {manifest['step']} and lacks the files of "
            f"{', '.join(unlisted) or 'no part'}. Use an earlier checkpoint."
        )
    for name, expected in manifest["files"].items():
        if not _matches(path / name, expected):
            raise CheckpointError(
                f"{path} is damaged: {name} is missing or differs from the manifest. Use an earlier checkpoint."
            )
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says, compared with no file. Raises CheckpointError if it is missing or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        (
            manifest["format_version"],
            manifest["step"],
            list(manifest["parts"]),
            manifest["files"].items(),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no complete checkpoint: its {MANIFEST} is missing or unreadable ({error})."
        ) from None
    return manifest


def load_part(path: Path, name: str) -> Any:
    """One part of a checkpoint, tensors on the CPU. Verify the checkpoint first.

    Raises:
        CheckpointError: the checkpoint has no such part.
    """
    files = read_manifest(path)["files"]  # others are not the checkpoint's
    if f"{name}.json" not in files:
        raise CheckpointError(f"{path} has no part {name!r}.")
    tensors = load_file(path / f"{name}.safetensors") if f"{name}.safetensors" in files else {}
    return decode(json.loads((path / f"{name}.json").read_text(encoding="utf-8")), tensors)


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's global generators, CUDA devices included."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Bring all global generators back; CUDA ones where as many devices exist as were saved, else a warning is
    logged.
    """
    random.setstate(state["python"])
    numpy_state = dict(state["numpy"], state=dict(state["numpy"]["state"]))
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        log.warning(
            f"The random state of {len(state['cuda'])} CUDA devices was saved and there are {found}: it is not "
            "restored, and what these devices draw, dropout say, will differ from an uninterrupted run."
        )


class StopSignals:
    """While active, SIGINT and SIGTERM are remembered instead of obeyed; a second one is obeyed at once.

    ``received`` is the signal's number or None. The exit status of a program that stops for signal n is ``128 + n``.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)


def _write_part(folder: Path, name: str, tree: Any) -> None:
    tensors: dict[str, Tensor] = {}
    document = encode(tree, "", tensors)
    if tensors:
        save_file(tensors, folder / f"{name}.safetensors")
        with (folder / f"{name}.safetensors").open("rb+") as file:
            os.fsync(file.fileno())
    write_synced(folder / f"{name}.json", json.dumps(document).encode())


def _matches(path: Path, expected: Any) -> bool:
    try:
        return size_and_digest(path) == expected
    except OSError:
        return False


def weights_fingerprint(weights: Mapping[str, Tensor], *, sample: int = 4096) -> str:
    """SHA-256 over names, shapes, dtypes and ``sample`` evenly spread values of every tensor: tells one base from
    another.

    It reads a few megabytes of a model of any size, so it is cheap enough for every start; it does not prove that no
    other value changed.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach()
        flat = tensor.flatten()
        values = flat[:: max(1, flat.numel() // sample)][:sample].float().cpu()
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + values.numpy().tobytes()
        )
    return digest.hexdigest()
