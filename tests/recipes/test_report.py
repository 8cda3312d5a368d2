"""A run's pictures: the numbers behind them against dense decompositions, and what is said when there are none."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kasa_tune import config
from kasa_tune.components.checkpointing import load_part


@pytest.fixture
def report(load_recipe, monkeypatch):
    """Call the recipe as the command line does; raises what a user would be told."""
    monkeypatch.setenv("KASA_TUNE_TRACEBACK", "1")

    def run(folder, *overrides):
        arguments = ["--config", "tiny_kasa", f"output_dir={folder}", *overrides]
        monkeypatch.setattr(sys, "argv", ["report_run", *arguments])
        return load_recipe("report_run").recipe_main()

    return run


def dense_singular_values(matrix, count):
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:count].tolist()


@pytest.mark.parametrize("config_name", ["tiny_kasa", "tiny_lora"])
def test_spectra_are_those_of_the_dense_matrices(config_name, finetune, load_recipe):
    run = finetune("max_steps=3", "optimizer.lr=1e-2", "model.rank=5", config_name=config_name)
    cfg = config.load(run.folder / "config.yaml", [], config.FINETUNE)
    spectra = load_recipe("report_run").layer_spectra(cfg, run.checkpoints[-1])
    adapter = load_part(run.checkpoints[-1], "adapter")
    assert len(spectra) == 6
    assert len({name.rpartition(".")[2] for name in spectra}) > 3
    assert len({name.split(".")[1] for name in spectra}) > 3
    for name, layer in spectra.items():
        part = {key.removeprefix(f"{name}."): value.double() for key, value in adapter.items() if f"{name}." in key}
        scale = cfg.model.alpha / 5 * torch.diag(part.get("lora_diag", torch.ones(5)).double())
        update = part["lora_b.weight"] @ scale @ part["lora_a.weight"]
        edit = part["lora_edit_out"] @ part["lora_edit_in"]
        assert layer.update.tolist() == pytest.approx(dense_singular_values(update, 5), rel=1e-9, abs=1e-12)
        assert layer.removed.tolist() == pytest.approx(dense_singular_values(edit, len(layer.removed)), rel=1e-9)
        assert len(layer.removed) == cfg.model.get("truncation_rank", 0)
        assert layer.update[0] > 0


def test_the_base_spectrum_is_the_files(finetune, load_recipe):
    run = finetune("max_steps=1")
    cfg = config.load(run.folder / "config.yaml", [], config.FINETUNE)
    spectra = load_recipe("report_run").layer_spectra(cfg, run.checkpoints[-1])
    weights = load_file(f"{cfg.checkpointer.checkpoint_dir}/{cfg.checkpointer.checkpoint_files[0]}")
    norms = {round(float(weight.double().norm()), 3) for weight in weights.values()}  # the same in any order of rows
    for layer in spectra.values():
        assert round(float(layer.base.double().norm()), 3) in norms


@pytest.mark.parametrize(("m", "n", "r"), [(30, 20, 4), (4, 50, 4), (50, 4, 4), (6, 7, 0), (9, 9, 1)])
def test_singular_values_of_a_product(m, n, r, load_recipe):
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(m, r, generator=generator, dtype=torch.float64)
    into = torch.randn(r, n, generator=generator, dtype=torch.float64)
    found = load_recipe("report_run").product_singular_values(out, into)
    assert found.tolist() == pytest.approx(dense_singular_values(out @ into, r), rel=1e-12)


def test_a_run_with_other_settings_than_the_config_is_named(finetune, report):
    run = finetune("max_steps=1", "model.rank=4")
    with pytest.raises(ValueError, match=r"model\.rank: checkpoint 4, config 16"):
        report(run.folder)


def test_a_folder_without_metrics(report, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl.*output_dir"):
        report(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n', '{"loss": 1.0}\n{"step": 2, "loss": 1.0}\n', "[1]\n"]
)
def test_metrics_that_are_damaged(content, report, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        report(tmp_path)


def test_a_run_without_a_checkpoint_yet(report, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        report(tmp_path)
    assert (tmp_path / "loss_curve.png").is_file()
