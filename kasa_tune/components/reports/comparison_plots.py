"""Plots of a comparison of methods, written as PNG files."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from kasa_tune.components.reports.comparison import Comparison

# Okabe and Ito's colours, which the colour-blind tell apart; line styles tell more methods apart.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999")
_STYLES = ("-", "--", ":", "-.")


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLORS[number % len(_COLORS)],
        "linestyle": _STYLES[number // len(_COLORS) % len(_STYLES)],
    }


def curves(comparison: Comparison, path: Path) -> None:
    """Plot the metric by step of each method at its best learning rate: the mean over seeds, and from the least to
    the greatest value.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for i, method in enumerate(comparison.methods):
        by_step: dict[int, list[float]] = {}
        for run in comparison.chosen(method).values():
            for step, value in comparison.curve(run):
                by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        means = [statistics.fmean(by_step[step]) for step in steps]
        style = _style(i)
        axes.plot(steps, means, label=method, linewidth=1.6, **style)
        lows, highs = ([bound(by_step[step]) for step in steps] for bound in (min, max))
        axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel=comparison.metric)
    _save(figure, axes, path)


def rates(comparison: Comparison, path: Path) -> None:
    """Plot the final metric by learning rate of each method, with standard deviations over seeds."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for i, method in enumerate(comparison.methods):
        found = {lr: spread for lr, spread in comparison.rates(method).items() if lr is not None}
        at = sorted(found)
        means, deviations = [found[lr].mean for lr in at], [found[lr].deviation or 0.0 for lr in at]
        axes.errorbar(at, means, deviations, label=method, marker="o", capsize=2, **_style(i))
    axes.set(xlabel="learning rate", ylabel=f"{comparison.metric} at the end", xscale="log")
    _save(figure, axes, path)


def learned_and_kept(comparison: Comparison, learned: str, kept: str, path: Path) -> None:
    """Plot a task that was trained for against one that should be kept: a point for each run at its method's best
    learning rate, and the base.
    """
    tasks = comparison.tasks or {}
    figure, axes = plt.subplots(figsize=(6, 4.8))
    axes.scatter(
        tasks[learned]["base"], tasks[kept]["base"], color="black", marker="*", s=90, label="base"
    )
    for i, method in enumerate(comparison.methods):
        across, up = (
            list(comparison.task_values(task, method).values()) for task in (learned, kept)
        )
        marker = "osD^"[i // len(_COLORS) % 4]
        axes.scatter(across, up, color=_style(i)["color"], marker=marker, s=28, label=method)
    axes.set(xlabel=f"{learned} (learned)", ylabel=f"{kept} (kept)")
    _save(figure, axes, path)


def _save(figure: plt.Figure, axes: plt.Axes, path: Path) -> None:
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
