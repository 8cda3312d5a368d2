"""Llama, and the families that share its layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kasa_tune.architectures.architecture import ATTENTION, MLP, Architecture, Layer
from kasa_tune.architectures.rotary import rotary_of
from kasa_tune.architectures.settings import Settings

_ACTIVATIONS = {"silu": "silu", "swish": "silu"}
QKV = frozenset(ATTENTION[:3])


def llama(
    s: Settings,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps_key: str = "rms_norm_eps",
    eps: float = 1e-6,
    max_seq_len: int = 2048,
    tied: bool = False,
    reads_head_dim: bool = True,
    **rotary: Any,
) -> Architecture:
    """Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2, Yi, Falcon 3, R1-Distill-Llama: the baseline.

    Args:
        s: config.json.
        kv_heads: what an absent key means, as with all arguments but the last three; None for as
            many as heads.
        head_dim: width of a head; None for the hidden size by the heads.
        eps: epsilon of the norms.
        max_seq_len: the most tokens of a sequence.
        tied: whether the output projection is the embedding.
        eps_key: the key of the norms' epsilon.
        reads_head_dim: whether the family heeds a key ``head_dim``.
        **rotary: of :func:`~kasa_tune.architectures.rotary.rotary_of`.
    """
    heads, num_kv_heads, width = _heads(s, kv_heads, head_dim, reads_head_dim)
    longest = s.size("max_position_embeddings", max_seq_len)
    layer = Layer(rotary_of(s, head_dim=width, max_seq_len=longest, **rotary))
    return Architecture(
        model_type=str(s.get("model_type")),
        vocab_size=s.size("vocab_size"),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=width,
        embed_dim=s.size("hidden_size"),
        intermediate_dim=s.size("intermediate_size"),
        max_seq_len=longest,
        layers=(layer,) * s.size("num_hidden_layers"),
        norm_eps=s.number(eps_key, eps),
        biases=_biases(s),
        activation=s.one_of("hidden_act", _ACTIVATIONS, "silu"),
        tied=s.flag("tie_word_embeddings", tied),
        attention_scale=width**-0.5,
    )


def _heads(
    s: Settings, kv_heads: int | None, head_dim: int | None, reads_head_dim: bool
) -> tuple[int, int, int]:
    """Number of heads, number of those with keys and values, and their width."""
    heads, hidden = s.size("num_attention_heads"), s.size("hidden_size")
    default = heads if kv_heads is None or "num_key_value_heads" in s.values else kv_heads
    num_kv_heads = s.size("num_key_value_heads", default)  # null stands for as many as heads
    if heads % num_kv_heads:
        raise s.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if "head_dim" in s.values:
        head_dim = None  # so null stands for the hidden size by the heads
    if reads_head_dim and (head_dim is not None or "head_dim" in s):
        return heads, num_kv_heads, s.size("head_dim", head_dim)
    if hidden % heads:
        raise s.wrong("num_attention_heads", f"a divisor of hidden_size, {hidden}")
    return heads, num_kv_heads, hidden // heads


def _biases(s: Settings) -> frozenset[str]:
    """The linears with a bias by Llama's two keys."""
    attention = ATTENTION if s.flag("attention_bias") else ()
    return frozenset((*attention, *(MLP if s.flag("mlp_bias") else ())))


def with_windows(
    found: Architecture, window: int | None, slides: Sequence[bool] | Callable[[int], bool]
) -> Architecture:
    """Give the layers that slide their window. One that holds the longest sequence is none."""
    if window is None or window >= found.max_seq_len:
        return found
    chosen = slides if isinstance(slides, Sequence) else [*map(slides, range(found.num_layers))]
    return replace(
        found,
        layers=tuple(
            replace(layer, window=window) if slides else layer
            for layer, slides in zip(found.layers, chosen, strict=True)
        ),
    )


def mistral(s: Settings) -> Architecture:
    """Mistral 7B, Nemo, Small, Ministral 8B: every layer slides unless ``layer_types`` says which.
    An absent ``sliding_window`` is 4096.
    """
    found = llama(s, kv_heads=8, max_seq_len=131_072)
    window = s.optional_size("sliding_window", 4096)
    types = s.layer_types(found.num_layers)
    slides = types or (lambda layer: True)
    return with_windows(replace(found, biases=frozenset()), window, slides)


def ministral3(s: Settings) -> Architecture:
    """Ministral 3: YaRN, and queries that grow with their position."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0}
    yarn |= {"original_max_position_embeddings": 16_384, "beta_slow": 1.0}
    yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    found = llama(s, kv_heads=8, head_dim=128, eps=1e-5, max_seq_len=262_144, absent=yarn)
    parameters = Settings(s.get("rope_parameters") or s.get("rope_scaling") or yarn, s.name)
    beta = (
        parameters.number("llama_4_scaling_beta", 0.0)
        if parameters.get("llama_4_scaling_beta")
        else 0.0
    )
    original = parameters.size("original_max_position_embeddings", found.max_seq_len)
    found = replace(found, biases=frozenset(), query_temperature=(beta, original) if beta else None)
    return with_windows(found, s.optional_size("sliding_window"), lambda layer: True)


def qwen2(s: Settings) -> Architecture:
    """Qwen2, 2.5, Math, R1-Distill-Qwen: queries, keys and values have a bias."""
    found = llama(s, kv_heads=32, max_seq_len=32_768)
    return _qwen_windows(s, replace(found, biases=QKV))


def qwen3(s: Settings) -> Architecture:
    """Qwen3: each head of queries and keys is normalized before it is rotated."""
    found = llama(s, kv_heads=32, head_dim=128, max_seq_len=32_768)
    found = replace(found, biases=found.biases - {*MLP}, qk_norm="head")
    return _qwen_windows(s, found)


def _qwen_windows(s: Settings, found: Architecture) -> Architecture:
    window = s.optional_size("sliding_window", 4096)
    first = s.number("max_window_layers", 28) if s.get("max_window_layers") != 0 else 0
    types = s.layer_types(found.num_layers)
    if not s.flag("use_sliding_window"):
        window = None
    return with_windows(found, window, types or (lambda layer: layer >= first))


def phi3(s: Settings) -> Architecture:
    """Phi-3, 3.5, 4 and 4-mini: every layer slides where there is a window."""
    found = llama(s, eps=1e-5, max_seq_len=4096, fraction=1.0)
    found = replace(found, biases=frozenset())
    return with_windows(found, s.optional_size("sliding_window"), lambda layer: True)


def granite(s: Settings) -> Architecture:
    """Granite 3: four multipliers. An absent ``attention_multiplier`` is 1."""
    return replace(
        llama(s),
        embedding_scale=s.number("embedding_multiplier", 1.0),
        residual_scale=s.number("residual_multiplier", 1.0),
        attention_scale=s.number("attention_multiplier", 1.0),
        logit_scale=1.0 / s.number("logits_scaling", 1.0),
    )


def smollm3(s: Settings) -> Architecture:
    """SmolLM3: every fourth layer has no rotary embedding."""
    found = llama(s, kv_heads=4, max_seq_len=32_768, tied=True, base=2e6)
    interval = s.size("no_rope_layer_interval", 4)
    rotates = s.numbers("no_rope_layers", found.num_layers)
    if rotates is None:
        rotates = [int((layer + 1) % interval != 0) for layer in range(found.num_layers)]
    layers = tuple(
        layer if has else replace(layer, rotary=None)
        for layer, has in zip(found.layers, rotates, strict=True)
    )
    types = s.layer_types(found.num_layers)
    slides = [not has for has in rotates] if types is None else types
    window = s.optional_size("sliding_window")
    window = window if s.flag("use_sliding_window") else None
    return with_windows(replace(found, layers=layers), window, slides)


def glm(s: Settings) -> Architecture:
    """GLM 4: half of each head is rotated, in interleaved pairs."""
    found = llama(
        s,
        kv_heads=2,
        head_dim=128,
        eps=1.5625e-7,
        max_seq_len=131_072,
        fraction=0.5,
        interleaved=True,
    )
    return replace(found, biases=QKV if s.flag("attention_bias", True) else frozenset())


def hunyuan(s: Settings) -> Architecture:
    """Hunyuan, dense: each head of queries and keys is normalized after it is rotated."""
    found = llama(s, eps=1e-5)
    return replace(found, biases=found.biases - {*MLP}, qk_norm="head", qk_norm_after_rotary=True)


def ernie(s: Settings) -> Architecture:
    """ERNIE 4.5, dense: interleaved pairs, and one key for all biases."""
    found = llama(
        s,
        kv_heads=2,
        head_dim=128,
        eps=1e-5,
        max_seq_len=131_072,
        tied=True,
        base=5e5,
        interleaved=True,
    )
    every = frozenset((*ATTENTION, *MLP))
    return replace(found, biases=every if s.flag("use_bias") else frozenset())


def internlm3(s: Settings) -> Architecture:
    """InternLM 3: Llama with other keys for its biases."""
    # transformers saves it under Llama's names for the two.
    found = llama(s, kv_heads=2, head_dim=128, eps=1e-5, max_seq_len=32_768)
    attention = ATTENTION if s.flag("qkv_bias") else ()
    return replace(found, biases=found.biases | {*attention, *(MLP if s.flag("bias") else ())})
