"""Classifiers on two processes: the losses and metrics of one device, rows that do not divide, and going on."""

import json

import pytest
import torch

from kasa_tune import config

from .conftest import Run, assert_same_tree, copy_run, run_pair
from .test_distributed import SAME, learned

pytestmark = pytest.mark.slow

# Both add the same float32 numbers in another order; see the tolerances of test_distributed.py. The tiny RoBERTa has no
# dropout, of which every process draws its own.
ROWS = ["dataset.split=train[:21]", "dataset_val.split=train[:19]", "epochs=2", "lr_scheduler=null"]
RUNS = {
    # 21 rows in steps of 6: the last one of an epoch has 2 of one process and 1 of the other.
    "kasa": ["tiny_roberta_kasa_classify", "model.num_labels=1", "metric=pearson"],
    "corda": ["tiny_roberta_corda_classify", "calibration.num_samples=11", "head_lr=1e-3"],
}


def overrides_of(name, processes, *more):
    """A run of the same batches on so many processes."""
    sizes = [f"batch_size={6 // processes}", f"batch_size_val={8 // processes}", "keep_last=9"]
    return [*RUNS[name][1:], *ROWS, *sizes, "save_every_n_steps=3", *more]


def on_two(name, folder, *more):
    overrides = [f"output_dir={folder / 'run'}", *overrides_of(name, 2, *more)]
    entry = {"name": name, "recipe": "classify", "config": RUNS[name][0], "overrides": overrides}
    return run_pair(entry, folder)


def on_one(name, folder, module, *more) -> Run:
    cfg = config.load(
        RUNS[name][0],
        [f"output_dir={folder}", *overrides_of(name, 1, *more)],
        config.CLASSIFY,
    )
    recipe = module.ClassifyFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    return Run(recipe.train(cfg), folder, recipe)


@pytest.fixture(scope="module", params=RUNS)
def both(request, load_recipe, tmp_path_factory):
    """A run's name, the run on one device and that on two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    module = load_recipe("classify_finetune_single_device")
    alone = on_one(request.param, folder / "alone", module)
    return request.param, alone, on_two(request.param, folder / "pair")


def test_two_processes_train_as_one_device(both):
    _, alone, pair = both
    assert pair.ends == [{"status": 0, "step": 8}] * 2
    counts = [line["num_tokens"] for line in pair.metrics]
    assert counts == [6, 6, 6, 3] * 2  # of rows: those that fill up the last batch do not count
    for line, wanted in zip(pair.metrics, alone.metrics, strict=True):
        assert line.keys() == wanted.keys()
        for name in ("loss", "l2", "l3", "grad_norm"):
            if name in wanted:
                assert line[name] == pytest.approx(wanted[name], rel=10 * SAME), (
                    line["step"],
                    name,
                )


def test_the_metrics_are_those_of_every_row_once(both):
    """19 rows of validation in batches of 8, as one device computes them."""
    name, alone, pair = both
    metric = "pearson" if name == "kasa" else "accuracy"
    found, wanted = (json.loads((r.folder / "evaluation.json").read_text()) for r in (pair, alone))
    assert found["metric"] == metric
    assert [epoch["step"] for epoch in found["epochs"]] == [4, 8]
    for epoch, other in zip(found["epochs"], wanted["epochs"], strict=True):
        assert epoch == pytest.approx(other, abs=1e-4)


def test_the_checkpoints_of_two_processes_are_those_of_one_device(both):
    _, alone, pair = both
    adapter, wanted = pair.part("adapter"), alone.part("adapter")
    assert {k: v.shape for k, v in adapter.items()} == {k: v.shape for k, v in wanted.items()}
    updates = learned(wanted)
    for layer, update in learned(adapter).items():
        assert (update - updates[layer]).norm() <= 100 * SAME * updates[layer].norm(), layer
    for part in ("dense", "out_proj"):  # trained whole
        found, other = (one[f"head.{part}.weight"] for one in (adapter, wanted))
        torch.testing.assert_close(found, other, rtol=0, atol=1e-4)
    assert pair.part("run")["world_size"] == 2


@pytest.mark.parametrize("both", ["corda"], indirect=True)
def test_two_processes_go_on_bit_for_bit(both, tmp_path):
    name, _, pair = both
    copy_run(pair, tmp_path / "run", until_step=3)
    rest = on_two(name, tmp_path, "resume_from_checkpoint=True")
    assert rest.curve == pair.curve
    for part in ("adapter", "optimizer", "rng"):
        assert_same_tree(rest.part(part), pair.part(part), part)
    found, wanted = ((r.folder / "evaluation.json").read_text() for r in (rest, pair))
    assert found == wanted


def test_one_device_goes_on_where_two_processes_stopped(both, load_recipe, tmp_path):
    name, alone, pair = both
    copy_run(pair, tmp_path / "run", until_step=6)
    module = load_recipe("classify_finetune_single_device")
    rest = on_one(name, tmp_path / "run", module, "resume_from_checkpoint=True")
    wanted = [line["loss"] for line in alone.metrics]
    assert [line["loss"] for line in rest.metrics] == pytest.approx(wanted, rel=10 * SAME)
