"""A run that is stopped anywhere and resumed is, bit for bit, the run that was never stopped."""

import math
import shutil
import signal

import pytest

from kasa_tune.components.checkpoints import list_checkpoints, load_part

from .conftest import Run, assert_same_run, assert_same_tree, copy_run, run_recipe, wait_for_steps


@pytest.fixture(scope="module")
def whole(load_recipe, tmp_path_factory) -> Run:
    """The run that nothing interrupts."""
    return run_recipe(
        load_recipe("kasa_finetune_single_device"), tmp_path_factory.mktemp("whole") / "run"
    )


@pytest.mark.parametrize(
    "step", [3, 6, 9]
)  # an epoch has 5 steps: before, after and across its border
def test_resume_is_bitwise_the_uninterrupted_run(finetune, whole, tmp_path, step):
    copy_run(whole, tmp_path / "resumed", until_step=step)
    resumed = finetune("resume_from_checkpoint=True", name="resumed")
    assert len(whole.metrics) == 12
    assert_same_run(resumed, whole)


def test_resume_from_a_named_checkpoint_into_another_folder(finetune, whole):
    resumed = finetune(f"resume_from_checkpoint={whole.checkpoints[1]}", name="elsewhere")
    assert resumed.curve == whole.curve[6:]
    assert_same_tree(resumed.part("adapter"), whole.part("adapter"))


def test_learning_rate_goes_on_where_it_was(finetune, whole, tmp_path):
    """A cosine of 12 steps after 2 of warm-up, which a schedule that restarts on resume would not give."""
    copy_run(whole, tmp_path / "resumed", until_step=3)
    resumed = finetune("resume_from_checkpoint=True", name="resumed")
    expected = [
        4e-3 * (i / 2 if i < 2 else 0.5 * (1 + math.cos(math.pi * (i - 2) / 10))) for i in range(12)
    ]
    assert [line["lr"] for line in resumed.metrics] == pytest.approx(expected)


def test_resume_does_not_decompose_again(finetune, monkeypatch):
    finetune("max_steps=3")
    monkeypatch.setattr("torch.linalg.eigh", lambda *_: pytest.fail("the SVD was repeated"))
    resumed = finetune("max_steps=6", "resume_from_checkpoint=True")
    assert resumed.recipe.steps.step == 6


def test_a_damaged_newest_checkpoint_is_passed_over(finetune, whole, tmp_path):
    copy_run(whole, tmp_path / "resumed", until_step=6)
    newest = list_checkpoints(tmp_path / "resumed" / "checkpoints")[-1]
    with (newest / "adapter.safetensors").open("r+b") as file:
        file.truncate(1000)
    resumed = finetune("resume_from_checkpoint=True", name="resumed")
    assert_same_run(resumed, whole)


def test_resume_without_checkpoint_starts_from_the_beginning(finetune):
    run = finetune("max_steps=2", "resume_from_checkpoint=True")
    assert [line["step"] for line in run.metrics] == [1, 2]


def test_a_finished_run_is_not_overwritten(finetune):
    finetune("max_steps=2")
    with pytest.raises(ValueError, match=r"already holds checkpoints.*resume_from_checkpoint=True"):
        finetune("max_steps=2")


def test_resume_under_other_settings_is_refused(finetune):
    finetune("max_steps=3")
    with pytest.raises(ValueError, match=r"other settings.*optimizer"):
        finetune("max_steps=6", "resume_from_checkpoint=True", "optimizer.lr=1e-4")


def test_resume_on_other_base_weights_is_refused(finetune, tmp_path):
    from safetensors.torch import load_file, save_file

    from kasa_tune.registry import PACKAGE_ROOT

    other = shutil.copytree(PACKAGE_ROOT / "tiny_world" / "model", tmp_path / "other_base")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, other / "model.safetensors")
    finetune("max_steps=3")
    with pytest.raises(ValueError, match="other base weights"):
        finetune(
            "max_steps=6", "resume_from_checkpoint=True", f"checkpointer.checkpoint_dir={other}"
        )


def test_resume_on_other_data_is_refused_but_data_may_move(finetune, whole, tmp_path):
    from kasa_tune.registry import PACKAGE_ROOT

    moved = shutil.copy(
        PACKAGE_ROOT / "tiny_world" / "data" / "task_train.jsonl", tmp_path / "moved.jsonl"
    )
    copy_run(whole, tmp_path / "resumed", until_step=9)
    resumed = finetune("resume_from_checkpoint=True", f"dataset.data_files={moved}", name="resumed")
    assert resumed.curve == whole.curve
    with pytest.raises(ValueError, match="other data"):
        finetune("resume_from_checkpoint=True", "dataset.split=train[1:41]", name="resumed")


def test_a_changed_row_is_other_data(finetune, whole, tmp_path):
    """Even one that no probe looks at."""
    from kasa_tune.registry import PACKAGE_ROOT

    rows = (PACKAGE_ROOT / "tiny_world" / "data" / "task_train.jsonl").read_text().splitlines()
    rows[17] = rows[17].replace('"output": "', '"output": "Well. ')
    (tmp_path / "changed.jsonl").write_text("\n".join(rows) + "\n")
    copy_run(whole, tmp_path / "resumed", until_step=3)
    with pytest.raises(ValueError, match="other data"):
        finetune(
            "resume_from_checkpoint=True",
            f"dataset.data_files={tmp_path / 'changed.jsonl'}",
            name="resumed",
        )


def test_a_refused_resume_leaves_the_runs_config_alone(finetune, whole, tmp_path):
    copy_run(whole, tmp_path / "resumed", until_step=3)
    before = (tmp_path / "resumed" / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match="other data"):
        finetune("resume_from_checkpoint=True", "dataset.split=train[1:41]", name="resumed")
    assert (tmp_path / "resumed" / "config.yaml").read_bytes() == before


def test_going_back_beside_later_checkpoints_is_refused(finetune, whole, tmp_path):
    copy_run(whole, tmp_path / "run", until_step=9)
    earlier, later = list_checkpoints(tmp_path / "run" / "checkpoints")[::2]
    with pytest.raises(ValueError, match=later.name):
        finetune(f"resume_from_checkpoint={earlier}")
    with pytest.raises(ValueError, match=later.name):  # nor into a folder that holds another run's
        finetune(f"resume_from_checkpoint={whole.checkpoints[0]}")
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 3


def test_a_run_that_starts_over_starts_its_metrics_over(finetune, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    run = finetune("max_steps=2", "resume_from_checkpoint=True")
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert run.metrics[0]["loss"] != 3.0


def test_the_checkpoint_holds_no_pickle(finetune):
    run = finetune("max_steps=2")
    assert {path.suffix for path in run.checkpoints[-1].iterdir()} == {".json", ".safetensors"}
    run.part("optimizer")


@pytest.mark.slow
def test_an_optimizer_with_states_in_8_bits_goes_on_bit_for_bit(finetune, tmp_path):
    """Its kernels are compiled, and its learning rate is a tensor that the schedule changes in place."""
    # torchao quantizes states of 4096 values or more: at rank 32 those of all matrices but B of k and v, 64 x 32.
    same = [
        "optimizer._component_=torchao.optim.AdamW8bit",
        "model.rank=32",
        "max_steps=6",
        "optimizer.lr=8e-3",
    ]
    whole = finetune(*same, name="whole")
    states = [value for state in whole.recipe._optimizer.state.values() for value in state.values()]
    assert sum(type(value).__name__ == "OptimState8bit" for value in states) == 2 * (2 * 35 - 10)
    expected = [
        8e-3 * (0.0 if i < 1 else 0.5 * (1 + math.cos(math.pi * (i - 1) / 5))) for i in range(6)
    ]
    assert [line["lr"] for line in whole.metrics] == pytest.approx(expected)
    assert whole.metrics[-1]["loss"] < 0.8 * whole.metrics[0]["loss"]
    copy_run(whole, tmp_path / "resumed", until_step=3)
    resumed = finetune(*same, "resume_from_checkpoint=True", name="resumed")
    assert_same_run(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_status(
    finetune, whole, start_process, tmp_path, number, status
):
    folder = tmp_path / "stopped"
    slow = "save_every_n_steps=1000"
    process = start_process(folder, slow)
    wait_for_steps(process, folder, 2)
    process.send_signal(number)
    assert process.wait(60) == status
    run = Run(process.returncode, folder, None)
    assert run.part("run")["step"] == len(run.metrics) < 12
    resumed = finetune("resume_from_checkpoint=True", name="stopped")
    assert resumed.curve == whole.curve
    assert_same_tree(resumed.part("adapter"), whole.part("adapter"))


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_to_the_same_curve(
    finetune, whole, start_process, tmp_path
):
    folder = tmp_path / "killed"
    process = start_process(folder)
    wait_for_steps(process, folder, 5)
    process.kill()
    process.wait(60)
    resumed = finetune("resume_from_checkpoint=True", name="killed")
    assert_same_run(resumed, whole)
    assert load_part(resumed.checkpoints[-1], "run")["step"] == 12
