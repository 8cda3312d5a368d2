"""Runs of several methods side by side: each at its best learning rate, with spreads over seeds and paired differences.

Everything here follows from the lines of the runs' metrics files. A line has ``step`` and ``seconds``
of the step, and after validation the metric that methods are compared by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        method: its name.
        lr: learning rate; None for that of a config without one.
        seed: of the run.
        lines: those of its metrics file.
        trainable: number of trained parameters.
        peak_gib: peak memory of the GPU, or of the process on a CPU, in GiB. None if it is not known.
    """

    method: str
    lr: float | None
    seed: int
    lines: Lines
    trainable: int
    peak_gib: float | None = None


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) of values. The deviation of one value is None."""

    mean: float
    deviation: float | None
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """That of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.fmean(values), deviation, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (
            f" ± {self.deviation:.2g}" if self.deviation is not None else ""
        )


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, with Student's interval. A single pair has no interval."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.3g}"
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]"


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95
) -> Difference | None:
    """``second - first`` over the seeds that both have: the mean and Student's interval,
    ``mean ± t · deviation / sqrt(n)`` with n - 1 degrees of freedom. None without a common seed.
    """
    changes = [second[seed] - first[seed] for seed in first if seed in second]
    if not changes:
        return None
    spread = Spread.of(changes)
    if spread.deviation is None:
        return Difference(spread.mean, None, None, 1)
    half = t_quantile(confidence, len(changes) - 1) * spread.deviation / math.sqrt(len(changes))
    return Difference(spread.mean, spread.mean - half, spread.mean + half, len(changes))


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with ``P(|T| < t) = confidence`` for Student's distribution, by bisection.

    Args:
        confidence: above 0 and below 1.
        degrees: of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """``P(|T| < t)``: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2 == 1
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 if odd else 1, degrees, 2):
        total += term
        term *= square * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@dataclass(frozen=True)
class Comparison:
    """Methods side by side.

    Args:
        runs: finished runs of every method, at least one of each.
        metric: what they are compared by.
        lower_is_better: as of a loss.
        reference: the method that the others are compared with; nothing is, if it has no run.
        target: value of the metric that steps and seconds are counted to. None for the mean of the
            reference at its end.
        confidence: of intervals.
        tasks: by task and model, the value of the task's metric; a model is ``base`` or ``(method, seed)``.
    """

    runs: Sequence[Trained]
    metric: str = "val_loss"
    lower_is_better: bool = True
    reference: str = "lora"
    target: float | None = None
    confidence: float = 0.95
    tasks: Mapping[str, Mapping[Any, float]] | None = None

    @cached_property
    def methods(self) -> list[str]:
        """Their names, in the order of the runs."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def curve(self, run: Trained) -> list[tuple[int, float]]:
        """Steps after the first one, and the metric where it was measured."""
        pairs = [(line["step"], line[self.metric]) for line in run.lines if self.metric in line]
        return [(step, value) for step, value in pairs if step > 0]

    def final(self, run: Trained) -> float:
        """The metric at the run's end."""
        return self.curve(run)[-1][1]

    def best(self, run: Trained) -> float:
        """The best value of the metric after any step."""
        values = [value for _, value in self.curve(run)]
        return min(values) if self.lower_is_better else max(values)

    def rates(self, method: str) -> dict[float | None, Spread]:
        """Final metric by learning rate, over the seeds that all rates were run with."""
        by_rate: dict[float | None, dict[int, float]] = {}
        for run in self.runs:
            if run.method == method:
                by_rate.setdefault(run.lr, {})[run.seed] = self.final(run)
        common = set.intersection(*(set(values) for values in by_rate.values()))
        return {
            lr: Spread.of([value for seed, value in values.items() if seed in common or not common])
            for lr, values in by_rate.items()
        }

    def best_rate(self, method: str) -> float | None:
        """The learning rate with the best mean of the final metric."""
        sign = 1 if self.lower_is_better else -1
        means = {lr: sign * spread.mean for lr, spread in self.rates(method).items()}
        return min(means, key=lambda lr: math.inf if math.isnan(means[lr]) else means[lr])

    def chosen(self, method: str) -> dict[int, Trained]:
        """The runs of a method at its best learning rate, by seed."""
        rate = self.best_rate(method)
        return {run.seed: run for run in self.runs if run.method == method and run.lr == rate}

    @cached_property
    def goal(self) -> float | None:
        """What steps and seconds are counted to."""
        if self.target is not None or self.reference not in self.methods:
            return self.target
        return statistics.fmean(self.final(run) for run in self.chosen(self.reference).values())

    def reached(self, run: Trained) -> tuple[int, float] | None:
        """The first validated step at which the metric is as good as the goal, and the seconds of training until then.
        None if there is none.

        If not every step was logged, the others took as long as the logged ones on average.
        """
        goal = self.goal
        if goal is None:
            return None
        for step, value in self.curve(run):
            if value <= goal if self.lower_is_better else value >= goal:
                logged = [
                    line["seconds"]
                    for line in run.lines
                    if 0 < line["step"] <= step and "seconds" in line
                ]
                return step, statistics.fmean(logged) * step if logged else math.nan
        return None

    def summary(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return {
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "reference": self.reference if self.reference in self.methods else None,
            "goal": self.goal,
            "confidence": self.confidence,
            "methods": {method: self._of(method) for method in self.methods},
            "before": {task: values["base"] for task, values in (self.tasks or {}).items()},
        }

    def _of(self, method: str) -> dict[str, Any]:
        chosen, rates = self.chosen(method), self.rates(method)
        runs, rate = list(chosen.values()), self.best_rate(method)
        reached = [self.reached(run) for run in runs]
        done = [each for each in reached if each is not None]
        peaks = [run.peak_gib for run in runs if run.peak_gib is not None]
        ordered = sorted(lr for lr in rates if lr is not None)
        return {
            "learning_rate": rate,
            "at_edge_of_sweep": len(ordered) > 1 and rate in (ordered[0], ordered[-1]),
            "rates": [{"learning_rate": lr, **vars(spread)} for lr, spread in rates.items()],
            "seeds": sorted(chosen),
            "final": vars(Spread.of([self.final(run) for run in runs])),
            "best": vars(Spread.of([self.best(run) for run in runs])),
            "difference": _json(self.difference(method)),
            "steps_to_goal": vars(Spread.of([s for s, _ in done])) if done else None,
            "seconds_to_goal": vars(Spread.of([s for _, s in done])) if done else None,
            "reached_goal": len(done),
            "trainable": runs[0].trainable,
            "peak_gib": max(peaks, default=None),
            "tasks": {
                task: {
                    **vars(Spread.of(list(self.task_values(task, method).values()))),
                    "difference": _json(self.difference(method, task)),
                }
                for task in self.tasks or {}
            },
        }

    def task_values(self, task: str, method: str) -> dict[int, float]:
        """The value of a task's metric by seed."""
        values = (self.tasks or {})[task]
        return {seed: values[method, seed] for seed in self.chosen(method)}

    def difference(self, method: str, task: str | None = None) -> Difference | None:
        """The final metric, or a task's, less the reference's of the same seeds."""
        if method == self.reference or self.reference not in self.methods:
            return None
        if task is not None:
            first, second = (self.task_values(task, name) for name in (self.reference, method))
        else:
            first, second = (
                {seed: self.final(run) for seed, run in self.chosen(name).items()}
                for name in (self.reference, method)
            )
        return paired_difference(first, second, self.confidence)

    def table(self) -> str:
        """The numbers as a Markdown table, a row for each method."""
        tasks = list(self.tasks or {})
        percent = f"{100 * self.confidence:g} %"
        head = ["method", "learning rate", "seeds", f"{self.metric}, end", f"{self.metric}, best"]
        head += [f"end - {self.reference} [{percent}]"]
        goal = "goal" if self.goal is None else f"{self.goal:.4g}"
        head += [f"steps to {goal}", f"seconds to {goal}", "trained", "peak GiB", *tasks]
        rows = [["base", *[""] * 9, *(f"{(self.tasks or {})[task]['base']:.4g}" for task in tasks)]]
        rows = rows * bool(tasks) + [self._row(method, tasks) for method in self.methods]
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _row(self, method: str, tasks: Sequence[str]) -> list[str]:
        found, change = self._of(method), self.difference(method)
        rate = found["learning_rate"]
        edge = " (end of the sweep)" if found["at_edge_of_sweep"] else ""
        short = found["reached_goal"] < len(found["seeds"])
        share = f" ({found['reached_goal']} of {len(found['seeds'])})" if short else ""
        counted = [found[name] for name in ("steps_to_goal", "seconds_to_goal")]
        peak = found["peak_gib"]
        return [
            method,
            "-" if rate is None else f"{rate:g}{edge}",
            str(len(found["seeds"])),
            str(Spread(**found["final"])),
            str(Spread(**found["best"])),
            "" if change is None else str(change),
            *("-" if each is None else f"{Spread(**each)}{share}" for each in counted),
            f"{found['trainable']:,}",
            "-" if peak is None else f"{peak:.2f}",
            *(str(Spread.of(list(self.task_values(task, method).values()))) for task in tasks),
        ]


def _json(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else dict(vars(difference))
