"""A run's pictures: the numbers behind them against dense decompositions, and what is said when there are none."""

import json
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kasa_tune import config
from kasa_tune.components.checkpoints import Checkpoint, load_part
from kasa_tune.components.reports import diagonals_of, layer_inputs, plots
from kasa_tune.components.reports.measuring import covariance_picture, seen_through
from kasa_tune.components.reports.plots import DrawnSpectrum, layer_ranks, singular_values
from tests.components.reports.reading_pages import Page


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
    spectra = load_recipe("report_run").drawn_spectra(cfg, Checkpoint(run.checkpoints[-1]))
    adapter = load_part(run.checkpoints[-1], "adapter")
    assert len(spectra) == 6
    assert len({name.rpartition(".")[2] for name in spectra}) > 3
    assert len({name.split(".")[1] for name in spectra}) > 3
    for name, layer in spectra.items():
        part = {
            key.removeprefix(f"{name}."): value.double()
            for key, value in adapter.items()
            if f"{name}." in key
        }
        scale = cfg.model.alpha / 5 * torch.diag(part.get("lora_diag", torch.ones(5)).double())
        update = part["lora_b.weight"] @ scale @ part["lora_a.weight"]
        edit = part["lora_edit_out"] @ part["lora_edit_in"]
        assert layer.update.tolist() == pytest.approx(
            dense_singular_values(update, 5), rel=1e-9, abs=1e-12
        )
        assert layer.removed.tolist() == pytest.approx(
            dense_singular_values(edit, len(layer.removed)), rel=1e-9
        )
        assert len(layer.removed) == cfg.model.get("truncation_rank", 0)
        assert layer.update[0] > 0


def test_the_base_spectrum_is_the_files(finetune, load_recipe):
    run = finetune("max_steps=1")
    cfg = config.load(run.folder / "config.yaml", [], config.FINETUNE)
    spectra = load_recipe("report_run").drawn_spectra(cfg, Checkpoint(run.checkpoints[-1]))
    weights = load_file(f"{cfg.checkpointer.checkpoint_dir}/{cfg.checkpointer.checkpoint_files[0]}")
    norms = {
        round(float(weight.double().norm()), 3) for weight in weights.values()
    }  # the same in any order of rows
    for layer in spectra.values():
        assert round(float(layer.base.double().norm()), 3) in norms


@pytest.mark.parametrize(("method", "from_start"), [("pissa", True), ("milora", False)])
def test_a_start_inside_the_weight_is_no_learned_update(method, from_start, corda, load_recipe):
    """PiSSA takes the base's first singular values out, MiLoRA its last; what is learned is what came on top."""
    run = corda("max_steps=1", "model.rank=5", config_name=f"tiny_{method}")
    cfg = config.load(run.folder / "config.yaml", [], config.CORDA)
    adapter = run.part("adapter")
    for name, layer in (
        load_recipe("report_run").drawn_spectra(cfg, Checkpoint(run.checkpoints[-1])).items()
    ):
        assert layer.from_start == from_start
        taken = layer.base[:5] if from_start else layer.base[-5:]
        assert layer.removed.tolist() == pytest.approx(taken.tolist(), rel=1e-3)
        part = {
            key.removeprefix(f"{name}."): value.double()
            for key, value in adapter.items()
            if f"{name}." in key
        }
        learned = cfg.model.alpha / 5 * part["lora_b.weight"] @ part["lora_a.weight"]
        learned -= part["lora_edit_out"] @ part["lora_edit_in"]
        assert layer.update.tolist() == pytest.approx(
            dense_singular_values(learned, 10), rel=1e-6, abs=1e-9
        )


@pytest.mark.parametrize(
    ("m", "n", "r"), [(30, 20, 4), (4, 50, 4), (50, 4, 4), (6, 7, 0), (9, 9, 1)]
)
def test_singular_values_of_a_product(m, n, r, load_recipe):
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(m, r, generator=generator, dtype=torch.float64)
    into = torch.randn(r, n, generator=generator, dtype=torch.float64)
    found = load_recipe("report_run").product_singular_values(out, into)
    assert found.tolist() == pytest.approx(dense_singular_values(out @ into, r), rel=1e-12)


def test_a_config_that_trains_nothing(run_main, tmp_path):
    folders = [f"adapter_checkpoint={tmp_path}", f"output_dir={tmp_path}"]
    with pytest.raises(ValueError, match=r"trains nothing.*--config report run="):
        run_main("report_run", "--config", "tiny_corda_generate", *folders)


def test_a_run_with_other_settings_than_the_config_is_named(finetune, report):
    run = finetune("max_steps=1", "model.rank=4")
    with pytest.raises(ValueError, match=r"model\.rank: checkpoint 4, config 16"):
        report(run.folder)


def test_a_folder_without_metrics(report, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl.*output_dir"):
        report(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n',
        b'{"loss": 1.0}\n{"step": 2, "loss": 1.0}\n',
        b'[1]\n{"step": 2, "loss": 1.0}\n',
        b'{"step": "1", "loss": 2.0}\n{"step": 2, "loss": 1.0}\n',
        b'{"step": 1, "l\xffss": 2.0}\n{"step": 2, "loss": 1.0}\n',
    ],
)
def test_unreadable_lines_are_left_out_with_a_warning(content, report, tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        report(tmp_path)
    assert (tmp_path / "loss_curve.png").is_file()
    assert "1 lines of" in caplog.text


def test_a_run_without_a_checkpoint_yet(report, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no finished checkpoint"):
        report(tmp_path)
    assert (tmp_path / "loss_curve.png").is_file()


# -------------------------------------------------------------------------------------------------------------- page


@pytest.fixture(scope="module")
def texts():
    """Read a report.html: what a reader sees, once it is clear that nothing in it is broken."""

    def read(folder):
        page = Page((folder / "report.html").read_text(encoding="utf-8"))
        assert page.faults == []
        return page.text

    return read


def test_one_page_of_a_run_and_one_of_two(finetune, run_main, tmp_path, texts, capsys):
    options = ("save_every_n_steps=2", "keep_last=5", "run_val_every_n_steps=2")
    run = finetune("max_steps=4", "optimizer.lr=1e-2", *options)
    record = {"step": 2, "prompt": "<b>p</b>", "completion": "said"}
    (run.folder / "samples.jsonl").write_text(json.dumps(record) + "\n")
    assert run_main("report_run", "--config", "report", f"run={run.folder}") == 0
    assert f"Report: {run.folder / 'report.html'}" in capsys.readouterr().out
    text = texts(run.folder)
    for said in ("KaSA", "Every layer at step 4", "attn.q_proj over the checkpoints", "<b>p</b>"):
        assert said in text
    phases = json.loads((run.folder / "phases.json").read_text())
    assert list(phases) == [
        "reading data and weights", "starting the adapters", "setting up", "validation",
        "waiting for data", "forward and backward", "optimizer", "logging", "saving",
    ]  # fmt: skip
    assert all(name in text for name in phases)
    runs = f"runs={{a <i>: {run.folder}, second: {run.folder}}}"
    run_main("report_run", "--config", "report", runs, f"output_dir={tmp_path / 'both'}")
    text = texts(tmp_path / "both")
    assert "a <i> and second" in text
    assert "second: Every layer at step 4" in text


def test_the_size_of_d_is_that_of_the_checkpoints(finetune):
    run = finetune("max_steps=2", "optimizer.lr=1e-2", "save_every_n_steps=1", "keep_last=5")
    damaged = run.checkpoints[0] / "adapter.safetensors"
    found = diagonals_of(run.folder)
    assert list(found) == [1, 2]
    for path in run.checkpoints:
        stored = load_file(path / "adapter.safetensors")
        diagonals = {key: value for key, value in stored.items() if key.endswith(".lora_diag")}
        assert len(diagonals) == 35
        of_step = found[int(path.name[-8:])]
        for key, value in diagonals.items():
            expected = np.abs(value.numpy().astype(float)).mean()
            assert of_step[key.removesuffix(".lora_diag")] == pytest.approx(expected, rel=1e-12)
    damaged.write_bytes(b"")
    assert list(diagonals_of(run.folder)) == [2]


def test_calibration_is_that_of_the_run(corda, run_main, texts):
    """The spectrum of W C on the page is the one that the run's own decomposition started from."""
    run = corda("max_steps=1", "model.rank=5")
    cfg = config.load(run.folder / "config.yaml", [], config.CORDA)
    decomposed = json.loads((run.folder / "decomposition.json").read_text())["layers"]
    names = ["layers.0.attn.q_proj", "layers.3.mlp.w2"]
    found = layer_inputs(cfg, names, device=torch.device("cpu"))
    assert list(found) == names
    for name, layer in found.items():
        co_svd = layer.spectra["CO-SVD, W C"][:5]
        assert co_svd == pytest.approx(decomposed[name]["singular_values"], rel=1e-3)
        assert layer.width == (384 if name.endswith("w2") else 128)
    assert run_main("report_run", "--config", "report", f"run={run.folder}", "calibrate=True") == 0
    assert "Covariances of the inputs" in texts(run.folder)


def test_no_covariances_without_calibration(finetune, run_main):
    run = finetune("max_steps=1")
    with pytest.raises(ValueError, match=r"trained without calibration.*calibrate=False"):
        run_main("report_run", "--config", "report", f"run={run.folder}", "calibrate=True")


def test_a_weight_seen_through_its_inputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator)
    inputs = torch.randn(40, 5, generator=generator) * torch.tensor([1.0, 2.0, 4.0, 0.5, 0.1])
    covariance = inputs.T @ inputs / 40
    spectra = list(seen_through(weight, covariance).spectra.values())
    sizes = np.sqrt((inputs.double().numpy() ** 2).mean(axis=0))
    w, c = weight.double().numpy(), covariance.double().numpy()
    for found, matrix in zip(spectra, (w, w * np.sqrt(sizes), w @ c), strict=True):
        expected = np.linalg.svd(matrix, compute_uv=False)
        assert found == pytest.approx(expected.tolist(), rel=1e-4)


def test_the_picture_of_a_covariance_keeps_its_outliers():
    covariance = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) - 0.5
    covariance[4, 5] = -9.0
    found = covariance_picture(covariance, most=3)
    size = np.pad(np.abs(covariance.double().numpy()), (0, 2))
    squares = [
        [size[3 * i : 3 * i + 3, 3 * j : 3 * j + 3].max() for j in range(3)] for i in range(3)
    ]
    assert found == pytest.approx(np.sqrt(np.array(squares) / 9.0), rel=1e-6)
    assert found[1][1] == 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [([], "run: missing"), (["run=/tmp", "runs=[/tmp]"], "run: got .* beside runs")],
)
def test_a_report_is_of_one_run_or_of_several(overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("report", overrides)


# ---------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def figure(monkeypatch):
    """The figure of the last picture, instead of its file."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    yield lambda: drawn[-1]
    for each in drawn:
        plt.close(each)


RANKS = {
    "layers.0.attn.q_proj": 3,
    "layers.0.mlp.w1": 0,
    "layers.10.attn.q_proj": 40,
    "layers.2.attn.q_proj": 7,
    "layers.10.mlp.w1": 5,
    "output": 9,
}


def test_ranks_are_drawn_by_block_for_each_kind_of_linear(figure):
    layer_ranks(RANKS, None, title="a run", uniform=16)
    (axes,) = figure().get_axes()
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines.pop("q_proj") == [[0, 3], [2, 7], [10, 40]]
    assert lines.pop("w1") == [[0, 0], [10, 5]]
    assert lines.pop("output") == [[11, 9]]
    ((label, uniform),) = lines.items()
    assert label == "the same everywhere, 16"
    assert {y for _, y in uniform} == {16}
    assert axes.get_ylim()[0] == 0
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("block", "rank", "a run")


def test_kinds_of_linears_are_told_apart(figure):
    kinds = ["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"]
    layer_ranks(
        {f"layers.{i}.x.{kind}": i for i in range(3) for kind in kinds}, None, title="", uniform=1
    )
    (axes,) = figure().get_axes()
    styles = {
        (line.get_color(), line.get_marker())
        for line in axes.get_lines()
        if line.get_label() in kinds
    }
    assert len(styles) == len(kinds)
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {
        *kinds,
        "the same everywhere, 1",
    }


def test_the_picture_of_ranks_is_a_file(tmp_path):
    layer_ranks(RANKS, tmp_path / "ranks.png", title="a run", uniform=16)
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert plt.get_fignums() == []


def test_what_was_taken_from_the_start_of_a_spectrum_is_marked_there(figure):
    spectrum = DrawnSpectrum(
        torch.linspace(9, 1, 9), torch.tensor([8.5, 7.5]), torch.tensor([0.5]), from_start=True
    )
    words = {"removed": "moved into the adapter", "update": "s (B A - B₀ A₀)"}
    singular_values({"layers.0.attn.q_proj": spectrum}, None, title="a run", **words)
    left, right = figure().get_axes()
    marks = [line.get_xydata().tolist() for line in left.get_lines() if line.get_marker() == "x"]
    assert [[1, 8.5], [2, 7.5]] in marks
    assert "moved into the adapter" in {text.get_text() for text in left.get_legend().get_texts()}
    assert right.get_title() == "learned update  s (B A - B₀ A₀)"
