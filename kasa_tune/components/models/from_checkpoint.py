"""A model from the folder of its checkpoint: config.json says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from kasa_tune.architectures import (
    Architecture,
    Dropouts,
    parts_of,
    read_architecture,
    read_dropouts,
)
from kasa_tune.components.models.decoder import Decoder
from kasa_tune.components.models.llava import Llava


def from_checkpoint(
    checkpoint_dir: str | Path,
    base_dropout: bool = False,
    train_connector: Literal["full", "frozen"] | None = None,
) -> Decoder:
    """Build the decoder that a checkpoint's config.json describes, without its weights. Of a LLaVA
    model it is a :class:`~kasa_tune.components.models.llava.Llava`, tower and connector included.

    Args:
        checkpoint_dir: a folder in Hugging Face's layout.
        base_dropout: whether the dropouts that GPT-2's config.json names act in training, besides
            that of the adapters.
        train_connector: of a LLaVA model, whether the connector is trained whole beside the
            adapters (``full``), or not at all (``frozen``). None stands for the former.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: the model is of no supported family, or config.json is damaged, or
            ``train_connector`` has another value or is given of a model without one.
    """
    architecture = read_architecture(checkpoint_dir)
    if train_connector not in (None, "full", "frozen"):
        raise ValueError(f"train_connector is {train_connector!r}; it must be full or frozen.")
    if architecture.vision:
        return Llava(architecture, train_connector=train_connector != "frozen")
    if train_connector:
        raise ValueError(
            f"train_connector is {train_connector}, and the model in {checkpoint_dir} has no "
            "connector. Leave it out."
        )
    dropouts = read_dropouts(checkpoint_dir) if base_dropout else Dropouts()
    return Decoder(architecture, dropouts)


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
