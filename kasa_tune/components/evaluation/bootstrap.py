"""Numbers over samples with bootstrap intervals, and paired differences of two models.

A metric is a function of sums over the samples: accuracy is the sum of hits over the number of samples, BLEU follows
from summed n-gram counts. So a resample needs no answer to be scored again: its sums are those of the samples it drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_CHUNK = 4_000_000  # how many counts of draws are in memory at once


@dataclass(frozen=True)
class Metric:
    """A number of a set of samples.

    Args:
        sums: ``[n, m]``, what each of the n samples adds to each of m sums.
        value_of: from sums ``[..., m]`` to values ``[...]``.
        lower_is_better: as of a perplexity.
        has_interval: False where the number does not follow from resampled sums.
    """

    sums: np.ndarray
    value_of: Callable[[np.ndarray], np.ndarray]
    lower_is_better: bool = False
    has_interval: bool = True

    @property
    def value(self) -> float:
        """The number of all samples."""
        return float(self.value_of(self.sums.sum(axis=0)))


@dataclass(frozen=True)
class Estimate:
    """A value with the interval of its bootstrap distribution; None where there is none, as of a single sample."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are found: the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    Args:
        num_resamples: resamples with replacement, each as large as the set; 0 gives no intervals.
        confidence: share of the resamples that the interval holds.
        seed: of the draws. Two models that answered the same samples are compared on the same draws.
    """

    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 42

    def estimate(self, metric: Metric) -> Estimate:
        """The metric's value and interval."""
        if not self._has_interval(metric):
            return Estimate(metric.value)
        values = [metric.value_of(draws @ metric.sums) for draws in self._draws(len(metric.sums))]
        return self._interval(metric.value, values)

    def difference(self, first: Metric, second: Metric) -> Estimate:
        """``second - first``, of two models on the same samples in the same order (paired bootstrap).

        Raises:
            ValueError: the metrics are of different numbers of samples.
        """
        if len(first.sums) != len(second.sums):
            raise ValueError(
                f"A paired difference needs the same samples, got {len(first.sums)} and "
                f"{len(second.sums)}."
            )
        value = second.value - first.value
        if not self._has_interval(first):
            return Estimate(value)
        values = [
            second.value_of(draws @ second.sums) - first.value_of(draws @ first.sums)
            for draws in self._draws(len(first.sums))
        ]
        return self._interval(value, values)

    def _has_interval(self, metric: Metric) -> bool:
        return self.num_resamples > 0 and metric.has_interval and len(metric.sums) > 1

    def _draws(self, size: int) -> Iterator[np.ndarray]:
        """How often each of ``size`` samples is in each resample, ``[some resamples, size]``."""
        rng, left = np.random.default_rng(self.seed), self.num_resamples
        while left:
            rows = min(left, max(1, _CHUNK // size))
            drawn = rng.integers(size, size=(rows, size))
            drawn += np.arange(rows)[:, None] * size
            yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
            left -= rows

    def _interval(self, value: float, values: Sequence[np.ndarray]) -> Estimate:
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
        return Estimate(value, float(low), float(high))


def mean(values: Sequence[float]) -> Metric:
    """The mean of one number for each sample."""
    column = np.asarray(values, dtype=np.float64)
    return ratio(column, np.ones_like(column))


def ratio(
    numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray
) -> Metric:
    """The sum of numerators over the sum of denominators; 0 where the latter is 0."""
    return Metric(_columns(numerators, denominators), _ratio_of)


def exponential(
    numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray
) -> Metric:
    """``exp`` of a ratio of sums, such as the perplexity of summed losses over numbers of tokens."""
    return Metric(
        _columns(numerators, denominators),
        lambda sums: np.exp(_ratio_of(sums)),
        lower_is_better=True,
    )


def _columns(*columns: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)


def _ratio_of(sums: np.ndarray) -> np.ndarray:
    above, below = sums[..., 0], sums[..., 1]
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)
