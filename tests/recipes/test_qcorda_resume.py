"""A run on a base in four bits goes on with the same bits, wherever it was stopped or moved to; and what a person looks
at afterwards shows that base and no other.
"""

import json
import shutil
import signal

import pytest
import torch

from kasa_tune import config
from kasa_tune.components.checkpoints import Checkpoint
from kasa_tune.components.corda import calibration, calibrator
from kasa_tune.components.quantized import start as quantized_start
from kasa_tune.components.quantized.base import FOLDER
from kasa_tune.components.reports.measuring import words_of
from kasa_tune.components.training import Step
from kasa_tune.registry import PACKAGE_ROOT

from .conftest import (
    QUANTIZED,
    RESUMABLE,
    SMALL_CALIBRATION,
    SMALL_CORDA_RUN,
    Run,
    assert_same_run,
    assert_same_tree,
    copy_run,
    nf4_weights,
    recipe_class,
    wait_for_steps,
)

FACTS = PACKAGE_ROOT / "tiny_world" / "data" / "facts_calibration.jsonl"
RESUME = "resume_from_checkpoint=True"
GENERATE = {
    "qlora": "tiny_lora_generate",
    "qkasa": "tiny_kasa_generate",
}  # of the others tiny_qcorda_generate


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def find_nothing_again(qcorda_recipe, monkeypatch):
    """From its call on no calibration row is drawn, no weight decomposed or quantized."""
    names = {
        qcorda_recipe: ("decompose", "quantize", "quantized_start"),
        calibrator: ("draw_rounds",),
        quantized_start: ("co_svd", "fit_quantization", "smallest_triplets", "split_component"),
        calibration: ("covariances",),
    }

    def forbid() -> None:
        for owner, name in (
            (owner, name) for owner, of_owner in names.items() for name in of_owner
        ):
            monkeypatch.setattr(
                owner, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called")
            )

    return forbid


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("method", "step"),
    [*((method, 4) for method in QUANTIZED), ("qcorda++", 2)],  # an epoch has 3 steps
)
def test_resume_is_bitwise_the_uninterrupted_run(
    qcorda, whole_quantized, find_nothing_again, tmp_path, method, step
):
    whole, (config_name, overrides) = whole_quantized(method), QUANTIZED[method]
    find_nothing_again()
    copy_run(whole, tmp_path / "resumed", until_step=step)
    shutil.rmtree(tmp_path / "resumed" / "decomposition", ignore_errors=True)
    resumed = qcorda(*RESUMABLE, *overrides, RESUME, config_name=config_name, name="resumed")
    assert [line["step"] for line in whole.metrics] == list(range(7))
    assert_same_run(resumed, whole)
    assert_same_tree(nf4_weights(resumed.recipe._model), nf4_weights(whole.recipe._model))
    assert contents(resumed.folder / FOLDER) == contents(whole.folder / FOLDER)


def test_resume_into_another_folder_takes_the_base_along(
    qcorda, whole_quantized, find_nothing_again, tmp_path
):
    whole = whole_quantized("qcorda++")
    find_nothing_again()
    copy_run(whole, tmp_path / "first", until_step=4)
    same = [*RESUMABLE, *QUANTIZED["qcorda++"][1]]
    step = tmp_path / "first" / "checkpoints" / "step_00000004"
    elsewhere = qcorda(*same, f"resume_from_checkpoint={step}", name="elsewhere")
    assert elsewhere.curve == whole.curve[5:]
    assert_same_tree(elsewhere.part("adapter"), whole.part("adapter"))
    assert contents(elsewhere.folder / FOLDER) == contents(whole.folder / FOLDER)
    shutil.rmtree(tmp_path / "first")
    alone = qcorda(*same, RESUME, "max_steps=7", "epochs=3", name="elsewhere")
    assert alone.recipe.steps.step == 7
    assert_same_tree(nf4_weights(alone.recipe._model), nf4_weights(whole.recipe._model))


def test_resume_into_a_folder_with_the_base_of_another_run_replaces_it(
    qcorda, whole_quantized, tmp_path
):
    """Left there by a run that got to no checkpoint, whole or not."""
    whole = whole_quantized("qlora")
    shutil.copytree(whole_quantized("qpissa").folder / FOLDER, tmp_path / "run" / FOLDER)
    damaged = tmp_path / "run" / FOLDER / "step_00000000" / "layers.0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    same = [*RESUMABLE, f"resume_from_checkpoint={whole.checkpoints[1]}"]
    run = qcorda(*same, config_name="tiny_qlora")
    assert run.curve == whole.curve[5:]
    assert contents(run.folder / FOLDER) == contents(whole.folder / FOLDER)


def test_resume_where_data_have_moved_but_not_under_another_start(
    qcorda, whole_quantized, tmp_path
):
    whole = whole_quantized("qcorda")
    copy_run(whole, tmp_path / "run", until_step=4)
    same = [*RESUMABLE, RESUME]
    before = contents(tmp_path / "run")
    for other in (
        "adapter.damping=0.5",
        "adapter.dtype=bf16",
        "calibration.seed=1",
        "calibration.rounds=2",
    ):
        with pytest.raises(ValueError, match=rf"other settings.*{other.partition('.')[0]}: saved"):
            qcorda(*same, other)
    assert contents(tmp_path / "run") == before
    component = "_component_: kasa_tune.components.data.instruct_dataset"
    moved = f"calibration.dataset={{{component}, source: json, data_files: {FACTS}}}"
    resumed = qcorda(
        *same, moved, "calibration.batch_size=2", "enable_activation_checkpointing=True"
    )
    assert [line["loss"] for line in resumed.metrics[1:]] == pytest.approx(
        [line["loss"] for line in whole.metrics[1:]], rel=1e-5
    )


def test_a_crash_before_the_first_checkpoint_costs_only_time(
    qcorda, qcorda_recipe, whole_quantized, monkeypatch, tmp_path
):
    """Right after the quantized base was written, and while it was; its remains are removed."""
    whole, crashed = whole_quantized("qpissa"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(recipe_class(qcorda_recipe), "train", lambda *_: pytest.fail("crashed"))
        with pytest.raises(pytest.fail.Exception, match="crashed"):
            qcorda(*RESUMABLE, "seed=7", config_name="tiny_qpissa")
    assert contents(crashed / FOLDER) == contents(
        whole.folder / FOLDER
    )  # quantizing draws no random number
    (crashed / FOLDER / "step_00000000" / "layers.3.safetensors").write_bytes(b"half of it")
    (crashed / FOLDER / ".step_00000000.999999999.tmp").mkdir()
    (crashed / FOLDER / ".step_00000000.999999999.tmp" / "layers.0.safetensors").write_bytes(
        b"half of it"
    )
    for start_over in ("resume_from_checkpoint=False", RESUME):
        run = qcorda(*RESUMABLE, start_over, config_name="tiny_qpissa")
        assert run.curve == whole.curve
        assert contents(run.folder / FOLDER) == contents(whole.folder / FOLDER)
        shutil.rmtree(crashed / "checkpoints")


def test_a_signal_saves_and_resume_goes_on(qcorda, qcorda_recipe, whole_quantized, monkeypatch):
    whole, steps, apply = whole_quantized("qcorda++"), [], Step.apply
    same = [*RESUMABLE, *QUANTIZED["qcorda++"][1]]

    def stopped_in_the_third(self, *args, **options):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return apply(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "apply", stopped_in_the_third)
        stopped = qcorda(*same, "save_every_n_steps=1000")
    assert stopped.status == 128 + signal.SIGTERM
    assert [path.name for path in stopped.checkpoints] == ["step_00000003"]
    resumed = qcorda(*same, RESUME)
    assert resumed.curve == whole.curve
    assert_same_tree(resumed.part("adapter"), whole.part("adapter"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_process_that_is_stopped_goes_on_to_the_same_curve(
    qcorda, whole_quantized, start_process, tmp_path, number, status
):
    whole, folder = whole_quantized("qcorda"), tmp_path / "stopped"
    small = [*SMALL_CORDA_RUN, *SMALL_CALIBRATION, *RESUMABLE]
    process = start_process(
        folder, config_name="tiny_qcorda", recipe="qcorda_finetune_single_device", small=small
    )
    wait_for_steps(process, folder, 4)  # step 0 has a line too
    process.send_signal(number)
    assert process.wait(60) == status
    assert len(Run(status, folder, None).metrics) < 7
    resumed = qcorda(*RESUMABLE, RESUME, name="stopped")
    assert resumed.curve == whole.curve
    assert_same_tree(resumed.part("adapter"), whole.part("adapter"))
    assert contents(folder / FOLDER) == contents(whole.folder / FOLDER)


# --------------------------------------------------------------------------------------------- what comes after a run


def generating(load_recipe, method: str, *overrides: str):
    """The generation recipe, set up for a run of a method."""
    cfg = config.load(
        GENERATE.get(method, "tiny_qcorda_generate"), list(overrides), config.GENERATE
    )
    recipe = load_recipe("generate_text").GenerateTextRecipe(cfg)
    recipe.setup(cfg)
    return recipe


@pytest.mark.parametrize("method", QUANTIZED)
def test_generation_completes_with_the_model_that_was_trained(method, whole_quantized, load_recipe):
    run = whole_quantized(method)
    model = generating(load_recipe, method, f"adapter_checkpoint={run.folder}")._model
    assert_same_tree(nf4_weights(model), nf4_weights(run.recipe._model))
    for name, trained in run.recipe._linears.items():
        assert torch.equal(model.get_submodule(name).merged_weight(), trained.merged_weight()), name


@pytest.mark.parametrize("method", ["qcorda++", "qkasa"])
def test_base_and_tuned_completions_of_a_run_that_was_moved(
    method, whole_quantized, run_main, tmp_path
):
    run = shutil.copytree(whole_quantized(method).folder, tmp_path / "moved" / "run")
    rows = {}
    for name, adapter in {
        "run": run,
        "checkpoint": run / "checkpoints" / "step_00000006",
        "base": "null",
    }.items():
        few = [
            f"adapter_checkpoint={adapter}",
            "num_samples=3",
            "max_new_tokens=12",
            f"output_dir={tmp_path / name}",
        ]
        assert (
            run_main(
                "generate_text", "--config", GENERATE.get(method, "tiny_qcorda_generate"), *few
            )
            == 0
        )
        rows[name] = [
            json.loads(line)
            for line in (tmp_path / name / "completions.jsonl").read_text().splitlines()
        ]
    assert rows["run"] == rows["checkpoint"]
    assert len(rows["run"]) == 3
    assert all(list(row) == ["prompt", "reference", "base", "tuned"] for row in rows["run"])
    assert all(row["base"] != row["tuned"] for row in rows["run"])
    assert [row["prompt"] for row in rows["base"]] == [row["prompt"] for row in rows["run"]]


def test_generation_in_bf16_on_the_base_of_an_fp32_run(whole_quantized, run_main, tmp_path):
    few = [
        f"adapter_checkpoint={whole_quantized('qlora').folder}",
        "num_samples=2",
        "max_new_tokens=8",
        "dtype=bf16",
    ]
    assert (
        run_main("generate_text", "--config", "tiny_lora_generate", *few, f"output_dir={tmp_path}")
        == 0
    )
    assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 2


def test_generation_without_the_quantized_base_says_where_it_belongs(
    whole_quantized, load_recipe, tmp_path
):
    run = shutil.copytree(whole_quantized("qlora").folder, tmp_path / "run")
    alone = shutil.copytree(
        run / "checkpoints" / "step_00000006", tmp_path / "shared" / "checkpoints" / "step_00000006"
    )
    with pytest.raises(
        ValueError, match=rf"{alone}.*in {tmp_path / 'shared' / FOLDER}\. It is not there\. Copy"
    ):
        generating(load_recipe, "qlora", f"adapter_checkpoint={alone}")
    shutil.rmtree(run / FOLDER)
    with pytest.raises(
        ValueError, match=rf"quantized base.*in {run / FOLDER}\. It is not there\. Copy it there"
    ):
        generating(load_recipe, "qlora", f"adapter_checkpoint={run}")


def test_generation_refuses_what_the_run_was_not_trained_on(whole_quantized, load_recipe, tmp_path):
    run = shutil.copytree(whole_quantized("qcorda").folder, tmp_path / "run")
    for other in ("rank=4", "alpha=8"):
        key, value = other.split("=")
        with pytest.raises(ValueError, match=rf"model\.{key}: checkpoint .*config {value}"):
            generating(load_recipe, "qcorda", f"adapter_checkpoint={run}", f"model.{other}")
    shutil.rmtree(run / FOLDER)
    shutil.copytree(whole_quantized("qpissa").folder / FOLDER, run / FOLDER)
    with pytest.raises(
        ValueError, match=rf"{run / FOLDER} is not the quantized base.*checksums differ"
    ):
        generating(load_recipe, "qcorda", f"adapter_checkpoint={run}")


@pytest.mark.parametrize("method", ["qcorda++", "loftq", "qlora", "qkasa"])
def test_report_draws_a_run_from_its_own_config(method, whole_quantized, run_main, tmp_path):
    run = shutil.copytree(whole_quantized(method).folder, tmp_path / "run")
    assert run_main("report_run", "--config", str(run / "config.yaml"), f"output_dir={run}") == 0
    drawn = ["loss_curve.png", "singular_values.png"] + ["ranks.png"] * (method == "qcorda++")
    assert sorted(path.name for path in run.glob("*.png")) == sorted(drawn)
    for name in drawn:
        assert (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (run / name).stat().st_size > 10_000


@pytest.mark.parametrize("method", ["qcorda", "qpissa", "qlora", "qkasa"])
def test_the_report_shows_what_was_learned(method, whole_quantized, load_recipe):
    """``s (B A - B0 A0)`` where the update started inside the weight, all of the update elsewhere."""
    run, report = whole_quantized(method), load_recipe("report_run")
    cfg = config.load(run.folder / "config.yaml", [], config.QCORDA)
    adapter, starts_inside = run.part("adapter"), method in ("qcorda", "qpissa")
    for name, layer in report.drawn_spectra(cfg, Checkpoint(run.checkpoints[-1])).items():
        part = {
            key.removeprefix(f"{name}."): value.double()
            for key, value in adapter.items()
            if f"{name}." in key
        }
        scale = cfg.model.alpha / 16 * torch.diag(part.get("lora_diag", torch.ones(16)).double())
        edit = part["lora_edit_out"] @ part["lora_edit_in"]
        learned = part["lora_b.weight"] @ scale @ part["lora_a.weight"] - (
            edit if starts_inside else 0
        )
        assert layer.from_start == starts_inside
        wanted = torch.linalg.svdvals(learned)[: len(layer.update)]
        assert layer.update.tolist() == pytest.approx(wanted.tolist(), rel=1e-6, abs=1e-9)
    words = words_of(cfg)
    assert words["removed"] == ("moved into the adapter" if starts_inside else "removed")
    assert words["update"] == {"qlora": "s B A", "qkasa": "s B diag(d) A"}.get(
        method, "s (B A - B₀ A₀)"
    )
