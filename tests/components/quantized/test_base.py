"""Which linears are quantized, what that takes, and their copy on disk: the same bits or a clear error."""

import os
import shutil
from functools import partial

import pytest
import torch
from torch import nn

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.checkpoints import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    save_checkpoint,
)
from kasa_tune.components.linalg.nf4 import (
    dequantize_workspace,
    is_quantized,
    quantize,
    quantize_workspace,
    to_parts,
)
from kasa_tune.components.models.loading import build_on_meta, load_base_weights, put_weight
from kasa_tune.components.quantized.base import (
    FOLDER,
    base_bytes,
    keep_quantized,
    load_quantized,
    quantized_linears,
)
from tests.components.failing_disk import (
    at_each_call,
    died_by_kill,
    disk_full,
    in_a_process_that_dies,
    killed,
)
from tests.tolerances import assert_same_bits
from tests.toy_models import FAMILIES, randomized, tokens

CPU = torch.device("cpu")
BLOCK, SCALER_BLOCK = 16, 4


def on_meta(name="llama3", kind="corda", dtype=torch.float32, **options):
    family = FAMILIES[name]
    options = {"apply_to_mlp": True, "rank": 2} | family.sizes | options
    model = build_on_meta(
        partial(getattr(family, kind), ["q_proj", "v_proj"], **options), dtype=dtype
    )
    return model, quantized_linears(model, BLOCK)


def quantized(name="llama3", kind="corda", dtype=torch.float32, *, seed=0, **options):
    """A toy on the CPU whose blocks' linears are NF4, and these linears."""
    model, linears = on_meta(name, kind, dtype, **options)
    family = FAMILIES[name]
    sizes = {key: value for key, value in options.items() if key in family.sizes}
    weights = randomized(family.base(**family.sizes | sizes), seed).state_dict()
    without = {f"{path}.weight" for path in linears}
    load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32, without=without)
    for path, linear in linears.items():
        sizes = {"block_size": BLOCK, "scaler_block_size": SCALER_BLOCK}
        put_weight(linear, quantize(weights[f"{path}.weight"], **sizes, dtype=dtype))
    return model.eval(), linears


def checkpoint_of(output_dir, checksum, step=3):
    folder = output_dir / "checkpoints"
    return Checkpoint(save_checkpoint(folder, step, {"run": {"quantized_base": checksum}}))


def weights_of(linears):
    return {path: linear.weight for path, linear in linears.items()}


def assert_same_weights(linears, expected):
    assert linears.keys() == expected.keys()
    for path, linear in linears.items():
        assert_same_bits(linear.weight, expected[path].weight)


# --------------------------------------------------------------------------------- which


@pytest.mark.parametrize("kind", ["lora", "kasa", "corda"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_blocks_linears_are_quantized(name, kind):
    model, linears = on_meta(name, kind)
    base = FAMILIES[name].base(**FAMILIES[name].sizes)
    assert linears.keys() == {
        path
        for path, module in base.layers.named_modules(prefix="layers")
        if isinstance(module, nn.Linear)
    }
    assert len(linears) == 2 * 7
    assert all(model.get_submodule(path) is linear for path, linear in linears.items())
    adapted = {path for path, _ in adapter_linears(model)}
    assert adapted < linears.keys()


def test_an_adapted_output_keeps_its_precision():
    model, linears = on_meta("llama3", apply_to_output=True)
    assert "output" in dict(adapter_linears(model))
    assert "output" not in linears


def test_a_layer_that_does_not_divide_is_refused_by_name():
    model, _ = on_meta(num_kv_heads=4)
    with pytest.raises(
        ValueError,
        match=r"^layers\.0\.mlp\.w1 \(48 x 32\) has 1,536 elements.*blocks of 1024: set ",
    ):
        quantized_linears(model, 1024)
    assert len(quantized_linears(model, 512)) == 14


def test_put_weights_are_frozen():
    linear = nn.Linear(4, 4)
    put_weight(linear, torch.ones(4, 4))
    assert (type(linear.weight), linear.weight.requires_grad) == (nn.Parameter, False)
    weight = quantize(torch.randn(4, 4), block_size=4)
    put_weight(linear, weight)
    assert_same_bits(linear.weight, weight)
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]


# --------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2"])
def test_bytes_are_those_of_an_actual_model(name, dtype):
    meta, on_meta_linears = on_meta(name, dtype=dtype)
    found = base_bytes(meta, on_meta_linears, block_size=BLOCK, scaler_block_size=SCALER_BLOCK)
    model, linears = quantized(name, dtype=dtype)
    in_nf4 = [part for linear in linears.values() for part in to_parts(linear.weight)[1].values()]
    frozen = [p for p in model.parameters() if not p.requires_grad and not is_quantized(p)]
    assert found["base weights in NF4"] == sum(part.nbytes for part in in_nf4)
    assert found["base weights"] == sum(parameter.nbytes for parameter in frozen)
    blocks = [
        sum(linear.weight.numel() for path, linear in linears.items() if f"s.{i}." in path)
        for i in range(2)
    ]
    assert found["one block unquantized"] == max(blocks) * dtype.itemsize
    largest = max(linear.weight.numel() for linear in linears.values())
    assert found["dequantizing one weight"] == dequantize_workspace(largest, dtype.itemsize, BLOCK)
    assert found["quantizing one weight"] == quantize_workspace(largest, BLOCK)
    assert len(found) == 5


def test_the_largest_block_and_weight_count():
    model, linears = on_meta()
    linears["layers.1.mlp.w1"].weight = nn.Parameter(
        torch.empty(96, 32, device="meta"), requires_grad=False
    )
    found = base_bytes(model, linears, block_size=BLOCK, scaler_block_size=SCALER_BLOCK)
    assert found["one block unquantized"] == 4 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 48 * 32 + 96 * 32)
    assert found["quantizing one weight"] == quantize_workspace(96 * 32, BLOCK)


# --------------------------------------------------------------------------------- kept and loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2"])
def test_kept_weights_come_back_bit_for_bit(name, dtype, tmp_path):
    model, linears = quantized(name, dtype=dtype)
    checksum = keep_quantized(tmp_path / FOLDER, weights_of(linears))
    again, others = quantized(name, dtype=dtype, seed=1)
    assert not torch.equal(again(tokens()), model(tokens()))
    load_quantized(checkpoint_of(tmp_path, checksum), others, CPU)
    assert_same_weights(others, linears)
    assert all(not linear.weight.requires_grad for linear in others.values())
    again.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k[:-7] not in linears}, strict=False
    )
    assert torch.equal(again(tokens()), model(tokens()))


def test_they_are_loaded_onto_a_model_without_weights(tmp_path):
    _, linears = quantized()
    checksum = keep_quantized(tmp_path / FOLDER, weights_of(linears))
    _, others = on_meta()
    load_quantized(checkpoint_of(tmp_path, checksum), others, CPU)
    assert_same_weights(others, linears)


def test_on_disk_they_take_what_they_take_in_memory(tmp_path):
    _, linears = quantized()
    keep_quantized(tmp_path / FOLDER, weights_of(linears))
    (folder,) = list_checkpoints(tmp_path / FOLDER)
    assert sorted(path.stem for path in folder.glob("*.safetensors")) == ["layers.0", "layers.1"]
    tensors = [part for linear in linears.values() for part in to_parts(linear.weight)[1].values()]
    headers = sum(
        int.from_bytes(path.open("rb").read(8), "little") + 8
        for path in folder.glob("*.safetensors")
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size - headers == sum(part.nbytes for part in tensors)


def test_the_checksum_tells_bases_apart(tmp_path):
    _, linears = quantized()
    checksum = keep_quantized(tmp_path / "one", weights_of(linears))
    assert keep_quantized(tmp_path / "same", weights_of(linears)) == checksum
    codes = to_parts(linears["layers.1.mlp.w2"].weight)[1]["quantized_data"]
    codes[5] ^= 1
    assert keep_quantized(tmp_path / "other", weights_of(linears)) != checksum


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_known_copy_stays_as_it_is_and_any_other_is_replaced(tmp_path):
    _, linears = quantized()
    _, others = quantized(seed=1)
    folder = tmp_path / FOLDER
    checksum = keep_quantized(folder, weights_of(linears))
    before = modified(folder)
    assert keep_quantized(folder, weights_of(linears), checksum) == checksum
    assert modified(folder) == before
    other = keep_quantized(folder, weights_of(others))
    assert other != checksum
    load_quantized(checkpoint_of(tmp_path, other), linears, CPU)
    assert_same_weights(linears, others)
    assert len(list_checkpoints(folder)) == 1


def test_a_run_that_goes_on_elsewhere_takes_its_base_along(tmp_path):
    _, linears = quantized()
    _, others = quantized(seed=1)
    checksum = keep_quantized(tmp_path / "first" / FOLDER, weights_of(linears))
    keep_quantized(tmp_path / "second" / FOLDER, weights_of(others))  # of an earlier run
    for folder in ("second", "third"):
        assert keep_quantized(tmp_path / folder / FOLDER, weights_of(linears), checksum) == checksum
        _, again = on_meta()
        load_quantized(checkpoint_of(tmp_path / folder, checksum), again, CPU)
        assert_same_weights(again, linears)


def test_a_damaged_copy_of_a_known_base_is_written_again(tmp_path):
    _, linears = quantized()
    checksum = keep_quantized(tmp_path / FOLDER, weights_of(linears))
    (file,) = (tmp_path / FOLDER).rglob("layers.1.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert keep_quantized(tmp_path / FOLDER, weights_of(linears), checksum) == checksum
    _, again = on_meta()
    load_quantized(checkpoint_of(tmp_path, checksum), again, CPU)
    assert_same_weights(again, linears)


# --------------------------------------------------------------------------------- what cannot be loaded


@pytest.fixture
def kept(tmp_path):
    """A run's output_dir with a quantized base and a checkpoint that names it."""
    _, linears = quantized()
    checksum = keep_quantized(tmp_path / "run" / FOLDER, weights_of(linears))
    return tmp_path / "run", checkpoint_of(tmp_path / "run", checksum)


def test_a_missing_folder_is_said_with_what_to_do(kept):
    output_dir, checkpoint = kept
    shutil.rmtree(output_dir / FOLDER)
    with pytest.raises(
        CheckpointError,
        match=rf"step_00000003 .* should be in {output_dir / FOLDER}\. It is not there\. Copy",
    ):
        load_quantized(checkpoint, on_meta()[1], CPU)


@pytest.mark.parametrize("name", ["layers.0.safetensors", "layers.1.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_a_damaged_file_is_named(kept, damage, name):
    output_dir, checkpoint = kept
    (file,) = (output_dir / FOLDER).rglob(name)
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        file.write_bytes(content[:middle] if damage == "truncated" else flipped)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        load_quantized(checkpoint, on_meta()[1], CPU)
    assert str(output_dir / FOLDER) in str(caught.value)
    assert "Copy it there" in str(caught.value)
    assert "earlier checkpoint" not in str(caught.value)  # they all need this base


def test_another_runs_base_is_refused(kept):
    output_dir, checkpoint = kept
    keep_quantized(output_dir / FOLDER, weights_of(quantized(seed=1)[1]))
    _, linears = on_meta()
    with pytest.raises(
        CheckpointError, match=r"quantized_base is not the quantized base that .*checksums differ"
    ):
        load_quantized(checkpoint, linears, CPU)
    assert all(linear.weight.is_meta for linear in linears.values())


OTHERS = {
    "other sizes": (
        {"intermediate_dim": 64},
        r"of another model: it has layers\.0\.mlp\.w1 \(48, 32\)",
    ),
    "fewer layers": (
        {"num_layers": 1},
        r"of another model: it has layers\.1\.attn\.q_proj \(32, 32\)",
    ),
    "more layers": ({"num_layers": 3}, r"of another model: it has no layers\.2\.attn\.q_proj"),
}


@pytest.mark.parametrize(("options", "words"), OTHERS.values(), ids=OTHERS)
def test_a_base_of_another_model_is_refused_by_the_layer(kept, options, words):
    output_dir, checkpoint = kept
    with pytest.raises(CheckpointError, match=words) as caught:
        load_quantized(checkpoint, on_meta(**options)[1], CPU)
    assert str(output_dir / FOLDER) in str(caught.value)


# --------------------------------------------------------------------------------- writing that fails


def writers(tmp_path):
    """A template with a kept base and its checkpoint, the kept linears and others."""
    _, old = quantized(num_layers=1)
    _, new = quantized(num_layers=1, seed=1)
    checksum = keep_quantized(tmp_path / "template" / FOLDER, weights_of(old))
    checkpoint_of(tmp_path / "template", checksum)
    return old, new


def loaded_from(output_dir, checksum=None):
    """The base that the run's checkpoint names, or the one of a checksum."""
    step = 3 if checksum is None else 4
    if checksum:
        checkpoint_of(output_dir, checksum, step)
    _, linears = on_meta(num_layers=1)
    checkpoint = Checkpoint(output_dir / "checkpoints" / f"step_{step:08d}")
    load_quantized(checkpoint, linears, CPU)
    return linears


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(tmp_path, monkeypatch):
    old, new = writers(tmp_path)
    written = keep_quantized(tmp_path / "elsewhere", weights_of(new))

    def work(folder, n):
        with monkeypatch.context() as patch:
            at_each_call(patch, killed)(n)
            keep_quantized(folder, weights_of(new))

    outcomes = []
    for n in range(1, 100):
        run = shutil.copytree(tmp_path / "template", tmp_path / f"run{n}")
        if not died_by_kill(in_a_process_that_dies(lambda run=run, n=n: work(run / FOLDER, n))):
            break
        try:
            assert_same_weights(loaded_from(run), old)
            outcomes.append("old")
        except CheckpointError:
            assert_same_weights(loaded_from(run, written), new)
            outcomes.append("new")
        assert (
            keep_quantized(run / FOLDER, weights_of(new)) == written
        )  # the next start writes it all the same
        assert [path.name for path in (run / FOLDER).iterdir()] == ["step_00000000"]
    assert outcomes.count("old") > 8
    assert "new" in outcomes
    assert outcomes == sorted(outcomes, reverse=True)
    assert_same_weights(loaded_from(run, written), new)


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    old, new = writers(tmp_path)
    run = tmp_path / "template"
    with monkeypatch.context() as patch:
        at_each_call(patch, disk_full)(4)
        with pytest.raises(OSError, match=r"quantized_base.*No space left"):
            keep_quantized(run / FOLDER, weights_of(new))
    assert_same_weights(loaded_from(run), old)
    assert os.listdir(run / FOLDER) == ["step_00000000"]
