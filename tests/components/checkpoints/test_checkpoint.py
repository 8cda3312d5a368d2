"""Checkpoints: everything comes back as it was, and nothing that goes wrong while saving costs an earlier one."""

import errno
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.optim.subclass_8bit import OptimState8bit

from kasa_tune.components.checkpoints import (
    Checkpoint,
    CheckpointError,
    check_saveable,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_part,
    rng_state,
    run_lock,
    save_checkpoint,
    set_rng_state,
    verify_checkpoint,
)
from kasa_tune.components.linalg.nf4 import quantize
from kasa_tune.components.models.base_weights import weights_fingerprint
from kasa_tune.components.training.stop_signals import StopSignals
from tests.components.failing_disk import (
    at_each_call,
    died_by_kill,
    disk_full,
    in_a_process_that_dies,
    killed,
)
from tests.tolerances import assert_same_bits


def newest(folder):
    """The path of the newest good checkpoint, if any, and why newer ones were passed over."""
    checkpoint, reasons = latest_checkpoint(folder)
    return checkpoint and checkpoint.path, reasons


def same(left, right):
    """Equal in value and in the type of every node; tensors also in dtype and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        equal_kind = left.dtype == right.dtype and left.shape == right.shape
        return (
            equal_kind
            and left.contiguous().view(-1).tolist() == right.contiguous().view(-1).tolist()
        )
    if isinstance(left, dict):
        keys = [(type(key), key) for key in left] == [(type(key), key) for key in right]
        return keys and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def round_trip(tree, folder):
    return load_part(save_checkpoint(folder, 1, {"part": tree}), "part")


# --------------------------------------------------------------------------------- what goes in comes out


def special_tensors():
    storage = torch.arange(12.0)
    return {
        "bf16": torch.randn(3, 4).bfloat16(),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "int64": torch.tensor([2**62, -1]),
        "bool": torch.tensor([True, False]),
        "float64": torch.tensor([0.1, float("inf"), -0.0], dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "transposed": storage.view(3, 4).T,
        "every other": storage[::2],
        "shared": storage,
        "shared, part": storage[3:7],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)).detach(),
    }


def test_tensors_of_every_kind(tmp_path):
    tree = special_tensors()
    found = round_trip(tree, tmp_path)
    assert same(found, tree)
    found["shared"].zero_()
    assert same(found["shared, part"], tree["shared, part"])


def test_trees_of_every_kind(tmp_path):
    tree = {
        "none": None,
        "numbers": [1, -(2**80), 0.1, 1e-310, float("inf"), True, False],
        "tuple": (1, (), [(2,)]),
        0: {1: "int key", "1": "string key", 1.5: "float key"},
        "empty": {"list": [], "dict": {}, "tuple": ()},
        "looks tagged": {"tensor": "x", "dict": [["a", 1]]},
        "text": 'Zürich \u2028 \x00 "',
        "deep": [{"a": [torch.ones(1), {"b": (torch.zeros(2),)}]}],
    }
    assert same(round_trip(tree, tmp_path), tree)


def test_a_tensor_alone_and_a_part_without_tensors(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"alone": torch.ones(2), "plain": [1]})
    assert same(load_part(path, "alone"), torch.ones(2))
    assert same(load_part(path, "plain"), [1])
    assert not (path / "plain.safetensors").exists()


def test_tensors_whose_paths_read_the_same_are_kept_apart(tmp_path):
    tree = {
        1: torch.tensor(1),
        "1": torch.tensor(2),
        "a/b": torch.tensor(3),
        "a": {"b": torch.tensor(4)},
    }
    assert same(round_trip(tree, tmp_path), tree)


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
KEYS = st.integers() | st.text(max_size=3)
TREES = st.recursive(
    LEAVES | st.lists(st.integers(-9, 9), max_size=3).map(torch.tensor),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_any_tree(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    assert same(round_trip(tree, folder), tree)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "tree", [{1, 2}, object(), b"bytes", {(1, 2): 3}, np.int64(3)], ids=lambda t: type(t).__name__
)
def test_what_cannot_be_kept_is_refused_before_anything_is_left(tree, tmp_path):
    with pytest.raises(ValueError, match=r"part|branch"):
        save_checkpoint(tmp_path, 1, {"part": {"branch": [tree]}})
    assert not list(tmp_path.iterdir())


class Packed(torch.Tensor):
    """A kind of tensor that no checkpoint knows."""


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"state": {0: {"exp_avg": torch.ones(2).as_subclass(Packed)}}},
            r"Packed \(at state/0/exp_avg\).*Use an optimizer",
        ),
        ({"betas": (0.9, object())}, r"object \(at betas/1\)"),
    ],
)
def test_what_cannot_be_saved_is_known_before(tree, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_saveable(tree)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, 1, {"optimizer": tree})
    assert not list(tmp_path.iterdir())


def test_what_can_be_saved_is_known_before():
    check_saveable(
        special_tensors()
        | {"parameter itself": torch.nn.Parameter(torch.ones(2)), "rng": rng_state()}
    )


def test_quantized_tensors_are_kept_as_their_parts(tmp_path):
    weight = quantize(torch.randn(16, 24), block_size=8)
    state = OptimState8bit.zeros((32, 128))
    state.copy_(torch.randn(32, 128))
    tree = {
        "one": weight,
        "same": weight,
        "state": {0: {"exp_avg": state}},
        "beside": (torch.ones(1), [weight]),
    }
    check_saveable(tree)
    found = round_trip(tree, tmp_path)
    for again in (found["one"], found["same"], found["beside"][1][0]):
        assert_same_bits(again, weight)
    assert_same_bits(found["state"][0]["exp_avg"], state)
    assert same(found["beside"][0], torch.ones(1))


def test_saving_copies_nothing_into_the_live_tensors(tmp_path):
    tree = {"weight": torch.ones(3)}
    path = save_checkpoint(tmp_path, 1, {"part": tree})
    tree["weight"].zero_()
    assert load_part(path, "part")["weight"].tolist() == [1, 1, 1]


def test_files_are_safetensors_and_json_and_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickled")

    for module, name in (
        (pickle, "dump"),
        (pickle, "dumps"),
        (pickle, "load"),
        (pickle, "loads"),
        (torch, "save"),
    ):
        monkeypatch.setattr(module, name, refuse)
    path = save_checkpoint(tmp_path, 1, {"tensors": special_tensors(), "rng": rng_state()})
    load_part(path, "tensors")
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for file in path.glob("*.json"):
        json.loads(file.read_text())


def test_a_part_that_is_not_there(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"part": 1})
    with pytest.raises(CheckpointError, match="no part 'optimizer'"):
        load_part(path, "optimizer")
    (path / "optimizer.json").write_text("1")
    with pytest.raises(CheckpointError, match="no part 'optimizer'"):
        load_part(path, "optimizer")


# --------------------------------------------------------------------------------- random state and optimizers


def draws():
    """Numbers of each global generator, more than one block of any of them."""
    return (
        [random.random() for _ in range(700)],
        random.gauss(0, 1),
        np.random.standard_normal(701).tolist(),
        torch.randn(701).tolist(),
        torch.nn.functional.dropout(torch.ones(50)).tolist(),
    )


def test_all_generators_go_on_with_the_same_draws(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draws()  # leaves Python's and NumPy's normal generators with a number in hand
    path = save_checkpoint(tmp_path, 1, {"rng": rng_state()})
    expected = draws()
    assert draws() != expected
    set_rng_state(load_part(path, "rng"))
    assert draws() == expected


def test_random_state_of_other_devices_is_warned_of(caplog):
    state = rng_state()
    set_rng_state(state)
    assert caplog.text == ""
    set_rng_state(state | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 99})
    assert "of 99 CUDA devices" in caplog.text


def test_taking_the_state_draws_nothing():
    torch.manual_seed(3), np.random.seed(2), random.seed(1)
    expected = draws()
    torch.manual_seed(3), np.random.seed(2), random.seed(1)
    rng_state()
    assert draws() == expected


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.3}, {"params": p[1:]}], lr=0.1, betas=(0.8, 0.9)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(name, tmp_path):
    def parameters():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]

    def train(trained, optimizer, steps):
        for step in steps:
            for parameter in trained:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()

    whole = parameters()
    train(whole, OPTIMIZERS[name](whole), range(5))
    first = parameters()
    optimizer = OPTIMIZERS[name](first)
    train(first, optimizer, range(3))
    path = save_checkpoint(
        tmp_path, 3, {"weights": [p.detach() for p in first], "optimizer": optimizer.state_dict()}
    )
    second = [torch.nn.Parameter(weight) for weight in load_part(path, "weights")]
    optimizer = OPTIMIZERS[name](second)
    optimizer.load_state_dict(load_part(path, "optimizer"))
    train(second, optimizer, range(3, 5))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


# --------------------------------------------------------------------------------- which checkpoints there are


def save(folder, step, **options):
    """A checkpoint of several files whose content tells its step."""
    parts = {
        "adapter": {"weight": torch.full((50,), float(step))},
        "run": {"step": step},
        "rng": torch.arange(step % 50),
    }
    return save_checkpoint(folder, step, parts, **options)


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


def assert_all_good(folder):
    """What can be seen is whole; returns the newest step."""
    path, reasons = newest(folder)
    assert not reasons
    steps = steps_in(folder)
    for step in steps:
        assert_good(folder / f"step_{step:08d}", step)
    assert path == folder / f"step_{steps[-1]:08d}"
    return steps[-1]


def assert_good(path, step):
    verify_checkpoint(path)
    assert load_part(path, "run") == {"step": step}
    assert load_part(path, "adapter")["weight"].unique().tolist() == [step]


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (5, 100_000_000, 99_999_999, 20):
        save(tmp_path, step)
    (tmp_path / "step_notes.txt").touch()
    (tmp_path / "step_best").mkdir()
    assert steps_in(tmp_path) == [5, 20, 99_999_999, 100_000_000]
    assert newest(tmp_path) == (tmp_path / "step_100000000", [])


def test_no_checkpoints_yet(tmp_path):
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "absent") == (None, [])
    assert list_checkpoints(tmp_path / "absent") == []


def test_keep_last_removes_the_oldest(tmp_path):
    kept = []
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2)
        kept.append(steps_in(tmp_path))
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


def test_keep_last_never_removes_what_was_just_saved(tmp_path):
    """After a fall-back from a damaged step 9 the run saves step 6: no good one may make room for the damaged one."""
    save(tmp_path, 5), save(tmp_path, 9)
    (tmp_path / "step_00000009" / "run.json").write_text("{}")
    save(tmp_path, 6, keep_last=1)
    path, reasons = newest(tmp_path)
    assert_good(path, 6)
    assert "step_00000009" in reasons[0]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3)
    save_checkpoint(tmp_path, 3, {"other": 1})
    assert load_part(tmp_path / "step_00000003", "other") == 1
    assert list(verify_checkpoint(tmp_path / "step_00000003")["files"]) == ["other.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_leftovers_of_a_writer_that_is_gone_are_removed(tmp_path):
    gone = in_a_process_that_dies(lambda: None)
    os.waitpid(gone, 0)
    living = f".step_00000001.{os.getppid()}.tmp"
    names = (
        f".step_00000001.{gone}.tmp",
        f".step_00000001.{os.getpid()}.tmp",
        ".step_00000002.removed.tmp",
        living,
    )
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [living, "notes", "step_00000003"]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(
    tmp_path, monkeypatch, caplog
):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    save(tmp_path, 1)
    monkeypatch.setattr(
        Path,
        "rename",
        lambda old, new: refuse() if "removed" in new.name else os.rename(old, new) or new,
    )
    assert_good(save(tmp_path, 2, keep_last=1), 2)
    assert "Could not remove the old checkpoint" in caplog.text


# --------------------------------------------------------------------------------- which one to use


def test_a_run_is_its_newest_good_checkpoint_and_a_checkpoint_is_itself(tmp_path, caplog):
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert find_checkpoint(tmp_path).path == checkpoints / "step_00000003"
    assert find_checkpoint(checkpoints / "step_00000001").path == checkpoints / "step_00000001"
    assert caplog.text == ""
    truncate(checkpoints / "step_00000003" / "run.json")
    assert find_checkpoint(tmp_path).path == checkpoints / "step_00000002"
    assert "step_00000003 is damaged: run.json" in caplog.text
    with pytest.raises(CheckpointError, match=r"step_00000003 is damaged: run\.json"):
        find_checkpoint(checkpoints / "step_00000003")


def test_no_checkpoint_to_use(tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="empty holds no finished checkpoint"):
        find_checkpoint(tmp_path / "empty")
    truncate(save(tmp_path / "torn" / "checkpoints", 7) / "run.json")
    with pytest.raises(
        CheckpointError, match=r"torn holds no finished checkpoint.*step_00000007 is damaged: run"
    ):
        find_checkpoint(tmp_path / "torn")
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder.*output_dir"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"not a complete checkpoint.*and not a run's output_dir"
    ):
        find_checkpoint(tmp_path)


MODEL = {
    "_component_": "models.kasa_tiny",
    "rank": 8,
    "attn_modules": ["q_proj", "v_proj"],
    "dropout": 0.1,
}


def checkpoint_of(folder, model=MODEL):
    return save_checkpoint(
        folder, 1, {"run": {"base": "abc", "config": {"model": model, "seed": 1}}}
    )


@pytest.mark.parametrize(
    "model", [MODEL, MODEL | {"dropout": 0.0}, {k: v for k, v in MODEL.items() if k != "dropout"}]
)
def test_a_checkpoint_belongs_to_its_model_whatever_the_dropout(model, tmp_path):
    Checkpoint(checkpoint_of(tmp_path)).check_belongs(base_fingerprint="abc", model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, r"model\.rank: checkpoint 8, config 4\.$"),
        (
            {"attn_modules": ["q_proj"]},
            r"attn_modules: checkpoint \['q_proj', 'v_proj'\], config \['q_proj'\]",
        ),
        ({"truncation": "published"}, r"model\.truncation: checkpoint 'unset', config 'published'"),
        (
            {"rank": 4, "_component_": "lora"},
            r"_component_: checkpoint 'models.kasa_tiny', config 'lora'; model\.rank",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=f"belongs to another model: .*{message}"):
        Checkpoint(checkpoint_of(tmp_path)).check_belongs(
            base_fingerprint="abc", model=MODEL | change
        )


def test_a_key_that_the_config_no_longer_sets_is_a_difference(tmp_path):
    checkpoint = checkpoint_of(tmp_path, MODEL | {"truncation": "published"})
    with pytest.raises(
        CheckpointError, match=r"truncation: checkpoint 'published', config 'unset'"
    ):
        Checkpoint(checkpoint).check_belongs(base_fingerprint="abc", model=MODEL)


def test_a_checkpoint_on_another_base_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"belongs to other base weights than.*checkpointer"):
        Checkpoint(checkpoint_of(tmp_path)).check_belongs(base_fingerprint="abd", model=MODEL)


# --------------------------------------------------------------------------------- damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm", [truncate, flip_a_bit, Path.unlink, lambda path: path.write_bytes(b"")]
)
@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json", "run.json"])
def test_damage_is_named_and_the_previous_checkpoint_taken(harm, name, tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    harm(tmp_path / "step_00000002" / name)
    with pytest.raises(CheckpointError, match=f"step_00000002 is damaged: {name}"):
        verify_checkpoint(tmp_path / "step_00000002")
    path, reasons = newest(tmp_path)
    assert_good(path, 1)
    assert len(reasons) == 1
    assert "step_00000002" in reasons[0]
    assert name in reasons[0]


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[]", "null", "{}", '{"format_version": 1}', '{"files": {}}', b"\xff\xfe\x00"],
    ids=repr,
)
def test_a_manifest_that_is_none_is_no_checkpoint(content, tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    manifest = tmp_path / "step_00000002" / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint.*manifest\.json"):
        verify_checkpoint(tmp_path / "step_00000002")
    assert newest(tmp_path)[0] == tmp_path / "step_00000001"


def test_a_checkpoint_of_another_format_says_so(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="checkpoint format 99, this version reads 1"):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 7}, "is of step 7"),
        ({"parts": ["adapter", "optimizer", "run", "rng"]}, "lacks the files of optimizer"),
    ],
)
def test_a_manifest_of_another_checkpoint_is_refused(change, message, tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=f"step_00000001 is damaged: .*{message}"):
        verify_checkpoint(path)


def test_a_checkpoint_may_be_copied_under_another_name(tmp_path):
    path = shutil.copytree(save(tmp_path, 1), tmp_path / "best")
    verify_checkpoint(path)


def test_all_damaged_is_none_with_all_reasons(tmp_path):
    for step in (1, 2):
        truncate(save(tmp_path, step) / "run.json")
    path, reasons = newest(tmp_path)
    assert path is None
    assert ["step_00000002" in reasons[0], "step_00000001" in reasons[1]] == [True, True]


def test_a_path_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        verify_checkpoint(tmp_path / "nowhere")


# --------------------------------------------------------------------------------- writing that fails


def error_of(act):
    try:
        act()
    except OSError as error:
        return error


def copy_of(template, folder):
    shutil.copytree(template, folder)
    return folder


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_a_disk_that_fills_at_any_moment_costs_nothing(again, tmp_path, monkeypatch):
    template = tmp_path / "template"
    save(template, 1), save(template, 2)
    step = 2 if again else 3
    failures = 0
    for n in range(1, 200):
        folder = copy_of(template, tmp_path / f"run{n}")
        with monkeypatch.context() as patch:
            at_each_call(patch, disk_full)(n)
            error = error_of(partial(save, folder, step))
        failed = error is not None
        assert not failed or (type(error), error.errno) == (OSError, errno.ENOSPC)
        failures += failed
        assert_all_good(folder)
        assert set(steps_in(folder)) >= {1, 2}
        if not failed and n > failures + 10:
            break
    assert failures > 15
    assert steps_in(folder) == sorted({1, 2, step})


def test_a_failed_save_leaves_no_trace_and_the_next_one_works(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        at_each_call(patch, disk_full)(6)
        with pytest.raises(OSError, match=r"No space left.*Earlier checkpoints are untouched"):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert_good(save(tmp_path, 2), 2)


def test_a_file_that_cannot_grow_is_an_os_error_from_safetensors_too(tmp_path):
    """The kernel refuses to write more than 64 KiB to a file: as on a full disk, through safetensors' own code."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(
            OSError, match=r"step_00000002.*Earlier checkpoints are untouched"
        ) as caught:
            save_checkpoint(tmp_path, 2, {"adapter": torch.ones(1 << 16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_an_interrupt_while_saving_leaves_no_trace(tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    save(tmp_path, 1)
    at_each_call(monkeypatch, interrupt)(7)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "run", 1)


# --------------------------------------------------------------------------------- a process that is killed


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """SIGKILL before the n-th operation on the disk, for every n, while a step is replaced and while old ones go."""
    template = tmp_path / "template"
    save(template, 1), save(template, 2)

    def work(folder, n):
        with monkeypatch.context() as patch:
            at_each_call(patch, killed)(n)
            save(folder, 2, keep_last=2)
            save(folder, 3, keep_last=1)

    deaths = 0
    for n in range(1, 200):
        folder = copy_of(template, tmp_path / f"run{n}")
        if not died_by_kill(in_a_process_that_dies(lambda folder=folder, n=n: work(folder, n))):
            break
        deaths += 1
        assert_all_good(folder)
        if 3 not in steps_in(folder):
            assert 2 in steps_in(folder)  # even if it had been moved aside
        save(folder, 4)
        assert not [left.name for left in folder.iterdir() if left.name.startswith(".")], n
    assert deaths > 30
    assert steps_in(folder) == [3]


@pytest.mark.slow
def test_kills_at_random_moments_of_a_loop_of_saves(tmp_path):
    save(tmp_path, 1)

    def work():
        for step in range(steps_in(tmp_path)[-1] + 1, 1_000_000):
            save(tmp_path, step, keep_last=2)

    draw = random.Random(0)
    before = 1
    for _ in range(12):
        child = in_a_process_that_dies(work)
        patience = time.monotonic() + 30
        while steps_in(tmp_path)[-1] == before and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert died_by_kill(child)
        newest = assert_all_good(tmp_path)
        assert newest > before
        before = newest


def test_a_kill_between_the_two_renames_hides_no_checkpoint(tmp_path):
    """The newest checkpoint is found where it was even before anything is saved again."""
    save(tmp_path, 1), save(tmp_path, 2)

    def work():
        def rename_and_die(old, new):
            os.rename(old, new)
            os._exit(7)

        Path.rename = rename_and_die
        save(tmp_path, 2)

    assert os.waitpid(in_a_process_that_dies(work), 0)[1] == 7 << 8
    assert steps_in(tmp_path) == [1]
    for _ in range(2):
        assert newest(tmp_path) == (tmp_path / "step_00000002", [])
    assert_good(tmp_path / "step_00000002", 2)


def test_a_reader_between_the_two_renames_does_not_stop_the_writer(tmp_path, monkeypatch):
    save(tmp_path, 2)
    rename, reads = Path.rename, []

    def rename_and_read(old, new):
        done = rename(old, new)
        if "replaced" in new.name and not reads:
            reads.append(new)  # the reader renames too
            reads.append(newest(tmp_path)[0])
        return done

    monkeypatch.setattr(Path, "rename", rename_and_read)
    save_checkpoint(tmp_path, 2, {"other": 1})
    assert reads[1] == tmp_path / "step_00000002"
    assert load_part(tmp_path / "step_00000002", "other") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_a_checkpoint_moved_aside_in_anothers_folder_is_read_where_it_is(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    save(folder, 2)
    aside = (folder / "step_00000002").rename(folder / ".step_00000002.replaced.tmp")
    assert find_checkpoint(tmp_path).path == aside
    assert find_checkpoint(tmp_path).manifest["step"] == 2
    assert sorted(path.name for path in folder.iterdir()) == [aside.name, "step_00000001"]


def test_half_of_a_surrogate_pair_in_a_checkpoint_is_damage(tmp_path):
    """It is no character: it could be written to no model card, and printed on no terminal."""
    save_checkpoint(tmp_path, 1, {"run": {"text": "\ud83d"}})
    with pytest.raises(CheckpointError, match=r"its part run is not of the form .*surrogates"):
        load_part(tmp_path / "step_00000001", "run")


def test_a_folder_that_may_only_be_read_is_read(tmp_path, monkeypatch):
    save(tmp_path, 1)
    (tmp_path / ".step_00000002.replaced.tmp").mkdir()

    def refuse(old, new):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    assert newest(tmp_path) == (tmp_path / "step_00000001", [])


# --------------------------------------------------------------------------------- one writer at a time


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    folder = tmp_path / "new" / "run"
    with run_lock(folder):
        with (
            pytest.raises(ValueError, match=r"another run is writing to .*new/run"),
            run_lock(folder),
        ):
            pass
        with run_lock(tmp_path / "other"):
            pass
    with run_lock(folder):
        pass
    with pytest.raises(KeyError), run_lock(folder):
        raise KeyError
    with run_lock(folder):
        pass


def test_another_process_holds_the_folder_until_it_dies(tmp_path):
    read, write = os.pipe()

    def work():
        with run_lock(tmp_path):
            os.write(write, b"x")
            time.sleep(60)

    child = in_a_process_that_dies(work)
    os.read(read, 1)
    with pytest.raises(ValueError, match="another run is writing to"), run_lock(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    assert died_by_kill(child)
    with run_lock(tmp_path):
        pass


def test_the_end_of_a_run_frees_the_folder_even_while_a_worker_lives(tmp_path):
    with run_lock(tmp_path):
        worker = in_a_process_that_dies(lambda: time.sleep(60))
    entered = False
    try:
        with run_lock(tmp_path):
            entered = True
    finally:
        assert entered
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with run_lock(tmp_path):
        assert "cannot be locked" in caplog.text


# --------------------------------------------------------------------------------- stop signals


@pytest.fixture
def interrupts():
    """Python's handler of SIGINT, which a process started in the background does not have."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interrupts")
def test_the_first_signal_is_remembered_and_the_second_obeyed():
    with StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
def test_a_second_signal_of_the_other_kind_is_obeyed_too(first, second):
    obeyed = []
    previous = {
        number: signal.signal(number, lambda n, frame: obeyed.append(n))
        for number in (first, second)
    }
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), first)
            assert (stop.received, obeyed) == (first, [])
            os.kill(os.getpid(), second)
            assert (stop.received, obeyed) == (first, [second])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignals():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def work():
        with StopSignals() as stop:
            found.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


# --------------------------------------------------------------------------------- fingerprint of weights


def some_weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(30, 20, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
    }


CHANGES = {
    "one value": lambda w: w["a"].view(-1).__setitem__(377, 0.5),
    "one bf16 value": lambda w: w["b"].__setitem__(3, 0.5),
    "a name": lambda w: w.__setitem__("c", w.pop("b")),
    "a shape": lambda w: w.__setitem__("a", w["a"].view(20, 30)),
    "a dtype": lambda w: w.__setitem__("b", w["b"].float()),
    "another tensor": lambda w: w.__setitem__("c", torch.zeros(1)),
    "a tensor less": lambda w: w.pop("b"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_changes_the_fingerprint(change):
    weights = some_weights()
    change(weights)
    assert weights_fingerprint(weights) != weights_fingerprint(some_weights())


def test_the_same_weights_have_the_same_fingerprint_whatever_their_order_and_memory():
    weights = some_weights()
    shuffled = {"b": weights["b"].clone(), "a": weights["a"].T.contiguous().T}
    assert weights_fingerprint(shuffled) == weights_fingerprint(weights)


def test_every_matrix_of_a_large_model_counts():
    weights = {f"layer{i}": torch.zeros(300, 200) for i in range(3)}
    before = weights_fingerprint(weights)
    for name in weights:
        changed = weights | {name: torch.randn(300, 200)}
        assert weights_fingerprint(changed) != before
    assert (
        weights_fingerprint(weights | {"empty": torch.empty(0, 4), "scalar": torch.tensor(1.0)})
        != before
    )
