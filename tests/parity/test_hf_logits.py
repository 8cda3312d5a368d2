"""Logits of our models against transformers, on one random checkpoint in Hugging Face layout per family."""

from functools import partial

import pytest
import torch
from torchtune.training import FullModelHFCheckpointer

from kasa_tune.components import models
from kasa_tune.components.models.base_weights import StreamedWeights, read_base_weights
from kasa_tune.components.models.loading import build_on_meta, load_base_weights

transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")
pytestmark = pytest.mark.parity

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

# family: (transformers class, its config, torchtune's model_type, our builder, its arguments)
FAMILIES = {
    "llama2": ("Llama", rope(1e4) | {"rms_norm_eps": 1e-5}, "LLAMA2", "kasa_llama2", {}),
    "llama3": ("Llama", rope(5e5) | {"rms_norm_eps": 1e-5}, "LLAMA3", "kasa_llama3", {"rope_base": 500_000}),
    "llama3_1": (
        "Llama",
        rope(5e5, **LLAMA31_SCALING) | {"rms_norm_eps": 1e-5},
        "LLAMA3",
        "kasa_llama3_1",
        {"rope_base": 500_000},
    ),
    "llama3_2": (
        "Llama",
        rope(5e5, **LLAMA31_SCALING | {"factor": 32.0}) | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        "LLAMA3_2",
        "kasa_llama3_2",
        {"rope_base": 500_000, "scale_factor": 32, "tie_word_embeddings": True},
    ),
    "mistral": ("Mistral", rope(1e4) | {"rms_norm_eps": 1e-5, "sliding_window": None}, "MISTRAL", "kasa_mistral", {}),
    "qwen2": (
        "Qwen2",
        rope(1e6) | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        "QWEN2",
        "kasa_qwen2",
        {"rope_base": 1_000_000, "norm_eps": 1e-6},
    ),
    "qwen2_tied": (
        "Qwen2",
        rope(1e6) | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        "QWEN2",
        "kasa_qwen2",
        {"rope_base": 1_000_000, "norm_eps": 1e-6, "tie_word_embeddings": True},
    ),
    "gemma": ("Gemma", rope(1e4) | {"head_dim": 32, "rms_norm_eps": 1e-6}, "GEMMA", "kasa_gemma", {"head_dim": 32}),
    "gemma2": (
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
        "kasa_gemma2",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window_size": 8,
            "hidden_capping_value": 2.0,
            "final_capping_value": 5.0,
        },
    ),
    "phi3": ("Phi3", rope(1e4) | {"rms_norm_eps": 1e-5}, "PHI3_MINI", "kasa_phi3", {}),
}


def random_hf_model(kind, settings):
    """A transformers model whose weights are large enough that soft caps, biases and norms all show in the logits."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**HF_SIZES | settings, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.25)
            if "norm" in name and not kind.startswith("Gemma"):  # Gemma stores the difference to 1
                parameter.add_(1.0)
    return model


def our_model(folder, model_type, builder, arguments):
    """The same checkpoint on our road: built on meta, read tensor by tensor, adapters at their start."""
    build = partial(
        getattr(models, builder),
        attn_modules=["q_proj", "v_proj"],
        apply_to_mlp=True,
        rank=4,
        truncation_rank=0,
        **OUR_SIZES | arguments,
    )
    model = build_on_meta(build, dtype=torch.float32)
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(folder),
        checkpoint_files=["model.safetensors"],
        model_type=model_type,
        output_dir=str(folder.with_name("out")),
    )
    weights = read_base_weights(checkpointer)
    assert isinstance(weights, StreamedWeights)
    load_base_weights(model, weights, device=torch.device("cpu"), adapter_dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tmp_path):
    kind, settings, model_type, builder, arguments = FAMILIES[family]
    theirs = random_hf_model(kind, settings)
    theirs.save_pretrained(tmp_path / "hf")
    ours = our_model(tmp_path / "hf", model_type, builder, arguments)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(got.float(), expected.float(), rtol=1e-3, atol=1e-3)
