"""What an evaluation leaves behind: numbers of every model on every task, differences to the base, and all answers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kasa_tune.components.evaluation.bootstrap import Bootstrap, Estimate, Metric
from kasa_tune.components.evaluation.mt_bench import MTBenchAnswers
from kasa_tune.components.evaluation.tasks import Scores, Task

BASE = "base"
_HEADINGS = {"learned": "learned", "kept": "kept", None: "other"}


class Results:
    """The scores of models on tasks, written as they come.

    Args:
        folder: to write into.
        tasks: that every model does.
        bootstrap: how intervals are found.
    """

    def __init__(self, folder: Path, tasks: Sequence[Task], bootstrap: Bootstrap) -> None:
        self.folder, self.tasks, self.bootstrap = folder, list(tasks), bootstrap
        self.scores: dict[str, dict[str, Scores]] = {}  # by model, by task
        self._found: dict[tuple[str, ...], Estimate] = {}  # resampling takes a while

    def add(self, model: str, task: Task, scores: Scores, num_cut: int = 0) -> None:
        """Keep the scores of a model on a task, and write its answers.

        Args:
            model: its name.
            task: that it did.
            scores: of it.
            num_cut: prompts that were too long and lost their beginning.
        """
        notes = scores.notes | ({"num_cut_prompts": num_cut} if num_cut else {})
        self.scores.setdefault(model, {})[task.name] = replace(scores, notes=notes)
        if isinstance(task, MTBenchAnswers):
            folder = self.folder / "judge" / task.name / "model_answer"
            lines = [
                record | {"model_id": model, "tstamp": time.time()} for record in scores.records
            ]
        else:
            folder = self.folder / "samples" / task.name
            lines = [{"index": i} | record for i, record in enumerate(scores.records)]
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{model}.jsonl").write_text(text, encoding="utf-8")

    def write(self, **about: Any) -> Path:
        """Write results.json, and return its path.

        Args:
            about: what the file says besides, such as the models' paths.
        """
        path = self.folder / "results.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**about, **self.summary()}, indent=2, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def summary(self) -> dict[str, Any]:
        """All numbers as JSON values. Numbers that are not finite are null."""
        return {
            "bootstrap": asdict(self.bootstrap),
            "tasks": {task.name: self._of_task(task) for task in self.tasks},
            "learned": self._total("learned"),
            "forgotten": self._total("kept"),
        }

    def _of_task(self, task: Task) -> dict[str, Any]:
        done = {model: scores[task.name] for model, scores in self.scores.items()}
        return {
            "kind": type(task).__name__,
            "data_file": str(task.data_file),
            "num_samples": len(task.samples),
            "measures": task.measures,
            "results": {
                model: {name: _json(self.estimate(model, task, name)) for name in scores.metrics}
                for model, scores in done.items()
            },
            "differences_to_base": {
                model: {name: _json(self.difference(model, task, name)) for name in scores.metrics}
                for model, scores in done.items()
                if model != BASE and BASE in done
            },
            "notes": {model: scores.notes for model, scores in done.items() if scores.notes},
        }

    def estimate(self, model: str, task: Task, metric: str) -> Estimate:
        """The value of a metric, with its interval."""
        key = (model, task.name, metric)
        if key not in self._found:
            self._found[key] = self.bootstrap.estimate(self._metric(*key))
        return self._found[key]

    def difference(self, model: str, task: Task, metric: str) -> Estimate:
        """A model's value less the base's, of the same samples (paired bootstrap)."""
        key = (BASE, model, task.name, metric)
        if key not in self._found:
            metrics = (self._metric(each, task.name, metric) for each in (BASE, model))
            self._found[key] = self.bootstrap.difference(*metrics)
        return self._found[key]

    def _metric(self, model: str, task: str, metric: str) -> Metric:
        return self.scores[model][task].metrics[metric]

    def _total(self, measures: str) -> dict[str, dict[str, Any]]:
        """By model and task how much better it is at what it learned, or worse at what it should keep."""
        found: dict[str, dict[str, Any]] = {}
        for model in self.scores if BASE in self.scores else ():
            for task in self.tasks:
                metrics = self.scores[model][task.name].metrics
                if model == BASE or task.measures != measures or not metrics:
                    continue
                name = next(iter(metrics))
                change = self.difference(model, task, name)
                if metrics[name].lower_is_better == (measures == "learned"):
                    change = _negative(change)
                found.setdefault(model, {})[task.name] = {"metric": name, **_json(change)}
        return found

    def table(self) -> str:
        """All numbers side by side: a column of each model, and of each one's difference to the base."""
        models = list(self.scores)
        others = [model for model in models if model != BASE and BASE in models]
        rows = [["", "", *models, *(f"{model} - {BASE}" for model in others)]]
        for heading, tasks in self._by_purpose():
            rows.append([heading])
            for task in tasks:
                metrics = self.scores[models[0]][task.name].metrics
                for i, name in enumerate(metrics or ["(answers for a judge)"]):
                    shown = [self.estimate(model, task, name) for model in models if metrics]
                    changed = [self.difference(model, task, name) for model in others if metrics]
                    label = f"  {task.name}" if i == 0 else ""
                    cells = [*map(_cell, shown), *(_cell(change, "+") for change in changed)]
                    rows.append([label, name, *cells])
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in rows
        )

    def _by_purpose(self) -> Iterator[tuple[str, list[Task]]]:
        for measures, heading in _HEADINGS.items():
            tasks = [task for task in self.tasks if task.measures == measures]
            if tasks:
                yield heading, tasks


@dataclass(frozen=True)
class MainMetric:
    """A task's main metric, as results.json has it.

    Args:
        name: of the task and the metric.
        measures: ``learned``, ``kept`` or None.
        values: by model; NaN stands for what is not finite.
    """

    name: str
    measures: str | None
    values: dict[str, float]


def read_main_metrics(path: Path) -> list[MainMetric]:
    """The main metric of each task in a results.json. Tasks that others judge have none."""
    found = []
    for task, told in json.loads(path.read_text(encoding="utf-8"))["tasks"].items():
        for metric in list(told["results"][BASE])[:1]:
            values = {name: numbers[metric]["value"] for name, numbers in told["results"].items()}
            finite = {n: math.nan if value is None else value for n, value in values.items()}
            found.append(MainMetric(f"{task} {metric}", told["measures"], finite))
    return found


def _negative(change: Estimate) -> Estimate:
    if change.low is None or change.high is None:
        return Estimate(-change.value)
    return Estimate(-change.value, -change.high, -change.low)


def _json(estimate: Estimate) -> Mapping[str, float | None]:
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in asdict(estimate).items()
    }


def _cell(estimate: Estimate, sign: str = "") -> str:
    text = f"{estimate.value:{sign}.4g}"
    if estimate.low is None:
        return text
    return f"{text} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"
