"""Files of a decomposition: a folder of safetensors, each sealed with a digest and the key it was
made under.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kasa_tune.components.checkpoints.files import sync_folder, write_synced

FORMAT_VERSION = 1
UNREADABLE = (
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


class CacheError(ValueError):
    """A cached decomposition is damaged or belongs to another run."""


class KeyedFiles:
    """Files ``<name>.safetensors`` in a folder, all made under one key.

    Args:
        folder: made when something is written.
        key: what the content depends on, as JSON.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder, self.key = folder, json.loads(json.dumps(key))

    def path(self, name: str) -> Path:
        """Where a file is, or would be."""
        return self.folder / f"{name}.safetensors"

    def names(self) -> list[str]:
        """The files there are, sorted. Those that a killed run has half written begin with a dot
        and do not count.
        """
        return sorted(path.stem for path in self.folder.glob("[!.]*.safetensors"))

    def check(self) -> None:
        """Look at the header of every file.

        Raises:
            CacheError: a file is damaged or of another key; the message says what differs.
        """
        for name in self.names():
            self._metadata(self.path(name))

    def write(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Write a file, all or nothing: another run may read the folder, and this one may be killed.

        Args:
            name: of the file.
            tensors: its tensors by name, on any device.
            about: more about them, as JSON.

        Raises:
            OSError: it could not be written. What was there is still there.
        """
        content = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {
            "version": FORMAT_VERSION,
            "key": self.key,
            "layers": about,
            "sha256": _digest(content, about),
        }
        temporary = self.path(f".{name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_synced(temporary, save(content, metadata={"decomposition": json.dumps(metadata)}))
            temporary.replace(self.path(name))
            sync_folder(self.folder)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors of a file and what is said about them; None where there is no such file.

        Raises:
            CacheError: the file is damaged or of another key; the message says what differs.
        """
        path = self.path(name)
        if not path.exists():
            return None
        metadata = self._metadata(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            about, intact = (
                metadata["layers"],
                _digest(tensors, metadata["layers"]) == metadata["sha256"],
            )
        except UNREADABLE as error:
            raise self._unreadable(path, error) from error
        if not intact:
            raise CacheError(f"{path} is damaged: its content is not what was written. Delete it.")
        return tensors, about

    @contextlib.contextmanager
    def well_formed(self, name: str) -> Iterator[None]:
        """Around the code that takes a file's content apart, which may have the right digest and
        another form.

        Raises:
            CacheError: the content has another form.
        """
        try:
            yield
        except KeyError as error:
            lacking = ValueError(f"it lacks {error}")
            raise self._unreadable(self.path(name), lacking) from error
        except UNREADABLE as error:
            raise self._unreadable(self.path(name), error) from error

    def _metadata(self, path: Path) -> dict[str, Any]:
        """What a file says of itself, which costs its header alone; of another key it is refused."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads(file.metadata()["decomposition"])
            (
                metadata["version"],
                metadata["key"].items(),
                metadata["layers"].items(),
                metadata["sha256"],
            )
        except UNREADABLE as error:
            raise self._unreadable(path, error) from error
        self._check_key(path, metadata)
        return metadata

    def _unreadable(self, path: Path, error: Exception) -> CacheError:
        return CacheError(
            f"{path} is no readable decomposition ({error}). Delete it, or set another calibration.cache_dir."
        )

    def _check_key(self, path: Path, metadata: Mapping[str, Any]) -> None:
        stored = metadata["key"] if metadata["version"] == FORMAT_VERSION else {}
        wrong = [
            f"{part}: stored {stored.get(part, 'none')}, now {self.key.get(part, 'none')}"
            for part in sorted(stored.keys() | self.key.keys())
            if stored.get(part) != self.key.get(part)
        ]
        if wrong:
            raise CacheError(
                f"{path} was found under other conditions and is not used. Different: {'; '.join(wrong)}. Set "
                "another calibration.cache_dir, or delete it."
            )


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype} ".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
