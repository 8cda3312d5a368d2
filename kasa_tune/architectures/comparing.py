"""Whether a model computes what a checkpoint's config.json says, and what to set if it does not.

Nothing here needs torch: a model is compared by its :class:`~kasa_tune.architectures.Architecture`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from kasa_tune.architectures.architecture import (
    Architecture,
    Difference,
    Layer,
    Rotary,
    Vision,
    differences,
)
from kasa_tune.architectures.settings import Settings, shown

# Conversions of a checkpoint's tensors, by the model type of torchtune's checkpointer that chooses
# them. These leave the rows of queries and keys where they are. Those of other model types reorder
# them, for a rotary embedding that rotates pairs of neighbours.
AS_STORED = "as stored"  # of our own CheckpointFolder
KEEPS_ROWS = frozenset({"QWEN2", "PHI3_MINI", "PHI4", AS_STORED})
# A checkpointer's model type for each family that torchtune can read.
MODEL_TYPES: Mapping[str, str] = {
    "llama": "LLAMA3",
    "mistral": "MISTRAL",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "qwen2": "QWEN2",
    "phi3": "PHI3_MINI",
}
PAIRS = "layers.rotary.interleaved"
FOLDER = "kasa_tune.components.models.CheckpointFolder"
FROM_CHECKPOINT = "kasa_tune.components.models.{}_from_checkpoint"

# config.json's keys of a value: the first of them that stands in the file is named.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "num_attention_heads", "n_head"),
    "embed_dim": ("hidden_size", "n_embd"),
    "intermediate_dim": ("intermediate_size", "n_inner"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "parallel": ("use_parallel_residual",),
    "biases": ("attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "use_bias", "bias"),
    "activation": ("hidden_activation", "hidden_act", "activation_function"),
    "tied": ("tie_word_embeddings",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "attention_scale": (
        "attention_multiplier",
        "query_pre_attn_scalar",
        "scale_attn_weights",
        "head_dim",
    ),
    "layers.attention_scale": ("scale_attn_by_inverse_layer_idx",),
    "attention_cap": ("attn_logit_softcapping",),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "logit_cap": ("final_logit_softcapping",),
    "query_temperature": ("rope_parameters.llama_4_scaling_beta",),
    "experts.count": ("num_experts", "num_local_experts"),
    "experts.active": ("num_experts_per_tok",),
    "experts.intermediate_dim": ("moe_intermediate_size", "intermediate_size"),
    "experts.normalized": ("norm_topk_prob",),
    "layers.window": ("sliding_window",),
    "layers.sparse": ("mlp_only_layers", "decoder_sparse_step"),
    "layers.rotary": ("no_rope_layers", "no_rope_layer_interval", "layer_types"),
}
# The same of a rotary embedding: under the keys of transformers 5, and under the old ones.
_OF_ROTARY = {
    "base": ("rope_theta",),
    "fraction": ("partial_rotary_factor",),
    "scaling": ("rope_type", "type"),
}
# The builders' arguments, and what turns an architecture's value into theirs.
_ARGUMENTS = {
    **{
        name: name
        for name in (
            "vocab_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "embed_dim",
            "intermediate_dim",
            "num_layers",
            "norm_eps",
        )
    },
    "tied": "tie_word_embeddings",
    "attention_cap": "hidden_capping_value",
    "logit_cap": "final_capping_value",
    "attention_scale": "query_pre_attn_scalar",
    "layers.window": "sliding_window_size",
    "layers.rotary.base": "rope_base",
    "layers.rotary.options.factor": "scale_factor",
}


class Mismatch(NamedTuple):
    """A value in which a model is not what config.json says.

    Attributes:
        name: of the value, without the number of a layer, such as ``layers.rotary.base``.
        key: config.json's, by the name that stands in the file.
        in_file: the value in words, with what it means where that is not plain.
        in_model: the model's, in words.
        setting: the config's key to set and its value, such as ``model.rope_base=500000``. None if
            the builder takes no such argument.
    """

    name: str
    key: str
    in_file: str
    in_model: str
    setting: str | None

    def sentence(self) -> str:
        """The mismatch in half a sentence."""
        advice = f" (set {self.setting})" if self.setting else ""
        return f"{self.key} is {self.in_file}, and the model has {self.in_model}{advice}"


def on_files(model: Architecture, model_type: str | None) -> Architecture:
    """What a model of torchtune computes on a checkpoint's own tensors, which a conversion may
    reorder for its rotary embedding.

    Args:
        model: as :func:`~kasa_tune.components.models.inspecting.architecture_of_model` finds it.
        model_type: of the checkpointer, or :data:`AS_STORED`. None if it is not known.
    """
    if model_type is None or model_type in KEEPS_ROWS:
        return model
    layers = tuple(
        replace(layer, rotary=replace(layer.rotary, interleaved=not layer.rotary.interleaved))
        if layer.rotary
        else layer
        for layer in model.layers
    )
    return replace(model, layers=layers)


def unlike(
    expected: Architecture,
    model: Architecture,
    *,
    longest: int,
    unknown: Collection[str] = (),
) -> list[Difference]:
    """The values in which a model differs from what is expected of it, for the sequences of a run.

    Left out are the families' names, the longest sequences, which are no part of what is computed,
    and windows that hold the whole sequence.

    Args:
        expected: of config.json, or of a run.
        model: of the model.
        longest: tokens of the run's longest sequence; 0 if it has none.
        unknown: names of values of the model that are not known.
    """
    found = differences(_within(expected, longest), _within(model, longest))
    found = [part for difference in found for part in _parts(difference)]
    scaled = {_layer(one.name) for one in found if one.name.endswith(".scaling")}
    return [
        one
        for one in found
        if not any(_is_of(name_of(one.name), name) for name in unknown)
        and not (".options" in one.name and _layer(one.name) in scaled)
    ]


def name_of(name: str) -> str:
    """The name of a difference without the number of its layer."""
    return re.sub(r"^layers\.\d+", "layers", name)


def _layer(name: str) -> str:
    return name.partition(".rotary")[0]


def _is_of(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}.")


def _within(found: Architecture, longest: int) -> Architecture:
    def seen(layer: Layer) -> Layer:
        return replace(layer, window=None) if layer.window and layer.window >= longest else layer

    return replace(found, model_type="", max_seq_len=0, layers=tuple(map(seen, found.layers)))


def _parts(difference: Difference) -> list[Difference]:
    """A difference of two mappings as one of each key."""
    expected, given = difference.expected, difference.given
    if not (isinstance(expected, Mapping) and isinstance(given, Mapping)):
        return [difference]
    return [
        Difference(f"{difference.name}.{key}", expected.get(key), given.get(key))
        for key in sorted(expected.keys() | given.keys())
        if expected.get(key) != given.get(key)
    ]


def mismatches(
    file: tuple[Architecture, Settings],
    model: Architecture,
    *,
    longest: int,
    model_type: str | None = None,
    takes: Collection[str] = (),
    unknown: Collection[str] = (),
) -> list[Mismatch]:
    """The values in which a model is not what config.json says, with their keys.

    Args:
        file: the architecture of config.json, and its values.
        model: of the model.
        longest: tokens of the run's longest sequence; 0 if it has none.
        model_type: of the checkpointer, see :func:`on_files`.
        takes: names of the arguments that the model's builder takes.
        unknown: names of values of the model that are not known.
    """
    expected, settings = file
    conversion = _conversion(expected, model, model_type)
    found = []
    if model_type is None:
        unknown = {*unknown, PAIRS}
    elif _scrambles(model, model_type):
        unknown = {*unknown, PAIRS}
        key, value = "model_type", str(settings.values.get("model_type"))
        words = f"a rotary embedding that the conversion of {model_type} does not suit"
        found.append(Mismatch(PAIRS, key, value, words, conversion))
    given = on_files(model, model_type)
    others = unlike(expected, given, longest=longest, unknown=unknown)
    following = _following({one.name for one in others}, expected, given)
    for one in others:
        if one.name in following:
            continue
        setting = _setting(one, takes)
        if name_of(one.name) == PAIRS:
            setting = conversion
        found.append(_mismatch(one, expected, settings, setting))
    return found


def _following(names: Collection[str], *both: Architecture) -> set[str]:
    """Those of the values that differ which follow from others that differ."""
    found = set()
    if "head_dim" in names and all(_plain_scale(one) for one in both):
        found.add("attention_scale")
    if "embed_dim" in names:
        found.add("embedding_scale")
    sizes = {"embed_dim", "num_heads"} & {*names}
    if sizes and all(one.head_dim == one.embed_dim // one.num_heads for one in both):
        found.add("head_dim")
    return found


def _plain_scale(one: Architecture) -> bool:
    return one.attention_scale == one.head_dim**-0.5


def _conversion(expected: Architecture, model: Architecture, given: str | None) -> str | None:
    """What to set so that tensors are converted for the model, if the conversion is the fault."""
    if model.model_type:  # ours, which carries its architecture
        return f"checkpointer._component_={FOLDER}" if given != AS_STORED else None
    right = MODEL_TYPES.get(expected.model_type)
    return f"checkpointer.model_type={right}" if right and given not in (right, AS_STORED) else None


def _scrambles(model: Architecture, model_type: str) -> bool:
    """Whether a conversion reorders rows for another rotary embedding than the model's."""
    neighbours = [layer.rotary.interleaved for layer in model.layers if layer.rotary]
    return model_type not in KEEPS_ROWS and not all(neighbours)


def _mismatch(
    found: Difference, expected: Architecture, settings: Settings, setting: str | None
) -> Mismatch:
    name = name_of(found.name)
    key, value = _key(found.name, expected, settings)
    in_file = _words(found.expected)
    if key == "model_type":
        in_file = f"{value}, whose {_title(name)} is {in_file}"
    elif value is None:
        in_file = f"{in_file} by default"
    elif _words(value) != in_file:
        in_file = f"{_words(value)}, so {_title(name)} is {in_file}"
    return Mismatch(name, key, in_file, _words(found.given), setting)


def _setting(found: Difference, takes: Collection[str]) -> str | None:
    """What makes the two the same, where one key does."""
    name, value = name_of(found.name), found.expected
    argument = _ARGUMENTS.get(name)
    if argument in takes and value is not None:
        if argument == "query_pre_attn_scalar":
            value = round(value**-2)
        return f"model.{argument}={_words(value)}"
    if name == "layers.window" and found.expected and not found.given:
        return f"tokenizer.max_seq_len={found.expected}"
    return None


def _key(name: str, expected: Architecture, settings: Settings) -> tuple[str, Any]:
    """config.json's key of a value as it stands there, and what it says. ``model_type`` if the
    family alone decides; None for the value if no key stands there.
    """
    plain = name_of(name)
    part, _, leaf = plain.partition("layers.rotary.")
    if leaf and not part:
        keys = _rotary_keys(name, leaf.removeprefix("options."), expected)
    else:
        keys = _KEYS.get(plain, ())
    for key in keys:
        value: Any = settings.values
        for step in key.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        if value is not None:
            return key, value
    plain_keys = [key for key in keys if "." not in key]
    if plain_keys and plain != "biases":
        return plain_keys[-1] if leaf else plain_keys[0], None
    return "model_type", settings.values.get("model_type")


def _rotary_keys(name: str, leaf: str, expected: Architecture) -> tuple[str, ...]:
    if leaf == "interleaved":
        return ()
    index = int(name.split(".")[1])
    slides = expected.layers[index].window is not None
    level = "sliding_attention" if slides else "full_attention"
    leaves = _OF_ROTARY.get(leaf, (leaf,))
    places = [f"rope_parameters.{level}", "rope_parameters", *(() if slides else ("rope_scaling",))]
    keys = [f"{place}.{one}" for place in places for one in leaves]
    if leaf == "base" and slides:
        keys.append("rope_local_base_freq")
    return (*keys, *(("rope_scaling",) if leaf == "scaling" else leaves))


def _title(name: str) -> str:
    """A value's name in a sentence."""
    return name.removeprefix("layers.").replace("rotary.options.", "").replace(".", " ")


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Rotary):
        return f"one of base {_words(value.base)}"
    if isinstance(value, Vision):
        return "a vision tower"
    if isinstance(value, frozenset):
        return ", ".join(sorted(value)) or "none"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, str | int | float):
        return str(value)
    return shown(value)


def changes_beyond(values: Mapping[str, Any]) -> bool:
    """Whether the rotary embedding of a config.json is another one for sequences of more tokens
    than it has positions.
    """
    kinds: set[Any] = set()
    for key in ("rope_parameters", "rope_scaling"):
        given = values.get(key)
        if isinstance(given, Mapping) and "alpha" not in given:
            kinds.update((given.get("rope_type"), given.get("type")))
    return "dynamic" in kinds


def told_apart(
    expected: Architecture, given: Architecture, *, longest: int, unknown: Collection[str] = ()
) -> str:
    """In words, what a run's architecture and another's differ in. Empty if they do not.

    Args:
        expected: of the run.
        given: of the model or the base that it meets.
        longest: tokens of the run's longest sequence; 0 if it has none.
        unknown: names of values of the other that are not known.
    """
    found = unlike(expected, given, longest=longest, unknown=unknown)
    return "; ".join(
        f"{_title(name_of(one.name))} {_words(one.expected)} of the run, {_words(one.given)} here"
        for one in found
    )
