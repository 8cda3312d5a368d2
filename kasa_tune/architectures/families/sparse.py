"""Families whose MLPs are mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from kasa_tune.architectures.architecture import MLP, Architecture, Experts
from kasa_tune.architectures.families.llama import llama, with_windows
from kasa_tune.architectures.settings import Settings

_MOST_EXPERTS = 2**15  # of all layers together; published models have up to 12,000


def _experts(s: Settings, count: int, active: int, width: int, *, normalized: bool) -> Experts:
    """The experts of a layer, with what absent keys for their numbers mean."""
    count = s.either("num_local_experts", "num_experts", count)
    active = s.size("num_experts_per_tok", active)
    if active > count:
        raise s.wrong("num_experts_per_tok", f"at most the number of experts, {count}")
    if count * s.size("num_hidden_layers") > _MOST_EXPERTS:
        raise ValueError(
            f"{s.name}: {count} experts in each of {s.size('num_hidden_layers')} layers are more "
            f"than the {_MOST_EXPERTS:,} that are supported."
        )
    return Experts(count, active, width, normalized)


def _dense_layers(s: Settings) -> frozenset[int]:
    """The layers without experts."""
    given = s.get("mlp_only_layers") or []
    if not isinstance(given, list) or any(type(one) is not int for one in given):
        raise s.wrong("mlp_only_layers", "a list of numbers of layers")
    return frozenset(given)


def qwen3_moe(s: Settings) -> Architecture:
    """Qwen3-MoE: Qwen3 whose MLPs are mixtures of experts."""
    found = llama(s, kv_heads=4, max_seq_len=32_768)
    dense, step = _dense_layers(s), s.size("decoder_sparse_step", 1)
    experts = _experts(
        s, 128, 8, s.size("moe_intermediate_size", 768), normalized=s.flag("norm_topk_prob")
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
    return with_windows(found, window if slides else None, lambda layer: True)


def mixtral(s: Settings) -> Architecture:
    """Mixtral: Mistral whose MLPs are mixtures of experts."""
    found = llama(s, kv_heads=8, eps=1e-5, max_seq_len=131_072, base=1e6)
    experts = _experts(s, 8, 2, found.intermediate_dim, normalized=True)
    layers = tuple(replace(layer, sparse=True) for layer in found.layers)
    found = replace(found, biases=frozenset(), layers=layers, experts=experts)
    return with_windows(found, s.optional_size("sliding_window"), lambda layer: True)
