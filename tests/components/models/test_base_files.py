"""The files of a base: what is listed must be weights, all of them, beside a config.json that can be read."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from kasa_tune.components.models.base_files import (
    INDEX,
    check_base_files,
    checked_config,
    shards_of,
)
from kasa_tune.components.models.base_weights import read_base
from tests.toy_checkpoints import toy, write_checkpoint


def node_of(folder, files, model_type="LLAMA2"):
    component = "torchtune.training.FullModelHFCheckpointer"
    options = {"checkpoint_dir": str(folder), "checkpoint_files": files, "model_type": model_type}
    return OmegaConf.create(
        {"_component_": component, "output_dir": str(folder.parent / "out"), **options}
    )


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in three shards with an index, and the names of its shards."""
    folder = tmp_path / "base"
    files = write_checkpoint(folder, "llama2", shards=3)
    weight_map = {key: file for file in files for key in load_file(folder / file)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, files


def test_all_shards_are_read(sharded):
    folder, files = sharded
    weights = read_base(node_of(folder, files))
    expected = toy("llama2")[1]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    pattern = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00003"}
    assert read_base(node_of(folder, pattern)).keys() == expected.keys()


def test_an_index_is_not_weights(sharded):
    folder, files = sharded
    with pytest.raises(ValueError, match=r"lists weights and holds none\. Set .*") as error:
        read_base(node_of(folder, [INDEX]))
    assert json.dumps(files) in str(error.value)
    with pytest.raises(ValueError, match=r"config\.json, which holds no weights"):
        read_base(node_of(folder, ["config.json"]))


@pytest.mark.parametrize("index", [True, False])
def test_one_shard_of_several_is_refused_with_the_list_to_set(sharded, index):
    folder, files = sharded
    if not index:
        (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=r"names 2 of the 3 files .*00002-of-00003") as error:
        read_base(node_of(folder, [files[0], files[2]]))
    assert json.dumps(files) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "null", '{"weight_map": 3}', "[" * 10**5])
def test_a_damaged_index_is_named(sharded, text):
    """The shards' own names say how many there are, so that a whole list does not need it."""
    folder, files = sharded
    (folder / INDEX).write_text(text)
    assert read_base(node_of(folder, files)).keys() == toy("llama2")[1].keys()
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        read_base(node_of(folder, [INDEX]))
    (folder / files[0]).rename(folder / "first.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        read_base(node_of(folder, ["first.safetensors"]))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/a", "", ".."])
def test_an_index_names_files_of_its_folder_alone(sharded, name):
    folder, _ = sharded
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="which is no file of this folder"):
        shards_of(folder)


def test_shards_of_any_names_are_counted_by_the_index(sharded):
    folder, files = sharded
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    names = dict(zip(files, ["a.safetensors", "b.safetensors", "c.safetensors"], strict=True))
    for old, new in names.items():
        (folder / old).rename(folder / new)
    weight_map = {key: names[file] for key, file in weight_map.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert read_base(node_of(folder, [*names.values()])).keys() == toy("llama2")[1].keys()
    with pytest.raises(ValueError, match=r"names 1 of the 3 files .*b\.safetensors is left out"):
        read_base(node_of(folder, ["a.safetensors"]))


@pytest.mark.parametrize(
    "given",
    [None, [], 7, [7], ["/etc/passwd"], ["../x.safetensors"], {"max_filename": "3"}],
    ids=str,
)
def test_a_list_that_names_no_files_of_the_folder(sharded, given):
    with pytest.raises(ValueError, match=r"checkpoint_files"):
        check_base_files(sharded[0], given)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe\x00", b"version https://git-lfs\n"]
)
def test_a_config_that_is_no_object_is_named(sharded, content):
    folder, files = sharded
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"base/config\.json is damaged"):
        read_base(node_of(folder, files))


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "hidden_size"])
@pytest.mark.parametrize("value", [0, -4, "4", 2.5, True, [4], {}, 10**12], ids=str)
def test_numbers_that_are_none_are_named(sharded, key, value):
    folder, files = sharded
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: {key} is "):
        read_base(node_of(folder, files))


@pytest.mark.parametrize("without", ["missing", "null"])
def test_without_key_value_heads_there_are_as_many_as_heads(without, tmp_path):
    """As transformers reads it: every head has its own, Llama 2 7B's older files say nothing of them."""
    folder = tmp_path / "base"
    files = write_checkpoint(folder, "phi3")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("num_key_value_heads") == config["num_attention_heads"]
    if without == "null":
        config["num_key_value_heads"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert checked_config(folder)["num_key_value_heads"] == config["num_attention_heads"]
    weights = read_base(node_of(folder, files, "PHI3_MINI"))
    assert all(torch.equal(weights[name], value) for name, value in toy("phi3")[1].items())
    pickled = write_checkpoint(folder, "phi3", save=torch.save)
    (folder / "config.json").write_text(json.dumps(config))
    weights = read_base(node_of(folder, pickled, "PHI3_MINI"))
    assert all(torch.equal(weights[name], value) for name, value in toy("phi3")[1].items())
