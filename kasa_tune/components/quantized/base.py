"""The quantized base of a model: which linears are stored in NF4, how much memory they take, and
their copy on disk.

A run quantizes its weights once. The result is stored beside the run's checkpoints, and every
checkpoint holds its checksum. A resumed run therefore has the same bits and does not calibrate
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kasa_tune.components.checkpoints import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    read_manifest,
    save_checkpoint,
)
from kasa_tune.components.linalg.nf4 import (
    check_quantizable,
    dequantize_workspace,
    is_quantized,
    quantize_workspace,
    quantized_bytes,
)
from kasa_tune.components.models.loading import block_linears, put_weight

FOLDER = "quantized_base"  # in a run's output_dir, beside its checkpoints


def quantized_linears(model: nn.Module, block_size: int) -> dict[str, nn.Module]:
    """Return the linears to quantize by name. They are all linears of the transformer's blocks,
    with or without an adapter.

    The embedding, the norms and the output projection keep their precision, as in QLoRA.

    Args:
        model: on any device, meta included.
        block_size: number of weights that share a scale.

    Raises:
        ValueError: a weight does not divide into blocks of this size.
    """
    linears = block_linears(model)
    for name, linear in linears.items():
        check_quantizable(linear.weight.shape, block_size, name)
    return linears


def linears_in_nf4(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Return the model's linears whose weights a run had quantized, by name. A run on a
    full-precision base has none.

    Args:
        model: on any device.
        checkpoint: any checkpoint of the run.

    Raises:
        CheckpointError: the run's config does not say how the base was quantized.
        ValueError: as :func:`quantized_linears`.
    """
    if not checkpoint.has_quantized_base:
        return {}
    settings = checkpoint.config.get("quantization")
    block_size = settings.get("block_size") if isinstance(settings, Mapping) else None
    if type(block_size) is not int or block_size < 1:
        raise CheckpointError(
            f"{checkpoint} was trained on a quantized base, but the config in its run.json gives "
            "no quantization.block_size."
        )
    return quantized_linears(model, block_size)


def keep_quantized(folder: Path, weights: Mapping[str, Tensor], known: str | None = None) -> str:
    """Write the NF4 weights to the disk. They appear completely or not at all.

    Args:
        folder: the folder FOLDER in the run's output_dir. An older copy in it is replaced.
        weights: NF4 weights ``(d_out, d_in)`` by the names from :func:`quantized_linears`.
        known: checksum of the weights, if they were loaded from disk. A copy that has this checksum
            is not written again.

    Returns:
        The checksum of the weights.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    if known:
        stored, _ = latest_checkpoint(folder)
        if stored and _checksum(stored.manifest) == known:
            return known
    parts: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        parts.setdefault(_block_of(name), {})[name] = weight
    return _checksum(read_manifest(save_checkpoint(folder, 0, parts)))


def load_quantized(
    checkpoint: Checkpoint, linears: Mapping[str, nn.Module], device: torch.device
) -> None:
    """Put the NF4 weights that a checkpoint was trained on into a model, bit for bit.

    Args:
        checkpoint: its part ``run`` holds the checksum of the weights.
        linears: from :func:`quantized_linears`.
        device: device of the model.

    Raises:
        CheckpointError: the weights are missing or damaged, have another checksum, or belong to
            another model.
    """
    for name, weight in read_quantized(checkpoint, linears):
        put_weight(linears[name], weight.to(device))


def read_quantized(
    checkpoint: Checkpoint, linears: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the NF4 weight ``(d_out, d_in)`` of each linear, on the CPU. One block is
    held at a time.

    The arguments are those of :func:`load_quantized`.

    Raises:
        CheckpointError: as :func:`load_quantized`.
    """
    stored = find_quantized(checkpoint)
    waiting = dict(linears)
    for part in stored.manifest["parts"]:
        for name, weight in _weights_of(stored, part).items():
            if name not in waiting or waiting.pop(name).weight.shape != weight.shape:
                raise CheckpointError(
                    f"{stored} is of another model: it has {name} {tuple(weight.shape)}."
                )
            yield name, weight
    if waiting:
        raise CheckpointError(f"{stored} is of another model: it has no {next(iter(waiting))}.")


def find_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """Find the NF4 weights that a checkpoint was trained on. A native adapter contains them. For a
    run, they lie beside its checkpoints.

    Raises:
        CheckpointError: the weights are missing or damaged, or have another checksum.
    """
    path = checkpoint.path.absolute()
    of_a_run = path.parent.name == "checkpoints" and not (path / FOLDER).is_dir()
    folder = (path.parent.parent if of_a_run else path) / FOLDER
    stored, skipped = latest_checkpoint(folder, repair=False)
    if not stored:
        # An earlier checkpoint is no remedy here, because all of them need this one base.
        found = " ".join(skipped).replace(" Use an earlier checkpoint.", "")
        raise CheckpointError(
            f"{path} was trained on a quantized base, which should be in {folder}. "
            f"{found or 'It is not there.'} Copy it there from where it was."
        )
    if _checksum(stored.manifest) != checkpoint.run["quantized_base"]:
        raise CheckpointError(
            f"{folder} is not the quantized base that {path} was trained on: the checksums differ. "
            "Copy that run's quantized base there."
        )
    return stored


class QuantizedWeights(Mapping[str, Tensor]):
    """The NF4 weights ``(d_out, d_in)`` that a checkpoint was trained on, by the names of their
    linears. The weights of one block are held at a time.

    Args:
        checkpoint: as in :func:`load_quantized`.
        linears: from :func:`quantized_linears`.

    Attributes:
        folder: the folder that holds the weights.

    Raises:
        CheckpointError: as :func:`find_quantized`. Looking up a weight raises it as well, if that
            weight is missing.
    """

    def __init__(self, checkpoint: Checkpoint, linears: Mapping[str, nn.Module]) -> None:
        self._stored, self._names = find_quantized(checkpoint), dict.fromkeys(linears)
        self.folder = self._stored.path
        self._block, self._held = "", {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._block != _block_of(name):
            self._block = _block_of(name)
            self._held = _weights_of(self._stored, self._block)
        if name not in self._held:
            raise CheckpointError(f"{self.folder} is of another model: it has no {name}.")
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _weights_of(stored: Checkpoint, part: str) -> dict[str, Tensor]:
    """Read the quantized weights of one block by the names of their linears."""
    weights = stored.part(part)
    if not isinstance(weights, dict) or not all(map(is_quantized, weights.values())):
        raise CheckpointError(f"{stored} is no quantized base: its part {part} holds other things.")
    return weights


def _block_of(name: str) -> str:
    """Return ``layers.<i>`` for a name such as ``layers.<i>.attn.q_proj``."""
    return name[: name.index(".", len("layers."))]


def _checksum(manifest: Mapping[str, object]) -> str:
    """Compute one SHA-256 sum over the sizes and sums of all files of a manifest."""
    return hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()


def base_bytes(
    model: nn.Module, linears: Mapping[str, nn.Module], *, block_size: int, scaler_block_size: int
) -> dict[str, int]:
    """Compute how many bytes the quantized base takes, and how many its quantization and its use
    take.

    Args:
        model: built on the meta device.
        linears: from :func:`quantized_linears`.
        block_size: number of weights that share a scale.
        scaler_block_size: number of scales that share a scale.

    Returns:
        Bytes by the names that the dry run prints.
    """
    weights = [linear.weight for linear in linears.values()]
    quantized = set(map(id, weights))
    others = [p for p in model.parameters() if not p.requires_grad and id(p) not in quantized]
    sizes = {
        "block_size": block_size,
        "scaler_block_size": scaler_block_size,
        "itemsize": weights[0].itemsize,
    }
    blocks: dict[str, int] = {}
    for name, linear in linears.items():
        blocks[_block_of(name)] = (
            blocks.get(_block_of(name), 0) + linear.weight.numel() * linear.weight.itemsize
        )
    largest = max(weight.numel() for weight in weights)
    return {
        "base weights in NF4": sum(quantized_bytes(weight.numel(), **sizes) for weight in weights),
        "base weights": sum(p.numel() * p.itemsize for p in others),
        "dequantizing one weight": dequantize_workspace(largest, weights[0].itemsize, block_size),
        "one block unquantized": max(blocks.values()),
        "quantizing one weight": quantize_workspace(largest, block_size),
    }
