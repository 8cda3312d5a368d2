"""Checkpoint folders damaged at random: each holds what was saved, or is refused in a sentence."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kasa_tune.components.checkpoints import CheckpointError, find_checkpoint, save_checkpoint
from kasa_tune.components.checkpoints.files import size_and_digest
from tests.fuzzing import bounded, soon

STEP = 4
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = ["format_version", "step", "parts", "files"]
DOCUMENTS = st.recursive(  # tagged objects as in the parts of a checkpoint
    st.integers(),
    lambda inner: st.dictionaries(
        st.sampled_from(["tensor", "tuple", "dict", "quantized"]),
        inner | st.lists(inner, max_size=3) | st.text(max_size=3),
        min_size=1,
        max_size=1,
    ),
    max_leaves=5,
)
NAMES = st.sampled_from(["../run.json", "a\0b", "\ud800", "", ".", "x" * 5000]) | st.text(
    max_size=9
)
HARMS = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("remove")),
    st.tuples(st.just("add"), st.binary(max_size=20)),
    st.tuples(st.just("write"), st.binary(max_size=40) | st.just(b"[" * 100_000)),
    st.tuples(st.just("fold")),
    st.tuples(st.just("key"), st.sampled_from(KEYS), JSON | st.just("x" * 5000)),
    st.tuples(st.just("name"), NAMES),
)


def parts():
    generator = torch.Generator().manual_seed(0)
    return {
        "adapter": {"layer.lora_a.weight": torch.randn(4, 8, generator=generator)},
        "run": {"step": STEP, "config": {"seed": 1, "betas": (0.9, 0.95)}},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "checkpoints", STEP, parts())


def harm(file, kind, *values):
    """Damage one file of a checkpoint; `key` and `name` change its manifest."""
    manifest = file.parent / "manifest.json"
    content = bytearray(file.read_bytes()) if file.is_file() else bytearray()
    if kind == "flip" and content:
        content[int(values[0] * len(content))] ^= 1 << values[1]
        file.write_bytes(content)
    elif kind == "cut" and content:
        file.write_bytes(content[: int(values[0] * len(content))])
    elif kind in ("remove", "fold"):
        file.unlink(missing_ok=True)
        if kind == "fold":
            file.mkdir()
    elif kind == "add":
        (file.parent / "more.json").write_bytes(values[0])
    elif kind == "write" and file.is_file():
        file.write_bytes(values[0])
    elif kind in ("key", "name"):
        try:
            tree = json.loads(manifest.read_bytes())
            if kind == "key":
                tree[values[0]] = values[1]
            else:
                tree["files"][values[0]] = tree["files"].pop(file.name, None)
        except (ValueError, OSError, TypeError, KeyError, AttributeError, RecursionError):
            return  # the manifest is damaged already
        manifest.write_text(json.dumps(tree))


def reseal(checkpoint, name, text):
    """Give a part another content, and the manifest the sums of it."""
    (checkpoint / name).write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest["files"][name] = size_and_digest(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.fuzz
@bounded("folders", quick=150)
@given(harms=st.lists(st.tuples(st.integers(0, 9), HARMS), min_size=1, max_size=3))
def test_any_damage_is_refused_in_a_sentence_or_costs_nothing(saved, harms, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    copied = run / "checkpoints" / saved.name
    shutil.copytree(saved, copied)
    files = sorted(path.name for path in saved.iterdir())
    for number, (kind, *values) in harms:
        file = copied / files[number % len(files)]
        if not file.is_dir():
            harm(file, kind, *values)
    said = str(run)
    try:
        checkpoint = find_checkpoint(run)
        adapter, state = checkpoint.adapter, checkpoint.run
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        expected = parts()
        assert state == expected["run"]
        assert torch.equal(
            *(tree["layer.lora_a.weight"] for tree in (adapter, expected["adapter"]))
        )
        assert checkpoint.manifest["step"] == STEP
    assert str(run) in said
    assert len(said) < 800
    shutil.rmtree(run)


@pytest.mark.fuzz
@bounded("folders", quick=100)
@given(document=JSON | DOCUMENTS)
def test_any_sealed_part_is_read_or_refused_in_a_sentence(saved, document, tmp_path_factory):
    """Its sums are right, as they are in a folder that somebody made up."""
    copied = tmp_path_factory.mktemp("sealed") / saved.name
    shutil.copytree(saved, copied)
    reseal(copied, "adapter.json", json.dumps(document))
    checkpoint = find_checkpoint(copied)
    said = str(copied)
    try:
        checkpoint.part("adapter")
    except CheckpointError as error:
        said = str(error)
    assert str(copied) in said
    assert len(said) < 800
    shutil.rmtree(copied.parent)


def test_a_part_that_is_nested_without_end_is_damaged(saved, tmp_path):
    copied = shutil.copytree(saved, tmp_path / saved.name)
    reseal(copied, "adapter.json", "[" * 100_000)
    with pytest.raises(CheckpointError, match="its part adapter is not of the form"):
        find_checkpoint(copied).part("adapter")


@pytest.mark.parametrize("name", ["manifest.json", "run.json", "adapter.safetensors"])
def test_a_pipe_is_not_waited_for(saved, name, tmp_path):
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with soon(), pytest.raises(CheckpointError, match=name):
        find_checkpoint(folder)


def test_names_that_only_look_like_those_of_a_run(tmp_path):
    """``²`` is a digit of no number, and no process has a number of thirty digits."""
    (tmp_path / "checkpoints" / "step_²").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        find_checkpoint(tmp_path)
    leftover = tmp_path / "checkpoints" / f".step_00000004.{'9' * 30}.tmp"
    leftover.mkdir()
    save_checkpoint(tmp_path / "checkpoints", STEP, parts())
    assert not leftover.exists()


@pytest.mark.parametrize("numbers", [[0, 1, [1, 1], "torch.float32"], [1, 1, [], 7]], ids=str)
def test_a_quantized_tensor_that_cannot_be_put_together(saved, numbers, tmp_path):
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    document = {"quantized": ["NF4Tensor", {"dict": [["quantized_data", 5]]}, numbers]}
    (folder / "adapter.json").write_text(json.dumps(document))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["adapter.json"] = size_and_digest(folder / "adapter.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="its part adapter is not of the form"):
        _ = find_checkpoint(folder).adapter


@pytest.mark.parametrize("run", [[], 7, {}, {"config": []}, {"config": {}}], ids=str)
def test_a_run_json_that_describes_no_run(run, tmp_path):
    save_checkpoint(tmp_path / "checkpoints", STEP, parts() | {"run": run})
    with pytest.raises(CheckpointError):
        find_checkpoint(tmp_path).check_belongs(base_fingerprint="", model={})
