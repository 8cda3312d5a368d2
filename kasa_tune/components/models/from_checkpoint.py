"""A model from the folder of its checkpoint: config.json says what it is."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from kasa_tune.architectures import (
    Architecture,
    Dropouts,
    parts_of,
    read_architecture,
    read_dropouts,
)
from kasa_tune.components.models.decoder import Decoder


def from_checkpoint(checkpoint_dir: str | Path, base_dropout: bool = False) -> Decoder:
    """Build the decoder that a checkpoint's config.json describes, without its weights.

    Args:
        checkpoint_dir: a folder in Hugging Face's layout.
        base_dropout: whether the dropouts that GPT-2's config.json names act in training, besides
            that of the adapters.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: the model is of no supported family, or config.json is damaged.
    """
    dropouts = read_dropouts(checkpoint_dir) if base_dropout else Dropouts()
    return Decoder(read_architecture(checkpoint_dir), dropouts)


def to_native(architecture: Architecture, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of a Hugging Face checkpoint to those of :class:`Decoder`, and split those
    that hold several. Each can be converted on its own.

    Args:
        architecture: of the model.
        tensors: by the file's names.

    Raises:
        ValueError: a tensor that holds several has more or fewer rows than they have.
    """
    converted = {}
    for key, tensor in tensors.items():
        parts = parts_of(architecture, key)
        last = parts[-1].rows if parts else None
        if last is not None and len(tensor) != last[1]:
            raise ValueError(
                f"{key} has {len(tensor)} rows, and config.json describes a model in which it has "
                f"{last[1]}."
            )
        for name, rows in parts:
            converted[name] = tensor if rows is None else tensor[slice(*rows)]
    return converted
