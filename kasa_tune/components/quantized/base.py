"""The frozen linears of a model in NF4: which ones, what they take, and their copy on disk.

Quantization happens once in the life of a run. The result lies next to the run's checkpoints, and every checkpoint
names it by its checksum: a run goes on with the same bits, and needs no calibration for it.
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
    quantize_workspace,
    quantized_bytes,
)
from kasa_tune.components.models.loading import block_linears, put_weight

FOLDER = "quantized_base"  # in a run's output_dir, beside its checkpoints


def quantized_linears(model: nn.Module, block_size: int) -> dict[str, nn.Module]:
    """Names and modules of the linears to quantize: all in the transformer's blocks, with or without an adapter.

    Embedding, norms and output projection keep their precision, as in QLoRA.

    Args:
        model: on any device, meta included.
        block_size: weights that share a scale.

    Raises:
        ValueError: a layer's weight does not divide into such blocks.
    """
    linears = block_linears(model)
    for name, linear in linears.items():
        check_quantizable(linear.weight.shape, block_size, name)
    return linears


def linears_in_nf4(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The model's linears whose weights a run had quantized; none of a run on a full-precision base.

    Args:
        model: on any device.
        checkpoint: one of the run's.
    """
    if not checkpoint.has_quantized_base:
        return {}
    return quantized_linears(model, checkpoint.config["quantization"]["block_size"])


def keep_quantized(folder: Path, weights: Mapping[str, Tensor], known: str | None = None) -> str:
    """Write the NF4 weights, whole or not at all.

    Args:
        folder: FOLDER in the run's output_dir; an older copy in it is replaced.
        weights: NF4, by the names of the linears from :func:`quantized_linears`.
        known: their checksum, if they were loaded; then a copy that has it stays as it is.

    Returns:
        Their checksum.

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
        checkpoint: its part ``run`` holds their checksum.
        linears: from :func:`quantized_linears`.
        device: where the model lives.

    Raises:
        CheckpointError: they are missing, damaged, of another checksum, or of other layers than the model's.
    """
    for name, weight in read_quantized(checkpoint, linears):
        put_weight(linears[name], weight.to(device))


def read_quantized(
    checkpoint: Checkpoint, linears: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """Names and NF4 weights of :func:`load_quantized`, a block at a time, on the CPU.

    Raises:
        CheckpointError: as :func:`load_quantized`.
    """
    stored = find_quantized(checkpoint)
    waiting = dict(linears)
    for part in stored.manifest["parts"]:
        for name, weight in stored.part(part).items():
            if name not in waiting or waiting.pop(name).weight.shape != weight.shape:
                raise CheckpointError(
                    f"{stored} is of another model: it has {name} {tuple(weight.shape)}."
                )
            yield name, weight
    if waiting:
        raise CheckpointError(f"{stored} is of another model: it has no {next(iter(waiting))}.")


def find_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """Where the NF4 weights that a checkpoint was trained on lie: within it (a native adapter) or beside its folder.

    Raises:
        CheckpointError: they are missing, damaged or of another checksum.
    """
    path = checkpoint.path.absolute()
    of_a_run = path.parent.name == "checkpoints" and not (path / FOLDER).is_dir()
    folder = (path.parent.parent if of_a_run else path) / FOLDER
    stored, passed_over = latest_checkpoint(folder)
    if not stored:
        found = " ".join(passed_over).replace(
            " Use an earlier checkpoint.", ""
        )  # they all need this one base
        raise CheckpointError(
            f"{path} was trained on a quantized base, which should be in {folder}. {found or 'It is not there.'} "
            "Copy it there from where it was."
        )
    if _checksum(stored.manifest) != checkpoint.run["quantized_base"]:
        raise CheckpointError(
            f"{folder} is not the quantized base that {path} was trained on: checksums differ."
        )
    return stored


class QuantizedWeights(Mapping[str, Tensor]):
    """The NF4 weights that a checkpoint was trained on, by the names of their linears; one block's are held at a time.

    Args:
        checkpoint: as in :func:`load_quantized`.
        linears: from :func:`quantized_linears`.

    Attributes:
        folder: where they lie.

    Raises:
        CheckpointError: as :func:`find_quantized`, or, when asked for, a weight is missing.
    """

    def __init__(self, checkpoint: Checkpoint, linears: Mapping[str, nn.Module]) -> None:
        self._stored, self._names = find_quantized(checkpoint), list(linears)
        self.folder = self._stored.path
        self._block, self._held = "", {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._block != _block_of(name):
            self._block = _block_of(name)
            self._held = self._stored.part(self._block)
        if name not in self._held:
            raise CheckpointError(f"{self.folder} is of another model: it has no {name}.")
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _block_of(name: str) -> str:
    """``layers.<i>`` of ``layers.<i>.attn.q_proj``."""
    return name[: name.index(".", len("layers."))]


def _checksum(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()


def base_bytes(
    model: nn.Module, linears: Mapping[str, nn.Module], *, block_size: int, scaler_block_size: int
) -> dict[str, int]:
    """Bytes of the quantized base, and of what making and using it takes besides.

    Args:
        model: built on meta.
        linears: from :func:`quantized_linears`.
        block_size: weights that share a scale.
        scaler_block_size: scales that share a scale.
    """
    weights = [linear.weight for linear in linears.values()]
    others = [
        p
        for p in model.parameters()
        if not p.requires_grad and all(p is not weight for weight in weights)
    ]
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
