"""An adapter by itself, edit and update, for our own recipes: a checkpoint without what going on would take."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kasa_tune.components.checkpoints import read_manifest, save_checkpoint
from kasa_tune.components.checkpoints.checkpoint import MANIFEST
from kasa_tune.components.exchange.trained_run import TrainedRun
from kasa_tune.components.models.agreement import kept_architecture
from kasa_tune.components.quantized.base import FOLDER

_KEPT = (  # of the part `run`
    "step",
    "base",
    "base_digest",
    "architecture",
    "data",
    "config",
    "quantized_base",
)


def write_native(run: TrainedRun, folder: Path) -> None:
    """Write a run's adapter, and the quantized weights under it if it has such.

    Args:
        run: what to export.
        folder: exists; it becomes what ``adapter_checkpoint`` takes.
    """
    state = {key: run.state[key] for key in _KEPT if key in run.state}
    write_adapter(folder, run.adapter, kept_architecture(run.checkpoint_dir) | state)
    if run.quantized:
        _copy_checkpoint(run.quantized.folder, folder / FOLDER / run.quantized.folder.name)


def _copy_checkpoint(source: Path, target: Path) -> None:
    """Copy the files that the manifest lists, and the manifest. Anything else in the folder, such
    as a link to a file elsewhere, is not part of the checkpoint and stays where it is.
    """
    target.mkdir(parents=True)
    for name in [*read_manifest(source)["files"], MANIFEST]:
        shutil.copy2(source / name, target / name)


def write_adapter(folder: Path, adapter: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write an adapter's tensors with what it belongs to, sealed by a manifest.

    Args:
        folder: exists.
        adapter: see :func:`~kasa_tune.components.adapters.state.adapter_state_dict`.
        state: ``step``, ``base`` (fingerprint of the base weights), ``config`` (with at least ``model``), ...
    """
    written = save_checkpoint(folder, state["step"], {"adapter": dict(adapter), "run": dict(state)})
    for path in written.iterdir():
        path.rename(folder / path.name)
    written.rmdir()
