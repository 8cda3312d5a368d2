"""Reading step checkpoints, which hold everything that a run needs to resume bit for bit.

A checkpoint is a folder ``step_<n>`` of safetensors and JSON files. It is written under a temporary
name and flushed to the disk. It is then sealed with a manifest of sizes and SHA-256 sums, and only
then renamed. A checkpoint that does not match its manifest is never read.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kasa_tune.architectures import Architecture
from kasa_tune.architectures.comparing import told_apart
from kasa_tune.architectures.lengths import longest_row
from kasa_tune.architectures.saving import from_json
from kasa_tune.components.checkpoints.files import is_endless, size_and_digest
from kasa_tune.components.checkpoints.serialization import decode
from kasa_tune.json_text import parse_json

log = logging.getLogger(__name__)

_MAY_DIFFER = ("dropout", "checkpoint_dir")  # of a model section, for the same model
MANIFEST = "manifest.json"
PREFIX = "step_"
FORMAT_VERSION = 1
# What decoding a part raises if the part is not of the form that a run writes.
_MALFORMED = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
    SafetensorError,
)  # fmt: skip
_FILE_NAME = re.compile(r"[^/\\\0\ud800-\udfff]{1,255}")


class CheckpointError(ValueError):
    """A checkpoint is missing, is damaged, or belongs to another model."""


class Checkpoint:
    """A checkpoint on disk. Opening it compares every file with the manifest. Its parts are read
    when they are used.

    Args:
        path: its folder, which is ``<output_dir>/checkpoints/step_<n>`` or a native adapter.
        resumes: True if the run goes on from this checkpoint. False if the run takes only the
            adapters from it.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """

    def __init__(self, path: Path, *, resumes: bool = False) -> None:
        self.path, self.resumes = path, resumes
        self.manifest = verify_checkpoint(path)

    def __str__(self) -> str:
        return str(self.path)

    def part(self, name: str) -> Any:
        """Read one part, with its tensors on the CPU. Every call reads it from the disk again.

        Raises:
            CheckpointError: the checkpoint has no such part.
        """
        return load_part(self.path, name)

    @cached_property
    def run(self) -> dict[str, Any]:
        """Part ``run``: the step, the epoch, the batches done, the fingerprints of data and base,
        and the config in plain containers.
        """
        run = self.part("run")
        if not isinstance(run, Mapping):
            raise CheckpointError(f"{self}: its run.json holds no step and config of a run.")
        return dict(run)

    @property
    def config(self) -> dict[str, Any]:
        """Config of the run that wrote the checkpoint, in plain containers."""
        config = self.run.get("config")
        if not isinstance(config, Mapping):
            raise CheckpointError(f"{self}: its run.json holds no step and config of a run.")
        return dict(config)

    @cached_property
    def adapter(self) -> dict[str, Tensor]:
        """Part ``adapter``: tensors by their names ``<module>.lora_*``. A tensor has the shape of
        its parameter or buffer, such as ``(rank, d_in)`` for ``lora_a.weight``.
        """
        return self.part("adapter")

    @property
    def has_quantized_base(self) -> bool:
        """Whether the adapters were trained on NF4 weights, which are stored beside the
        checkpoint.
        """
        return "quantized_base" in self.run

    def check_data(self, fingerprint: str) -> None:
        """Raise ValueError if the run resumes from this checkpoint and the checkpoint was trained
        on other data.
        """
        if self.resumes and self.run["data"] != fingerprint:
            raise ValueError(
                f"{self} was trained on other data than the config's dataset and tokenizer now "
                "give. Set both back to what that run used, or start a new run in another "
                "output_dir."
            )

    @property
    def architecture(self) -> Architecture | None:
        """What the config.json of the base said when the run was trained. None of a run that did
        not keep it.

        Raises:
            ValueError: run.json holds something else there.
        """
        kept = self.run.get("architecture")
        return None if kept is None else from_json(kept, f"{self}: run.json")

    def longest(self, otherwise: int) -> int:
        """Tokens of the longest sequence that the run was trained on, as far as its config says;
        else ``otherwise``.
        """
        return longest_row(self.config, otherwise)

    def check_belongs(
        self,
        *,
        base_fingerprint: str,
        model: Mapping[str, Any],
        architecture: Architecture | None = None,
    ) -> None:
        """Raise an error if the checkpoint was trained on another base or with another ``model``
        section.

        Args:
            base_fingerprint: fingerprint of the present base weights, see ``weights_fingerprint``
                of the models room.
            model: the resolved ``model`` section of the present config. Only ``dropout`` may
                differ, and ``checkpoint_dir``, which says where the base lies.
            architecture: that the config.json of the present base describes, if it is known.

        Raises:
            CheckpointError: they differ. The message names the key, the saved value and the given
                value.
        """
        if self.run.get("base") != base_fingerprint:
            raise CheckpointError(
                f"{self} belongs to other base weights than those given. Set "
                "checkpointer.checkpoint_dir (checkpoint_dir for an export) to the base that it "
                "was trained on."
            )
        trained = self.architecture
        if trained and architecture:
            longest = self.longest(trained.max_seq_len)
            if told := told_apart(trained, architecture, longest=longest):
                raise CheckpointError(
                    f"{self} was trained on these weights with another config.json: {told}. Give "
                    "the config.json that it was trained with."
                )
        self.check_model(model)

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Compare the section ``model`` of a config with that of the checkpoint's.

        Args:
            model: as a plain mapping. ``dropout``, which may differ, and ``checkpoint_dir``, which
                says where the base lies, do not count.

        Raises:
            CheckpointError: they differ. The message names the key, the saved value and the given
                value.
        """
        saved, unset = self.config.get("model"), "unset"
        if not isinstance(saved, Mapping):
            raise CheckpointError(f"{self}: the config in its run.json has no section model.")
        wrong = [
            f"model.{key}: checkpoint {saved.get(key, unset)!r}, config {model.get(key, unset)!r}"
            for key in sorted(saved.keys() | model.keys())
            if key not in _MAY_DIFFER and saved.get(key) != model.get(key)
        ]
        if wrong:
            raise CheckpointError(f"{self} belongs to another model: {'; '.join(wrong)}.")


def find_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at a path, or the newest undamaged checkpoint of the run whose
    ``output_dir`` it is.

    Nothing is written in the folder, which may belong to somebody else.

    Raises:
        CheckpointError: there is none. The message says which checkpoints were skipped and why.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder: give a run's output_dir or one of its checkpoints."
        )
    if not (path / "checkpoints").is_dir():
        if not (path / MANIFEST).exists():
            raise CheckpointError(
                f"{path} is not a complete checkpoint (it has no {MANIFEST}) and not a run's "
                "output_dir (it has no folder checkpoints)."
            )
        return Checkpoint(path)
    newest, skipped = latest_checkpoint(path / "checkpoints", repair=False)
    if newest is None:
        raise CheckpointError(" ".join([f"{path} holds no finished checkpoint.", *skipped]))
    if skipped:
        log.warning(f"Using {newest}. {' '.join(skipped)}")
    return newest


def put_back(folder: Path) -> None:
    """Restore checkpoints that a killed writer had moved aside to replace them and did
    not replace.
    """
    for aside, final in _moved_aside(folder):
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed it
            aside.rename(final)


def _moved_aside(folder: Path) -> list[tuple[Path, Path]]:
    """Checkpoints that were moved aside and not replaced, each with the name that it should have."""
    aside = {path: path.name[1:].split(".")[0] for path in folder.glob(f".{PREFIX}*.replaced.tmp")}
    return [
        (path, folder / name)
        for path, name in aside.items()
        if name[len(PREFIX) :].isdecimal() and not (folder / name).exists()
    ]


def list_checkpoints(folder: Path) -> list[Path]:
    """List the folders that are named like checkpoints, oldest first. None of them is verified."""
    try:
        # Unlike `glob`, `iterdir` fails for an unreadable folder and does not call it empty.
        entries = list(folder.iterdir())
    except FileNotFoundError:
        return []
    named = [path for path in entries if path.name.startswith(PREFIX)]
    found = [path for path in named if path.name[len(PREFIX) :].isdecimal() and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name[len(PREFIX) :])


def latest_checkpoint(folder: Path, *, repair: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """Open the newest checkpoint that matches its manifest. The second value says why newer ones
    were skipped.

    Args:
        folder: folder of the checkpoints.
        repair: whether what a killed writer left is put right first. Otherwise nothing is written,
            and a checkpoint that was moved aside is read where it is.
    """
    if repair:
        with contextlib.suppress(OSError):  # the folder may be read-only
            put_back(folder)
    found = {path: path for path in list_checkpoints(folder)}
    if not repair:
        found |= {final: aside for aside, final in _moved_aside(folder)}
    skipped: list[str] = []
    for path in (found[name] for name in sorted(found, key=step_of, reverse=True)):
        try:
            return Checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest, and return the manifest.

    Raises:
        CheckpointError: a file is missing or differs from the manifest. Or the manifest is missing,
            unreadable, or that of another checkpoint.
        OSError: a file exists and cannot be read.
    """
    manifest = read_manifest(path)
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest['format_version']}, this version reads "
            f"{FORMAT_VERSION}."
        )
    unlisted = [name for name in manifest["parts"] if f"{name}.json" not in manifest["files"]]
    named_step = path.name.removeprefix(PREFIX)
    if unlisted or (
        path.name != named_step and named_step.isdecimal() and int(named_step) != manifest["step"]
    ):
        raise CheckpointError(
            f"{path} is damaged: its {MANIFEST} is of step {manifest['step']} and lacks the files "
            f"of {', '.join(unlisted) or 'no part'}. Use an earlier checkpoint."
        )
    for name, expected in manifest["files"].items():
        if not _matches(path / name, expected):
            raise CheckpointError(
                f"{path} is damaged: {name} is missing or differs from the manifest. Use an "
                "earlier checkpoint."
            )
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint without comparing any file with it.

    Raises:
        CheckpointError: the manifest is missing or damaged.
        OSError: the manifest exists and cannot be read.
    """
    try:
        if is_endless(path / MANIFEST):
            raise ValueError("it is not a regular file")
        manifest = parse_json((path / MANIFEST).read_text(encoding="utf-8"))
        _check_form(manifest)
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise _unreadable(path / MANIFEST, error) from error
        raise CheckpointError(
            f"{path} is not a complete checkpoint: its {MANIFEST} is missing."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: its {MANIFEST} is missing or unreadable "
            f"({error!s:.200})."
        ) from None
    return manifest


def _check_form(manifest: Any) -> None:
    """Raise ValueError, KeyError or TypeError if this is not what a manifest holds."""
    for key, kind in {"format_version": int, "step": int, "parts": list, "files": dict}.items():
        if not isinstance(manifest[key], kind):
            raise ValueError(f"its {key} is a {type(manifest[key]).__name__}")
    for name in [*manifest["parts"], *manifest["files"]]:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r:.40} is not the name of a file in it")


def load_part(path: Path, name: str) -> Any:
    """Read one part of a verified checkpoint. Its tensors are on the CPU and may have any shape.

    Raises:
        CheckpointError: the checkpoint has no such part, or the part is not of the form that
            :func:`save_checkpoint` writes, although it matches the manifest.
    """
    files = read_manifest(path)["files"]  # a file that is not listed here was never verified
    if f"{name}.json" not in files:
        raise CheckpointError(f"{path} has no part {name!r}.")
    try:
        tensors = load_file(path / f"{name}.safetensors") if f"{name}.safetensors" in files else {}
        text = (path / f"{name}.json").read_text(encoding="utf-8")
        return decode(parse_json(text), tensors)
    except _MALFORMED as error:
        raise CheckpointError(
            f"{path} is damaged: its part {name} is not of the form that a run writes "
            f"({type(error).__name__}: {error!s:.200}). Use an earlier checkpoint."
        ) from error


def _matches(path: Path, expected: Any) -> bool:
    """Tell whether a file has the content that the manifest records.

    Raises:
        OSError: the file exists and cannot be read. It may be intact, so this is not reported as
            damage.
    """
    try:
        return not is_endless(path) and size_and_digest(path) == expected
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{path} cannot be read ({error.strerror}). That does not mean it is damaged, so nothing "
        "was changed. Check permissions, disk and network, and start again.",
    )
