"""The QCorDA recipe on wrong input: refused with what is wrong, where, and what to set; before any step, and before the
weights are read where that can be.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_tune import config
from kasa_tune.components import checkpoints
from kasa_tune.components.data import training_data
from kasa_tune.components.quantized.base import FOLDER
from kasa_tune.methods import methods_of
from kasa_tune.registry import PACKAGE_ROOT

from .conftest import RESUMABLE, SMALL_CORDA_RUN, copy_run, recipe_class, run_recipe

TINY_WORLD = PACKAGE_ROOT / "tiny_world"
BUILDER = "model._component_=kasa_tune.components.models."
RESUME = "resume_from_checkpoint=True"


@pytest.fixture
def not_trained(qcorda_recipe, monkeypatch):
    """Whatever is wrong is found before the first step."""
    monkeypatch.setattr(
        recipe_class(qcorda_recipe), "train", lambda *_: pytest.fail("training began")
    )


@pytest.fixture
def not_loaded(qcorda_recipe, monkeypatch, not_trained):
    """Whatever is wrong is found before data and weights are read."""
    for owner, name in ((training_data, "build_dataset"), (qcorda_recipe, "open_base")):
        monkeypatch.setattr(
            owner, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called")
        )


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded model to be changed: ``change`` takes the function that does it to the dict of tensors,
    and gives the override that selects the copy.
    """

    def change(how) -> str:
        folder = shutil.copytree(TINY_WORLD / "model", tmp_path / "base")
        weights = load_file(folder / "model.safetensors")
        how(weights)
        save_file(weights, folder / "model.safetensors")
        return f"checkpointer.checkpoint_dir={folder}"

    return change


# --------------------------------------------------------------------------------------------------- between the keys


@pytest.mark.parametrize(
    ("config_name", "overrides", "message"),
    [
        (
            "tiny_qcorda",
            [f"{BUILDER}lora_llama3"],
            r"model\._component_.*adapter\.method qcorda needs a corda_<model>",
        ),
        (
            "tiny_qcorda",
            [f"{BUILDER}kasa_llama3"],
            r"model\._component_.*got .*kasa_llama3.*corda_llama3",
        ),
        (
            "tiny_qpissa",
            [f"{BUILDER}lora_llama3"],
            r"model\._component_.*adapter\.method qpissa needs a corda_<model>",
        ),
        (
            "tiny_loftq",
            [f"{BUILDER}kasa_llama3"],
            r"model\._component_.*got .*kasa_llama3.*corda_llama3",
        ),
        (
            "tiny_qlora",
            [f"{BUILDER}kasa_llama3"],
            r"model\._component_.*got .*kasa_llama3.*lora_llama3",
        ),
        (
            "tiny_qkasa",
            [f"{BUILDER}lora_llama3"],
            r"model\._component_.*adapter\.method qkasa needs a kasa_<model>",
        ),
        ("tiny_qlora", ["model.use_dora=True"], r"model\.use_dora.*got True.*set it to False"),
        (
            "tiny_qcorda",
            ["model.apply_to_output=True"],
            r"model\.apply_to_output.*got True.*set it to False",
        ),
        (
            "tiny_qlora",
            ["model.apply_to_output=True"],
            r"model\.apply_to_output.*got True.*set it to False",
        ),
        (
            "tiny_qkasa",
            ["model.edit_storage=folded"],
            r"model\.edit_storage.*folded.*qkasa.*set auto or factored",
        ),
        (
            "tiny_qcorda",
            ["model.edit_storage=factored"],
            r"model\.edit_storage.*factored.*qcorda.*set auto or folded",
        ),
        (
            "tiny_loftq",
            ["model.edit_storage=factored"],
            r"model\.edit_storage.*factored.*loftq.*set auto or folded",
        ),
        (
            "tiny_qcorda",
            ["calibration.dataset=null"],
            r"calibration\.dataset.*missing.*qcorda needs it.*\$\{dataset\}",
        ),
        (
            "tiny_qpissa",
            ["adapter.dynamic_ranks=True"],
            r"adapter\.dynamic_ranks.*qpissa.*belongs to .*qcorda",
        ),
        (
            "tiny_loftq",
            ["calibration.rounds=3"],
            r"calibration\.rounds.*got 3.*loftq.*belongs to .*qcorda.*set it to 1",
        ),
        (
            "tiny_qcorda",
            ["adapter.quantization_iterations=2"],
            r"quantization_iterations.*got 2.*qpissa or loftq",
        ),
        (
            "tiny_loftq",
            ["adapter.quantization_iterations=0"],
            r"adapter\.quantization_iterations.*got 0",
        ),
        ("tiny_qlora", ["quantization.block_size=63"], r"quantization\.block_size.*63.*even"),
        ("tiny_qlora", ["quantization.block_size=0"], r"quantization\.block_size.*got 0"),
        (
            "tiny_qlora",
            ["quantization.scaler_block_size=0"],
            r"quantization\.scaler_block_size.*got 0",
        ),
        (
            "tiny_qlora",
            ["quantization.blocksize=32"],
            r"quantization\.blocksize.*[Dd]id you mean.*block_size",
        ),
        ("tiny_qcorda", ["adapter.mode=kpm"], r"adapter\.mode: unknown key"),
        ("tiny_qcorda", ["adapter.method=corda"], r"adapter\.method.*corda_finetune_single_device"),
        (
            "tiny_qcorda",
            ["adapter.dynamic_ranks=True", "adapter.min_rank=17"],
            r"adapter\.min_rank.*17.*at most 16",
        ),
    ],
)
def test_settings_that_do_not_go_together(config_name, overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load(config_name, overrides, config.QCORDA)


@pytest.mark.parametrize(
    ("config_name", "schema"), [("tiny_corda", "CORDA"), ("tiny_kasa", "FINETUNE")]
)
def test_the_other_recipes_name_the_one_that_quantizes(config_name, schema):
    with pytest.raises(config.ConfigError, match=r"adapter\.method.*qcorda_finetune_single_device"):
        config.load(config_name, ["adapter.method=qlora"], getattr(config, schema))


def test_a_calibration_file_that_is_not_there(tmp_path):
    component = "_component_: kasa_tune.components.data.instruct_dataset, source: json"
    dataset = f"calibration.dataset={{{component}, data_files: {tmp_path / 'none.jsonl'}}}"
    with pytest.raises(
        config.ConfigError, match=r"calibration\.dataset\.data_files.*does not exist"
    ):
        config.load("tiny_qcorda", [dataset], config.QCORDA)


@pytest.mark.parametrize("method", ["qcorda", "qlora"])
def test_a_layer_that_does_not_fill_its_blocks_is_named(qcorda, not_loaded, method):
    message = (
        r"layers\.0\.attn\.q_proj \(128 x 128\) has 16,384 elements.*blocks of 96: "
        r"set quantization\.block_size=32"
    )
    with pytest.raises(ValueError, match=message):
        qcorda("quantization.block_size=96", config_name=f"tiny_{method}")


def test_a_layer_without_an_adapter_must_fill_its_blocks_too(qcorda, not_loaded):
    """The adapted q_proj, 128 x 128, is one block; k_proj is half of one."""
    only = [
        "model.attn_modules=[q_proj]",
        "model.apply_to_mlp=False",
        "quantization.block_size=16384",
    ]
    with pytest.raises(
        ValueError, match=r"layers\.0\.attn\.k_proj \(64 x 128\).*quantization\.block_size="
    ):
        qcorda(*only, config_name="tiny_qlora")


def test_a_rank_above_a_layers_smaller_dimension_names_the_layer(qcorda, not_loaded):
    with pytest.raises(ValueError, match=r"model\.rank: got 65, but k_proj.* 64"):
        qcorda("model.rank=65", config_name="tiny_loftq")


# --------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.usefixtures("not_trained")
@pytest.mark.parametrize("method", [method.name for method in methods_of("qcorda_finetune")])
def test_a_damaged_weight_is_named(qcorda, base, method):
    def damage(weights):
        weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")

    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.w3\.weight holds NaN or infinity"):
        qcorda(base(damage), config_name=f"tiny_{method}")


@pytest.mark.usefixtures("not_trained")
@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("model.layers.3.input_layernorm.weight", r"layers\.3\.sa_norm\.scale"),
        ("model.embed_tokens.weight", r"tok_embeddings\.weight"),
        ("model.layers.1.self_attn.k_proj.weight", r"layers\.1\.attn\.k_proj\.weight"),
    ],
)
def test_a_damaged_weight_without_an_adapter_is_named(qcorda, base, tensor, named):
    def damage(weights):
        weights[tensor].view(-1)[7] = float("inf")

    only = ["model.attn_modules=[q_proj]", "model.apply_to_mlp=False"]
    with pytest.raises(ValueError, match=rf"{named} holds NaN or infinity"):
        qcorda(base(damage), *only)


@pytest.mark.usefixtures("not_trained")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_a_base_that_is_quantized_already(qcorda, base, dtype):
    def quantize(weights):
        weights["model.layers.1.mlp.down_proj.weight"] = weights[
            "model.layers.1.mlp.down_proj.weight"
        ].to(dtype)

    message = r"Could not read .*base.*model\.layers\.1\.mlp\.down_proj\.weight is stored as .*8.*quantized already"
    with pytest.raises(ValueError, match=rf"{message}.*Give the unquantized one"):
        qcorda(base(quantize), config_name="tiny_qlora")


@pytest.mark.usefixtures("not_trained")
def test_a_truncated_base(qcorda, base):
    override = base(lambda weights: None)
    with open(override.partition("=")[2] + "/model.safetensors", "r+b") as file:
        file.truncate(100_000)
    with pytest.raises(ValueError, match=r"Could not read .*base"):
        qcorda(override, config_name="tiny_qlora")


@pytest.mark.usefixtures("not_trained")
def test_a_base_of_another_width(qcorda, base):
    """config.json says what the config says, and the weights do not."""
    override = base(lambda weights: None)
    path = Path(override.partition("=")[2]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 256}))
    with pytest.raises(
        config.ConfigError,
        match=r"holds model\.layers\.0\.mlp\.down_proj\.weight of shape \(128, 384\)",
    ):
        qcorda(override, "model.intermediate_dim=256", config_name="tiny_qlora")


# ------------------------------------------------------------------------------------------------------- the data


@pytest.mark.usefixtures("not_trained")
def test_no_calibration_sample_at_all(qcorda, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    component = "_component_: kasa_tune.components.data.instruct_dataset, source: json"
    with pytest.raises(ValueError, match=r"calibration\.dataset.*no samples"):
        qcorda(f"calibration.dataset={{{component}, data_files: {tmp_path / 'rows.jsonl'}}}")


@pytest.mark.usefixtures("not_trained")
def test_activations_that_overflow_name_the_layer_that_gets_them(qcorda, base):
    def damage(weights):
        weights["model.layers.2.mlp.up_proj.weight"].view(-1)[7] = 1e30

    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.w2: its inputs hold NaN or infinity.*round 1"
    ):
        qcorda(base(damage))


# -------------------------------------------------------------------------------------------------- the quantized base


@pytest.fixture
def stopped(whole_quantized, tmp_path):
    """The folder of a QLoRA run that was stopped after four of its six steps. To be named before ``not_trained``: it
    may have to be trained first, and so may the other run that tests take a base from.
    """
    whole_quantized("qpissa")
    copy_run(whole_quantized("qlora"), tmp_path / "run", until_step=4)
    return tmp_path / "run"


def resume(qcorda, *overrides: str):
    return qcorda(*RESUMABLE, RESUME, *overrides, config_name="tiny_qlora")


@pytest.mark.usefixtures("stopped", "not_trained")
@pytest.mark.parametrize(("key", "was"), [("block_size", 64), ("scaler_block_size", 256)])
def test_resume_with_other_blocks(qcorda, key, was):
    with pytest.raises(
        ValueError,
        match=rf"other settings.*quantization: saved .*'{key}': {was}.*now .*'{key}': 32",
    ):
        resume(qcorda, f"quantization.{key}=32")


@pytest.mark.usefixtures("stopped", "not_trained")
def test_resume_on_other_base_weights(qcorda, base):
    def change(weights):
        weights["model.layers.4.mlp.gate_proj.weight"] *= 1.5

    with pytest.raises(ValueError, match=r"other base weights.*checkpointer\.checkpoint_dir"):
        resume(qcorda, base(change))


@pytest.mark.usefixtures("stopped", "not_trained")
def test_resume_with_the_quantized_base_of_another_run(qcorda, stopped, whole_quantized):
    shutil.rmtree(stopped / FOLDER)
    shutil.copytree(whole_quantized("qpissa").folder / FOLDER, stopped / FOLDER)
    with pytest.raises(
        ValueError, match=rf"{stopped / FOLDER} is not the quantized base.*step_00000004.*checksums"
    ):
        resume(qcorda)


@pytest.mark.usefixtures("stopped", "not_trained")
def test_resume_with_a_file_of_another_runs_quantized_base(qcorda, stopped, whole_quantized):
    file = "step_00000000/layers.2.safetensors"
    shutil.copy(whole_quantized("qpissa").folder / FOLDER / file, stopped / FOLDER / file)
    with pytest.raises(
        ValueError, match=rf"{stopped / FOLDER}.*damaged: layers\.2\.safetensors.*differs"
    ):
        resume(qcorda)


@pytest.mark.usefixtures("stopped", "not_trained")
def test_resume_without_the_quantized_base(qcorda, stopped):
    shutil.rmtree(stopped / FOLDER)
    with pytest.raises(
        ValueError, match=rf"step_00000004.*in {stopped / FOLDER}\. It is not there\. Copy it there"
    ):
        resume(qcorda)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("stopped", "not_trained")
@pytest.mark.parametrize("file", ["layers.0.safetensors", "layers.3.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage", [os.unlink, truncate, flip_a_bit], ids=["missing", "truncated", "flipped"]
)
def test_resume_with_a_damaged_quantized_base(qcorda, stopped, file, damage):
    """An earlier checkpoint would need the same base: the message must not send there."""
    damage(stopped / FOLDER / "step_00000000" / file)
    with pytest.raises(
        ValueError, match=rf"{stopped / FOLDER}.*(damaged|not a complete).*Copy it there"
    ) as refused:
        resume(qcorda)
    assert "earlier checkpoint" not in str(refused.value)


def test_a_full_disk_while_the_quantized_base_is_written(qcorda, monkeypatch, tmp_path):
    real_fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=rf"Could not write {tmp_path / 'run' / FOLDER}.*No space left"
    ) as refused:
        qcorda(*RESUMABLE, config_name="tiny_qlora")
    assert refused.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not list((tmp_path / "run" / FOLDER).iterdir())
    assert not checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert qcorda("max_steps=1", config_name="tiny_qlora").status == 0


def test_a_second_run_in_the_folder_of_a_live_one_touches_nothing(
    qcorda, whole_quantized, tmp_path
):
    folder = shutil.copytree(whole_quantized("qpissa").folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")  # not one written yet
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with (
        checkpoints.run_lock(folder / "checkpoints"),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        qcorda("max_steps=1", config_name="tiny_qlora")
    assert {path: path.read_bytes() for path in before} == before


def test_a_full_precision_recipe_does_not_go_on_from_a_quantized_run(stopped, load_recipe):
    options = {"config_name": "tiny_lora", "schema": config.FINETUNE, "small": SMALL_CORDA_RUN}
    with pytest.raises(ValueError, match=r"other settings|quantized base"):
        run_recipe(
            load_recipe("kasa_finetune_single_device"), stopped, *RESUMABLE, RESUME, **options
        )
