"""LLaVA-1.5's config.json and the names of its tensors: a CLIP tower, a connector and a Llama.

Absent keys mean what they mean in transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kasa_tune.architectures.architecture import Vision
from kasa_tune.architectures.settings import Settings, shown

# LlamaConfig's sizes, which config.json of LLaVA-1.5 7B leaves out.
_TEXT = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
# Of LLaVA-1.5 where vision_config is left out, and of CLIP where a key of it is.
_VISION_LEFT_OUT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
_LONGEST_SIDE = 4096  # pixels; a larger tower is a mistake
_STRATEGIES = {"default": False, "full": True}

_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)")
CONNECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))")
# How names begin in files, and in the model that transformers builds of them.
_IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.": "model.vision_tower.",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_TOP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "patches.weight",
    "embeddings.position_embedding.weight": "positions.weight",
    "pre_layrnorm.weight": "norm.weight",  # so spelled
    "pre_layrnorm.bias": "norm.bias",
}
# The names differ from those of the decoder's linears, so that no adapter meets the tower.
_IN_LAYER = {
    "layer_norm1": "norm1",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.out_proj": "out",
    "layer_norm2": "norm2",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}


def text_part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config.json of LLaVA's language model.

    Args:
        config: of the whole model.
        name: of the file, for messages.

    Raises:
        ValueError: ``text_config`` is no object, or of another family than Llama.
    """
    text = _section(config, "text_config", name)
    kind = text.get("model_type", "llama")
    if kind != "llama":
        raise ValueError(
            f"{name}: text_config.model_type is {shown(kind)}; of LLaVA models only those on a "
            "Llama are supported."
        )
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    return {**_TEXT, **text, "tie_word_embeddings": tied}


def read_vision(config: Mapping[str, Any], name: str) -> Vision:
    """Read LLaVA's tower and connector.

    Args:
        config: of the whole model.
        name: of the file, for messages.

    Raises:
        ValueError: a value is of a wrong type, or not supported; the message names the key.
    """
    whole = Settings(config, name)
    given = _section(config, "vision_config", name)
    s = Settings(given, f"{name}: vision_config")
    s.must_be("model_type", "clip_vision_model", default="clip_vision_model")
    sizes = {k: s.size(k, v) for k, v in (_CLIP if given else _VISION_LEFT_OUT).items()}
    whole.must_be("projector_hidden_act", "gelu", default="gelu")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise s.wrong("num_attention_heads", f"a divisor of hidden_size, {sizes['hidden_size']}")
    if not sizes["patch_size"] <= sizes["image_size"] <= _LONGEST_SIDE:
        raise s.wrong("image_size", f"pixels from patch_size to {_LONGEST_SIDE}")
    return Vision(
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        embed_dim=sizes["hidden_size"],
        intermediate_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_layers=_computed_layers(whole, sizes["num_hidden_layers"]),
        norm_eps=s.number("layer_norm_eps", 1e-5),
        activation=s.one_of("hidden_act", _ACTIVATIONS, "quick_gelu"),
        keeps_class=whole.one_of("vision_feature_select_strategy", _STRATEGIES, "default"),
        connector_bias=whole.flag("multimodal_projector_bias", True),
        image_token=_image_token(whole),
    )


def _computed_layers(whole: Settings, num_layers: int) -> int:
    """How many layers of the tower the features have passed: entry ``vision_feature_layer`` of the
    list of the embeddings and every layer's output.
    """
    key = "vision_feature_layer"
    value = -2 if whole.get(key) is None else whole.get(key)
    layers = value + num_layers + 1 if type(value) is int and value < 0 else value
    if type(layers) is not int or not 1 <= layers <= num_layers:
        raise ValueError(
            f"{whole.name}: {key} is {shown(value)}; it must be one whole number from -{num_layers} "
            f"to {num_layers}, and not 0."
        )
    return layers


def _image_token(whole: Settings) -> int:
    """The token's id, by transformers' key of today or by that of before."""
    return whole.either("image_token_index", "image_token_id", 32_000)


def _section(config: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    section = {} if config.get(key) is None else config[key]
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}: {key} is {shown(section)}; it must be an object.")
    return section


def vision_name(vision: Vision, key: str) -> str | None:
    """What a tensor of the tower or the connector is in our model.

    Args:
        vision: of the model.
        key: the tensor's name in the file, in any of the four layouts there are: with or without
            ``model.`` at its beginning, with or without ``vision_model.`` inside.

    Returns:
        Our name. None for a tensor that the model does not need, as those of layers that are not
        computed. An unknown name comes back as it is.
    """
    if connector := CONNECTOR.fullmatch(key):
        return f"connector.{connector[1]}"
    tower = _TOWER.fullmatch(key)
    if tower is None:
        return key
    rest = tower[1]
    if rest.startswith("post_layernorm.") or rest == "embeddings.position_ids":
        return None
    if rest in _TOP:
        return f"vision.{_TOP[rest]}"
    layer = _LAYER.fullmatch(rest)
    if layer is None or layer[2] not in _IN_LAYER:
        return key
    if int(layer[1]) >= vision.num_layers:
        return None
    return f"vision.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.{layer[3]}"


def name_in_memory(key: str) -> str:
    """What a tensor of a LLaVA file is called in transformers' model, since 4.52.

    Args:
        key: its name in the file, in any of the four layouts.
    """
    for stored, now in _IN_MEMORY.items():
        if key.startswith(stored):
            return now + key.removeprefix(stored)
    return key
