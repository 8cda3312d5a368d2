"""checksums.json beside an exported adapter: sizes and SHA-256 sums of its files, digest and architecture of its base.

PEFT, vLLM and llama.cpp do not look at it; the recipe ``import_adapter`` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kasa_tune.architectures import Architecture
from kasa_tune.architectures.saving import from_json
from kasa_tune.components.checkpoints.files import size_and_digest
from kasa_tune.components.models.base_files import read_object

CHECKSUMS = "checksums.json"


class ExportedFor(NamedTuple):
    """The base that an adapter was exported for, as far as its folder tells."""

    base_digest: str | None = None
    architecture: Architecture | None = None


def write_checksums(
    folder: Path,
    names: Iterable[str],
    *,
    base_digest: str,
    architecture: Mapping[str, Any] | None = None,
) -> None:
    """Write the file.

    Args:
        folder: of the adapter.
        names: of its files.
        base_digest: :func:`~kasa_tune.components.models.base_weights.weights_digest` of the base.
        architecture: of the base, in plain containers.
    """
    content = {
        "files": {name: size_and_digest(folder / name) for name in names},
        "base_digest": base_digest,
        **({"architecture": architecture} if architecture else {}),
    }
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_checksums(folder: Path) -> ExportedFor:
    """Compare an adapter's files with the sums beside them, where there are such.

    Returns:
        The base that the adapter was exported for, as far as checksums.json tells.

    Raises:
        FileNotFoundError: a file that is listed is missing.
        ValueError: a file is not what it was, or checksums.json is damaged.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return ExportedFor()
    content = read_object(path)
    files: Any = content.get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise ValueError(f"{path} is damaged: it has no sums of the files beside it.")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing, which {CHECKSUMS} lists.")
        if size_and_digest(folder / name) != expected:
            raise ValueError(
                f"{folder / name} is not the file that was exported: its SHA-256 sum differs from {CHECKSUMS}. Copy "
                f"the adapter again; if you changed the file yourself, remove {CHECKSUMS}."
            )
    digest, kept = content.get("base_digest"), content.get("architecture")
    return ExportedFor(
        digest if isinstance(digest, str) else None,
        None if kept is None else from_json(kept, path),
    )
