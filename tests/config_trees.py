"""Complete configs in a folder that holds the files they name, and the problems of a changed one."""

import json
from pathlib import Path

import pytest
import yaml

from kasa_tune import config

LLAMA3_8B = {  # config.json of the model
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def complete(folder: Path) -> dict:
    """A fine-tuning config without a fault, in a folder that holds the files it names."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    for name in SHARDS:
        (model / name).touch()
    (model / "config.json").write_text(json.dumps(LLAMA3_8B))
    (model / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    (folder / "rows.jsonl").touch()
    return {
        "output_dir": str(folder / "out"),
        "tokenizer": {
            "_component_": "torchtune.models.llama3.llama3_tokenizer",
            "path": str(model / "tokenizer.model"),
        },
        "model": {
            "_component_": "kasa_tune.components.models.kasa_llama3_8b",
            "attn_modules": ["q_proj", "v_proj"],
            "rank": 8,
            "alpha": 16,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model),
            "checkpoint_files": SHARDS,
            "model_type": "LLAMA3",
            "output_dir": "${output_dir}",
        },
        "dataset": {
            "_component_": "torchtune.datasets.instruct_dataset",
            "source": "json",
            "data_files": str(folder / "rows.jsonl"),
            "split": "train",
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-4},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 10,
        },
        "device": "cpu",
    }


def write(tree: dict, folder: str | Path, name: str = "mine.yaml") -> Path:
    path = Path(folder) / name
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def folder_of(tree: dict) -> Path:
    return Path(tree["output_dir"]).parent


def load(tree: dict, *overrides: str, **options):
    return config.load(write(tree, folder_of(tree)), overrides, **options)


def problems(tree: dict, *overrides: str, **options) -> dict[str, str]:
    """The problems by key; each key may have one."""
    with pytest.raises(config.ConfigError) as caught:
        load(tree, *overrides, **options)
    found = dict(caught.value.problems)
    assert len(found) == len(caught.value.problems)
    return found


def only_problem(tree: dict, *overrides: str, **options) -> tuple[str, str]:
    found = problems(tree, *overrides, **options)
    assert len(found) == 1, found
    return next(iter(found.items()))
