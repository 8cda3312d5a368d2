"""Metrics of classifiers and regressions, in float64: those of GLUE."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Predicted = np.ndarray  # of labels, or of scores of a regression
Given = np.ndarray


def accuracy(predicted: Predicted, given: Given) -> float:
    """Share of the predictions ``[n]`` that are the label ``[n]``."""
    return float(np.mean(predicted == given))


def f1(predicted: Predicted, given: Given) -> float:
    """F1 of label 1: the harmonic mean of precision and recall. 0 if label 1 is neither predicted
    nor given.
    """
    hits = np.sum((predicted == 1) & (given == 1))
    claims = np.sum(predicted == 1) + np.sum(given == 1)
    return float(2 * hits / claims) if claims else 0.0


def matthews(predicted: Predicted, given: Given) -> float:
    """Matthews correlation of two or more labels. 0 if all predictions or all labels are one."""
    size = int(max(predicted.max(), given.max())) + 1
    table = np.zeros((size, size))
    np.add.at(table, (given, predicted), 1.0)
    of_given, of_predicted, total = table.sum(1), table.sum(0), table.sum()
    numerator = np.trace(table) * total - of_given @ of_predicted
    spread = (total**2 - of_predicted @ of_predicted) * (total**2 - of_given @ of_given)
    return float(numerator / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted: Predicted, given: Given) -> float:
    """Pearson correlation. 0 if all predictions or all scores are equal, where it is not defined."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (predicted, given))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(predicted: Predicted, given: Given) -> float:
    """Pearson correlation of the ranks, where equal values have the mean of their ranks."""
    return pearson(average_ranks(predicted), average_ranks(given))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks ``[n]`` from 1; equal values have the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


OF_LABELS: Mapping[str, Callable[[Predicted, Given], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
OF_SCORES: Mapping[str, Callable[[Predicted, Given], float]] = {
    "pearson": pearson,
    "spearman": spearman,
}


def metrics_of(num_labels: int) -> dict[str, Callable[[Predicted, Given], float]]:
    """The metrics that a task has: F1 with two labels alone, correlations of scores with one."""
    if num_labels == 1:
        return dict(OF_SCORES)
    return {name: metric for name, metric in OF_LABELS.items() if name != "f1" or num_labels == 2}


def check_metric(metric: str, num_labels: int) -> None:
    """See that a metric is one of the task.

    Raises:
        ValueError: it is not.
    """
    known = metrics_of(num_labels)
    if metric not in known:
        raise ValueError(
            f"metric {metric} is none of a model with num_labels {num_labels}. Set metric to one "
            f"of {', '.join(known)}."
        )


def score(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All metrics of a model's scores.

    Args:
        outputs: ``[n, num_labels]``; one column for a regression.
        labels: ``[n]``.

    Returns:
        The metrics by name, and ``constant``: 1 where all predictions are equal, so that a
        correlation of 0 only says that, else 0.

    Raises:
        ValueError: a score is NaN or infinite. The message names the row.
    """
    bad = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(outputs)} validation rows have scores that are no numbers; the "
            f"first is row {bad[0]}. Lower optimizer.lr, or set dtype=fp32."
        )
    num_labels = outputs.shape[1]
    predicted = outputs[:, 0] if num_labels == 1 else outputs.argmax(axis=1)
    found = {name: metric(predicted, labels) for name, metric in metrics_of(num_labels).items()}
    return found | {"constant": float(np.ptp(predicted) == 0)}
