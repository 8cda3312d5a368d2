"""What the modules of a decoder are called in Hugging Face's checkpoints, family by family.

Ours are torchtune's names. A name of theirs may hold the rows of several of ours, one after the
other, as Phi's ``qkv_proj`` does. GPT-2's matrices lie transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from kasa_tune.architectures.architecture import Architecture
from kasa_tune.architectures.vision import name_in_memory, vision_name

# How the names of a text model begin: alone, and inside a model that also sees.
_TEXT = re.compile(
    r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.|transformer\.)?"
)
# Parts of such a model that are no text, tables of rotary embeddings and of causal masks.
_OTHER = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|audio_tower|embed_audio)\."
    r"|.*rotary_emb\.(inv_freq|cos_cached|sin_cached)$|.*\.masked_bias$"
    r"|(transformer\.)?h\.\d+\.attn\.bias$"
)
_LAYER = re.compile(r"(?:layers|h)\.(\d+)\.(.+)")

_TOP = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}
_TOP_OF_FAMILY = {
    "gpt2": {
        "wte": "tok_embeddings",
        "wpe": "position_embeddings",
        "ln_f": "norm",
        "lm_head": "output",
    }
}
_ATTENTION = {
    "self_attn.q_proj": ("attn.q_proj",),
    "self_attn.k_proj": ("attn.k_proj",),
    "self_attn.v_proj": ("attn.v_proj",),
    "self_attn.o_proj": ("attn.output_proj",),
}
_MLP = {
    "mlp.gate_proj": ("mlp.w1",),
    "mlp.down_proj": ("mlp.w2",),
    "mlp.up_proj": ("mlp.w3",),
}
_NORMS_BEFORE = {"input_layernorm": ("sa_norm",), "post_attention_layernorm": ("mlp_norm",)}
_HEAD_NORMS = {"self_attn.q_norm": ("attn.q_norm",), "self_attn.k_norm": ("attn.k_norm",)}
_LLAMA = _ATTENTION | _MLP | _NORMS_BEFORE | _HEAD_NORMS
_FUSED_MLP = {"mlp.gate_up_proj": ("mlp.w1", "mlp.w3"), "mlp.down_proj": ("mlp.w2",)}
_NORMS_AFTER = {
    "post_attention_layernorm": ("sa_scale",),
    "post_feedforward_layernorm": ("mlp_scale",),
}
_FOUR_NORMS = _NORMS_AFTER | {
    "input_layernorm": ("sa_norm",),
    "pre_feedforward_layernorm": ("mlp_norm",),
}
_OF_FAMILY: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "gemma2": _LLAMA | _FOUR_NORMS,
    "gemma3_text": _LLAMA | _FOUR_NORMS,
    "phi3": {
        "self_attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "self_attn.o_proj": ("attn.output_proj",),
        **_FUSED_MLP,
        **_NORMS_BEFORE,
    },
    "olmo2": _ATTENTION | _MLP | _HEAD_NORMS | _NORMS_AFTER,
    "olmo3": _ATTENTION | _MLP | _HEAD_NORMS | _NORMS_AFTER,
    "exaone4": _ATTENTION | _MLP | _HEAD_NORMS | _NORMS_AFTER,
    "glm": _ATTENTION | _FUSED_MLP | _NORMS_BEFORE,
    "glm4": _ATTENTION
    | _FUSED_MLP
    | _NORMS_BEFORE
    | {
        "post_self_attn_layernorm": ("sa_scale",),
        "post_mlp_layernorm": ("mlp_scale",),
    },
    "nemotron": _ATTENTION
    | _NORMS_BEFORE
    | {"mlp.up_proj": ("mlp.w1",), "mlp.down_proj": ("mlp.w2",)},
    "hunyuan_v1_dense": _ATTENTION
    | _MLP
    | _NORMS_BEFORE
    | {
        "self_attn.query_layernorm": ("attn.q_norm",),
        "self_attn.key_layernorm": ("attn.k_norm",),
    },
    "gpt2": {
        "attn.c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "attn.c_proj": ("attn.output_proj",),
        "mlp.c_fc": ("mlp.w1",),
        "mlp.c_proj": ("mlp.w2",),
        "ln_1": ("sa_norm",),
        "ln_2": ("mlp_norm",),
    },
}
_TRANSPOSED = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")
_OF_EXPERT = {
    "qwen3_moe": ("mlp.gate", r"mlp\.experts\.(\d+)\.(gate_proj|down_proj|up_proj)"),
    "mixtral": (
        "block_sparse_moe.gate",
        r"block_sparse_moe\.experts\.(\d+)\.(w1|w2|w3)",
    ),
}
_EXPERT_LINEARS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class Part(NamedTuple):
    """Rows of one of their tensors that are one of ours.

    ``name`` is ours, such as ``layers.0.attn.k_proj.weight``, ``rows`` the rows, from the first to
    before the last; None for all.
    """

    name: str
    rows: tuple[int, int] | None = None


def parts_of(architecture: Architecture, key: str) -> list[Part]:
    """What a tensor of a checkpoint is in our decoder.

    Args:
        architecture: of the model.
        key: the tensor's name in the file.

    Returns:
        One entry, or several for a tensor that holds several of ours, or none for a tensor that
        the model does not need. An unknown name comes back as it is.
    """
    if _OTHER.match(key):
        seeing = architecture.vision and vision_name(architecture.vision, key)
        return [Part(seeing)] if seeing else []
    prefix = _TEXT.match(key)
    rest = key[prefix.end() if prefix else 0 :]
    module, _, leaf = rest.rpartition(".")
    if module == "lm_head" and architecture.tied:
        return []  # some files hold the embedding twice
    top = _TOP_OF_FAMILY.get(architecture.model_type, _TOP)
    if module in top:
        return [Part(f"{top[module]}.{leaf}")]
    layer = _LAYER.fullmatch(module)
    if layer is None:
        return [Part(key)]
    names = _names_in_layer(architecture, layer[2])
    if not names:
        return [Part(key)]
    ours = [f"layers.{layer[1]}.{name}.{leaf}" for name in names]
    if len(ours) == 1:
        return [Part(ours[0])]
    parts, start = [], 0
    for name, full in zip(names, ours, strict=True):
        end = start + _height(architecture, name)
        parts.append(Part(full, (start, end)))
        start = end
    return parts


def usual_name(architecture: Architecture, key: str) -> str:
    """What transformers' model calls a tensor. The published files of GPT-2 leave a part out, and those of
    LLaVA have names of before transformers 4.52.

    Args:
        architecture: of the model.
        key: the tensor's name in the file.
    """
    if architecture.model_type == "gpt2" and not key.startswith(("transformer.", "lm_head.")):
        return f"transformer.{key}"
    return name_in_memory(key) if architecture.vision else key


def is_transposed(architecture: Architecture, key: str) -> bool:
    """Whether a tensor of a checkpoint is a matrix ``(d_in, d_out)``, as GPT-2's ``Conv1D`` has it,
    and not ``(d_out, d_in)``.

    Args:
        architecture: of the model.
        key: the tensor's name in the file.
    """
    return architecture.model_type == "gpt2" and bool(_TRANSPOSED.fullmatch(key))


def _names_in_layer(architecture: Architecture, module: str) -> tuple[str, ...]:
    family = architecture.model_type
    if family in _OF_EXPERT:
        router, expert = _OF_EXPERT[family]
        if module == router:
            return ("mlp.router",)
        if found := re.fullmatch(expert, module):
            linear = _EXPERT_LINEARS.get(found[2], found[2])
            return (f"mlp.experts.{found[1]}.{linear}",)
    return _OF_FAMILY.get(family, _LLAMA).get(module, ())


def _height(architecture: Architecture, name: str) -> int:
    """Rows of a linear that may lie in a fused tensor."""
    leaf = name.rpartition(".")[2]
    heads = {
        "q_proj": architecture.num_heads,
        "k_proj": architecture.num_kv_heads,
        "v_proj": architecture.num_kv_heads,
    }
    if leaf in heads:
        return heads[leaf] * architecture.head_dim
    return architecture.intermediate_dim
