"""Whether the model of a config is the one that its checkpoint's config.json describes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from kasa_tune.architectures import Architecture, UnsupportedArchitectureError, read_architecture
from kasa_tune.architectures.comparing import (
    AS_STORED,
    FOLDER,
    FROM_CHECKPOINT,
    Mismatch,
    changes_beyond,
    mismatches,
)
from kasa_tune.architectures.lengths import longest_row
from kasa_tune.architectures.reading import read_with_settings, unknown_keys
from kasa_tune.architectures.saving import to_json
from kasa_tune.architectures.settings import named
from kasa_tune.components.models.inspecting import Inspected, architecture_of_model

log = logging.getLogger(__name__)

_SHOWN, _KEYS_NAMED = 8, 12  # differences in a message, and keys
_OURS = ("kasa_tune.components.models.", "torchtune.models.")


def check_base(model: Any, cfg: Mapping[str, Any], *, longest: int | None = None) -> bool:
    """Compare a config's model with the config.json of its checkpoint; see
    :func:`check_architecture`.

    Args:
        model: that the section ``model`` built, on any device.
        cfg: with the sections ``model`` and ``checkpointer``, and with ``tokenizer``, whose
            ``max_seq_len`` is the longest sequence.
        longest: tokens of the longest sequence, prompt included, where text is generated.

    Returns:
        Whether there is a config.json. A folder that is missing or holds another kind of
        checkpoint is left to those who read it.
    """
    node = cfg.get("checkpointer")
    if not node:  # a config whose bytes are counted
        return False
    folder = Path(node["checkpoint_dir"])
    if not (folder / "config.json").is_file():
        return False
    check_architecture(
        model,
        folder,
        longest=longest_row(cfg, model.max_seq_len) if longest is None else longest,
        builder=cfg["model"]["_component_"],
        model_type=conversion_of(node),
        **({} if longest is None else {"setting": "max_new_tokens"}),
    )
    return True


def conversion_of(node: Mapping[str, Any]) -> str | None:
    """How a section ``checkpointer`` converts the tensors of Hugging Face's files: a model type of
    torchtune, or :data:`~kasa_tune.architectures.comparing.AS_STORED`. None if it is not known.
    """
    component = node.get("_component_")
    if component == FOLDER:
        return AS_STORED
    return str(node.get("model_type")) if str(component).endswith("HFCheckpointer") else None


def base_architecture(folder: Path | str) -> Architecture | None:
    """The architecture of a checkpoint as a run keeps it. None if config.json is missing, or of a
    family that is not known here, as a model of one's own may have it.

    Raises:
        ValueError: config.json is damaged.
    """
    try:
        return read_architecture(folder)
    except (FileNotFoundError, UnsupportedArchitectureError):
        return None


def kept_architecture(folder: Path | str | None) -> dict[str, Any]:
    """What a run keeps of :func:`base_architecture`: ``architecture`` in plain containers.
    Nothing if there is none.
    """
    found = base_architecture(folder) if folder else None
    return {"architecture": to_json(found)} if found else {}


def check_architecture(
    model: nn.Module,
    folder: Path,
    *,
    longest: int,
    builder: str = "",
    model_type: str | None = None,
    setting: str = "tokenizer.max_seq_len",
) -> None:
    """See that a model computes what the config.json of a checkpoint says.

    Sizes, norms, biases, activation, rotary embeddings, windows, caps and scales are compared. A
    window that no sequence reaches is no difference. Sequences of more tokens than config.json
    has positions are warned of: a rotary embedding goes on beyond them. They are refused where it
    changes there, as it does with dynamic scaling, and where positions are learned.

    Of a model of one's own builder, values that its modules do not tell are named in a warning.

    Args:
        model: on any device, meta included.
        folder: of the checkpoint, with config.json.
        longest: tokens of the run's longest sequence; 0 if it has none.
        builder: dotted path of what built the model.
        model_type: how the weights are converted, see :func:`conversion_of`.
        setting: the key that makes sequences as long as ``longest``.

    Raises:
        FileNotFoundError: config.json is missing.
        ValueError: they differ. The message gives both values, config.json's key and the key to
            set. Or the family is not supported, or config.json is damaged.
    """
    own = bool(builder) and not builder.startswith(_OURS)
    try:
        found, file = architecture_of_model(model), read_with_settings(folder)
    except ValueError as error:
        if not own:
            raise
        log.warning(f"{builder} was not compared with {folder / 'config.json'}: {error}")
        return
    _warn(found, folder)
    _check_length(file[0], file[1].values, folder, longest, setting)
    wrong = mismatches(
        file,
        found.architecture,
        longest=longest,
        model_type=model_type,
        takes=_arguments(builder),
        unknown=found.unknown,
    )
    if wrong:
        raise ValueError(message(wrong, folder, builder))


def message(wrong: list[Mismatch], folder: Path, builder: str) -> str:
    """What differs, and what to set."""
    name = builder.rpartition(".")[2]
    told = "; ".join(one.sentence() for one in wrong[:_SHOWN])
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    prefix = name.partition("_")[0]
    kinds = ("kasa", "lora", "corda")
    advice = FROM_CHECKPOINT.format(prefix if prefix in kinds else kinds[0])
    return (
        f"{folder / 'config.json'} describes another model than {name or 'the given one'}: {told}"
        f"{more}."
        + (
            ""
            if all(one.setting for one in wrong)
            else f" Set model._component_={advice}, which takes every value from config.json."
        )
    )


def _warn(found: Inspected, folder: Path) -> None:
    """Name what cannot be compared."""
    if found.unknown:
        told = ", ".join(f"{name} ({module})" for name, module in sorted(found.unknown.items()))
        log.warning(
            f"These values of the model are not known, and were not compared with "
            f"{folder / 'config.json'}: {told}."
        )
    if keys := unknown_keys(folder):
        told = ", ".join(map(named, keys[:_KEYS_NAMED]))
        told += f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
        log.warning(
            f"{folder / 'config.json'} has keys that nothing is known about here: "
            f"{told}. If one of them changes what the model computes, results are wrong."
        )


def _check_length(
    file: Architecture, values: Mapping[str, Any], folder: Path, longest: int, setting: str
) -> None:
    if longest <= file.max_seq_len:
        return
    key = "n_positions" if file.learned_positions else "max_position_embeddings"
    words = (
        f"Sequences have up to {longest} tokens ({setting}), and {key} is "
        f"{file.max_seq_len} in {folder / 'config.json'}"
    )
    if file.learned_positions:
        raise ValueError(
            f"{words}: the model has learned as many positions and has no others. Lower {setting}."
        )
    if changes_beyond(values):
        raise ValueError(
            f"{words}: beyond that its rotary embedding is another one (dynamic scaling), which is "
            f"not supported. Lower {setting}: {file.max_seq_len} tokens are allowed."
        )
    log.warning(f"{words}: the model was not made for sequences that long.")


def _arguments(builder: str) -> Collection[str]:
    """Names of the arguments that a builder takes; none if it cannot be told."""
    module, _, name = builder.rpartition(".")
    try:
        return inspect.signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return ()
