"""The head of a classifier that PEFT trained whole beside an adapter."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from kasa_tune.architectures.encoder_names import encoder_name, hub_name
from kasa_tune.components.exchange.peft_files import PeftAdapter
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.components.models.encoder_folder import open_with_head

_TASK = "classification"


def read_head(peft: PeftAdapter, model: Encoder, folder: Path) -> dict[str, Tensor]:
    """Read the head from an adapter's file, and what was not trained of it from the base.

    Args:
        peft: of a classifier of sequences.
        model: the base as a classifier, on any device. Its number of labels does not matter.
        folder: of the base.

    Returns:
        ``head.dense.weight (d, d)``, ``head.dense.bias (d,)``, ``head.out_proj.weight (n, d)`` and
        ``head.out_proj.bias (n,)`` for n labels, in float32.

    Raises:
        ValueError: something else was trained whole, a part of the head is neither in the adapter nor in the base, has
            another shape or is not finite.
    """
    kind, found = model.architecture.model_type, {}
    for name in peft.whole:
        ours = encoder_name(kind, _TASK, name)
        if ours is None or not ours.startswith("head."):
            raise ValueError(
                f"{peft.folder} cannot be imported: it trained {name} whole. Beside an adapter, the head of a "
                "classifier alone is trained whole here."
            )
        found[ours] = peft.read_whole(name)
    stored = open_with_head(folder)
    for name in (f"head.{name}" for name, _ in model.head.named_parameters()):
        if name not in found and name in stored:
            found[name] = stored[name].float()
        elif name not in found:
            theirs = hub_name(kind, _TASK, name)
            raise ValueError(
                f"{peft.folder} cannot be imported: its file has no {theirs}, and the base in {folder} has none "
                "either. It was drawn at random when the adapter was trained, so the trained scores are lost. Train "
                f"with modules_to_save that name {theirs.rpartition('.')[0]}."
            )
    _check_shapes(peft, found, model.architecture.embed_dim)
    return found


def _check_shapes(peft: PeftAdapter, head: dict[str, Tensor], width: int) -> None:
    count = len(head["head.out_proj.bias"]) if head["head.out_proj.bias"].ndim == 1 else 0
    wanted = {
        "head.dense.weight": (width, width),
        "head.dense.bias": (width,),
        "head.out_proj.weight": (count, width),
        "head.out_proj.bias": (count,),
    }
    for name, shape in wanted.items():
        if tuple(head[name].shape) != shape or not count:
            raise ValueError(
                f"{peft.folder}: its {name} is {tuple(head[name].shape)}, and {shape} belongs to an encoder of width "
                f"{width}. The adapter is of another base model."
            )
