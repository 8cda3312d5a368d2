"""Runs on the embedded tiny GPT-2: learned positions in packed rows, dropouts of the base, E2E's loss."""

import pytest

from kasa_tune.components.models.loading import needs_dense_mask

from .conftest import SCHEMAS, SMALL_CALIBRATION, SMALL_CORDA_RUN, assert_same_run, copy_run
from .conftest import run_recipe as run_of

# As E2E is trained, besides the models' own dropouts.
NOISY = [
    *SMALL_CORDA_RUN,
    "model.dropout=0.1",
    "model.base_dropout=True",
    "dataset.packed=True",
    "loss.label_smoothing=0.1",
    "model.attn_modules=[q_proj, v_proj]",
    "model.apply_to_mlp=False",
    "batch_size=1",
]


@pytest.mark.parametrize("method", ["kasa", "corda"])
def test_two_steps_learn(method, load_recipe, tmp_path):
    """All samples are in both steps, so the second loss must be the smaller."""
    small = [*SMALL_CORDA_RUN, *(SMALL_CALIBRATION if method == "corda" else []), "max_steps=2"]
    run = run_of(
        load_recipe(f"{method}_finetune_single_device"),
        tmp_path / "run",
        config_name=f"tiny_gpt2_{method}",
        schema=SCHEMAS[method],
        small=small,
    )
    first, second = (line["loss"] for line in run.metrics if "loss" in line)
    assert second < first
    saved = run.part("adapter")
    assert sum(key.endswith("lora_a.weight") for key in saved) == 5 * 6  # there is no gate


def test_a_run_with_every_dropout_is_resumed_exactly(load_recipe, tmp_path):
    module = load_recipe("kasa_finetune_single_device")
    options = {"config_name": "tiny_gpt2_kasa", "small": NOISY}
    whole = run_of(module, tmp_path / "whole", **options)
    assert needs_dense_mask(whole.recipe._model)
    copy_run(whole, tmp_path / "resumed", until_step=2)
    resumed = run_of(module, tmp_path / "resumed", "resume_from_checkpoint=True", **options)
    assert_same_run(resumed, whole)
    losses = [line["loss"] for line in whole.metrics if "loss" in line]
    assert len({*losses}) == len(losses) == 4
