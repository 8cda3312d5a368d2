"""Families whose MLPs are mixtures of experts."""

from __future__ import annotations

from dataclasses import replace

from kasa_tune.architectures.architecture import MLP, Architecture, Experts
from kasa_tune.architectures.families.llama import llama, with_windows
from kasa_tune.architectures.settings import Settings


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
    return with_windows(found, window if slides else None, lambda layer: True)


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
    return with_windows(found, s.optional_size("sliding_window"), lambda layer: True)
