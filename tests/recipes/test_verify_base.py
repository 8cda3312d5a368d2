"""Base weights that changed in a value that no sample looks at: verify_base=full tells it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_tune.components.checkpoints import CheckpointError
from kasa_tune.registry import PACKAGE_ROOT

TINY_MODEL = PACKAGE_ROOT / "tiny_world" / "model"
OPTIONS = ["max_steps=2", "save_every_n_steps=1", "model.dropout=0.0"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(TINY_MODEL, tmp_path / "base")


def change_a_value_between_samples(folder):
    """Flip the lowest bit of the embedding's second value; of 131,072 values every 32nd is sampled."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    flat = weights["model.embed_tokens.weight"].view(torch.int32).flatten()
    assert flat.numel() == 131_072
    flat[1] ^= 1
    save_file(weights, path)


def test_one_changed_byte_is_told_by_the_whole_digest_alone(finetune, base):
    options = [*OPTIONS, f"checkpointer.checkpoint_dir={base}"]
    first = finetune(*options, "verify_base=full", "max_steps=1", name="run")
    assert len(first.part("run")["base_digest"]) == 64
    change_a_value_between_samples(base)
    resume = "resume_from_checkpoint=True"
    shutil.copytree(first.folder, first.folder.with_name("sampled"))
    assert finetune(*options, resume, name="sampled").status == 0
    with pytest.raises(CheckpointError, match=r"digest .* some value differs"):
        finetune(*options, resume, "verify_base=full", name="run")
    assert [path.name for path in first.checkpoints] == ["step_00000001"]


def test_a_sample_is_compared_unless_told_otherwise(finetune, base):
    options = [*OPTIONS, f"checkpointer.checkpoint_dir={base}"]
    first = finetune(*options, "max_steps=1", name="run")
    assert "base_digest" not in first.part("run")
    resumed = finetune(*options, "resume_from_checkpoint=True", "verify_base=full", name="run")
    assert len(resumed.part("run")["base_digest"]) == 64
