"""Plots of a run, written as PNG files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor


@dataclass(frozen=True)
class DrawnSpectrum:
    """Singular values of one adapted weight for :func:`singular_values`. Each list is in descending
    order.

    Args:
        base: ``(R,)``, all singular values of the base weight.
        removed: ``(k,)``, those of the part that was removed from it.
        update: ``(r,)``, those of the trained update.
        from_start: True if the removed part is drawn beside the first k values of the base, False
            for the last k.
    """

    base: Tensor
    removed: Tensor
    update: Tensor
    from_start: bool = False


def loss_curve(metrics: Sequence[Mapping[str, float]], path: Path, *, title: str) -> None:
    """Plot the training loss by step, the validation loss where it was measured, and the base
    model's validation loss.

    Args:
        metrics: lines of a run's metrics file.
        path: the PNG file to write.
        title: title of the plot.

    Raises:
        ValueError: the run has not logged a training loss yet.
    """
    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    if not train:
        raise ValueError("The run has not logged a training loss yet, so there is nothing to plot.")
    validation = [(line["step"], line["val_loss"]) for line in metrics if "val_loss" in line]
    base = [line["val_loss_base"] for line in metrics if "val_loss_base" in line]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    axes.plot(
        *zip(*train, strict=True),
        color="tab:blue",
        alpha=0.35,
        linewidth=1,
        label="training, each step",
    )
    axes.plot(
        *zip(*_smoothed(train), strict=True),
        color="tab:blue",
        linewidth=2,
        label="training, running mean",
    )
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            "o-",
            color="tab:orange",
            label=f"validation, last {validation[-1][1]:.3f}",
        )
    if base:
        axes.axhline(
            base[0],
            color="gray",
            linestyle="--",
            linewidth=1,
            label=f"base model, validation {base[0]:.3f}",
        )
    axes.set(xlabel="step", ylabel="cross-entropy per token [nats]", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def singular_values(
    spectra: Mapping[str, DrawnSpectrum],
    path: Path,
    *,
    title: str,
    removed: str = "removed",
    update: str = "s B diag(d) A",
) -> None:
    """Plot two panels of singular values. The left one shows the base weights and what was removed
    from them, the right one the trained updates.

    Args:
        spectra: singular values of each layer, by its name.
        path: the PNG file to write.
        title: title of the plot.
        removed: label of the removed part.
        update: formula of the trained update.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    colors = plt.get_cmap("viridis")
    for i, (name, layer) in enumerate(spectra.items()):
        color, rank = colors(i / max(1, len(spectra) - 1)), len(layer.base)
        left.semilogy(
            range(1, rank + 1), layer.base.clamp_min(1e-12), color=color, linewidth=1.2, label=name
        )
        first = 1 if layer.from_start else rank - len(layer.removed) + 1
        marked = range(first, first + len(layer.removed))
        left.semilogy(marked, layer.removed.clamp_min(1e-12), "x", color="tab:red", markersize=5)
        right.plot(
            range(1, len(layer.update) + 1),
            layer.update,
            "o-",
            color=color,
            markersize=3,
            linewidth=1.2,
        )
    left.plot([], [], "x", color="tab:red", label=removed)
    left.set(xlabel="index", ylabel="singular value", title="base weights")
    right.set(
        xlabel="index", ylabel="singular value", title=f"learned update  {update}", ylim=(0, None)
    )
    left.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    _save(figure, path)


def layer_ranks(ranks: Mapping[str, int], path: Path, *, title: str, uniform: int) -> None:
    """Plot the rank of every adapted layer by its block, with one line for each kind of linear.

    Args:
        ranks: rank of each layer by its name, such as ``layers.3.attn.q_proj``. Layers outside the
            blocks are drawn after them.
        path: the PNG file to write.
        title: title of the plot.
        uniform: the rank that all layers would have if the same number of parameters were spread
            evenly.
    """
    blocks = {
        name: int(found[1]) for name in ranks if (found := re.match(r"layers\.(\d+)\.", name))
    }
    after = max(blocks.values(), default=-1) + 1
    kinds: dict[str, list[tuple[int, int]]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append((blocks.get(name, after), rank))
    figure, axes = plt.subplots(figsize=(9, 4.2))
    colors, markers = plt.get_cmap("tab10"), "os^vDPX*"
    for i, (kind, points) in enumerate(kinds.items()):
        style = {
            "color": colors(i % 10),
            "marker": markers[i % len(markers)],
            "markersize": 4,
            "linewidth": 1.2,
        }
        axes.plot(*zip(*sorted(points), strict=True), label=kind, **style)
    axes.axhline(
        uniform, color="gray", linestyle="--", linewidth=1, label=f"the same everywhere, {uniform}"
    )
    axes.set(xlabel="block", ylabel="rank", title=title, ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _smoothed(
    points: Sequence[tuple[float, float]], decay: float = 0.9
) -> list[tuple[float, float]]:
    """Compute the exponential running mean of the values, corrected for its start at zero."""
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, mean / weight))
    return smoothed


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
