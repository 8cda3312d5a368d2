"""What the builders of torchtune and of our GPT-2 build, from their arguments alone.

A config can be compared with a checkpoint before torch is imported. The run compares the built
model itself; a test compares both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kasa_tune.architectures.architecture import ATTENTION, Architecture, Layer, Rotary
from kasa_tune.architectures.families.gpt import gpt2_of_size

_LLAMA31 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
_SIZES = ("vocab_size", "num_layers", "num_heads", "embed_dim", "max_seq_len")  # as gpt2_of_size
BUILDERS = frozenset("llama2 llama3 llama3_1 llama3_2 mistral gemma gemma2 phi3 qwen2 gpt2".split())


def built_by(name: str, values: Mapping[str, Any]) -> Architecture | None:
    """The architecture of the model that a builder of torchtune makes, or that of our GPT-2, as
    :func:`~kasa_tune.components.models.inspecting.architecture_of_model` would find it.

    Args:
        name: of the builder, such as ``llama3_1``.
        values: its arguments, defaults included.

    Returns:
        None if the builder is not among :data:`BUILDERS`, or a value is missing or of another
        type than the builder takes.
    """
    if name not in BUILDERS or any(type(values.get(key)) is not int for key in _SIZES):
        return None
    try:
        return _built(name, values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None  # a value that the check of the config names, or the builder itself


def _built(name: str, v: Mapping[str, Any]) -> Architecture:
    if name == "gpt2":
        return gpt2_of_size(*(v[key] for key in _SIZES))
    heads, dim = v["num_heads"], v["embed_dim"]
    head_dim = v["head_dim"] if name in ("gemma", "gemma2") else dim // heads
    rotary = Rotary(float(v["rope_base"]), interleaved=name not in ("phi3", "qwen2"))
    if name in ("llama3_1", "llama3_2"):
        options = {"factor": v["scale_factor"], **_LLAMA31}
        rotary = Rotary(rotary.base, interleaved=True, scaling="llama3", options=options)
    layers: tuple[Layer, ...] = (Layer(rotary),) * v["num_layers"]
    more: dict[str, Any] = {"attention_scale": head_dim**-0.5, "tied": _is_tied(name, v)}
    if name in ("gemma", "gemma2"):
        more |= {
            "norm_plus_one": True,
            "activation": "gelu_tanh",
            "embedding_scale": dim**0.5,
        }
    if name == "gemma2":
        window = v["sliding_window_size"]
        layers = tuple(
            Layer(rotary, window if index % 2 == 0 else None) for index in range(len(layers))
        )
        more |= {
            "norm_after": True,
            "attention_scale": (v.get("query_pre_attn_scalar") or head_dim) ** -0.5,
            "attention_cap": v.get("attention_cap", v["hidden_capping_value"]),
            "logit_cap": v.get("logit_cap", v["final_capping_value"]),
        }
    if name == "qwen2":
        more["biases"] = frozenset(ATTENTION[:3])
    return Architecture(
        model_type="",
        vocab_size=v["vocab_size"],
        num_heads=heads,
        num_kv_heads=v.get("num_kv_heads") or heads,
        head_dim=head_dim,
        embed_dim=dim,
        intermediate_dim=v.get("intermediate_dim") or _scaled(dim),
        max_seq_len=v["max_seq_len"],
        layers=layers,
        norm_eps=float(v["norm_eps"]),
        **more,
    )


def _is_tied(name: str, values: Mapping[str, Any]) -> bool:
    return name in ("gemma", "gemma2") or bool(values.get("tie_word_embeddings", False))


def _scaled(dim: int) -> int:
    """The width that an MLP of Llama has where none is given: two thirds of four times its input,
    up to the next multiple of 256.
    """
    return -(-4 * int(2 * dim / 3) // 256) * 256
