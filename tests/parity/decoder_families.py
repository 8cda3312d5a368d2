"""A random checkpoint of every family that our decoder knows, saved by transformers in today's layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kasa_tune.components.models import CheckpointFolder
from kasa_tune.components.models.from_checkpoint import from_checkpoint

transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")

VOCAB, LENGTH, WINDOW = 97, 24, 5
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OF_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_inner": 96,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0}
_YARN |= {"original_max_position_embeddings": 16}
_LONGROPE = {"type": "longrope", "short_factor": [1 + i / 10 for i in range(8)]}
_LONGROPE |= {"long_factor": [2 + i / 10 for i in range(8)]}
_SLIDES = {"sliding_window": WINDOW}
_EXPERTS = {"num_experts_per_tok": 2}

# What each case adds to the sizes. The part of a name before a blank is config.json's model_type.
CASES = {
    "llama": {"head_dim": 24},
    "llama, scaled": {
        "rope_theta": 5e5,
        "rope_scaling": _LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 16},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"head_dim": 24} | _SLIDES,
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": _YARN
        | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    },
    "mixtral": {"num_local_experts": 4} | _EXPERTS,
    "qwen2": {"head_dim": 24},
    "qwen2, sliding": {"use_sliding_window": True, "max_window_layers": 2} | _SLIDES,
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "qwen3_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 48,
        "head_dim": 24,
        "norm_topk_prob": True,
    }
    | _EXPERTS,
    "qwen3_moe, some dense": {
        "num_experts": 6,
        "moe_intermediate_size": 48,
        "head_dim": 16,
        "mlp_only_layers": [1],
    }
    | _EXPERTS,
    "gemma": {"head_dim": 24},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    }
    | _SLIDES,
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "num_hidden_layers": 7,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    | _SLIDES,
    "phi3": {"partial_rotary_factor": 0.5, "head_dim": 24} | _SLIDES,
    "phi3, long": {"original_max_position_embeddings": 12, "rope_scaling": _LONGROPE},
    "olmo2": {"head_dim": 24},
    "olmo3": {"head_dim": 24, "rope_theta": 5e5, "rope_scaling": _YARN} | _SLIDES,
    "granite": {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    },
    "smollm3": {"head_dim": 24},
    "smollm3, sliding": {"use_sliding_window": True} | _SLIDES,
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "cohere": {"head_dim": 24, "logit_scale": 0.3},
    "cohere2": {"head_dim": 24, "logit_scale": 0.3} | _SLIDES,
    "nemotron": {"hidden_act": "relu2", "head_dim": 24},
    "stablelm": {"use_qkv_bias": True},
    "stablelm, parallel": {"use_parallel_residual": True},
    "exaone4": {"sliding_window_pattern": 4} | _SLIDES,
    "exaone4, full": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "hunyuan_v1_dense": {
        "head_dim": 16,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    },
    "ernie4_5": {"head_dim": 24, "use_bias": True},
    "internlm3": {"qkv_bias": True, "bias": True, "head_dim": 16},
    "gpt2": {},
    "gpt2, scaled by depth": {
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "reorder_and_upcast_attn": True,
        "activation_function": "gelu",
        "layer_norm_epsilon": 0.01,
        "n_inner": None,
        "tie_word_embeddings": False,
    },
}


def settings_of(case: str) -> dict:
    """The content of a config.json in the layout of before transformers 5."""
    kind = case.partition(",")[0]
    return {**(_OF_GPT2 if kind == "gpt2" else _SIZES), "model_type": kind, **CASES[case]}


def save_random(case: str, folder: Path):
    """Save a random model of a case, and return it. Its weights are large enough that caps, biases
    and norms show in the logits.
    """
    settings = settings_of(case)
    kind = settings.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    build = transformers.AutoModelForCausalLM.from_config
    model = build(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            counts_from_one = "gemma" in kind or kind == "nemotron"
            parameter.normal_(0.0, 0.25)
            if (
                ("norm" in name or ".ln_" in name)
                and name.endswith("weight")
                and not counts_from_one
            ):
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return model


def load_ours(folder: Path):
    """Our decoder with the weights of a folder."""
    model = from_checkpoint(folder)
    model.load_state_dict(dict(CheckpointFolder(folder).open()))
    return model.eval()


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by their names there."""
    return {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}


def config_of(folder: Path) -> dict:
    """The content of a folder's config.json."""
    return json.loads((folder / "config.json").read_text())


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Random token ids ``[rows, length]``, none of them special."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
