"""From config.json to an :class:`Architecture`: one function a family.

Each function says how its family differs from Llama, and what an absent key means there. The
defaults are those of transformers 5.23, because a checkpoint's author left a key out with them in
mind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kasa_tune.architectures.architecture import ATTENTION, MLP, Architecture, Experts, Layer
from kasa_tune.architectures.settings import Settings, rotary_of

_ACTIVATIONS = {"silu": "silu", "swish": "silu"}
_GELUS = dict.fromkeys(("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast"), "gelu_tanh")
_QKV = frozenset(ATTENTION[:3])


def llama(
    s: Settings,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps_key: str = "rms_norm_eps",
    eps: float = 1e-6,
    max_seq_len: int = 2048,
    tied: bool = False,
    base: float = 10_000.0,
    fraction: float = 1.0,
    interleaved: bool = False,
    absent_rotary: Mapping[str, Any] | None = None,
    reads_head_dim: bool = True,
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
        base: of the rotary embedding.
        fraction: of each head that it rotates.
        absent_rotary: the whole of the rotary embedding.
        eps_key: the key of the norms' epsilon.
        interleaved: see :class:`~kasa_tune.architectures.Rotary`.
        reads_head_dim: whether the family has a key ``head_dim``.
    """
    heads, hidden = s.size("num_attention_heads"), s.size("hidden_size")
    layers = s.size("num_hidden_layers")
    longest = s.size("max_position_embeddings", max_seq_len)
    if (head_dim is None and "head_dim" not in s) or not reads_head_dim:
        if hidden % heads:
            raise s.wrong("num_attention_heads", f"a divisor of hidden_size, {hidden}")
        head_dim = hidden // heads
    else:
        head_dim = s.size("head_dim", head_dim)
    num_kv_heads = s.size("num_key_value_heads", kv_heads or heads)
    if heads % num_kv_heads:
        raise s.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    rotary = rotary_of(
        s,
        base=base,
        fraction=fraction,
        interleaved=interleaved,
        head_dim=head_dim,
        max_seq_len=longest,
        absent=absent_rotary,
    )
    return Architecture(
        model_type=str(s.get("model_type")),
        vocab_size=s.size("vocab_size"),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        embed_dim=hidden,
        intermediate_dim=s.size("intermediate_size"),
        max_seq_len=longest,
        layers=(Layer(rotary),) * layers,
        norm_eps=s.number(eps_key, eps),
        biases=_biases(s),
        activation=s.one_of("hidden_act", _ACTIVATIONS, "silu"),
        tied=s.flag("tie_word_embeddings", tied),
        attention_scale=head_dim**-0.5,
    )


def _biases(s: Settings) -> frozenset[str]:
    """The linears with a bias by Llama's two keys."""
    attention = ATTENTION if s.flag("attention_bias") else ()
    return frozenset((*attention, *(MLP if s.flag("mlp_bias") else ())))


def _windows(
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
    """Mistral 7B, Nemo, Small: every layer slides. An absent ``sliding_window`` is 4096."""
    found = llama(s, kv_heads=8, max_seq_len=131_072)
    window = s.optional_size("sliding_window", 4096)
    return _windows(replace(found, biases=frozenset()), window, lambda layer: True)


def ministral3(s: Settings) -> Architecture:
    """Ministral 3: YaRN, and queries that grow with their position."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0}
    yarn |= {"original_max_position_embeddings": 16_384, "beta_slow": 1.0}
    yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    found = llama(s, kv_heads=8, head_dim=128, eps=1e-5, max_seq_len=262_144, absent_rotary=yarn)
    parameters = Settings(s.get("rope_parameters") or s.get("rope_scaling") or yarn, s.name)
    beta = (
        parameters.number("llama_4_scaling_beta", 0.0)
        if parameters.get("llama_4_scaling_beta")
        else 0.0
    )
    original = parameters.size("original_max_position_embeddings", found.max_seq_len)
    found = replace(found, biases=frozenset(), query_temperature=(beta, original) if beta else None)
    return _windows(found, s.optional_size("sliding_window"), lambda layer: True)


def qwen2(s: Settings) -> Architecture:
    """Qwen2, 2.5, Math, R1-Distill-Qwen: queries, keys and values have a bias."""
    found = llama(s, kv_heads=32, max_seq_len=32_768, reads_head_dim=False)
    return _qwen_windows(s, replace(found, biases=_QKV))


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
    return _windows(found, window, types or (lambda layer: layer >= first))


def qwen3_moe(s: Settings) -> Architecture:
    """Qwen3-MoE: Qwen3 whose MLPs are mixtures of experts."""
    found = llama(s, kv_heads=4, max_seq_len=32_768)
    dense = s.get("mlp_only_layers") or []
    step = s.size("decoder_sparse_step", 1)
    count = s.size("num_local_experts", s.size("num_experts", 128))  # the newer name first
    experts = Experts(
        count,
        s.size("num_experts_per_tok", 8),
        s.size("moe_intermediate_size", 768),
        s.flag("norm_topk_prob"),
    )
    layers = tuple(
        replace(layer, sparse=index not in dense and (index + 1) % step == 0)
        for index, layer in enumerate(found.layers)
    )
    found = replace(
        found, biases=found.biases - {*MLP}, qk_norm="head", layers=layers, experts=experts
    )
    window = s.optional_size("sliding_window", 4096)
    slides = s.flag("use_sliding_window")
    return _windows(found, window if slides else None, lambda layer: True)


def mixtral(s: Settings) -> Architecture:
    """Mixtral: Mistral whose MLPs are mixtures of experts."""
    found = llama(s, kv_heads=8, eps=1e-5, max_seq_len=131_072, base=1e6)
    experts = Experts(
        s.size("num_local_experts", 8),
        s.size("num_experts_per_tok", 2),
        found.intermediate_dim,
        True,
    )
    layers = tuple(replace(layer, sparse=True) for layer in found.layers)
    found = replace(found, biases=frozenset(), layers=layers, experts=experts)
    return _windows(found, s.optional_size("sliding_window"), lambda layer: True)


def gemma(s: Settings) -> Architecture:
    """Gemma: norms by 1 + weight, embeddings by the root of their width, a tanh GELU."""
    return _gemma(s, llama(_with_gelu(s), kv_heads=16, head_dim=256, max_seq_len=8192, tied=True))


def _with_gelu(s: Settings) -> Settings:
    """The settings for :func:`llama`, without the activation, which Gemma has under two keys."""
    activation = s.get("hidden_activation") or s.get("hidden_act") or "gelu_pytorch_tanh"
    Settings({"hidden_act": activation}, s.name).one_of("hidden_act", _GELUS, "gelu")
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
    return _windows(found, window, types or (lambda layer: layer % 2 == 0))


def gemma3(s: Settings) -> Architecture:
    """Gemma 3, its text part: Gemma 2 without caps, with normalized heads and two rotary bases."""
    defaults = {"num_attention_heads": 8, "vocab_size": 262_208, "hidden_size": 2304}
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
    )
    found = replace(
        _gemma_with_norms_after(s, found),
        qk_norm="head",
        attention_cap=s.optional_number("attn_logit_softcapping", None),
        logit_cap=s.optional_number("final_logit_softcapping", None),
    )
    local = rotary_of(
        s,
        base=s.number("rope_local_base_freq", 1e4),
        head_dim=found.head_dim,
        max_seq_len=found.max_seq_len,
        level="sliding_attention",
    )
    pattern = s.size("sliding_window_pattern", s.size("_sliding_window_pattern", 6))
    slides = s.layer_types(found.num_layers)
    if slides is None:
        slides = [bool((layer + 1) % pattern) for layer in range(found.num_layers)]
    layers = tuple(Layer(local) if one else found.layers[0] for one in slides)
    window = s.optional_size("sliding_window", 4096)
    return _windows(replace(found, layers=layers), window, slides)


def phi3(s: Settings) -> Architecture:
    """Phi-3, 3.5, 4 and 4-mini: every layer slides where there is a window."""
    found = llama(s, eps=1e-5, max_seq_len=4096, reads_head_dim=False)
    found = replace(found, biases=frozenset())
    return _windows(found, s.optional_size("sliding_window"), lambda layer: True)


def olmo2(s: Settings) -> Architecture:
    """OLMo 2: norms after attention and MLP, none before; queries and keys normalized whole."""
    found = llama(s, eps=1e-5, reads_head_dim=False)
    return replace(
        found, biases=found.biases - {*MLP}, norm_before=False, norm_after=True, qk_norm="full"
    )


def olmo3(s: Settings) -> Architecture:
    """OLMo 3: OLMo 2 of which three layers in four slide, without the others' scaling."""
    found = replace(
        llama(s, eps=1e-5, base=5e5, reads_head_dim=False),
        norm_before=False,
        norm_after=True,
        qk_norm="full",
    )
    sizes = {"head_dim": found.head_dim, "max_seq_len": found.max_seq_len}
    local = rotary_of(s, base=5e5, level="sliding_attention", **sizes)
    slides = s.layer_types(found.num_layers)
    if slides is None:
        slides = [bool((layer + 1) % 4) for layer in range(found.num_layers)]
    layers = tuple(Layer(local) if one else found.layers[0] for one in slides)
    found = replace(found, biases=found.biases - {*MLP}, layers=layers)
    return _windows(found, s.optional_size("sliding_window", 4096), slides)


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
    found = llama(s, kv_heads=4, max_seq_len=32_768, tied=True, base=2e6, reads_head_dim=False)
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
    return _windows(replace(found, layers=layers), window, slides)


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
    return replace(found, biases=_QKV if s.flag("attention_bias", True) else frozenset())


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
        reads_head_dim=False,
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
    return _windows(replace(found, layers=layers), s.optional_size("sliding_window", 4096), slides)


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
        reads_head_dim=False,
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
        biases=_QKV if s.flag("use_qkv_bias") else frozenset(),
        parallel=s.flag("use_parallel_residual"),
    )


def exaone4(s: Settings) -> Architecture:
    """EXAONE 4: norms after, normalized heads. Where layers slide, the others do not rotate."""
    found = llama(s, kv_heads=32, eps=1e-5, reads_head_dim=True)
    found = replace(found, biases=frozenset(), norm_before=False, norm_after=True, qk_norm="head")
    window = s.optional_size("sliding_window", 4096)
    given = s.get("sliding_window_pattern")
    pattern = s.get("layer_types") is None and _exaone_pattern(s, given)
    if window is None:
        return found
    slides = s.layer_types(found.num_layers)
    if slides is None:
        last = found.num_layers - 1
        slides = [bool((n + 1) % pattern) and n < last for n in range(found.num_layers)]
    layers = tuple(
        layer if one else replace(layer, rotary=None)
        for layer, one in zip(found.layers, slides, strict=True)
    )
    return _windows(replace(found, layers=layers), window, slides)


def _exaone_pattern(s: Settings, given: Any) -> int:
    """After how many layers the pattern repeats: a number, or as long as the text ``LLLG``."""
    if isinstance(given, str) and given and given == "L" * (len(given) - 1) + "G":
        return len(given)
    return s.size("sliding_window_pattern", 4)


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
    found = llama(s, kv_heads=2, eps=1e-5, max_seq_len=32_768)
    attention = ATTENTION if s.flag("qkv_bias") else ()
    return replace(found, biases=found.biases | {*attention, *(MLP if s.flag("bias") else ())})
