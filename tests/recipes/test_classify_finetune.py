"""The classification recipe on the tiny RoBERTa: what it learns, resumes, starts from and refuses."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kasa_tune import config
from kasa_tune.components.adapters import adapter_linears
from kasa_tune.components.exchange import classifier
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.models.encoder_folder import EncoderFolder
from kasa_tune.components.training import read_metrics
from kasa_tune.registry import find_recipe

FAST = ["lr_scheduler=null", "epochs=1", "batch_size_val=100", "save_every_n_steps=2"]


def recipe_file():
    path = find_recipe("classify_finetune_single_device")
    spec = importlib.util.spec_from_file_location("classify_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_up(name, folder, *overrides):
    cfg = config.load(name, [*FAST, f"output_dir={folder}", *overrides], config.CLASSIFY)
    recipe = recipe_file().ClassifyFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    return recipe, cfg


def run(name, folder, *overrides):
    recipe, cfg = set_up(name, folder, *overrides)
    assert recipe.train(cfg) == 0
    return recipe


def adapter_of(folder, step):
    return load_file(folder / "checkpoints" / f"step_{step:08}" / "adapter.safetensors")


@pytest.fixture(scope="module")
def kasa_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kasa")
    run("tiny_roberta_order_kasa_classify", folder, "max_steps=4")
    return folder


def test_metrics_are_reported_of_the_best_and_the_last_epoch(kasa_run):
    found = json.loads((kasa_run / "evaluation.json").read_text())
    assert found["metric"] == "matthews"
    assert found["best"] == found["last"] == found["epochs"][-1]
    logged = [row for row in read_metrics(kasa_run / "metrics.jsonl") if "val_matthews" in row]
    assert [row["val_matthews"] for row in logged] == [found["last"]["matthews"]]
    assert {"l2", "l3"} <= logged[0].keys()


def test_a_resumed_run_is_the_same_bit_for_bit(kasa_run, tmp_path):
    run("tiny_roberta_order_kasa_classify", tmp_path, "max_steps=2")
    run("tiny_roberta_order_kasa_classify", tmp_path, "max_steps=4", "resume_from_checkpoint=True")
    first, second = adapter_of(kasa_run, 4), adapter_of(tmp_path, 4)
    assert first.keys() == second.keys()
    assert {"head.dense.weight", "head.out_proj.bias"} <= first.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = (json.loads((f / "evaluation.json").read_text()) for f in (kasa_run, tmp_path))
    assert ours["last"] == theirs["last"]


def test_a_trained_model_can_be_evaluated_alone(kasa_run, tmp_path, capsys):
    recipe, _ = set_up(
        "tiny_roberta_order_kasa_classify", tmp_path, f"adapter_checkpoint={kasa_run}"
    )
    last = json.loads((kasa_run / "evaluation.json").read_text())["last"]
    assert {**recipe.evaluate(), "step": 4, "epoch": 1} == last


def test_a_dry_run_counts_the_head_and_reads_no_weight(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kasa_tune.components.models.base_weights.StreamedWeights.read", None)
    set_up("tiny_roberta_corda_classify", tmp_path, "dry_run=True", "device=cuda")
    told = capsys.readouterr().out
    head = 128 * 128 + 128 + 2 * 128 + 2
    assert f"Trainable parameters: {head + 3 * 2 * 2 * 8 * 128:,}\n" in told
    assert "53 shapes in" in told
    assert "covariances of one block" in told
    assert not any(tmp_path.iterdir())


def test_head_and_pooler_have_their_own_rates(tmp_path):
    recipe, _ = set_up(
        "tiny_roberta_lora_classify", tmp_path, "model.train_pooler=False", "head_lr=0.5"
    )
    adapters, head = recipe._optimizer.param_groups
    assert (adapters["lr"], head["lr"]) == (4e-3, 0.5)
    assert [tuple(p.shape) for p in head["params"]] == [(2, 128), (2,)]
    assert not recipe._model.head.dense.weight.requires_grad
    assert len(adapters["params"]) == 2 * len(recipe._linears)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.mode=ipm"],
        ["adapter.mode=kpm"],
        ["adapter.dynamic_ranks=True", "calibration.rounds=2"],
        ["adapter.method=pissa"],
    ],
)
def test_a_start_in_the_weights_leaves_the_model_as_it_is(overrides, tmp_path):
    """At step 0 every weight is the base's, though the adapters are not zero."""
    recipe, _ = set_up(
        "tiny_roberta_corda_classify", tmp_path, "calibration.num_samples=32", *overrides
    )
    base = EncoderFolder(Path(str(recipe.steps.cfg.checkpointer.checkpoint_dir))).open()
    for name, linear in adapter_linears(recipe._model):
        expected = base[f"{name}.weight"]
        torch.testing.assert_close(linear.merged_weight(), expected, rtol=1e-5, atol=1e-5)
        assert linear.lora_b.weight.abs().max() > 1e-3
    if recipe._calibrator:
        assert [len(names) for names in recipe._calibrator.groups] == [2, 2, 2]  # q and v


def test_a_regression_learns_its_scores(tmp_path):
    scores = ["model.num_labels=1", "metric=pearson"]
    run("tiny_roberta_kasa_classify", tmp_path, "max_steps=2", *scores)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"pearson", "spearman"} <= found["last"].keys()


def test_exports_of_a_run(kasa_run, tmp_path):
    trained = open_run(kasa_run)
    errors = classifier.write_classifier_merged(trained, tmp_path)
    assert max(error.of_weight for error in errors.values()) < 1e-6
    merged = load_file(tmp_path / "model.safetensors")
    assert torch.equal(
        merged["classifier.out_proj.weight"], adapter_of(kasa_run, 4)["head.out_proj.weight"]
    )
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["RobertaForSequenceClassification"]


def test_an_export_for_peft_comes_back_with_its_head(kasa_run, run_main, tmp_path):
    to = [f"adapter_checkpoint={kasa_run}", f"output_dir={tmp_path / 'peft'}"]
    assert run_main("export_adapter", "--config", "peft_export", *to) == 0
    back = [f"peft_adapter={tmp_path / 'peft'}", f"output_dir={tmp_path / 'back'}"]
    assert run_main("import_adapter", "--config", "tiny_roberta_order_kasa_classify", *back) == 0
    model = open_run(tmp_path / "back").config["model"]
    assert (model["num_labels"], model["train_pooler"], model["rank"]) == (2, True, 9)
    recipe, _ = set_up(
        "tiny_roberta_order_kasa_classify",
        tmp_path / "run",
        "adapter.method=lora",
        f"model={json.dumps(model)}",
        f"adapter_checkpoint={tmp_path / 'back'}",
    )
    last = json.loads((kasa_run / "evaluation.json").read_text())["last"]
    assert {**recipe.evaluate(), "step": 4, "epoch": 1} == pytest.approx(last)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["metric=pearson"], "metric pearson is none of a model with num_labels 2"),
        (["dataset_val.columns={text: sentence1, label: label}"], "one has the column text_pair"),
        (["dataset.columns.text_pair=sentence3"], "no column 'sentence3' for text_pair"),
        (["model.num_labels=1", "metric=accuracy"], "metric accuracy is none"),
        (["model._component_=kasa_tune.components.models.kasa_roberta_base",
          "~model.checkpoint_dir"], "another encoder than model._component_ builds"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_weights_are_read(
    overrides, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("kasa_tune.components.models.base_weights.StreamedWeights.read", None)
    with pytest.raises(ValueError, match=message):
        set_up("tiny_roberta_kasa_classify", tmp_path, *overrides)


def test_a_method_on_four_bits_and_a_builder_of_another_method_are_refused(tmp_path):
    for overrides, message in (
        (["adapter.method=qlora"], "it has no recipe for encoders"),
        (["adapter.method=pissa"], "needs a corda_<model> builder"),
    ):
        with pytest.raises(config.ConfigError, match=message):
            config.load("tiny_roberta_kasa_classify", overrides, config.CLASSIFY)
