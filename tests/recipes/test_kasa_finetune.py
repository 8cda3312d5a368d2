"""The KaSA recipe end to end: it learns, equivalent runs are equal, wrong input is refused before it costs anything."""

import errno
import json
import os
import shutil
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_tune import config
from kasa_tune.components import checkpoints
from kasa_tune.components.adapters import KaSALinear, LoRALinear
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.registry import PACKAGE_ROOT

TINY_MODEL = PACKAGE_ROOT / "tiny_world" / "model"
TASK = PACKAGE_ROOT / "tiny_world" / "data" / "task_train.jsonl"


# ------------------------------------------------------------------------------------------------------------ it learns


def test_it_learns_the_task(finetune):
    run = finetune(
        "dataset.split=train", "max_steps=30", "batch_size=8", "run_val_every_n_steps=15"
    )
    validation = [line["val_loss"] for line in run.metrics if "val_loss" in line]
    base = run.metrics[0]["val_loss_base"]
    assert validation[-1] < 0.7 * base
    assert validation == sorted(validation, reverse=True)
    assert run.status == 0


@pytest.mark.parametrize(
    ("config_name", "linear"), [("tiny_kasa", KaSALinear), ("tiny_lora", LoRALinear)]
)
def test_what_is_trained_is_what_the_config_says(finetune, config_name, linear):
    run = finetune("max_steps=2", config_name=config_name)
    linears = [module for _, module in adapter_linears(run.recipe._model)]
    assert len(linears) == 5 * 7
    assert all(type(module) is linear for module in linears)
    assert all(module.lora_b.weight.abs().max() > 0 for module in linears)
    trained = {name for name, p in run.recipe._model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)


@pytest.mark.slow
def test_a_real_model_learns_real_data(finetune, real_data):
    """stories260K on E2E: from 4.4 nats a token to less than half within 60 steps."""
    run = finetune(
        "max_steps=60",
        "dataset_val.split=train[:64]",
        "run_val_every_n_steps=60",
        config_name="stories260k_kasa",
        small=False,
    )
    assert run.metrics[-1]["val_loss"] < 0.5 * run.metrics[0]["val_loss_base"]


# --------------------------------------------------------------------------------------------------- equivalent runs


def losses(run):
    return torch.tensor(
        [[line["loss"], line["l2"], line["l3"], line["grad_norm"]] for line in run.metrics]
    )


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(["batch_size=2", "gradient_accumulation_steps=4"], id="accumulation"),
        pytest.param(["enable_activation_checkpointing=True"], id="activation checkpointing"),
        pytest.param(["loss.chunk_size=7"], id="loss in chunks"),
        pytest.param(["num_workers=2"], id="worker processes"),
        pytest.param(["model.edit_storage=factored"], id="factored edit"),
    ],
)
def test_runs_that_compute_the_same_have_the_same_curve(finetune, changed):
    same = ["model.dropout=0.0", "max_steps=6"]
    a, b = finetune(*same, name="a"), finetune(*same, *changed, name="b")
    torch.testing.assert_close(losses(b), losses(a), rtol=2e-4, atol=1e-5)


def test_the_last_partial_window_is_used_and_weighted_by_tokens(finetune):
    """10 samples in batches of 2, three batches a step: a step of 6 samples and one of 4, and no sample left out."""
    few = [
        "dataset.split=train[:10]",
        "epochs=1",
        "max_steps=null",
        "model.dropout=0.0",
        "shuffle=False",
    ]
    run = finetune(*few, "batch_size=2", "gradient_accumulation_steps=3")
    assert len(run.metrics) == 2
    labelled = [int((run.recipe._data.dataset[i]["labels"] != -100).sum()) for i in range(10)]
    assert [line["num_tokens"] for line in run.metrics] == [sum(labelled[:6]), sum(labelled[6:])]
    whole = finetune(*few, "batch_size=6", "gradient_accumulation_steps=1", name="whole")
    torch.testing.assert_close(losses(run), losses(whole), rtol=1e-4, atol=1e-5)


def test_packed_rows_learn_the_same_tokens(finetune):
    run = finetune(
        "dataset.packed=True",
        "epochs=1",
        "max_steps=null",
        "batch_size=64",
        "gradient_accumulation_steps=1",
    )
    plain = finetune(
        "epochs=1", "max_steps=null", "batch_size=64", "gradient_accumulation_steps=1", name="plain"
    )
    assert sum(line["num_tokens"] for line in run.metrics) == sum(
        line["num_tokens"] for line in plain.metrics
    )
    torch.testing.assert_close(run.metrics[0]["l2"], plain.metrics[0]["l2"])


def test_without_dropout_packing_does_not_change_the_loss(finetune):
    one_step = [
        "epochs=1",
        "max_steps=1",
        "batch_size=64",
        "gradient_accumulation_steps=1",
        "model.dropout=0.0",
    ]
    packed, plain = (
        finetune("dataset.packed=True", *one_step, name="packed"),
        finetune(*one_step, name="plain"),
    )
    torch.testing.assert_close(losses(packed), losses(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager(finetune):
    same = ["model.dropout=0.0", "max_steps=3", "batch_size=4", "gradient_accumulation_steps=1"]
    eager, compiled = (
        finetune(*same, name="eager"),
        finetune(*same, "compile=True", name="compiled"),
    )
    torch.testing.assert_close(losses(compiled), losses(eager), rtol=1e-3, atol=1e-4)


def test_bf16_base_keeps_a_full_precision_adapter(finetune):
    run = finetune("dtype=bf16", "max_steps=3")
    assert {tensor.dtype for tensor in run.part("adapter").values()} == {torch.float32}
    assert all(
        linear.weight.dtype == torch.bfloat16 and not linear.folded
        for linear in run.recipe._linears
    )
    exact = finetune("max_steps=3", name="fp32")
    torch.testing.assert_close(losses(run)[:, 0], losses(exact)[:, 0], rtol=3e-2, atol=0)


def test_a_mixture_of_datasets(finetune):
    component = "_component_: kasa_tune.components.data.instruct_dataset, source: json"
    parts = [
        f"{{{component}, data_files: {TASK}, split: '{split}', weight: {weight}}}"
        for split, weight in (("train[:20]", 1.0), ("train[20:40]", 0.5))
    ]
    mixture = ", ".join(parts)
    run = finetune(
        f"dataset=[{mixture}]",
        "epochs=1",
        "max_steps=null",
        "batch_size=5",
        "gradient_accumulation_steps=1",
    )
    assert len(run.metrics) == 6  # 20 + 10 samples


def test_every_metric_logger_of_torchtune_takes_what_we_log(finetune, tmp_path):
    pytest.importorskip("tensorboard")
    finetune(
        "metric_logger._component_=torchtune.training.metric_logging.TensorBoardLogger",
        "max_steps=2",
        name="tensorboard",
    )
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))


def test_trackio_gets_every_step(finetune, monkeypatch):
    """Its three calls, recorded in its place."""
    calls = []
    stand_in = SimpleNamespace(
        __spec__=ModuleSpec("trackio", None),
        init=lambda **kwargs: calls.append(("init", kwargs)),
        log=lambda metrics, step: calls.append(("log", step, metrics)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    finetune(
        "metric_logger={_component_: kasa_tune.components.training.TrackioLogger, name: x}",
        "max_steps=2",
    )
    assert calls[0] == ("init", {"project": "kasa_tune", "name": "x"})
    assert [call[1] for call in calls if call[0] == "log" and "loss" in call[2]] == [1, 2]
    assert calls[-1] == ("finish",)


def test_the_profiler_writes_a_trace(finetune, tmp_path):
    schedule = [
        f"profiler.{key}=1" for key in ("wait_steps", "warmup_steps", "active_steps", "num_cycles")
    ]
    finetune("profiler.enabled=True", *schedule, "max_steps=5")
    assert list((tmp_path / "run" / "profiler").rglob("*.json.gz"))


# ----------------------------------------------------------------------------------------------------- saving is safe


def test_saving_does_not_touch_the_live_weights(finetune, tmp_path):
    run = finetune("max_steps=2")
    before = {name: tensor.clone() for name, tensor in run.recipe._model.state_dict().items()}
    run.recipe.steps.save()
    after = run.recipe._model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_second_run_in_the_folder_of_a_live_one_is_refused_and_touches_nothing(
    finetune, tmp_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    with (
        checkpoints.run_lock(tmp_path / "run" / "checkpoints"),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        finetune("max_steps=2")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 3.0}\n'
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_full_disk_while_saving_loses_nothing(finetune, tmp_path, monkeypatch):
    real_fsync, calls = os.fsync, []

    def full_later(descriptor):
        calls.append(descriptor)
        if len(calls) > 15:  # the first checkpoint is written whole
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_later)
    with pytest.raises(OSError, match=r"step_00000006.*No space left.*Earlier checkpoints"):
        finetune()
    monkeypatch.undo()
    newest, passed_over = checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest.path.name == "step_00000003"
    assert not passed_over
    assert not list((tmp_path / "run" / "checkpoints").glob(".step*"))
    resumed = finetune("resume_from_checkpoint=True")
    assert resumed.recipe.steps.step == 12


def test_a_non_finite_loss_never_reaches_the_weights(finetune, monkeypatch):
    from kasa_tune.components.training.loss import ChunkedCrossEntropy

    calls, real = [], ChunkedCrossEntropy._chunk_loss

    def poisoned(self, *args):
        calls.append(1)
        return real(self, *args) * (
            float("nan") if len(calls) > 10 else 1.0
        )  # two are the loss's trial

    monkeypatch.setattr(ChunkedCrossEntropy, "_chunk_loss", poisoned)
    updated, real_step = [], torch.optim.AdamW.step

    def counted(self):
        updated.append(len(self.param_groups[0]["params"]))
        return real_step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    with pytest.raises(RuntimeError, match=r"Step 5.*step 4"):
        finetune()
    assert (
        sum(number > 1 for number in updated) == 4
    )  # steps of the model, not of the trial before it is built


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded model to be spoiled."""
    return shutil.copytree(TINY_MODEL, tmp_path / "base")


def test_truncated_safetensors(finetune, base):
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(ValueError, match=r"Could not read .*base"):
        finetune(f"checkpointer.checkpoint_dir={base}")


def test_missing_safetensors(finetune, base):
    (base / "model.safetensors").unlink()
    with pytest.raises(config.ConfigError, match=r"model\.safetensors"):
        finetune(f"checkpointer.checkpoint_dir={base}")


def test_a_checkpoint_of_another_model(finetune):
    with pytest.raises(config.ConfigError, match=r"num_hidden_layers is 5, .*_llama3 has 6"):
        finetune("model.num_layers=6")


def test_a_checkpoint_of_another_width(finetune, base):
    """config.json says what the config says, and the weights do not."""
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"intermediate_size": 256}))
    with pytest.raises(
        config.ConfigError,
        match=r"holds model\.layers\.0\.mlp\.down_proj\.weight of shape \(128, 384\)",
    ):
        finetune("model.intermediate_dim=256", f"checkpointer.checkpoint_dir={base}")


def test_nan_in_the_base_weights_names_the_layer(finetune, base):
    weights = load_file(base / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.w3.*NaN"):
        finetune(f"checkpointer.checkpoint_dir={base}")


def test_a_tokenizer_that_does_not_fit(finetune, base):
    """A base of 300 tokens, and a tokenizer of 1024."""
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"vocab_size": 300}))
    weights = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:300].clone()
    save_file(weights, base / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        finetune("model.vocab_size=300", f"checkpointer.checkpoint_dir={base}")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"dataset.data_files={path}"


def test_an_empty_dataset(finetune, tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        finetune(write_rows(tmp_path / "rows.jsonl", []), "dataset.split=train")


def test_all_labels_ignored(finetune):
    with pytest.raises(ValueError, match=r"every label .* ignored.*max_seq_len"):
        finetune("tokenizer.max_seq_len=6")


def test_a_bad_row_in_the_middle_costs_no_finished_step(finetune, tmp_path):
    rows = [json.loads(line) for line in TASK.read_text().splitlines()[:400]]
    rows[100]["output"] = None
    same = [
        write_rows(tmp_path / "rows.jsonl", rows),
        "dataset.split=train",
        "shuffle=False",
        "save_every_n_steps=null",
    ]
    with pytest.raises(ValueError, match=r"row 100.*'output'"):
        finetune(*same, "max_steps=20")
    newest, _ = checkpoints.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest.path.name == "step_00000012"  # 8 samples a step


def test_a_model_without_adapters(finetune):
    sizes = "vocab_size: 1024, num_layers: 5, num_heads: 8, num_kv_heads: 4, embed_dim: 128, max_seq_len: 512"
    with pytest.raises(ValueError, match="no adapters of ours"):
        finetune(
            f"model={{_component_: torchtune.models.llama3.llama3, {sizes}, intermediate_dim: 384}}",
            small=False,
        )


def test_an_optimizer_whose_state_cannot_be_saved(finetune, tmp_path, monkeypatch):
    (tmp_path / "optimizers_of_others.py").write_text(
        "import torch\n"
        "class Remembering(torch.optim.SGD):\n"
        "    def step(self):\n"
        "        super().step()\n"
        "        self.state[self.param_groups[0]['params'][0]]['seen'] = {1, 2}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"cannot hold set .*seen"):
        finetune("optimizer={_component_: optimizers_of_others.Remembering, lr: 1e-3}")


def test_another_loss(finetune):
    with pytest.raises(ValueError, match="CEWithChunkedOutputLoss cannot be called"):
        finetune("loss={_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}")


def test_a_row_without_the_columns(finetune, tmp_path):
    rows = [{"input": "a", "output": "b"}, {"input": "a", "text": "b"}]
    with pytest.raises(ValueError, match=r"row 1.*'output'"):
        finetune(write_rows(tmp_path / "rows.jsonl", rows), "dataset.split=train")


def test_rank_zero(finetune):
    with pytest.raises(config.ConfigError, match=r"model\.rank"):
        finetune("model.rank=0")


def test_a_rank_above_a_layers_smaller_dimension_names_the_layer(finetune):
    with pytest.raises(ValueError, match=r"model\.rank: got 65, but k_proj.* 64"):
        finetune("model.rank=65", "model.truncation_rank=1")


def test_an_output_folder_that_cannot_be_written(finetune, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(config.ConfigError, match="output_dir"):
        finetune(name="file/below")


# ------------------------------------------------------------------------------------------------------------- dry run


def test_dry_run_of_a_gpu_config_needs_no_gpu(load_recipe, tmp_path, capsys):
    overrides = [f"output_dir={tmp_path / 'run'}", "dry_run=True", "device=cuda", "dtype=bf16"]
    cfg = config.load("tiny_kasa", overrides, config.FINETUNE, about_to_run=True)
    load_recipe("kasa_finetune_single_device").KaSAFinetuneRecipeSingleDevice(cfg).setup(cfg)
    assert "Trainable parameters" in capsys.readouterr().out


def test_dry_run_prints_a_budget_and_writes_nothing(load_recipe, tmp_path, capsys):
    module = load_recipe("kasa_finetune_single_device")
    overrides = [f"output_dir={tmp_path / 'run'}", "dry_run=True"]
    cfg = config.load("tiny_kasa", overrides, config.FINETUNE, about_to_run=True)
    module.KaSAFinetuneRecipeSingleDevice(cfg).setup(cfg)
    printed = capsys.readouterr().out
    layer = 16 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384))
    assert (
        f"Trainable parameters: {5 * (layer + 7 * 16):,} ({5 * layer:,} + {5 * 7 * 16} in diagonals)"
        in printed
    )
    for purpose in ("base weights", "adapters", "optimizer", "activations", "truncation workspace"):
        assert purpose in printed
    assert not (tmp_path / "run" / "checkpoints").exists()
