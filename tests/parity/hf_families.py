"""A random checkpoint in Hugging Face layout per family, and what transformers and we call its parts and sizes."""

from typing import NamedTuple

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")

VOCAB, EMBED, HIDDEN, LAYERS, HEADS, KV_HEADS, LENGTH = 96, 64, 112, 2, 4, 2, 24

# What transformers and torchtune call the same sizes. Every family has grouped queries.
HF_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": EMBED,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OUR_SIZES = {
    "vocab_size": VOCAB,
    "embed_dim": EMBED,
    "intermediate_dim": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "max_seq_len": 128,
}


def rope(theta, **scaling):
    """Rotary settings as transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`) read them."""
    if transformers.__version__.startswith("4."):
        return {"rope_theta": theta, "rope_scaling": scaling or None}
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | scaling}


LLAMA31_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Family(NamedTuple):
    """One family: transformers' class and config, torchtune's model type, our builders' name and arguments."""

    kind: str
    settings: dict
    model_type: str
    builder: str
    arguments: dict

    @property
    def sizes(self) -> dict:
        """All of the builders' arguments but the adapters'."""
        return OUR_SIZES | self.arguments

    @property
    def tied(self) -> bool:
        """Whether the output projection is the embedding."""
        return self.settings.get("tie_word_embeddings", self.kind.startswith("Gemma"))


FAMILIES = {
    "llama2": Family("Llama", rope(1e4) | {"rms_norm_eps": 1e-5}, "LLAMA2", "llama2", {}),
    "llama3": Family(
        "Llama", rope(5e5) | {"rms_norm_eps": 1e-5}, "LLAMA3", "llama3", {"rope_base": 500_000}
    ),
    "llama3_1": Family(
        "Llama",
        rope(5e5, **LLAMA31_SCALING) | {"rms_norm_eps": 1e-5},
        "LLAMA3",
        "llama3_1",
        {"rope_base": 500_000},
    ),
    "llama3_2": Family(
        "Llama",
        rope(5e5, **LLAMA31_SCALING | {"factor": 32.0})
        | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        "LLAMA3_2",
        "llama3_2",
        {"rope_base": 500_000, "scale_factor": 32, "tie_word_embeddings": True},
    ),
    "mistral": Family(
        "Mistral",
        rope(1e4) | {"rms_norm_eps": 1e-5, "sliding_window": None},
        "MISTRAL",
        "mistral",
        {},
    ),
    "qwen2": Family(
        "Qwen2",
        rope(1e6) | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        "QWEN2",
        "qwen2",
        {"rope_base": 1_000_000, "norm_eps": 1e-6},
    ),
    "qwen2_tied": Family(
        "Qwen2",
        rope(1e6) | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        "QWEN2",
        "qwen2",
        {"rope_base": 1_000_000, "norm_eps": 1e-6, "tie_word_embeddings": True},
    ),
    "gemma": Family(
        "Gemma",
        rope(1e4) | {"head_dim": 32, "rms_norm_eps": 1e-6},
        "GEMMA",
        "gemma",
        {"head_dim": 32},
    ),
    "gemma2": Family(
        "Gemma2",
        rope(1e4)
        | {
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        "GEMMA2",
        "gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window_size": 8,
            "hidden_capping_value": 2.0,
            "final_capping_value": 5.0,
        },
    ),
    "phi3": Family("Phi3", rope(1e4) | {"rms_norm_eps": 1e-5}, "PHI3_MINI", "phi3", {}),
}


def random_hf_model(family):
    """A transformers model whose weights are large enough that soft caps, biases and norms all show in the logits."""
    torch.manual_seed(0)
    kind = family.kind
    config = getattr(transformers, f"{kind}Config")(
        **HF_SIZES | family.settings, attn_implementation="eager"
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25)
            if "norm" in name and not kind.startswith("Gemma"):  # Gemma stores the difference to 1
                parameter.add_(1.0)
    return model


def tokens():
    """Token ids ``[2, LENGTH]``."""
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
