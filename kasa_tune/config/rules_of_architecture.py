"""The model of a config is the one that its checkpoint's config.json describes, as far as that can
be told without building it. The run compares the model itself.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kasa_tune.architectures.comparing import (
    AS_STORED,
    FOLDER,
    FROM_CHECKPOINT,
    Mismatch,
    mismatches,
)
from kasa_tune.architectures.files import weight_files
from kasa_tune.architectures.lengths import longest_row
from kasa_tune.architectures.reading import read_architecture, read_with_settings
from kasa_tune.architectures.shapes import wrong_shapes
from kasa_tune.architectures.torchtune_builders import built_by
from kasa_tune.config import signatures
from kasa_tune.config.entries import Problem, shortened, show
from kasa_tune.config.file_kinds import settings_of

_OURS = "kasa_tune.components.models."
_KINDS = ("kasa", "lora", "corda")


def numbers_of_heads(key: str, path: str) -> Iterator[Problem]:
    """What torchtune reads from config.json is there. Without `num_key_value_heads` there are as many as heads."""
    try:
        settings = settings_of(path)
    except ValueError as error:
        yield Problem(key, f"{show(path)} {shortened(str(error), 120)}")
        return
    for name, required in (
        ("num_attention_heads", True),
        ("hidden_size", True),
        ("num_key_value_heads", False),
        ("head_dim", False),
    ):
        value = settings.get(name)
        if value is None and not required:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            given = f"{name} {show(value)}" if name in settings else f"no {name}"
            yield Problem(key, f"{show(path)} has {given}; expected an integer, at least 1")
            return


def architecture_fits(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The model of the config is the one in config.json, if that is there."""
    node, base = cfg.get("model") or {}, cfg.get("checkpointer") or {}
    key, folder = "checkpointer.checkpoint_dir", base.get("checkpoint_dir")
    builder = str(node.get("_component_"))
    component = str(base.get("_component_"))
    is_hf = component.endswith("HFCheckpointer") or component == FOLDER
    path = os.path.join(folder, "config.json") if isinstance(folder, str) else ""
    if not is_hf or not builder.startswith(_OURS) or not os.path.isfile(path):
        return
    name, values = _built_from(builder)
    model = built_by(name, values | node)
    if model is None or (component != FOLDER and any(numbers_of_heads(key, path))):
        return  # another rule names those
    try:
        file = read_with_settings(os.path.dirname(path))
    except ValueError as error:  # among them that the family is not supported
        yield Problem(key, str(error))
        return
    longest = longest_row(cfg, model.max_seq_len)
    for one in mismatches(
        file,
        model,
        longest=longest if "optimizer" in cfg and isinstance(longest, int) else 0,
        model_type=AS_STORED if component == FOLDER else str(base.get("model_type")),
        takes=signatures.static(builder).parameters,
    ):
        yield _problem(one, builder, path)


def weights_fit(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The weights, where they are there, have the shapes that config.json tells. A dry run reads none."""
    base = cfg.get("checkpointer") or {}
    component, given = str(base.get("_component_")), base.get("checkpoint_dir")
    is_folder = component == FOLDER
    if cfg.get("dry_run") or not isinstance(given, str):
        return
    if not (is_folder or component.endswith("HFCheckpointer")):
        return
    folder, listed = Path(given), base.get("checkpoint_files")
    try:
        names = listed if isinstance(listed, list) and not is_folder else weight_files(folder)
        if all(name.endswith(".safetensors") for name in names):
            told = read_architecture(folder)
            wrong = wrong_shapes(told, [folder / name for name in names])
        else:
            wrong = []
    except (OSError, ValueError):  # other rules and the run name those
        return
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        yield Problem("checkpointer.checkpoint_dir", f"got {show(given)}, where {wrong[0]}{more}")


def _built_from(builder: str) -> tuple[str, dict[str, Any]]:
    try:
        return signatures.built_from(builder)
    except (signatures.UnreadableError, signatures.NoSuchNameError):
        return "", {}


def _problem(one: Mismatch, builder: str, path: str) -> Problem:
    name = builder.rpartition(".")[2]
    key, _, value = (one.setting or "").partition("=")
    prefix = name.partition("_")[0]
    advice = f"set it to {value}"
    if not key:
        key = "model._component_"
        kind = FROM_CHECKPOINT.format(prefix if prefix in _KINDS else _KINDS[0])
        advice = f"set it to {kind}, which takes every value from config.json"
    wrong = f"in {show(path)} {one.key} is {one.in_file}, and {name} has {one.in_model}"
    return Problem(key, f"{wrong}; {advice}")


OF_ARCHITECTURE = (architecture_fits, weights_fit)  # each where those before found nothing
