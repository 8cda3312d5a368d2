"""A checkpoint opened to be exported: what is read, and what cannot be."""

import contextlib
import copy
import gc
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.checkpoints import Checkpoint, CheckpointError, load_part, save_checkpoint
from kasa_tune.components.exchange.adapter_set import AdapterSet
from kasa_tune.components.exchange.native import write_adapter, write_native
from kasa_tune.components.exchange.prompting import NoPromptError, prompting_of
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.models.base_weights import weights_digest
from kasa_tune.components.quantized.base import FOLDER
from tests.fuzzing import bounded
from tests.tolerances import FP64
from tests.toy_checkpoints import toy, write_checkpoint
from tests.toy_models import FAMILIES
from tests.trained_runs import (
    ALPHA,
    IN_PLACES,
    METHODS,
    QUANTIZED,
    RANK,
    STEP,
    effective_weight,
    toy_run,
)


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch):
    """Torchtune's checkpointer collects garbage after each file."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


def checkpoint_of(run):
    (folder,) = (run.path / "checkpoints").iterdir()
    return folder


def rewritten(trained, **parts):
    """The run's checkpoint with other parts."""
    checkpoint = checkpoint_of(trained)
    whole = {name: load_part(checkpoint, name) for name in ("adapter", "run")} | parts
    save_checkpoint(checkpoint.parent, STEP, whole)


# --------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_is_as_trained_and_let_go_afterwards(method, tmp_path):
    run = toy_run(tmp_path, "llama3", method)
    opened = open_run(run.path)
    assert opened.linears.keys() == dict(adapter_linears(run.model)).keys()
    for name, trained in adapter_linears(run.model):
        for _ in range(2):
            with opened.loaded(name) as linear:
                assert torch.equal(linear.merged_weight(), trained.merged_weight())
            assert all(tensor.is_meta for tensor in linear.state_dict().values())
        exact = effective_weight(trained)
        assert (opened.effective(name).double() - exact).norm() < 1e-6 * exact.norm()
    assert opened.state["step"] == STEP
    assert bool(opened.quantized) == (method in QUANTIZED)


@pytest.mark.parametrize("method", ["kasa", "corda_ipm", "corda_mixed", "lora"])
def test_the_update_is_the_difference_of_the_trained_and_the_base_weights(method, tmp_path):
    run = toy_run(tmp_path, "llama2", method)
    opened, (_, weights) = open_run(run.path), toy("llama2")
    for name, linear in adapter_linears(run.model):
        diag = linear.lora_diag.detach().double().numpy() if method == "kasa" else 1.0
        a, b, out, into = (
            tensor.detach().double().numpy()
            for tensor in (
                linear.lora_a.weight,
                linear.lora_b.weight,
                linear.lora_edit_out,
                linear.lora_edit_in,
            )
        )
        update = opened.update(name)
        expected = ALPHA / RANK * (b * diag) @ a - out @ into
        np.testing.assert_allclose(update.dense().numpy(), expected, **FP64)
        assert update.rank == len(a) + len(into)
        change = effective_weight(linear) - weights[f"{name}.weight"].double()
        assert (update.dense() - change).norm() < 1e-6 * effective_weight(linear).norm()


def test_a_nan_in_the_base_is_told_by_its_layer(tmp_path):
    def change(state):
        state["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")

    run = toy_run(tmp_path, "llama2", "lora", where=IN_PLACES, change=lambda state: None)
    write_checkpoint(tmp_path / "base", "llama2", change=change)
    opened = open_with_any_base(run)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.w2"):
        opened.frozen("layers.1.mlp.w2")


def open_with_any_base(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "check_belongs", lambda *_, **__: None)
        return open_run(run.path)


def test_what_changed_is_what_is_adapted_or_quantized(tmp_path):
    run = toy_run(tmp_path, "llama2", "qlora", where=IN_PLACES)
    opened = open_run(run.path)
    assert len(opened.linears) == 2 * 2
    assert len(opened.changed) == len(set(opened.changed)) == 2 * 7
    (tmp_path / "other").mkdir()
    full = open_run(toy_run(tmp_path / "other", "llama2", "lora", where=IN_PLACES).path)
    assert full.changed == list(full.linears)


@pytest.mark.parametrize(("name", "fused"), [("llama2", 1), ("phi3_gqa", 3)])
def test_linears_are_listed_by_the_tensor_that_they_lie_in(name, fused, tmp_path):
    opened = open_run(toy_run(tmp_path, name, "lora").path)
    modules = opened.modules(opened.linears)
    assert sorted(path for linears in modules.values() for path in linears) == sorted(
        opened.linears
    )
    assert max(map(len, modules.values())) == fused
    for key, linears in modules.items():
        tensor = opened.base.read(key)
        for path, rows in linears.items():
            assert torch.equal(tensor[rows], toy(name)[1][f"{path}.weight"])


def test_a_run_may_be_given_by_its_folder_or_one_of_its_checkpoints(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    assert (
        open_run(run.path).checkpoint.path
        == open_run(checkpoint_of(run)).checkpoint.path
        == checkpoint_of(run)
    )


def test_a_base_that_moved_is_found_where_one_says(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(
        ValueError, match=rf"should be in {tmp_path / 'base'}, which is no folder.*checkpoint_dir=<"
    ):
        open_run(run.path)
    opened = open_run(run.path, checkpoint_dir=str(tmp_path / "moved"))
    assert opened.checkpoint_dir == tmp_path / "moved"
    name, trained = next(adapter_linears(run.model))
    assert torch.equal(opened.effective(name), trained.merged_weight())
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("format_then", ["three files", "pickled"])
def test_a_base_in_other_files_is_found_where_one_says(format_then, tmp_path):
    """The same weights: in other shards, or in safetensors where the run had them pickled."""
    run = toy_run(tmp_path, "llama2", "kasa")
    if format_then == "pickled":
        files = write_checkpoint(tmp_path / "base", "llama2", save=torch.save)
        state = load_part(checkpoint_of(run), "run")
        state["config"]["checkpointer"]["checkpoint_files"] = files
        rewritten(run, run=state)
    write_checkpoint(tmp_path / "again", "llama2", shards=3)
    opened = open_run(run.path, checkpoint_dir=str(tmp_path / "again"))
    for name, trained in adapter_linears(run.model):
        assert torch.equal(opened.effective(name), trained.merged_weight())


def test_opening_writes_nothing(tmp_path):
    run = toy_run(tmp_path, "llama2", "qlora")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    before = sorted(tmp_path.rglob("*"))
    open_run(run.path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("method", "name"),
    {
        **{name: name for name in ("kasa", "pissa", "lora", "dora", "qcorda", "qkasa")},
        "corda_ipm": "corda",
        "corda_kpm": "corda_kpm",
    }.items(),
)
def test_its_method_by_name(method, name, tmp_path):
    assert open_run(toy_run(tmp_path, "llama2", method).path).method.name == name


# --------------------------------------------------------------------------------- what is never called


@pytest.mark.parametrize("section", ["model", "checkpointer"])
@pytest.mark.parametrize("native", [False, True], ids=["checkpoint", "native adapter"])
def test_a_checkpoint_calls_nothing_that_it_brings(section, native, tmp_path):
    """A run.json that names a function of the standard library, as one who gives away an adapter could write it."""
    run = toy_run(tmp_path, "llama2", "kasa")
    state = load_part(checkpoint_of(run), "run")
    marker = tmp_path / "ran"
    state["config"][section] = {
        "_component_": "subprocess.getoutput",
        "cmd": f"touch {marker}",
        "checkpoint_dir": str(tmp_path / "base"),
    }
    path = run.path
    if native:
        path = tmp_path / "native"
        path.mkdir()
        write_adapter(path, load_part(checkpoint_of(run), "adapter"), state)
    else:
        rewritten(run, run=state)
    words = rf"names {section}\._component_ 'subprocess\.getoutput'"
    with pytest.raises(ValueError, match=words):
        open_run(path, checkpoint_dir=str(tmp_path / "base"))
    if section == "model":
        with pytest.raises(ValueError, match=words):
            AdapterSet(FAMILIES["llama2"].base(**toy("llama2")[0])).add("hostile", path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("config"), "holds no step and config"),
        (lambda state: state.update(config=[1]), "holds no step and config"),
        (lambda state: state.update(step="7"), "holds no step and config"),
        (lambda state: state.update(base=None), "does not name the base's fingerprint"),
        (lambda state: state["config"].pop("adapter"), "has no section adapter"),
        (lambda state: state["config"].update(model="kasa"), "has no section model"),
        (lambda state: state["config"].pop("dtype"), "names no dtype"),
        (
            lambda state: state["config"]["checkpointer"].pop("checkpoint_dir"),
            "does not say where the base was",
        ),
        (
            lambda state: state["config"]["checkpointer"].update(checkpoint_files=7),
            "checkpoint_files is 7",
        ),
        (
            lambda state: state["config"]["checkpointer"].update(checkpoint_files=["../x"]),
            "which is no file in the folder",
        ),
        (
            lambda state: state["config"]["checkpointer"].update(model_type="NONE"),
            "does not take its section checkpointer",
        ),
    ],
)
def test_a_run_json_of_another_form_is_refused_in_a_sentence(change, words, tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    state = load_part(checkpoint_of(run), "run")
    change(state)
    rewritten(run, run=state)
    with pytest.raises(ValueError, match=words):
        open_run(run.path)


def places(tree, path=()):
    """The path of every value in nested containers."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """Gives a toy's run: its folder, its adapter and its state. (A function: they are long to print.)"""
    run = toy_run(tmp_path_factory.mktemp("fuzzed"), "llama2", "kasa")
    parts = [load_part(checkpoint_of(run), name) for name in ("adapter", "run")]
    return lambda: (run.path.parent, *parts)


NOTHING = object()
MARKER = Path(tempfile.gettempdir()) / f"kasa_tune_ran_{os.getpid()}"
HOSTILE = {"_component_": "subprocess.getoutput", "cmd": f"touch {MARKER}"}
VALUES = [None, True, -1, 10**30, 2.5, float("nan"), "", "a\0b", "x" * 5000, [], [1], {}, HOSTILE]


@pytest.mark.fuzz
@bounded("folders", quick=80)
@given(data=st.data())
def test_any_run_json_is_opened_or_refused_in_a_sentence(fuzzed, data):
    """Values of other types, missing ones, components where none belong: no bare traceback, nothing called."""
    folder, adapter, state = fuzzed()
    state = copy.deepcopy(state)
    for _ in range(data.draw(st.integers(1, 3))):
        *above, key = data.draw(st.sampled_from(list(places(state["config"]))))
        place, value = state["config"], data.draw(st.sampled_from([*VALUES, NOTHING]))
        for step in above:
            place = place[step]
        if value is NOTHING:
            del place[key]
        else:
            place[key] = copy.deepcopy(value)
    native = folder / "native"
    shutil.rmtree(native, ignore_errors=True)
    native.mkdir()
    write_adapter(native, adapter, state)
    with contextlib.suppress(ValueError, OSError):
        opened = open_run(native, checkpoint_dir=str(folder / "base"))
        with contextlib.suppress(NoPromptError):
            prompting_of(opened.config, opened.checkpoint_dir, opened.checkpoint)
    assert not MARKER.exists()


# --------------------------------------------------------------------------------- what cannot be


def test_no_run_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder: give a run's output_dir"):
        open_run(tmp_path / "nothing")
    with pytest.raises(
        CheckpointError, match=r"not a complete checkpoint .*not a run's output_dir"
    ):
        open_run(tmp_path)


def test_an_unfinished_checkpoint(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    (checkpoint_of(run) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"run holds no finished checkpoint.*manifest\.json"):
        open_run(run.path)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        open_run(checkpoint_of(run))


@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_a_damaged_adapter(damage, tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    file = checkpoint_of(run) / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.unlink() if damage == "removed" else file.write_bytes(
        content[:-9] if damage == "truncated" else content
    )
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors is missing or differs"):
        open_run(checkpoint_of(run))


def test_a_base_of_other_values(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    (file,) = (tmp_path / "base").glob("*.safetensors")
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(state, file)
    with pytest.raises(CheckpointError, match="belongs to other base weights"):
        open_run(run.path)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_base_with_one_other_byte_is_refused_where_the_run_knows_all_of_them(
    pickled, tmp_path, monkeypatch
):
    """The fingerprint looks at samples; a run that noted the digest of all bytes is compared with that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = toy_run(tmp_path, "llama2", "kasa")
    digest = weights_digest(open_run(run.path).base)
    state = load_part(checkpoint_of(run), "run") | {"base_digest": digest}
    if pickled:  # whose digest is over other names
        state["config"]["checkpointer"]["checkpoint_files"] = ["model.bin"]
    rewritten(run, run=state)
    assert open_run(run.path).check_base() == digest
    (file,) = (tmp_path / "base").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(Checkpoint, "check_belongs", lambda *_, **__: None)  # it missed the byte
    opened = open_run(run.path)
    if pickled:
        assert opened.check_base() != digest
        return
    with pytest.raises(CheckpointError, match=rf"trained on other base weights .*{digest}"):
        opened.check_base()


def test_a_base_of_another_family(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    shutil.rmtree(tmp_path / "base")
    write_checkpoint(tmp_path / "base", "phi3")
    with pytest.raises(ValueError, match=r"Could not read .*base as a LLAMA2 checkpoint"):
        open_run(run.path)


def test_a_base_folder_without_its_files(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    (file,) = (tmp_path / "base").glob("*.safetensors")
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=file.name):
        open_run(run.path)


def test_a_base_in_another_format(tmp_path):
    """Its names and layout say nothing of a Hugging Face checkpoint's."""
    run = toy_run(tmp_path, "llama2", "kasa")
    torch.save(toy("llama2")[1], tmp_path / "base" / "model.pt")
    config = load_part(checkpoint_of(run), "run")
    node = {
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        "checkpoint_files": ["model.pt"],
    }
    config["config"]["checkpointer"] |= node
    rewritten(run, run=config)
    with pytest.raises(
        ValueError, match=r"base is read by FullModelTorchTuneCheckpointer as a LLAMA2.*safetensors"
    ):
        open_run(run.path)


def test_a_pickled_base(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    files = write_checkpoint(tmp_path / "base", "llama2", save=torch.save)
    config = load_part(checkpoint_of(run), "run")
    config["config"]["checkpointer"]["checkpoint_files"] = files
    rewritten(run, run=config)
    with pytest.raises(ValueError, match=r"FullModelHFCheckpointer.*in safetensors"):
        open_run(run.path)


@pytest.mark.parametrize("key", ["lora_a.weight", "lora_edit_in", "lora_diag"])
def test_an_adapter_of_other_shapes(key, tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    adapter = load_part(checkpoint_of(run), "adapter")
    name = f"layers.1.attn.v_proj.{key}"
    adapter[name] = adapter[name][:-1].clone()
    rewritten(run, adapter=adapter)
    with pytest.raises(
        ValueError, match=r"does not fit the model in 1 tensors: layers\.1\.attn\.v_proj"
    ):
        open_run(run.path)


def test_an_adapter_of_a_model_that_has_none(tmp_path):
    run = toy_run(tmp_path, "llama2", "lora")
    state = load_part(checkpoint_of(run), "run")
    sizes = {
        key: value for key, value in state["config"]["model"].items() if key in toy("llama2")[0]
    }
    state["config"]["model"] = {"_component_": "torchtune.models.llama2.llama2", **sizes}
    rewritten(run, run=state)
    with pytest.raises(
        ValueError, match=r"llama2\.llama2'\. A data file may only name a kasa_<model>"
    ):
        open_run(run.path)


def test_a_quantized_base_that_is_missing_or_anothers(tmp_path):
    run = toy_run(tmp_path, "llama2", "qlora")
    (run.path / FOLDER).rename(tmp_path / "kept")
    with pytest.raises(
        CheckpointError, match=rf"should be in {run.path / FOLDER}\. It is not there\. Copy it"
    ):
        open_run(run.path)
    (tmp_path / "second").mkdir()
    other = toy_run(tmp_path / "second", "llama2", "qcorda")
    shutil.copytree(other.path / FOLDER, run.path / FOLDER)
    with pytest.raises(CheckpointError, match=r"is not the quantized base that .*checksums differ"):
        open_run(run.path)
    shutil.rmtree(run.path / FOLDER)
    (tmp_path / "kept").rename(run.path / FOLDER)
    file = next((run.path / FOLDER).rglob("layers.1.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"layers\.1\.safetensors"):
        open_run(run.path)


@pytest.mark.parametrize(
    "settings", [None, [], {}, {"block_size": 0}, {"block_size": "64"}], ids=repr
)
def test_a_quantized_base_of_an_unknown_block_size(settings, tmp_path):
    run = toy_run(tmp_path, "llama2", "qlora", where=IN_PLACES)
    state = load_part(checkpoint_of(run), "run")
    state["config"]["quantization"] = settings
    rewritten(run, run=state)
    with pytest.raises(CheckpointError, match=r"run\.json gives no quantization\.block_size"):
        open_run(run.path)


def test_a_quantized_base_that_holds_something_else(tmp_path):
    run = toy_run(tmp_path, "llama2", "qlora", where=IN_PLACES)
    stored = next((run.path / FOLDER).iterdir())
    names = json.loads((stored / "manifest.json").read_text())["parts"]
    save_checkpoint(stored.parent, 0, {name: [1, 2] for name in names})
    state = load_part(checkpoint_of(run), "run")
    files = json.loads((stored / "manifest.json").read_text())["files"]
    state["quantized_base"] = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    rewritten(run, run=state)
    opened = open_run(run.path)
    with pytest.raises(CheckpointError, match=r"is no quantized base"):
        opened.frozen(next(iter(opened.quantized)))


def test_a_method_that_is_no_name(tmp_path):
    run = toy_run(tmp_path, "llama2", "lora", where=IN_PLACES)
    state = load_part(checkpoint_of(run), "run")
    state["config"]["adapter"]["method"] = ["lora"]
    rewritten(run, run=state)
    with pytest.raises(ValueError, match=r"adapter\.method in its run\.json is no name"):
        open_run(run.path)


def test_a_native_export_takes_along_only_what_the_manifest_lists(tmp_path):
    """An export is published. A link in a foreign folder must not put a private file into it."""
    run = toy_run(tmp_path, "llama2", "qlora", where=IN_PLACES)
    stored = next((run.path / FOLDER).iterdir())
    (tmp_path / "private").write_text("sesame")
    (stored / "notes.txt").symlink_to(tmp_path / "private")
    (tmp_path / "exported").mkdir()
    write_native(open_run(run.path), tmp_path / "exported")
    written = {path.name for path in (tmp_path / "exported" / FOLDER / stored.name).iterdir()}
    assert written == {path.name for path in stored.iterdir()} - {"notes.txt"}
    Checkpoint(tmp_path / "exported" / FOLDER / stored.name)
