"""Pictures of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor


@dataclass(frozen=True)
class LayerSpectrum:
    """Singular values of one adapted weight, each descending: ``base (R,)``, ``removed (k,)`` and ``update (r,)``."""

    base: Tensor
    removed: Tensor
    update: Tensor


def loss_curve(metrics: Sequence[Mapping[str, float]], path: Path, *, title: str) -> None:
    """Training loss by step, validation loss where it was measured, and the base model's validation loss.

    Args:
        metrics: lines of a run's metrics file.
        path: the PNG to write.
        title: above the picture.

    Raises:
        ValueError: the run has not logged a training loss yet.
    """
    train = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    if not train:
        raise ValueError("The run has not logged a training loss yet; nothing to draw.")
    validation = [(line["step"], line["val_loss"]) for line in metrics if "val_loss" in line]
    base = [line["val_loss_base"] for line in metrics if "val_loss_base" in line]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(*zip(*_smoothed(train), strict=True), color="tab:blue", linewidth=2, label="training, running mean")
    if validation:
        axes.plot(
            *zip(*validation, strict=True), "o-", color="tab:orange", label=f"validation, last {validation[-1][1]:.3f}"
        )
    if base:
        axes.axhline(base[0], color="gray", linestyle="--", linewidth=1, label=f"base model, validation {base[0]:.3f}")
    axes.set(xlabel="step", ylabel="cross-entropy per token [nats]", title=title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def singular_values(spectra: Mapping[str, LayerSpectrum], path: Path, *, title: str) -> None:
    """Left: the base weights' spectra with the removed end marked. Right: the spectra of what training added.

    Args:
        spectra: layer name to its singular values.
        path: the PNG to write.
        title: above the picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    colors = plt.get_cmap("viridis")
    for i, (name, layer) in enumerate(spectra.items()):
        color, rank = colors(i / max(1, len(spectra) - 1)), len(layer.base)
        left.semilogy(range(1, rank + 1), layer.base.clamp_min(1e-12), color=color, linewidth=1.2, label=name)
        removed = range(rank - len(layer.removed) + 1, rank + 1)
        left.semilogy(removed, layer.removed.clamp_min(1e-12), "x", color="tab:red", markersize=5)
        right.plot(range(1, len(layer.update) + 1), layer.update, "o-", color=color, markersize=3, linewidth=1.2)
    left.plot([], [], "x", color="tab:red", label="removed")
    left.set(xlabel="index", ylabel="singular value", title="base weights")
    right.set(xlabel="index", ylabel="singular value", title="learned update  s B diag(d) A", ylim=(0, None))
    left.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    _save(figure, path)


def _smoothed(points: Sequence[tuple[float, float]], decay: float = 0.9) -> list[tuple[float, float]]:
    """Exponential running mean, corrected for its start."""
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, mean / weight))
    return smoothed


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
