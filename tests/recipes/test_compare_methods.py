"""Several methods, seeds and learning rates in one command: killed, gone on with, and every number worked out anew."""

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
import yaml

from kasa_tune import config
from kasa_tune.components.checkpoints import find_checkpoint
from tests.recipes.conftest import ROOT, environment

SMALL = {
    "base": "tiny_lora",
    "overrides": [
        "dataset.split=train[:16]",
        "dataset_val.split=train[:4]",
        "batch_size=8",
        "max_steps=3",
        "run_val_every_n_steps=1",
        "save_every_n_steps=1",
        "lr_scheduler=null",
    ],
    "methods": {
        "lora": None,
        "kasa": ["model.truncation_rank=2"],
    },
    "seeds": [3, 5],
}
FACTS = {
    "_component_": "kasa_tune.components.evaluation.QuestionAnswering",
    "name": "facts",
    "data_file": "kasa_tune://tiny_world/data/facts_test.jsonl",
    "prompt": "Q: {question} A:",
    "max_new_tokens": 4,
    "limit": 8,
}


def write(folder, **more):
    folder.mkdir(exist_ok=True)
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"output_dir": str(folder / "out")} | more))
    return path


def start(path, *overrides):
    command = [sys.executable, str(ROOT / "recipes/compare_methods.py"), "--config", str(path)]
    return subprocess.Popen(
        [*command, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def finish(process, seconds=240):
    return process.communicate(timeout=seconds)[0]


@pytest.fixture(scope="module")
def compared(load_recipe, tmp_path_factory):
    """A comparison whose process was killed in its second run. That run, which nobody kills, goes on by itself."""
    path = write(tmp_path_factory.mktemp("compare") / "a", tasks=[FACTS])
    first, out = start(path), path.parent / "out"
    deadline = time.monotonic() + 120
    second = out / "runs" / "lora_lr0.004_seed5" / "run.yaml"
    while not second.exists():
        assert first.poll() is None, finish(first)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    done = out / "runs" / "lora_lr0.004_seed3" / "finished.json"
    before = done.stat().st_mtime_ns
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    cfg = config.load(path, schema=config.COMPARE)
    recipe = load_recipe("compare_methods").CompareMethodsRecipe(cfg)
    recipe.setup(cfg)
    assert recipe.run() == 0
    said = recipe.report(recipe.evaluate())
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert done.stat().st_mtime_ns == before, "a finished run was done again"
    return out, said


def lines_of(out, method, seed):
    text = (out / "runs" / f"{method}_lr0.004_seed{seed}" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_the_numbers_follow_from_the_runs(compared):
    """Worked out from the metrics files, with the quantile 12.706 of Student's distribution with one degree."""
    out, said = compared
    found = json.loads((out / "comparison.json").read_text())
    final = {
        m: [lines_of(out, m, seed)[-1]["val_loss"] for seed in (3, 5)] for m in ("lora", "kasa")
    }
    for method, values in final.items():
        told = found["methods"][method]
        assert told["final"]["mean"] == pytest.approx(sum(values) / 2, rel=1e-12)
        assert told["final"]["deviation"] == pytest.approx(
            abs(values[0] - values[1]) / math.sqrt(2)
        )
        lows = [min(e["val_loss"] for e in lines_of(out, method, s) if e["step"]) for s in (3, 5)]
        assert told["best"]["mean"] == pytest.approx(sum(lows) / 2, rel=1e-12)
        assert [told["learning_rate"], told["seeds"]] == [0.004, [3, 5]]
    changes = [k - low for k, low in zip(final["kasa"], final["lora"], strict=True)]
    half = 12.7062 * statistics.stdev(changes) / math.sqrt(2)
    told = found["methods"]["kasa"]["difference"]
    assert told["mean"] == pytest.approx(statistics.fmean(changes))
    assert told["high"] - told["low"] == pytest.approx(2 * half, rel=1e-5)
    goal = statistics.fmean(final["lora"])
    assert found["goal"] == pytest.approx(goal)
    reached = []
    for seed in (3, 5):
        lines = [line for line in lines_of(out, "lora", seed) if line["step"]]
        step = next((line["step"] for line in lines if line["val_loss"] <= goal), None)
        if step:
            reached.append((step, sum(line["seconds"] for line in lines if line["step"] <= step)))
    told = found["methods"]["lora"]
    assert told["steps_to_goal"]["mean"] == pytest.approx(statistics.fmean(s for s, _ in reached))
    assert told["seconds_to_goal"]["mean"] == pytest.approx(statistics.fmean(s for _, s in reached))
    assert "| kasa | 0.004 | 2 |" in said
    assert (out / "comparison.md").read_text().strip() in said


@pytest.mark.slow
def test_what_was_trained_and_how(compared):
    out, _ = compared
    found = json.loads((out / "comparison.json").read_text())["methods"]
    for method, d in {"lora": 0, "kasa": 1}.items():
        run = out / "runs" / f"{method}_lr0.004_seed3"
        adapter = find_checkpoint(run).adapter
        edits = [tensor for name, tensor in adapter.items() if name.endswith("lora_edit_in")]
        assert [len(edit) for edit in edits] == [2 * d] * len(edits)
        trained = re.search(r"Parameters to train: ([\d,]+)\.", (run / "log.txt").read_text())[1]
        assert found[method]["trainable"] == int(trained.replace(",", ""))
        assert found[method]["peak_gib"] > 0.1
    seeds = [find_checkpoint(out / "runs" / f"lora_lr0.004_seed{s}").adapter for s in (3, 5)]
    assert not all(torch.equal(a, b) for a, b in zip(*(s.values() for s in seeds), strict=True))
    for name in ("comparison_curves.png", "evaluation/results.json"):
        assert (out / name).stat().st_size > 1000


@pytest.mark.slow
def test_the_tasks_are_those_of_evaluate_model(compared):
    out, said = compared
    found = json.loads((out / "comparison.json").read_text())
    told = json.loads((out / "evaluation" / "results.json").read_text())["tasks"]["facts"][
        "results"
    ]
    assert found["before"] == {"facts exact_match": told["base"]["exact_match"]["value"]}
    for method in ("lora", "kasa"):
        values = [told[f"{method}_seed{s}"]["exact_match"]["value"] for s in (3, 5)]
        mean = found["methods"][method]["tasks"]["facts exact_match"]["mean"]
        assert mean == pytest.approx(statistics.fmean(values))
    assert "| base |" in said


@pytest.fixture
def recipe(load_recipe):
    """The recipe of a config, set up in this process; nothing is run."""

    def recipe(path, *overrides):
        cfg = config.load(path, overrides, config.COMPARE)
        made = load_recipe("compare_methods").CompareMethodsRecipe(cfg)
        made.setup(cfg)
        return made

    return recipe


@pytest.mark.slow
def test_a_run_with_another_config_is_refused_or_moved_aside(compared, recipe, capsys):
    out, _ = compared
    path = out.parent / "compare.yaml"
    recipe(path)
    with pytest.raises(ValueError, match=r"kasa_lr0.004_seed3 was .* config; different: model\."):
        recipe(path, "methods.kasa=[model.truncation_rank=3]")
    kept = sorted(each.name for each in (out / "runs").iterdir())
    recipe(path, "methods.kasa=[model.truncation_rank=3]", "changed_runs=True")
    moved = sorted(each.name for each in (out / "runs").iterdir())
    assert [name.replace(".aside1", "") for name in moved] == kept
    assert [name for name in moved if "aside" in name] == [
        f"{name}.aside1" for name in kept if "kasa" in name
    ]


REFUSED = {
    "methods=[lora,kosa]": "kosa is no method.*Did you mean kasa",
    "methods=[lora,corda_kpm]": "calibration.dataset: missing",
    "methods=[]": "methods: got .*not empty",
    "methods=[lora,lora]": "no name twice",
    "methods={../x: [method=lora]}": "names folders",
    "methods={lora: [model.rnk=3]}": "model.rnk: unknown key",
    "seeds=[]": "seeds: got .*not empty",
    "seeds=[1,1]": "no seed twice",
    "seeds=[-1]": "each at least 0",
    "learning_rates=[]": "learning_rates: got .*not empty",
    "learning_rates=[1e-3,0.0]": "each above 0",
    "learning_rates=[1e-3,1e-3]": "no rate twice",
    "learning_rates={kasa: [1e-3]}": "there are none of lora",
    "base=tiny_loro": "No config named 'tiny_loro'",
    "overrides=[run_val_every_n_steps=null]": "nothing is measured without validation",
    "tasks=[{_component_: kasa_tune.components.evaluation.Perplexity, name: t, data_file: /no}]": "does not exist",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_is_refused_before_any_run(override, recipe, tmp_path):
    path = write(tmp_path)
    with pytest.raises(ValueError, match="(?s)" + REFUSED[override]):
        recipe(path, override)
    assert not (tmp_path / "out" / "runs").exists()


# ------------------------------------------------------------------------------------------------------- classifiers

CLASSIFIERS = {
    "base": "tiny_roberta_lora_classify",
    "metric": "val_accuracy",
    "seeds": [3],
    "overrides": [
        "max_steps=1",
        "batch_size=4",
        "dataset_val.split=train[:20]",
        "lr_scheduler=null",
    ],
}
CALIBRATED = ["method=corda", "calibration.dataset=${dataset}", "calibration.num_samples=8"]


def test_every_method_is_a_classifier_of_the_same_recipe(recipe, tmp_path):
    methods = {"lora": [], "kasa": ["model.truncation_rank=2"], "ipm": CALIBRATED, "pissa": []}
    made = recipe(write(tmp_path, **CLASSIFIERS, methods=methods))
    plans = [plan for plans in made._plans.values() for plan in plans]
    assert {plan.recipe for plan in plans} == {"classify_finetune_single_device"}
    chosen = {plan.method: plan.tree["adapter"]["method"] for plan in plans}
    assert chosen == {"lora": "lora", "kasa": "kasa", "ipm": "corda", "pissa": "pissa"}
    built = {plan.method: plan.tree["model"]["_component_"].rpartition(".")[2] for plan in plans}
    of_classes = {"lora": "lora", "kasa": "kasa", "ipm": "corda", "pissa": "corda"}
    assert built == {n: f"{kind}_encoder_from_checkpoint" for n, kind in of_classes.items()}


@pytest.mark.parametrize("wrong", [{"metric": "val_loss"}, {"tasks": [FACTS]}])
def test_what_classifiers_do_not_measure_is_refused(wrong, recipe, tmp_path):
    with pytest.raises(ValueError, match="which does no tasks and measures its own metrics"):
        recipe(write(tmp_path, **CLASSIFIERS | wrong, methods={"lora": []}))


@pytest.mark.slow
def test_classifiers_are_compared_by_their_metric(recipe, tmp_path):
    made = recipe(write(tmp_path, **CLASSIFIERS, methods={"lora": []}))
    assert made.run() == 0
    made.report(made.evaluate())
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    accuracy = json.loads((folder / "evaluation.json").read_text())["last"]["accuracy"]
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["lower_is_better"] is False
    assert found["methods"]["lora"]["final"]["mean"] == accuracy
