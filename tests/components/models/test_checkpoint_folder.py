"""Files of a checkpoint's folder that do not agree with its config.json, or with each other."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from kasa_tune.architectures.files import INDEX, weight_files
from kasa_tune.components.models import CheckpointFolder
from kasa_tune.components.models.agreement import check_architecture
from kasa_tune.components.models.from_checkpoint import from_checkpoint

CONFIG = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def folder_with(path, kind, files, **more):
    """A folder with these tensors by the names of files, and a config.json."""
    (path / "config.json").write_text(json.dumps({**CONFIG, "model_type": kind, **more}))
    for name, tensors in files.items():
        save_file(tensors, path / name)
    return CheckpointFolder(path)


def embeddings(other=None):
    table = torch.arange(100.0)[:, None].expand(100, 16).contiguous()
    return {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table.clone() if other is None else other,
    }


def test_a_copy_of_a_tied_embedding_is_left_out(tmp_path):
    folder = folder_with(
        tmp_path, "llama", {"model.safetensors": embeddings()}, tie_word_embeddings=True
    )
    assert set(folder.open()) == {"tok_embeddings.weight"}


@pytest.mark.parametrize("other", [torch.zeros(100, 16), torch.zeros(50, 16), torch.zeros(1)])
def test_an_output_projection_that_is_not_the_embedding_is_not_lost(tmp_path, other):
    files = {"model.safetensors": embeddings(other)}
    folder = folder_with(tmp_path, "llama", files, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight is another tensor than model"):
        folder.open()


@pytest.mark.parametrize("heads", [1, 4])
def test_a_fused_tensor_of_other_rows_is_not_cut(tmp_path, heads):
    fused = {"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(32, 16)}
    folder_with(tmp_path, "phi3", {"model.safetensors": fused}).open()
    folder = folder_with(tmp_path, "phi3", {}, num_key_value_heads=heads)
    with pytest.raises(ValueError, match="has 32 rows, and config"):
        folder.open()


@pytest.mark.parametrize("second", ["model.norm.weight", "language_model.model.norm.weight"])
def test_a_tensor_that_is_there_twice_is_refused(tmp_path, second):
    files = {
        "model-00001-of-00002.safetensors": {"model.norm.weight": torch.ones(16)},
        "model-00002-of-00002.safetensors": {second: torch.zeros(16)},
    }
    with pytest.raises(ValueError, match=r"holds norm\.weight as .* Remove the one that is wrong"):
        folder_with(tmp_path, "llama", files).open()


@pytest.mark.parametrize("name", ["a\n# b", "../other", "n" * 300, "/etc/passwd", "."])
def test_a_name_of_the_index_that_is_no_file_here_is_refused(tmp_path, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is no file of this folder") as error:
        weight_files(tmp_path)
    assert "\n" not in str(error.value)


def test_of_many_unknown_keys_a_few_are_named_in_one_line(tmp_path, caplog):
    unknown = {f"key{number:03}": 1 for number in range(20)} | {"a\n# b": 1}
    folder_with(tmp_path, "llama", {}, **unknown)
    with caplog.at_level(logging.WARNING):
        check_architecture(from_checkpoint(tmp_path), tmp_path, longest=0)
    (line,) = [one.getMessage() for one in caplog.records if "nothing is known" in one.getMessage()]
    assert r"'a\n# b', key000" in line
    assert "key010 and 9 more" in line
    assert "\n" not in line
