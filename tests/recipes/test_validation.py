"""What a run measures while it trains: tasks and samples, the best checkpoint, early stopping, several loggers."""

import importlib.util
import json
import math
import shutil

import pytest

from kasa_tune import config
from kasa_tune.components.checkpoints import load_part
from kasa_tune.components.training import Steps, loggers
from kasa_tune.components.training.validating import Best
from tests.recipes.conftest import Run, assert_same_tree, run_recipe

TASK = (
    "{_component_: kasa_tune.components.evaluation.QuestionAnswering, name: texts, "
    "data_file: 'kasa_tune://tiny_world/data/task_val.jsonl', prompt: '{input}', chat: True, "
    "answer: output, normalization: none, max_new_tokens: 8}"
)
SMALL = [
    "dataset.split=train[:24]",
    "dataset_val.split=train[:8]",
    "batch_size=4",
    "epochs=2",
    "max_steps=8",
    "run_val_every_n_steps=2",
    "save_every_n_steps=3",
    "model.dropout=0.1",
    "lr_scheduler=null",
    "optimizer.lr=2e-2",  # so high that the loss goes up and down
]
ASKED = [
    f"validation.tasks=[{TASK}]",
    "validation.limit=3",
    "validation.num_samples=2",
    "validation.prompts=[keeper]",
    "validation.max_new_tokens=4",
]
BEST = "val_texts_f1"


@pytest.fixture(scope="module")
def train(load_recipe, tmp_path_factory):
    """Run the recipe in a folder of its name."""
    module, root = load_recipe("kasa_finetune_single_device"), tmp_path_factory.mktemp("validation")

    def train(name: str, *overrides: str) -> Run:
        return run_recipe(module, root / name, *overrides, small=SMALL)

    return train


@pytest.fixture(scope="module")
def whole(train) -> Run:
    return train("whole", *ASKED, "keep_last=1", "keep_best=val_loss")


def samples_of(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]


def without(curve: list[tuple], *begins: str) -> list[dict]:
    return [{k: v for k, v in line if not k.startswith(begins)} for line in curve]


def test_the_numbers_are_those_of_evaluate_model(whole, load_recipe, tmp_path):
    """The best and the last checkpoint, evaluated from their files."""
    overrides = [
        f"adapters={{best: {whole.folder}/checkpoints/best, last: {whole.folder}}}",
        f"tasks=[{TASK.replace('}', ', limit: 3}').replace('{input, limit: 3}', '{input}')}]",
        f"output_dir={tmp_path}",
        "bootstrap.num_resamples=0",
        "batch_size=16",
    ]
    cfg = config.load("tiny_evaluate", overrides, config.EVALUATE, about_to_run=True)
    recipe = load_recipe("evaluate_model").EvaluateModelRecipe(cfg)
    recipe.setup(cfg)
    found = recipe.evaluate(cfg).summary()["tasks"]["texts"]["results"]
    lines = {line["step"]: line for line in whole.metrics if "val_loss" in line}
    at = {"best": load_part(whole.folder / "checkpoints" / "best", "run")["step"], "last": 8}
    for name, step in at.items():
        measured = {k.removeprefix("val_texts_"): v for k, v in lines[step].items() if "texts" in k}
        assert measured == {metric: value["value"] for metric, value in found[name].items()}
        answers = (tmp_path / "samples" / "texts" / f"{name}.jsonl").read_text().splitlines()
        records = [s for s in samples_of(whole) if s["step"] == step and "task" in s]
        wanted = [json.loads(line) for line in answers[:2]]
        assert [{**r, "index": i} for i, r in enumerate(records)] == [
            {**w, "step": step, "task": "texts"} for w in wanted
        ]


def test_being_asked_changes_nothing_that_is_learned(whole, train):
    plain = train("plain", "keep_last=1")
    assert without(whole.curve, "val_texts") == without(plain.curve)
    assert_same_tree(whole.part("adapter"), plain.part("adapter"))
    assert not (plain.folder / "samples.jsonl").exists()
    assert [s["step"] for s in samples_of(whole)] == [s for s in (0, 2, 4, 6, 8) for _ in range(3)]


def test_the_best_checkpoint_is_kept_besides_the_last(whole):
    losses = {line["step"]: line["val_loss"] for line in whole.metrics if "val_loss" in line}
    best = min((step for step in losses if step), key=losses.get)
    assert best not in (0, 8)  # or the test shows nothing
    assert [path.name for path in whole.checkpoints] == [f"step_{best:08d}", "step_00000008"]
    link = whole.folder / "checkpoints" / "best"
    assert link.resolve() == whole.checkpoints[0].resolve()
    assert load_part(link, "run")["best"]["value"] == losses[best]


@pytest.mark.parametrize("killed_at", [4, 6])
def test_a_killed_run_goes_on_with_its_best_and_its_patience(
    whole, train, killed_at, monkeypatch, tmp_path
):
    """Killed after a step, with what a kill leaves: a checkpoint that should have been removed, lines too many."""
    losses = [line["val_loss"] for line in whole.metrics if "val_loss" in line][1:]
    stale, best, stops = 0, math.inf, None
    for step, loss in zip((2, 4, 6, 8), losses, strict=True):
        stale, best = (0, loss) if loss < best else (stale + 1, best)
        stops = stops or (step if stale == 2 else None)
    early = [*ASKED, "keep_last=1", "keep_best=val_loss", "early_stopping.metric=val_loss"]
    early += ["early_stopping.patience=2"]
    once = train(f"once_{killed_at}", *early)
    assert once.metrics[-1]["step"] == stops
    assert once.status == 0

    log_samples = loggers.RunLoggers.log_samples

    def kill(self, samples, step):
        log_samples(self, samples, step)
        if step == killed_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(loggers.RunLoggers, "log_samples", kill)
    assert killed_at <= stops
    with pytest.raises(KeyboardInterrupt):
        train(f"twice_{killed_at}", *early)
    monkeypatch.undo()
    twice = train(f"twice_{killed_at}", *early, "resume_from_checkpoint=True")
    assert twice.curve == once.curve
    assert samples_of(twice) == samples_of(once)
    assert [path.name for path in twice.checkpoints] == [path.name for path in once.checkpoints]
    assert_same_tree(twice.part("run")["best"], once.part("run")["best"])
    again = train(f"twice_{killed_at}", *early, "resume_from_checkpoint=True")
    assert again.curve == once.curve  # it has stopped, and stays so


def test_a_restart_moves_the_best_aside(whole, train, tmp_path):
    shutil.copytree(whole.folder, whole.folder.parent / "again", symlinks=True)
    run = train("again", "max_steps=2", "resume_from_checkpoint=restart")
    moved = run.folder / "restarted_1" / "checkpoints" / "best"
    assert (
        load_part(moved, "run")["step"]
        == load_part(whole.folder / "checkpoints/best", "run")["step"]
    )
    assert not (run.folder / "checkpoints" / "best").is_symlink()


@pytest.mark.parametrize(("lower", "sign"), [({"m"}, 1), (set(), -1)])
def test_best_of_a_sequence(lower, sign):
    best = Best("m", min_delta=0.5)
    seen = []
    for step, value in enumerate([3.0, 2.6, 2.4, math.nan, 2.0, 1.0], start=1):
        best.update(step, {"m": sign * value}, lower)
        seen.append((best.step, best.validations_since))
    assert seen == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2), (6, 0)]
    other = Best("n")
    other.restore(best.state())
    assert other.value is None  # that of another metric


class Failing:
    """A logger whose network goes away at step 2."""

    def __init__(self, seen: str):
        self.seen = open(seen, "a")  # noqa: SIM115

    def log_config(self, config):
        self.seen.write("config\n")

    def log_dict(self, payload, step):
        if step == 2:
            raise ConnectionError("no route to host")
        self.seen.write(f"{step}\n")
        self.seen.flush()

    def close(self):
        raise AssertionError("a failed logger is not called again")


def test_a_logger_that_fails_does_not_stop_the_run(train, tmp_path, caplog):
    one = f"{{_component_: {__name__}.Failing, seen: {tmp_path}/one}}"
    board = "{_component_: torchtune.training.metric_logging.StdoutLogger}"
    run = train("loggers", f"metric_logger=[{one}, {board}]", "max_steps=4")
    assert (tmp_path / "one").read_text().split() == ["config", "0", "1"]
    assert [line["step"] for line in run.metrics] == [0, 1, 2, 3, 4]
    assert (run.folder / "config.yaml").exists()
    told = [r.message for r in caplog.records if "no route to host" in r.message]
    assert len(told) == 1


REFUSED = {
    "keep_best=val_f1": "which no validation measures; it is val_loss",
    "keep_best=val_loss run_val_every_n_steps=null": "without validation",
    "early_stopping.metric=loss": "which no validation measures",
    "early_stopping.patience=0": "at least 1",
    "early_stopping.min_delta=-1": "at least 0",
    "validation.limit=0": "at least 1",
    f"validation.tasks=[{TASK[:-1]}, decoding: {{num_beams: 2}}}}]": "answers in training are greedy",
    f"validation.tasks=[{TASK.replace('task_val', 'nowhere')}]": "is not part of the installed",
    "metric_logger=[{_component_: torchtune.training.metric_logging.WandBLogger}]": "pip install wandb",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(override, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *where: None if name == "wandb" else find(name, *where)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", missing)
    overrides = [override] if "=[" in override else override.split()
    with pytest.raises(config.ConfigError, match="(?s)" + REFUSED[override]):
        config.load("tiny_kasa", overrides, config.FINETUNE)


def test_an_unknown_metric_of_a_task_is_refused_before_the_first_step(train):
    with pytest.raises(ValueError, match="val_texts_bleu is no metric of this run's validation"):
        train("unknown", *ASKED, "keep_best=val_texts_bleu")


def test_bad_rows_are_refused_before_a_weight_is_read(train, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"input": "a"}\n')
    monkeypatch.setattr(Steps, "__init__", None)  # comes after the weights
    bad = TASK.replace("kasa_tune://tiny_world/data/task_val.jsonl", f"{tmp_path}/rows.jsonl")
    with pytest.raises(ValueError, match=r"row 0 of .* has no column 'output'"):
        train("bad", f"validation.tasks=[{bad}]")
