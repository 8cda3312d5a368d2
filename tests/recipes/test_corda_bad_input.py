"""The CorDA recipe on wrong input: refused before any training, in words that name the layer or the key to set."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_tune import config
from kasa_tune.components.corda.cache import CacheError
from kasa_tune.registry import PACKAGE_ROOT

TINY_WORLD = PACKAGE_ROOT / "tiny_world"
ONE_STEP = "max_steps=1"


@pytest.fixture
def not_trained(corda_recipe, monkeypatch):
    """Whatever is wrong is found before the first step."""
    recipe = corda_recipe.CorDAFinetuneRecipeSingleDevice
    monkeypatch.setattr(recipe, "train", lambda *_: pytest.fail("training began"))


@pytest.fixture
def damaged(tmp_path):
    """Make a copy of the embedded model with one number changed; gives the override that selects it."""

    def change(tensor: str, value: float) -> str:
        folder = shutil.copytree(TINY_WORLD / "model", tmp_path / "base")
        weights = load_file(folder / "model.safetensors")
        weights[tensor].view(-1)[7] = value
        save_file(weights, folder / "model.safetensors")
        return f"checkpointer.checkpoint_dir={folder}"

    return change


@pytest.fixture
def rows(tmp_path):
    """Write rows of the task to a file; gives the override that calibrates on them."""

    def write(count: int) -> str:
        text = (TINY_WORLD / "data" / "task_train.jsonl").read_text().splitlines()[:count]
        (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in text))
        component = "_component_: kasa_tune.components.data.instruct_dataset, source: json"
        return f"calibration.dataset={{{component}, data_files: {tmp_path / 'rows.jsonl'}}}"

    return write


# --------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.usefixtures("not_trained")
@pytest.mark.parametrize("config_name", ["tiny_corda", "tiny_pissa", "tiny_lora_plus"])
def test_a_damaged_weight_is_named(corda, damaged, config_name):
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.w3\.weight holds NaN or infinity"):
        corda(damaged("model.layers.2.mlp.up_proj.weight", float("nan")), config_name=config_name)


@pytest.mark.usefixtures("not_trained")
def test_a_damaged_weight_between_the_linears_is_named(corda, damaged):
    with pytest.raises(ValueError, match=r"layers\.3\.sa_norm\.scale holds NaN or infinity"):
        corda(damaged("model.layers.3.input_layernorm.weight", float("inf")))


@pytest.mark.usefixtures("not_trained")
def test_activations_that_overflow_name_the_layer_that_gets_them(corda, damaged):
    with pytest.raises(
        ValueError, match=r"layers\.2\.mlp\.w2: its inputs hold NaN or infinity.*round 1"
    ):
        corda(damaged("model.layers.2.mlp.up_proj.weight", 1e30))


@pytest.mark.usefixtures("not_trained")
def test_inputs_that_are_all_zero_name_the_layer(corda, tmp_path):
    folder = shutil.copytree(TINY_WORLD / "model", tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"] *= 0
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.w1.*zero"):
        corda(f"checkpointer.checkpoint_dir={folder}")


# ------------------------------------------------------------------------------------------------------------ the data


@pytest.mark.usefixtures("not_trained")
@pytest.mark.parametrize("concatenate", [True, False])
def test_no_calibration_sample_at_all(corda, rows, concatenate):
    with pytest.raises(ValueError, match=r"calibration\.dataset.*no samples"):
        corda(rows(0), f"calibration.concatenate={concatenate}")


@pytest.mark.usefixtures("not_trained")
def test_less_than_one_window(corda, rows):
    with pytest.raises(
        ValueError, match=r"holds 0 windows of 500 tokens.*calibration\.max_seq_len"
    ):
        corda(rows(2), "calibration.concatenate=True", "calibration.max_seq_len=500")


@pytest.mark.usefixtures("not_trained")
def test_fewer_samples_than_rounds(corda, rows):
    with pytest.raises(
        ValueError,
        match=r"holds 2 samples, fewer than one for each of 3 rounds.*calibration\.rounds",
    ):
        corda(rows(2), "calibration.rounds=3")


def test_fewer_samples_than_asked_for_are_shared_out_with_a_warning(corda, rows, caplog):
    corda(rows(7), "calibration.rounds=3", ONE_STEP)
    assert "holds 7 rows instead of 3 x 8: each round has 2" in caplog.text


@pytest.mark.usefixtures("not_trained")
def test_rows_longer_than_the_model_takes(corda):
    with pytest.raises(
        ValueError, match=r"calibration\.max_seq_len 513 is more than the model takes, 512"
    ):
        corda("calibration.max_seq_len=513")


def test_no_calibration_dataset():
    with pytest.raises(
        config.ConfigError, match=r"calibration\.dataset.*missing.*\$\{dataset\} for mode ipm"
    ):
        config.load("tiny_corda", ["calibration.dataset=null"], config.CORDA)


def test_a_calibration_file_that_is_not_there(tmp_path):
    component = "_component_: kasa_tune.components.data.instruct_dataset, source: json"
    dataset = f"calibration.dataset={{{component}, data_files: {tmp_path / 'none.jsonl'}}}"
    with pytest.raises(
        config.ConfigError, match=r"calibration\.dataset\.data_files.*does not exist"
    ):
        config.load("tiny_corda", [dataset], config.CORDA)


@pytest.mark.usefixtures("not_trained")
def test_a_calibration_row_without_the_columns(corda, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    component = "_component_: kasa_tune.components.data.instruct_dataset, source: json"
    with pytest.raises(ValueError, match=r"calibration\.dataset: row 0.*'input'"):
        corda(f"calibration.dataset={{{component}, data_files: {tmp_path / 'rows.jsonl'}}}")


@pytest.mark.usefixtures("not_trained")
@pytest.mark.parametrize(
    "position", [0, 100]
)  # the first rows are looked at beforehand, the hundredth is not
def test_token_ids_that_the_model_does_not_have(corda, tmp_path, monkeypatch, position):
    module = tmp_path / f"rows_of_others_{position}.py"
    module.write_text(
        "def rows(tokenizer):\n"
        f"    return [{{'tokens': [1, 2, 3 if i != {position} else 5000], 'labels': [1, 2, 3]}} for i in range(120)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"token id 5000, but the model's vocabulary has 1024"):
        corda(
            f"calibration.dataset={{_component_: {module.stem}.rows}}",
            "calibration.num_samples=120",
        )


# -------------------------------------------------------------------------------------------------- ranks and damping


@pytest.mark.usefixtures("not_trained")
def test_a_rank_above_a_layers_smaller_dimension_names_the_layer(corda):
    with pytest.raises(ValueError, match=r"model\.rank: got 65, but k_proj.* 64"):
        corda("model.rank=65")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter.min_rank=17"],
            r"adapter\.min_rank.*got 17.*budget of model\.rank 16.*at most 16",
        ),
        (
            ["adapter.max_rank=15"],
            r"adapter\.max_rank.*got 15.*budget of model\.rank 16.*at least 16",
        ),
        (
            ["adapter.min_rank=5", "adapter.max_rank=4"],
            r"adapter\.min_rank.*got 5.*more than max_rank 4",
        ),
    ],
)
def test_rank_bounds_that_the_budget_cannot_meet(overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("tiny_corda", ["adapter.dynamic_ranks=True", *overrides], config.CORDA)


@pytest.mark.usefixtures("not_trained")
def test_no_damping_where_compactness_divides_by_the_smallest_eigenvalue(corda):
    with pytest.raises(ValueError, match=r"not positive definite; raise adapter\.damping"):
        corda("adapter.damping=0", "adapter.dynamic_ranks=True", "calibration.num_samples=2")


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_no_damping_on_too_few_tokens_still_starts_as_the_base(corda, mode):
    run = corda(
        *(
            "adapter.damping=0",
            f"adapter.mode={mode}",
            "calibration.num_samples=2",
            ONE_STEP,
            "run_val_every_n_steps=9",
        )
    )
    before = run.metrics[0]
    assert before["val_loss"] == pytest.approx(before["val_loss_base"], rel=1e-5)
    assert all(torch.isfinite(tensor).all() for tensor in run.part("adapter").values())


def test_too_few_tokens_are_counted_in_a_warning(corda, caplog):
    run = corda("calibration.num_samples=2", "calibration.max_seq_len=32", ONE_STEP)
    tokens = sum(int(batch["valid"].sum()) for batch in run.recipe._calibrator.rounds[0])
    assert tokens == 2 * 32
    (warning,) = [
        record.getMessage()
        for record in caplog.records
        if "Calibration is thin" in record.getMessage()
    ]
    # q, k and v read one input, w1 and w3 another: 4 different inputs in each of 5 blocks.
    assert (
        f"layers.0.attn.q_proj (and 19 other inputs) saw {tokens} tokens for 128 inputs" in warning
    )
    assert "raise calibration.num_samples" in warning


@pytest.mark.usefixtures("not_trained")
def test_a_ratio_of_no_learning_rate_is_refused_before_anything_is_computed(
    corda, corda_recipe, monkeypatch
):
    monkeypatch.setattr(
        corda_recipe, "decompose", lambda *_, **__: pytest.fail("the weights were decomposed")
    )
    with pytest.raises(ValueError, match=r"adapter\.lr_ratio.*optimizer\.lr"):
        corda("~optimizer.lr", "adapter.lr_ratio=2", config_name="tiny_pissa")


# ----------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def cached(corda, tmp_path):
    """A folder with a decomposition, as the override that selects it."""
    corda(f"calibration.cache_dir={tmp_path / 'cache'}", ONE_STEP, name="first")
    return f"calibration.cache_dir={tmp_path / 'cache'}"


def damage(path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_corrupt_cache(corda, cached, tmp_path, not_trained):
    path = tmp_path / "cache" / "ipm.safetensors"
    good = path.read_bytes()
    damage(path, len(good) - 1000)  # among the numbers
    with pytest.raises(CacheError, match=rf"{path}.*damaged.*[Dd]elete it"):
        corda(cached)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(CacheError, match=rf"{path}.*[Dd]elete it"):
        corda(cached)


def test_a_foreign_cache(corda, cached, not_trained):
    for other, different in {
        "calibration.num_samples=4": "num_samples: stored 8, now 4",
        "adapter.damping=0.5": r"damping: stored 0\.01, now 0\.5",
        "dataset.split=train[1:9]": "calibration data: stored",
        "model.apply_to_mlp=False": "adapted layers: stored",
        "dtype=bf16": "dtype: stored fp32, now bf16",
    }.items():
        with pytest.raises(
            CacheError, match=rf"ipm\.safetensors.*{different}.*another calibration\.cache_dir"
        ):
            corda(cached, other)
