"""From where a run goes on: every choice, and every reason not to."""

import errno
import fcntl
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kasa_tune.components.checkpoints import (
    CheckpointError,
    clean_up,
    resume_point,
    resume_position,
    run_lock,
    save_checkpoint,
    starting_checkpoint,
)
from kasa_tune.components.checkpoints.locking import check_unlocked
from kasa_tune.components.checkpoints.resuming import RESUMABLE_KEYS
from kasa_tune.components.data.batches import FILLER, EpochBatches

CONFIG = {
    "seed": 1,
    "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]},
    "epochs": 1,
    "calibration": {"num_samples": 8, "batch_size": 2, "dataset": {"data_files": "a.jsonl"}},
    "dataset": None,
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def resume(*args, **options):
    """The path that a run resumes from, if any."""
    checkpoint = resume_point(*args, **options)
    assert checkpoint is None or checkpoint.resumes
    return checkpoint and checkpoint.path


def save(folder, step, config=CONFIG):
    return save_checkpoint(folder, step, {"run": {"config": config}, "adapter": {}})


def damage(checkpoint):
    with (checkpoint / "run.json").open("ab") as file:
        file.write(b" ")


# --------------------------------------------------------------------------------- which checkpoint


@pytest.mark.parametrize("choice", [True, False])
@pytest.mark.parametrize("made", [True, False])
def test_a_first_run_starts_from_the_beginning(folder, choice, made):
    if made:
        folder.mkdir(parents=True)
    assert resume(folder, choice, CONFIG) is None
    assert folder.exists() is made


def test_true_takes_the_newest(folder):
    save(folder, 9)
    newest = save(folder, 10)
    assert resume(folder, True, CONFIG) == newest


def test_true_passes_over_damaged_ones_and_says_so(folder, monkeypatch):
    said = []
    monkeypatch.setattr("kasa_tune.components.checkpoints.resuming.log.warning", said.append)
    good, bad = save(folder, 5), save(folder, 6)
    damage(bad)
    assert resume(folder, True, CONFIG) == good
    (message,) = said
    assert str(bad) in message
    assert "damaged" in message


def test_true_with_nothing_but_damaged_ones_stops_and_says_how_to_start_over(folder):
    damage(save(folder, 6))
    told = r"none of them is intact.*step_00000006 is damaged.*resume_from_checkpoint=restart"
    with pytest.raises(ValueError, match=told):
        resume(folder, True, CONFIG)


@pytest.mark.parametrize("unreadable", ["manifest.json", "run.json", "adapter.safetensors"])
def test_a_file_that_cannot_be_read_for_now_is_no_damage(folder, monkeypatch, unreadable):
    """Permissions, a disk or a network that fails: the run stops, and no earlier checkpoint takes the place."""
    save(folder, 3)
    newest = save_checkpoint(
        folder, 6, {"run": {"config": CONFIG}, "adapter": {"a": torch.ones(2)}}
    )
    real_open = Path.open

    def failing(self, *args, **kwargs):
        if self == newest / unreadable:
            raise OSError(errno.EIO, "Input/output error")
        return real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(OSError, match=rf"{unreadable}.*Input/output error.*does not mean") as told:
        resume(folder, True, CONFIG)
    assert told.value.errno == errno.EIO
    assert {path.name for path in folder.iterdir()} == {"step_00000003", "step_00000006"}


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(folder, monkeypatch):
    save(folder, 3)

    def denied(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    for choice in (True, False):
        with pytest.raises(PermissionError):
            resume(folder, choice, CONFIG)


def test_false_does_not_overwrite_another_run(folder):
    save(folder, 3)
    save(folder, 12)
    told = r"already holds checkpoints, the newest step_00000012\. .*resume_from_checkpoint=True"
    with pytest.raises(ValueError, match=told):
        resume(folder, False, CONFIG)


def test_a_path_is_a_checkpoint_or_a_run(folder, tmp_path):
    elsewhere = tmp_path / "other" / "checkpoints"
    early, late = save(elsewhere, 2), save(elsewhere, 4)
    assert resume(folder, str(early), CONFIG) == early
    assert resume(folder, str(elsewhere.parent), CONFIG) == late


def test_going_on_from_another_run_does_not_overwrite_ones_own(folder, tmp_path):
    save(folder, 1)
    other = save(tmp_path / "other" / "checkpoints", 4)
    with pytest.raises(ValueError, match="already holds checkpoints, the newest step_00000001"):
        resume(folder, str(other), CONFIG)


def test_the_newest_of_ones_own_by_its_path(folder):
    save(folder, 1)
    newest = save(folder, 2)
    assert resume(folder, str(newest), CONFIG) == newest
    assert resume(folder, str(folder.parent), CONFIG) == newest
    assert resume(folder.parent / ".." / "run" / "checkpoints", str(newest), CONFIG) == newest


def test_an_earlier_one_of_ones_own_would_be_run_over(folder):
    early = save(folder, 1)
    save(folder, 2)
    with pytest.raises(ValueError, match="already holds checkpoints, the newest step_00000002"):
        resume(folder, str(early), CONFIG)


@pytest.mark.parametrize("kind", ["absent", "no checkpoint", "damaged"])
def test_a_path_to_nothing_is_refused(folder, tmp_path, kind):
    if kind == "damaged":
        path = save(tmp_path / "other" / "checkpoints", 4)
        damage(path)
    else:
        path = tmp_path / "elsewhere"
        if kind == "no checkpoint":
            path.mkdir()
    with pytest.raises(CheckpointError, match=str(path)):
        resume(folder, str(path), CONFIG)


# --------------------------------------------------------------------------------- whether it may


def changed(**changes):
    """CONFIG with dotted keys, their dots written as __, set to other values."""
    config = {
        key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()
    }
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (config[section] if section else config)[leaf] = value
    return config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 2}, "seed: saved 1, now 2"),
        ({"optimizer__lr": 0.2}, "optimizer: saved .*0.1.*, now .*0.2"),
        ({"optimizer__betas": [0.9, 0.99]}, "optimizer"),
        ({"optimizer": None}, "optimizer: saved .*now None"),
        ({"optimizer__eps": 1.0}, "optimizer"),
        ({"calibration__num_samples": 9}, "calibration: saved .*8.*, now .*9"),
        ({"calibration": None}, "calibration: saved .*now None"),
    ],
)
def test_other_settings_are_refused_with_both_values(folder, changes, named):
    save(folder, 1)
    with pytest.raises(ValueError, match=f"other settings.*Different: {named}") as caught:
        resume(folder, True, changed(**changes))
    assert "step_00000001" in str(caught.value)


def test_all_that_differs_is_named(folder):
    save(folder, 1)
    with pytest.raises(ValueError, match=r"optimizer: .*; seed: saved 1, now 3"):
        resume(folder, True, changed(seed=3, optimizer__lr=1.0))


def test_a_key_that_is_gone_is_a_difference(folder):
    save(folder, 1)
    with pytest.raises(ValueError, match="seed: saved 1, now None"):
        resume(folder, True, {key: value for key, value in CONFIG.items() if key != "seed"})


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 7},
        {"dataset": {"data_files": "moved.jsonl"}},
        {"calibration__batch_size": 64},
        {"calibration__dataset": {"data_files": "moved.jsonl"}},
        {"calibration__dataset": None},
        {"calibration__offload": True},  # which the saved run did not have at all
        {"calibration__cache_dir": "elsewhere", "epochs": 2},
    ],
)
def test_what_computes_the_same_may_change(folder, changes):
    saved = save(folder, 1)
    assert resume(folder, True, changed(**changes)) == saved


def test_a_dotted_key_frees_that_key_alone(folder):
    save(folder, 1)
    with pytest.raises(ValueError, match="calibration: ") as caught:
        resume(folder, True, changed(calibration__num_samples=9, calibration__batch_size=64))
    assert "batch_size" not in str(caught.value)  # what may differ is not shown as a difference


def test_which_keys_may_change_is_up_to_the_recipe(folder):
    saved = save(folder, 1)
    assert resume(folder, True, changed(optimizer__lr=0.3), may_change={"optimizer.lr"}) == saved
    with pytest.raises(ValueError, match="epochs: saved 1, now 2"):
        resume(folder, True, changed(epochs=2), may_change={"optimizer.lr"})
    with pytest.raises(ValueError, match="optimizer"):
        resume(folder, True, changed(optimizer__lr=0.3), may_change={"optimizer.l"})
    assert resume(folder, True, changed(optimizer__lr=0.3), may_change={"optimizer"}) == saved


def test_nothing_that_shapes_the_result_is_free_to_change():
    fixed = {"seed", "model", "adapter", "optimizer", "lr_scheduler", "loss", "dtype", "shuffle", "clip_grad_norm",
             "max_steps_per_epoch", "quantization", "calibration"}  # fmt: skip
    assert not fixed & RESUMABLE_KEYS
    inside = {key.partition(".")[2] for key in RESUMABLE_KEYS if key.startswith("calibration.")}
    assert inside == {"dataset", "batch_size", "offload", "cache_dir"}


# --------------------------------------------------------------------------------- as many samples a step


def save_sizes(folder, batch_size, accumulation, processes):
    config = CONFIG | {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    run = {"config": config} | ({"world_size": processes} if processes else {})
    return save_checkpoint(folder, 1, {"run": run, "adapter": {}})


def resume_with(folder, batch_size, accumulation, processes):
    config = CONFIG | {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    return resume(folder, True, config, **({"world_size": processes} if processes else {}))


@pytest.mark.parametrize(
    "now", [(2, 3, 4), (4, 3, 2), (1, 6, 4), (24, 1, 1), (8, 3, None), (1, 1, 24)]
)
@pytest.mark.parametrize("saved", [(2, 3, 4), (6, 4, None), (6, 4, 1)])
def test_a_step_may_be_cut_in_another_way(folder, saved, now):
    checkpoint = save_sizes(folder, *saved)
    assert resume_with(folder, *now) == checkpoint


@pytest.mark.parametrize("now", [(2, 3, 2), (2, 3, 5), (4, 3, 4), (2, 6, 4), (2, 3, None)])
def test_other_samples_a_step_are_refused_with_both_numbers(folder, now):
    save_sizes(folder, 2, 3, 4)
    product = now[0] * now[1] * (now[2] or 1)
    told = rf"24 samples a step; batch_size x gradient_accumulation_steps x processes is now {product}\. .* is 24\."
    with pytest.raises(ValueError, match=told) as caught:
        resume_with(folder, *now)
    assert "step_00000001" in str(caught.value)


def test_left_out_sizes_are_one(folder):
    saved = save_checkpoint(folder, 1, {"run": {"config": CONFIG}, "adapter": {}})
    assert resume_with(folder, 1, 1, None) == saved
    with pytest.raises(ValueError, match=r"with 1 samples a step.* is now 2"):
        resume_with(folder, 1, 1, 2)


def epoch_of(samples, batch_size, processes, rank=0):
    return EpochBatches(
        [samples], batch_size=batch_size, seed=5, shuffle=True, rank=rank, world_size=processes
    )


def steps_of(samples, batch_size, accumulation, processes, start=0):
    """The samples of each step of an epoch, from a batch on, in any order inside the step."""
    parts = []
    for rank in range(processes):
        batches = epoch_of(samples, batch_size, processes, rank)
        batches.set_position(2, start)
        left = list(batches)
        parts.append([left[i : i + accumulation] for i in range(0, len(left), accumulation)])
    return [
        sorted(i for windows in step for batch in windows for i in batch if i != FILLER)
        for step in zip(*parts, strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 3).flatmap(
        lambda saved: st.tuples(
            st.just(saved),
            st.sampled_from(
                [
                    (b, a, math.prod(saved) // (a * b))
                    for b in range(1, math.prod(saved) + 1)
                    for a in range(1, math.prod(saved) // b + 1)
                    if math.prod(saved) % (a * b) == 0
                ]
            ),
        )
    ),
    samples=st.integers(1, 60),
    data=st.data(),
)
def test_the_rest_of_the_epoch_has_the_steps_it_would_have_had(sizes, samples, data):
    (batch_size, accumulation, processes), now = sizes
    whole_epoch = steps_of(samples, batch_size, accumulation, processes)
    done = data.draw(st.integers(0, len(whole_epoch)))
    run = {
        "step": 100 + done,
        "epoch": 2,
        "batches_done": min(done * accumulation, len(epoch_of(samples, batch_size, processes))),
        "config": {"gradient_accumulation_steps": accumulation},
    }
    step, epoch, batches_done = resume_position(run, now[1], len(epoch_of(samples, now[0], now[2])))
    assert (step, epoch) == (100 + done, 2)
    assert steps_of(samples, *now, start=batches_done) == whole_epoch[done:]
    if now == (batch_size, accumulation, processes):
        assert batches_done == run["batches_done"]


# ------------------------------------------------------------------------------------------ starting over, cleaning up


def run_config(output_dir, **changes):
    plain = {"output_dir": str(output_dir), "dry_run": False, "adapter_checkpoint": None}
    return OmegaConf.create(CONFIG | plain | {"resume_from_checkpoint": False} | changes)


def test_restart_moves_what_was_there_aside_and_deletes_nothing(folder):
    output = folder.parent
    save(folder, 3)
    damage(save(folder, 6))
    (output / "metrics.jsonl").write_text('{"step": 3}\n')
    (output / "quantized_base").mkdir()
    (output / "my_notes.txt").write_text("not the run's")
    before = {
        path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()
    }
    for number in (1, 2):
        cfg = run_config(output, resume_from_checkpoint="restart")
        assert starting_checkpoint(cfg) is None
        assert list(folder.glob("step_*")) == []
        aside = output / f"restarted_{number}"
        assert (aside / "checkpoints" / "step_00000003" / "manifest.json").is_file()
        save(folder, 3)
        (output / "metrics.jsonl").write_text("new\n")
    moved = {
        path.relative_to(output / "restarted_1"): path.read_bytes()
        for path in (output / "restarted_1").rglob("*")
        if path.is_file()
    }
    kept = {Path("my_notes.txt"), Path("checkpoints/.lock")}
    assert moved == {path: data for path, data in before.items() if path not in kept}
    assert (output / "my_notes.txt").is_file()


def test_another_rank_waits_for_rank_zero_to_move_the_files(folder):
    save(folder, 3)
    cfg = run_config(folder.parent, resume_from_checkpoint="restart")
    assert starting_checkpoint(cfg, rank=1, world_size=2) is None
    assert [path.name for path in folder.glob("step_*")] == ["step_00000003"]


@pytest.mark.parametrize("choice", [True, False, "restart"])
def test_a_second_run_in_a_live_folder_is_told_so_before_anything_else(folder, choice):
    """Even while the first one is writing, when its newest checkpoint looks unfinished."""
    (save(folder, 3) / "manifest.json").unlink()
    with run_lock(folder), pytest.raises(ValueError, match="another run is writing"):
        starting_checkpoint(run_config(folder.parent, resume_from_checkpoint=choice))
    assert (folder / "step_00000003").is_dir()


def test_several_processes_may_look_at_the_lock_at_once(folder):
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        check_unlocked(folder)


def test_what_a_kill_left_between_writing_and_removing_goes_at_the_next_start(folder):
    for step in (1, 2, 3, 4):
        save(folder, step)
    (folder / ".step_00000001.removed.tmp").mkdir()
    clean_up(folder, keep_last=2)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "step_00000003",
        "step_00000004",
    ]


def test_a_damaged_newest_one_does_not_count_as_one_that_is_kept(folder):
    for step in (1, 2, 3, 4):
        saved = save(folder, step)
    damage(saved)
    clean_up(folder, keep_last=2)
    assert sorted(path.name for path in folder.glob("step_*")) == [
        "step_00000002",
        "step_00000003",
        "step_00000004",
    ]
