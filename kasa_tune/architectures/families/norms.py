"""Families that normalize elsewhere than Llama does, or otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kasa_tune.architectures.architecture import MLP, Architecture, Layer
from kasa_tune.architectures.families.llama import QKV, glm, llama, with_windows
from kasa_tune.architectures.rotary import rotary_of
from kasa_tune.architectures.settings import Settings

_TANH_GELUS = dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")
_GELUS = _TANH_GELUS | {"gelu": "gelu_tanh"}  # of early files, which mean the former


def gemma(s: Settings) -> Architecture:
    """Gemma: norms by 1 + weight, embeddings by the root of their width, a tanh GELU."""
    return _gemma(s, llama(_with_gelu(s), kv_heads=16, head_dim=256, max_seq_len=8192, tied=True))


def _with_gelu(s: Settings) -> Settings:
    """The settings for :func:`llama`, without the activation, which Gemma has under two keys. The
    first is Gemma's own, the second that of its successors.
    """
    s.one_of("hidden_act", _GELUS, "gelu_pytorch_tanh")
    own = s.get("model_type") == "gemma"
    s.one_of("hidden_activation", _GELUS if own else _TANH_GELUS, "gelu_pytorch_tanh")
    plain = Settings({**s.values, "hidden_act": None}, s.name)
    plain.asked = s.asked
    return plain


def _gemma(s: Settings, found: Architecture) -> Architecture:
    s.must_be("use_bidirectional_attention", False, default=False)
    return replace(
        found,
        biases=found.biases - {*MLP},
        norm_plus_one=True,
        activation="gelu_tanh",
        embedding_scale=found.embed_dim**0.5,
    )


def _gemma_with_norms_after(s: Settings, found: Architecture) -> Architecture:
    scale = s.number("query_pre_attn_scalar", 256) ** -0.5
    return replace(_gemma(s, found), norm_after=True, attention_scale=scale)


def gemma2(s: Settings) -> Architecture:
    """Gemma 2: four norms, soft caps, and every other layer slides."""
    found = llama(_with_gelu(s), kv_heads=4, head_dim=256, max_seq_len=8192, tied=True)
    found = replace(
        _gemma_with_norms_after(s, found),
        attention_cap=s.optional_number("attn_logit_softcapping", 50.0),
        logit_cap=s.optional_number("final_logit_softcapping", 30.0),
    )
    types = s.layer_types(found.num_layers)
    window = s.optional_size("sliding_window", 4096)
    return with_windows(found, window, types or (lambda layer: layer % 2 == 0))


def gemma3(s: Settings) -> Architecture:
    """Gemma 3, its text part: Gemma 2 without caps, with normalized heads and two rotary bases."""
    defaults: dict[str, Any] = {
        "num_attention_heads": 8,
        "vocab_size": 262_208,
        "hidden_size": 2304,
    }
    defaults |= {"num_hidden_layers": 26, "intermediate_size": 9216}
    filled = Settings({**defaults, **s.values}, s.name)
    filled.asked = s.asked
    found = llama(
        _with_gelu(filled),
        kv_heads=4,
        head_dim=256,
        max_seq_len=131_072,
        tied=True,
        base=1e6,
        level="full_attention",
    )
    s.must_be("attn_logit_softcapping", None)  # transformers has the key and ignores it
    found = replace(
        _gemma_with_norms_after(s, found),
        qk_norm="head",
        logit_cap=s.optional_number("final_logit_softcapping", None),
    )
    local = rotary_of(
        s,
        base=s.number("rope_local_base_freq", 1e4),
        head_dim=found.head_dim,
        max_seq_len=found.max_seq_len,
        level="sliding_attention",
    )
    pattern = s.size("sliding_window_pattern", 6)
    slides, ignored = s.layer_types(found.num_layers), s.get("_sliding_window_pattern")
    if slides is None and ignored not in (None, pattern):
        raise s.wrong("_sliding_window_pattern", "absent: sliding_window_pattern is the key")
    if slides is None:
        slides = [bool((layer + 1) % pattern) for layer in range(found.num_layers)]
    layers = tuple(Layer(local) if one else found.layers[0] for one in slides)
    window = s.optional_size("sliding_window", 4096)
    return with_windows(replace(found, layers=layers), window, slides)


def olmo2(s: Settings) -> Architecture:
    """OLMo 2: norms after attention and MLP, none before; queries and keys normalized whole."""
    found = llama(s, eps=1e-5)
    return replace(
        found, biases=found.biases - {*MLP}, norm_before=False, norm_after=True, qk_norm="full"
    )


def olmo3(s: Settings) -> Architecture:
    """OLMo 3: OLMo 2 of which three layers in four slide, without the others' scaling."""
    found = replace(
        llama(s, eps=1e-5, base=5e5, level="full_attention"),
        norm_before=False,
        norm_after=True,
        qk_norm="full",
    )
    local = rotary_of(
        s,
        base=5e5,
        head_dim=found.head_dim,
        max_seq_len=found.max_seq_len,
        level="sliding_attention",
    )
    slides = s.layer_types(found.num_layers)
    if slides is None:
        slides = [bool((layer + 1) % 4) for layer in range(found.num_layers)]
    layers = tuple(Layer(local) if one else found.layers[0] for one in slides)
    found = replace(found, biases=found.biases - {*MLP}, layers=layers)
    return with_windows(found, s.optional_size("sliding_window", 4096), slides)


def glm4(s: Settings) -> Architecture:
    """GLM 4 0414: GLM with norms after attention and MLP besides."""
    return replace(glm(s), norm_after=True)


def cohere(s: Settings) -> Architecture:
    """Command R and Aya: one layer norm without bias, and attention and MLP side by side."""
    s.must_be("use_qk_norm", False, default=False)
    return _cohere(s, 5e5)


def _cohere(s: Settings, base: float) -> Architecture:
    found = llama(
        s,
        eps_key="layer_norm_eps",
        eps=1e-5,
        max_seq_len=8192,
        tied=True,
        base=base,
        interleaved=True,
    )
    return replace(
        found,
        biases=found.biases - {*MLP},
        norm="layer",
        parallel=True,
        logit_scale=s.number("logit_scale", 0.0625),
    )


def cohere2(s: Settings) -> Architecture:
    """Command R7B: of four layers three slide, and the fourth has no rotary embedding."""
    found = _cohere(s, 1e4)
    pattern = s.size("sliding_window_pattern", 4)
    slides = s.layer_types(found.num_layers)
    if slides is None:
        slides = [bool((layer + 1) % pattern) for layer in range(found.num_layers)]
    layers = tuple(
        layer if one else replace(layer, rotary=None)
        for layer, one in zip(found.layers, slides, strict=True)
    )
    return with_windows(
        replace(found, layers=layers), s.optional_size("sliding_window", 4096), slides
    )


def nemotron(s: Settings) -> Architecture:
    """Nemotron and Minitron: layer norms by 1 + weight, an MLP without a gate, half rotated."""
    plain = Settings({**s.values, "hidden_act": None}, s.name)
    plain.asked = s.asked
    s.must_be("hidden_act", "relu2", default="relu2")
    found = llama(
        plain,
        eps_key="norm_eps",
        eps=1e-5,
        max_seq_len=4096,
        fraction=0.5,
    )
    return replace(
        found,
        norm="layer",
        norm_plus_one=True,
        norm_bias=True,
        activation="relu_squared",
        gated=False,
    )


def stablelm(s: Settings) -> Architecture:
    """StableLM: layer norms with bias, a quarter of each head rotated."""
    s.must_be("qk_layernorm", False, default=False)
    found = llama(
        s,
        kv_heads=32,
        eps_key="layer_norm_eps",
        eps=1e-5,
        max_seq_len=4096,
        fraction=0.25,
        reads_head_dim=False,
    )
    return replace(
        found,
        norm="layer",
        norm_bias=True,
        biases=QKV if s.flag("use_qkv_bias") else frozenset(),
        parallel=s.flag("use_parallel_residual"),
    )


def exaone4(s: Settings) -> Architecture:
    """EXAONE 4: norms after, normalized heads. Where layers slide, the others do not rotate."""
    found = llama(s, kv_heads=32, eps=1e-5)
    found = replace(found, biases=frozenset(), norm_before=False, norm_after=True, qk_norm="head")
    window = s.optional_size("sliding_window", 4096)
    if window is None:
        return found
    slides = s.layer_types(found.num_layers)
    if slides is None:
        pattern = _exaone_pattern(s)
        slides = [bool((n + 1) % pattern) for n in range(found.num_layers)]
    layers = tuple(
        layer if one else replace(layer, rotary=None)
        for layer, one in zip(found.layers, slides, strict=True)
    )
    return with_windows(replace(found, layers=layers), window, slides)


def _exaone_pattern(s: Settings) -> int:
    """After how many layers the pattern repeats: a number, or as long as the text ``LLLG``."""
    given: Any = s.get("sliding_window_pattern")
    if isinstance(given, str) and given and given == "L" * (len(given) - 1) + "G":
        return len(given)
    return s.size("sliding_window_pattern", 4)
