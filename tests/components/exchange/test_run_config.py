"""The config of a run that is given alone: what it may name, where its base lies now, and texts that stay texts."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from kasa_tune.components.exchange.run_config import config_of_run

CONFIG = {
    "model": {
        "_component_": "kasa_tune.components.models.kasa_from_checkpoint",
        "checkpoint_dir": "/models/old",
        "attn_modules": ["q_proj"],
    },
    "tokenizer": {
        "_component_": "kasa_tune.components.data.tokenizer_from_checkpoint",
        "checkpoint_dir": "/models/old",
        "max_seq_len": 64,
    },
    "checkpointer": {
        "_component_": "kasa_tune.components.models.CheckpointFolder",
        "checkpoint_dir": "/models/old",
    },
    "adapter": {"dtype": "fp32"},
    "dtype": "fp32",
}


class Opened(SimpleNamespace):
    """A checkpoint as far as its config is asked for."""

    def __str__(self):
        return "/tmp/run"


def opened(**changed):
    config = {**CONFIG, **changed}
    return Opened(config=config, run={"step": 1, "base": "0", "config": config})


def test_a_folder_takes_the_place_of_the_runs():
    assert config_of_run(opened()) == CONFIG
    moved = config_of_run(opened(), "/models/new")
    places = {moved[name]["checkpoint_dir"] for name in ("model", "tokenizer", "checkpointer")}
    assert places == {"/models/new"}
    assert CONFIG["model"]["checkpoint_dir"] == "/models/old"


def test_files_of_a_tokenizer_are_looked_for_beside_a_base_that_moved(tmp_path):
    tokenizer = {
        "_component_": "torchtune.models.llama2.llama2_tokenizer",
        "path": "/models/old/tokenizer.model",
    }
    (tmp_path / "tokenizer.model").touch()
    found = config_of_run(opened(tokenizer=tokenizer), str(tmp_path))
    assert found["tokenizer"]["path"] == str(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("name", ["model", "tokenizer", "checkpointer"])
def test_what_a_data_file_may_not_name_is_not_called(name):
    node = CONFIG[name] | {"_component_": "os.system"}
    with pytest.raises(ValueError, match=rf"names {name}\._component_ 'os\.system'"):
        config_of_run(opened(**{name: node}))


def test_a_run_without_a_tokenizer_needs_a_config():
    with pytest.raises(ValueError, match="names no tokenizer, as an imported adapter"):
        config_of_run(opened(tokenizer=None))


def test_texts_of_a_data_file_are_not_interpolated(monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    tokenizer = CONFIG["tokenizer"] | {"checkpoint_dir": "/a/${oc.env:SECRET}"}
    found = OmegaConf.create(config_of_run(opened(tokenizer=tokenizer)))
    # The folder is gone, so that of the base is taken, which has no such text.
    assert found.tokenizer.checkpoint_dir == "/models/old"
    found = OmegaConf.create(config_of_run(opened(note="${oc.env:SECRET}")))
    assert found.note == "${oc.env:SECRET}"
