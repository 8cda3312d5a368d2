"""adapter_config.json of a LoRA that PEFT saved: what its keys may hold, which modules it means, with which values.

The file is another's: types are looked at before anything is done with them, and patterns are matched in bounded time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from kasa_tune.components.exchange.patterns import match_all
from kasa_tune.components.models.base_files import read_object

CONFIG = "adapter_config.json"

# What else a PEFT LoRA may be, which W0 - E + s·B diag(d) A does not say; every one of them is off unless asked for.
_UNSUPPORTED = {
    "modules_to_save": "it trained whole modules besides, which an adapter here does not hold",
    "trainable_token_indices": "it trained tokens' embeddings besides",
    "target_parameters": "it adapts parameters that are no linear's weight",
    "lora_bias": "its B have biases",
    "layer_replication": "it uses layers more than once",
    "alora_invocation_tokens": "it is active after some tokens alone (aLoRA)",
    "use_qalora": "it pools its inputs (QALoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "it is a router over other adapters (Arrow)",
    "monteclora_config": "it is a distribution of adapters (MonteCLoRA)",
}


def read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, its types looked at.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, a key is of a wrong type, or the adapter is none that can be imported.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no PEFT adapter: it has no {CONFIG}.")
    config = read_object(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(
            f"{folder} has peft_type {str(kind)[:100]}; only LORA, with its variants KaSA and DoRA, can be imported."
        )
    for key, (fits, words) in _TYPES.items():
        if config.get(key) is not None and not fits(config[key]):
            raise ValueError(f"{path}: {key} is {shown(config[key])}; it must be {words}.")
    _check_supported(folder, config)
    return config


def targets_of(config: Mapping[str, Any], modules: Collection[str]) -> set[str]:
    """The modules that PEFT adapts: by ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and
    ``layers_pattern`` of its config.

    Args:
        config: of a LoRA.
        modules: names of the base's modules.

    Raises:
        ValueError: a pattern is none, or takes too long.
    """

    def named(key: str) -> set[str]:
        names = config.get(key) or ()
        if isinstance(names, str):
            return set(match_all([names], modules, key=key)[0])
        ends = tuple(f".{name}" for name in names)
        return {name for name in modules if name in names or name.endswith(ends)}

    targets, layers = config.get("target_modules") or (), config.get("layers_to_transform")
    found = named("target_modules") - named("exclude_modules")
    if isinstance(targets, str) or layers in (None, []):
        return found
    given = config.get("layers_pattern") or []
    patterns = [
        rf"(?:^|.*?\.){pattern}" for pattern in ([given] if isinstance(given, str) else given)
    ]
    patterns = patterns or [r".*?\.[^.]*"]
    hits = match_all(
        [rf"(?:{pattern}\.(?P<index>\d+)\.).*" for pattern in patterns], found, key="layers_pattern"
    )
    indices: dict[str, str | None] = {}
    for hit in reversed(hits):  # the first pattern that fits tells the layer
        indices |= hit
    chosen = {str(layer) for layer in ([layers] if isinstance(layers, int) else layers)}
    whole = found & set(targets)  # named in full: not asked for their layer
    return whole | {name for name in found if indices.get(name) in chosen}


def values_of(
    config: Mapping[str, Any], patterns: str, default: str, modules: Collection[str]
) -> dict[str, Any]:
    """By module, the value of the first pattern that fits its name or the end of it, else the default.

    Args:
    config: of a LoRA.
    patterns: ``rank_pattern`` or ``alpha_pattern``.
    default: the key of the default, ``r`` or ``lora_alpha``.
    modules: their names.

    Raises:
    ValueError: a pattern is none, or takes too long.
    """
    values = config.get(patterns) or {}
    hits = match_all([rf"(.*\.)?({key})" for key in values], modules, key=patterns)
    found = dict.fromkeys(modules, config.get(default, 8))
    for value, matched in reversed(list(zip(values.values(), hits, strict=True))):
        found |= dict.fromkeys(matched, value)
    return found


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether the adapter is one of a classifier of sequences, whose head is trained whole."""
    return config.get("task_type") == "SEQ_CLS"


def is_number(value: Any, largest: float) -> bool:
    return type(value) in (int, float) and abs(value) <= largest and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    )


def _is_numbers(value: Any) -> bool:
    return type(value) is int or (
        isinstance(value, list) and all(type(number) is int for number in value)
    )


def _is_dropout(value: Any) -> bool:
    return is_number(value, 1.0) and 0 <= value < 1


# What a key may hold besides null; `r` and `lora_alpha` are looked at layer by layer.
_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"),
        (_is_names, "a name or pattern, or a list of names"),
    ),
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern", "kasa_config", "corda_config"),
        (lambda value: isinstance(value, dict), "an object"),
    ),
    **dict.fromkeys(
        ("use_rslora", "use_dora"), (lambda value: isinstance(value, bool), "true or false")
    ),
    **dict.fromkeys(
        ("bias", "base_model_name_or_path"), (lambda value: isinstance(value, str), "a text")
    ),
    "layers_to_transform": (_is_numbers, "a number or a list of numbers"),
    "lora_dropout": (_is_dropout, "at least 0 and below 1"),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or a name"),
}


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _check_supported(folder: Path, config: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} is {shown(config[key])}: {why}"
        for key, why in _UNSUPPORTED.items()
        if config.get(key) and not (key == "modules_to_save" and _is_known_whole(config))
    ]
    if config.get("kasa_config") and config.get("use_dora"):
        wrong.append("it is KaSA and DoRA at once")
    if wrong:
        raise ValueError(f"{folder} cannot be imported: {'; '.join(wrong)}.")


def _is_known_whole(config: Mapping[str, Any]) -> bool:
    """Whether what was trained whole is a classifier's head, or LLaVA's connector in full."""
    names = config["modules_to_save"]
    ends = {name.rpartition(".")[2] for name in names} if _is_names(names) else set()
    connector = ends in ({"multi_modal_projector"}, {"linear_1", "linear_2"})
    return is_classifier(config) or (connector and not isinstance(names, str))
