"""Step checkpoints that are whole or absent, and carry everything a run needs to go on bit for bit.

A checkpoint is a folder ``step_<n>`` of safetensors and JSON files. It is written under a temporary name, flushed to
the disk, sealed with a manifest of sizes and SHA-256 sums, and only then renamed; what does not match its manifest is
never read.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from kasa_tune.components.checkpoints.files import size_and_digest
from kasa_tune.components.checkpoints.serialization import decode

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREFIX = "step_"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another kind."""


class Checkpoint:
    """A checkpoint on disk, compared with its manifest once, when it is opened. Its parts are read when asked for.

    Args:
        path: its folder, ``<output_dir>/checkpoints/step_<n>`` or a native adapter.
        resumes: the run goes on from here. If False, it only takes the adapters.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """

    def __init__(self, path: Path, *, resumes: bool = False) -> None:
        self.path, self.resumes = path, resumes
        self.manifest = verify_checkpoint(path)

    def __str__(self) -> str:
        return str(self.path)

    def part(self, name: str) -> Any:
        """One part, tensors on the CPU, read anew at each call; raises CheckpointError where there is none."""
        return load_part(self.path, name)

    @cached_property
    def run(self) -> dict[str, Any]:
        """Part ``run``: step, epoch, batches done, fingerprints of data and base, the config as plain containers."""
        return self.part("run")

    @property
    def config(self) -> dict[str, Any]:
        """The config of the run that wrote it, as plain containers."""
        return self.run["config"]

    @cached_property
    def adapter(self) -> dict[str, Tensor]:
        """Part ``adapter``: ``<module>.lora_*`` to tensor."""
        return self.part("adapter")

    @property
    def has_quantized_base(self) -> bool:
        """Whether its adapters belong to NF4 weights that are stored beside it."""
        return "quantized_base" in self.run

    def check_data(self, fingerprint: str) -> None:
        """Raise ValueError if the run resumes and its data are not those that it was trained on before."""
        if self.resumes and self.run["data"] != fingerprint:
            raise ValueError(
                f"{self} was trained on other data than dataset and tokenizer now give."
            )

    def check_belongs(self, *, base_fingerprint: str, model: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that was trained on another base or with another model section.

        Args:
            base_fingerprint: of the base weights at hand, see ``weights_fingerprint`` of the models room.
            model: the resolved model section of the config; ``dropout`` may differ.

        Raises:
            CheckpointError: they differ; the message names the key, the saved and the given value.
        """
        if self.run["base"] != base_fingerprint:
            raise CheckpointError(
                f"{self} belongs to other base weights than those given. Set "
                "checkpointer.checkpoint_dir (of an export: checkpoint_dir) to the base that it "
                "was trained on."
            )
        saved, unset = self.config["model"], "unset"
        wrong = [
            f"model.{key}: checkpoint {saved.get(key, unset)!r}, config {model.get(key, unset)!r}"
            for key in sorted(saved.keys() | model.keys())
            if key != "dropout" and saved.get(key) != model.get(key)
        ]
        if wrong:
            raise CheckpointError(f"{self} belongs to another model: {'; '.join(wrong)}.")


def find_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint: the newest undamaged one of a run's ``output_dir``, or the one at ``path`` itself.

    Raises:
        CheckpointError: there is none; the message says what was passed over and why.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no folder: give a run's output_dir or one of its checkpoints."
        )
    if not (path / "checkpoints").is_dir():
        if not (path / MANIFEST).exists():
            raise CheckpointError(
                f"{path} is no complete checkpoint (it has no {MANIFEST}) and no run's output_dir "
                "(no checkpoints/)."
            )
        return Checkpoint(path)
    newest, passed_over = latest_checkpoint(path / "checkpoints")
    if newest is None:
        raise CheckpointError(" ".join([f"{path} holds no finished checkpoint.", *passed_over]))
    if passed_over:
        log.warning(f"Using {newest}. {' '.join(passed_over)}")
    return newest


def put_back(folder: Path) -> None:
    """Give checkpoints that a killed writer had moved aside and not yet replaced their names again."""
    for aside in folder.glob(f".{PREFIX}*.replaced.tmp"):
        final = folder / aside.name[1:].split(".")[0]
        if not final.exists():
            with contextlib.suppress(FileNotFoundError):  # another reader was faster
                aside.rename(final)


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders that look like checkpoints, oldest first; none of them verified."""
    try:
        entries = list(
            folder.iterdir()
        )  # unlike glob, it does not take an unreadable folder for an empty one
    except FileNotFoundError:
        return []
    named = [path for path in entries if path.name.startswith(PREFIX)]
    found = [path for path in named if path.name[len(PREFIX) :].isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that matches its manifest, and why newer ones were passed over."""
    with contextlib.suppress(OSError):  # a folder one may only read
        put_back(folder)
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return Checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


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
    """What a checkpoint's manifest says, compared with no file.

    Raises:
        CheckpointError: it is missing or damaged.
        OSError: it is there and cannot be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        (
            manifest["format_version"],
            manifest["step"],
            list(manifest["parts"]),
            manifest["files"].items(),
        )
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise _unreadable(path / MANIFEST, error) from error
        raise CheckpointError(
            f"{path} is no complete checkpoint: its {MANIFEST} is missing."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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


def _matches(path: Path, expected: Any) -> bool:
    """Whether a file has the recorded content. A file that cannot be read for now is no damaged one: OSError."""
    try:
        return size_and_digest(path) == expected
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{path} cannot be read ({error.strerror}). That does not mean it is damaged, so nothing was "
        "changed: mend permissions, disk or network, and start again.",
    )
