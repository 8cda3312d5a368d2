"""Two steps of each road on the embedded model: the run of every recipe that the fast tests keep."""

import math

import pytest

from .conftest import SCHEMAS, SMALL_CALIBRATION, SMALL_CORDA_RUN, run_recipe

NUM_LINEARS = 5 * 7  # adapted: seven in each of five blocks


@pytest.mark.parametrize("method", ["kasa", "corda", "qcorda"])
def test_two_steps_learn_and_are_saved(method, load_recipe, tmp_path):
    """All samples are in both steps, so the second loss must be the smaller."""
    module = load_recipe(f"{method}_finetune_single_device")
    small = [*SMALL_CORDA_RUN, *(SMALL_CALIBRATION if method != "kasa" else []), "max_steps=2"]
    run = run_recipe(
        module,
        tmp_path / "run",
        config_name=f"tiny_{method}",
        schema=SCHEMAS[method],
        small=small,
    )
    assert run.status == 0
    first, second = (line["loss"] for line in run.metrics if "loss" in line)
    assert math.isfinite(first)
    assert second < first
    (checkpoint,) = run.checkpoints
    assert checkpoint.name == "step_00000002"
    saved = run.part("adapter")
    assert sum(key.endswith("lora_a.weight") for key in saved) == NUM_LINEARS
    assert all(value.isfinite().all() for value in saved.values())
