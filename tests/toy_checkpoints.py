"""Checkpoints in Hugging Face's files, of the toy models and of any weights under torchtune's names."""

import inspect
import json
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.gemma2._convert_weights import gemma2_tune_to_hf
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.training import FullModelHFCheckpointer

from tests.toy_models import FAMILIES, randomized

# config.json's keys of what every builder takes.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "intermediate_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
}
_LLAMA31 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_CONVERT = {"GEMMA2": gemma2_tune_to_hf, "QWEN2": qwen2_tune_to_hf}


class Toy(NamedTuple):
    """A toy model: its family, further sizes, torchtune's model type."""

    family: str
    more: dict
    model_type: str

    @property
    def sizes(self) -> dict:
        """All of the builders' arguments but the adapters'."""
        return FAMILIES[self.family].sizes | self.more


MODELS = {
    "llama2": Toy("llama2", {}, "LLAMA2"),
    "llama3": Toy("llama3", {}, "LLAMA3"),
    "llama3_2": Toy("llama3_2", {}, "LLAMA3_2"),
    "mistral": Toy("mistral", {"num_kv_heads": 1}, "MISTRAL"),
    "gemma": Toy("gemma", {}, "GEMMA"),
    "gemma2": Toy("gemma2", {}, "GEMMA2"),
    "qwen2": Toy("qwen2", {}, "QWEN2"),
    "qwen2_tied": Toy("qwen2", {"tie_word_embeddings": True}, "QWEN2"),
    "phi3": Toy("phi3", {"num_kv_heads": 4}, "PHI3_MINI"),
    "phi3_gqa": Toy("phi3", {}, "PHI3_MINI"),
    "phi4": Toy("phi3", {}, "PHI4"),
}


def to_hf(weights, model_type, sizes):
    """Weights under torchtune's names, in Hugging Face's names and layout, by torchtune's own way back."""
    if model_type in ("PHI3_MINI", "PHI4"):
        return phi3_tune_to_hf(weights)
    shape = {
        "num_heads": sizes["num_heads"],
        "num_kv_heads": sizes["num_kv_heads"],
        "dim": sizes["embed_dim"],
    }
    return _CONVERT.get(model_type, tune_to_hf)(weights, **shape, head_dim=sizes.get("head_dim"))


def toy(name, dtype=torch.float32):
    """The sizes of a toy and its weights under torchtune's names, as they would be trained."""
    sizes = MODELS[name].sizes
    state = randomized(FAMILIES[MODELS[name].family].base(**sizes)).state_dict()
    return sizes, {key: value.to(dtype) for key, value in state.items()}


def config_of(family, sizes):
    """config.json of a toy, under the keys of transformers 4.

    Args:
        family: of :data:`~tests.toy_models.FAMILIES`.
        sizes: arguments of its builder; of others it has the defaults.
    """
    parameters = inspect.signature(FAMILIES[family].base).parameters.values()
    values = {one.name: one.default for one in parameters if one.default is not one.empty} | sizes
    config = {key: values[ours] for key, ours in _KEYS.items()}
    config["model_type"] = "llama" if family.startswith("llama") else family
    config["hidden_act"] = "gelu_pytorch_tanh" if family.startswith("gemma") else "silu"
    config["tie_word_embeddings"] = values.get("tie_word_embeddings", FAMILIES[family].tied)
    if "scale_factor" in values:
        config["rope_scaling"] = _LLAMA31 | {"factor": values["scale_factor"]}
    if "head_dim" in values:
        config["head_dim"] = values["head_dim"]
    if family == "mistral":
        config["sliding_window"] = None
    if family == "gemma2":
        config |= {
            "sliding_window": values["sliding_window_size"],
            "query_pre_attn_scalar": values["query_pre_attn_scalar"] or values["head_dim"],
            "attn_logit_softcapping": values["hidden_capping_value"],
            "final_logit_softcapping": values["final_capping_value"],
        }
    return config


def write_checkpoint(
    folder, name, *, dtype=torch.float32, shards=1, change=lambda state: None, save=save_file
):
    """A Hugging Face checkpoint of a toy; returns the names of its files."""
    sizes, weights = toy(name, dtype)
    state = to_hf(weights, MODELS[name].model_type, sizes)
    change(state)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(MODELS[name].family, sizes)))
    suffix = "safetensors" if save is save_file else "bin"
    names = [f"model-{index + 1:05d}-of-{shards:05d}.{suffix}" for index in range(shards)]
    keys = sorted(state)
    for index, file in enumerate(names):
        save({key: state[key].clone().contiguous() for key in keys[index::shards]}, folder / file)
    return names


def checkpointer(folder, files, model_type):
    """Torchtune's, of a folder in Hugging Face's layout."""
    options = {
        "checkpoint_files": files,
        "model_type": model_type,
        "output_dir": str(folder.parent / "out"),
    }
    return FullModelHFCheckpointer(checkpoint_dir=str(folder), **options)
