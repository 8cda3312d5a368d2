"""Compare methods of fine-tuning: one config, several methods and seeds, each method at its own best learning rate.

    tune run compare_methods --config tiny_compare
    tune cp compare my_compare.yaml && tune run compare_methods --config my_compare.yaml

Every run is a process of its recipe and has a folder in ``output_dir/runs``. The command can be repeated: a finished
run is skipped, and one that was begun goes on from its newest checkpoint. At the end the chosen runs do the tasks.

    for every method:    for every learning rate and seed:   train
                         choose the rate with the best mean of the metric
    base and the runs at these rates:                        do the tasks
    comparison.json, comparison.md and plots:                mean and spread, paired differences to the reference
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from kasa_tune import config
from kasa_tune.components.checkpoints import find_checkpoint
from kasa_tune.components.checkpoints.planned import (
    as_yaml,
    changed_keys,
    move_aside,
    write_whole,
)
from kasa_tune.components.evaluation import build_tasks
from kasa_tune.components.evaluation.results import read_main_metrics
from kasa_tune.components.processes.child import Children
from kasa_tune.components.reports import comparison_plots
from kasa_tune.components.reports.comparison import Comparison, Trained
from kasa_tune.components.training import read_metrics
from kasa_tune.config.comparing import classifies, named_methods, with_method

_LOWER = ("val_loss", "perplexity", "bits_per_byte")  # ends of metrics that are better when lower
_RUN = (sys.executable, "-m", "kasa_tune", "run")


@dataclass(frozen=True)
class Plan:
    """One run: what it is called, its folder, the recipe, and its config in plain containers."""

    method: str
    lr: float | None
    seed: int
    folder: Path
    recipe: str
    tree: dict[str, Any]

    def __str__(self) -> str:
        rate = "" if self.lr is None else f", learning rate {self.lr:g}"
        return f"{self.method}{rate}, seed {self.seed}"


class CompareMethodsRecipe:
    """Trains every method with every seed, and writes how they compare.

    Args:
        cfg: the checked config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg, self._folder = cfg, Path(cfg.output_dir)
        self._methods = named_methods(OmegaConf.to_container(cfg.methods, resolve=True))
        self._lower = cfg.metric.endswith(_LOWER)
        self._children = Children()
        self._done: list[Trained] = []
        self._failed: list[Plan] = []
        self._measures: dict[str | None, str] = {}  # learned, kept: the first such task

    def setup(self, cfg: DictConfig) -> None:
        """Check everything before the first run: the config of each method, the tasks, and the runs that are there."""
        build_tasks(cfg.tasks)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._plans = {name: self._plans_of(name) for name in self._methods}
        for name, plans in self._plans.items():
            path = self._folder / f".{name}.yaml"
            write_whole(path, as_yaml(plans[0].tree))
            checked = config.load(path, about_to_run=True)
            path.unlink()
            if classifies(plans[0].tree):
                self._check_classifier()
            elif not checked.run_val_every_n_steps:
                raise ValueError(
                    f"{name}: nothing is measured without validation. Set dataset_val and "
                    "run_val_every_n_steps in the base config."
                )
        for plan in (plan for plans in self._plans.values() for plan in plans):
            self._check_unchanged(plan)

    def _check_classifier(self) -> None:
        """See that nothing is asked of classifiers that they do not measure."""
        if self._cfg.tasks or self._cfg.metric == "val_loss":
            raise ValueError(
                f"{self._cfg.base} trains a classifier, which does no tasks and measures its own metrics: set "
                "tasks=null, and metric to one of them, such as val_accuracy."
            )

    def _plans_of(self, name: str) -> list[Plan]:
        """All runs of a method: every learning rate with every seed."""
        cfg, (method, overrides) = self._cfg, self._methods[name]
        tree = with_method(config.read_unchecked(cfg.base, cfg.overrides), method)
        config.override_unchecked(tree, overrides, f"methods.{name}")
        rates = cfg.learning_rates
        if isinstance(rates, DictConfig):
            if name not in rates:
                raise ValueError(f"learning_rates: there are none of {name}. Give its list.")
            rates = rates[name]
        if rates is None:
            rates = [(tree.get("optimizer") or {}).get("lr")]
        recipe = "classify_finetune" if classifies(tree) else method.recipe
        recipe += "_distributed" if cfg.nproc_per_node > 1 else "_single_device"
        plans = []
        for seed in cfg.seeds:
            for lr in rates:
                rate = "" if lr is None else f"_lr{lr:.10g}"
                folder = (self._folder / "runs" / f"{name}{rate}_seed{seed}").absolute()
                own = {"output_dir": str(folder), "seed": seed, "resume_from_checkpoint": True}
                optimizer = dict(tree.get("optimizer") or {}) | ({} if lr is None else {"lr": lr})
                whole = {**tree, **own, "optimizer": optimizer}
                plans.append(Plan(name, lr, seed, folder, recipe, whole))
        return plans

    def _check_unchanged(self, plan: Plan) -> None:
        """A run that is there was made with the same config; else it is refused, or moved aside.

        Raises:
            ValueError: it was made with another one.
        """
        changed = changed_keys(plan.folder / "run.yaml", plan.tree)
        if changed and not self._cfg.changed_runs:
            raise ValueError(
                f"{plan.folder} was made with another config; different: {', '.join(changed)}. Set "
                "them back, choose another output_dir, or set changed_runs=True to move such runs "
                "aside."
            )
        if changed:
            print(f"{plan} had another config; its run is in {move_aside(plan.folder)}.")

    # --- running

    def run(self) -> int:
        """Train what is not there yet. Returns the exit status: that of a run that a signal stopped, else 0."""
        for name, plans in self._plans.items():
            sweep = set(self._cfg.seeds[: self._cfg.sweep_seeds])
            first = [plan for plan in plans if plan.seed in sweep]
            for plan in first:
                if status := self._train(plan):
                    return status
            if not any(run.method == name for run in self._done):
                continue
            best = self._comparison().best_rate(name)
            for plan in (plan for plan in plans if plan.seed not in sweep and plan.lr == best):
                if status := self._train(plan):
                    return status
        if not self._done:
            raise ValueError("No run has finished, so there is nothing to compare.")
        return 0

    def _train(self, plan: Plan) -> int:
        """One run, unless it is finished. Returns a status other than 0 if a signal stopped it."""
        told = plan.folder / "finished.json"
        if not told.exists():
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_whole(plan.folder / "run.yaml", as_yaml(plan.tree))
            started = time.monotonic()
            processes = self._cfg.nproc_per_node
            options = ["--nproc_per_node", str(processes)] if processes > 1 else []
            command = [*_RUN, *options, plan.recipe, "--config", str(plan.folder / "run.yaml")]
            words = f"{plan}: waiting for the process that an earlier comparison started."
            tell = partial(print, words, flush=True)
            status, peak = self._children.run(command, plan.folder / "log.txt", waiting=tell)
            if status > 128:
                print(f"{plan}: stopped. Repeat the command to go on.")
                return status
            if status:
                last = (plan.folder / "log.txt").read_text(errors="replace").strip()[-400:]
                print(f"{plan}: failed, and is left out.\n{last}")
                self._failed.append(plan)
                return 0
            seconds = round(time.monotonic() - started, 1)
            write_whole(told, json.dumps({"peak_gib": peak, "seconds": seconds}))
        run = _trained(plan, json.loads(told.read_text()))
        if not any(self._cfg.metric in line for line in run.lines):
            raise ValueError(
                f"{plan.folder}/metrics.jsonl has no {self._cfg.metric}: set metric to a number of its validation."
            )
        self._done.append(run)
        print(f"{plan}: {self._cfg.metric} {self._comparison().final(run):.4g}", flush=True)
        return 0

    # --- results

    def _comparison(self, tasks: dict[str, dict[Any, float]] | None = None) -> Comparison:
        cfg = self._cfg
        return Comparison(
            self._done, cfg.metric, self._lower, cfg.reference, cfg.target, cfg.confidence, tasks
        )

    def evaluate(self) -> dict[str, dict[Any, float]] | int:
        """Let the base and the chosen runs do the tasks: by task and model the task's main metric."""
        if not self._cfg.tasks:
            return {}
        comparison, folder = self._comparison(), self._folder / "evaluation"
        models = {
            (m, s): run for m in comparison.methods for s, run in comparison.chosen(m).items()
        }
        plans = {(p.method, p.lr, p.seed): p for plans in self._plans.values() for p in plans}
        adapters = {
            f"{m}_seed{s}": str(plans[m, run.lr, s].folder) for (m, s), run in models.items()
        }
        tree = {
            "output_dir": str(folder.absolute()),
            "adapters": adapters,
            "tasks": OmegaConf.to_container(self._cfg.tasks, resolve=True),
            "batch_size": self._cfg.batch_size,
            "device": next(iter(plans.values())).tree.get("device", "cuda"),
        }
        path, results = folder / "evaluate.yaml", folder / "results.json"
        if not (results.exists() and path.exists() and path.read_text() == as_yaml(tree)):
            folder.mkdir(exist_ok=True)
            results.unlink(missing_ok=True)
            write_whole(path, as_yaml(tree))
            command = [*_RUN, "evaluate_model", "--config", str(path)]
            status, _ = self._children.run(command, folder / "log.txt")
            if status:
                print(f"The tasks were not done; {folder}/log.txt says why.")
                return status
        names = {"base": "base"} | {(m, s): f"{m}_seed{s}" for m, s in models}
        found = read_main_metrics(results)
        self._measures = {task.measures: task.name for task in reversed(found)}
        return {
            task.name: {key: task.values[name] for key, name in names.items()} for task in found
        }

    def report(self, tasks: dict[str, dict[Any, float]]) -> str:
        """Write comparison.json, comparison.md and the plots; returns the table."""
        comparison, folder = self._comparison(tasks), self._folder
        failed = [str(plan) for plan in self._failed]
        summary = {**comparison.summary(), "failed": failed}
        write_whole(folder / "comparison.json", json.dumps(summary, indent=2) + "\n")
        notes = [f"Failed and left out: {'; '.join(failed)}."] if failed else []
        text = "\n\n".join([comparison.table(), *notes]) + "\n"
        write_whole(folder / "comparison.md", text)
        comparison_plots.curves(comparison, folder / "comparison_curves.png")
        if any(len(comparison.rates(method)) > 1 for method in comparison.methods):
            comparison_plots.rates(comparison, folder / "comparison_rates.png")
        learned, kept = (self._measures.get(each) for each in ("learned", "kept"))
        if learned and kept:
            path = folder / "comparison_tasks.png"
            comparison_plots.learned_and_kept(comparison, learned, kept, path)
        return text


def _trained(plan: Plan, usage: dict[str, Any]) -> Trained:
    """What is needed of a finished run."""
    lines = read_metrics(plan.folder / "metrics.jsonl")
    adapter = find_checkpoint(plan.folder).path / "adapter.safetensors"
    with safe_open(adapter, "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    sizes = [math.prod(shape) for name, shape in shapes.items() if "lora_edit" not in name]
    peak = max(
        (line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line),
        default=usage["peak_gib"],
    )
    return Trained(plan.method, plan.lr, plan.seed, lines, sum(sizes), peak)


@config.parse(config.COMPARE)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = CompareMethodsRecipe(cfg)
    recipe.setup(cfg)
    if status := recipe.run():
        return status
    tasks = recipe.evaluate()
    if isinstance(tasks, int):
        return tasks
    print(recipe.report(tasks))
    print(f"Numbers, table and plots: {cfg.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
