"""Intervals: closed forms of resampled means, pairs on the same draws, what no resample can say."""

import math

import numpy as np
import pytest

from kasa_tune.components.evaluation.bootstrap import (
    Bootstrap,
    Estimate,
    Metric,
    exponential,
    mean,
    ratio,
)

FEW, MANY = Bootstrap(num_resamples=200), Bootstrap(num_resamples=20_000)


def test_values_are_of_all_samples():
    assert mean([1, 0, 0, 1]).value == 0.5
    assert ratio([1, 2], [3, 3]).value == 0.5
    assert exponential([2.0, 4.0], [1, 2]).value == pytest.approx(math.exp(2))
    assert ratio([0, 0], [0, 0]).value == 0


def test_an_interval_is_that_of_the_binomial_distribution():
    """The mean of resampled zeros and ones is binomial: with 1000 of probability 0.3 nearly normal."""
    hits = np.arange(1000) < 300
    found = MANY.estimate(mean(hits))
    spread = 1.959964 * math.sqrt(0.3 * 0.7 / 1000)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - spread, abs=0.002)
    assert found.high == pytest.approx(0.3 + spread, abs=0.002)


def test_confidence_is_the_share_inside():
    narrow = Bootstrap(num_resamples=5000, confidence=0.5).estimate(mean(np.arange(400) % 2))
    quartile = 0.674490 * 0.5 / math.sqrt(400)
    assert narrow.high - narrow.low == pytest.approx(2 * quartile, rel=0.1)


def test_a_paired_difference_sees_only_what_changed():
    """Two models that differ in every sample by the same amount differ by it in every resample."""
    values = np.random.default_rng(0).normal(size=300)
    found = FEW.difference(mean(values), mean(values + 0.25))
    assert [found.value, found.low, found.high] == pytest.approx([0.25] * 3)
    apart = FEW.estimate(mean(values))
    assert apart.high - apart.low > 0.1


def test_seeds_decide_the_draws():
    metric = mean(np.random.default_rng(1).normal(size=50))
    assert FEW.estimate(metric) == Bootstrap(num_resamples=200).estimate(metric)
    assert FEW.estimate(metric) != Bootstrap(num_resamples=200, seed=43).estimate(metric)


def test_chunks_of_draws_change_nothing(monkeypatch):
    metric = mean(np.random.default_rng(2).normal(size=60))
    whole = FEW.estimate(metric)
    monkeypatch.setattr("kasa_tune.components.evaluation.bootstrap._CHUNK", 60 * 7)
    assert FEW.estimate(metric) == whole


def test_without_resamples_there_is_a_value_alone():
    assert Bootstrap(num_resamples=0).estimate(mean([1, 0])) == Estimate(0.5)
    alone = Metric(np.ones((3, 1)), lambda sums: sums[..., 0] / 3, has_interval=False)
    assert FEW.estimate(alone) == Estimate(1.0)
    assert FEW.difference(alone, alone) == Estimate(0.0)


def test_one_sample_tells_nothing_of_its_spread():
    assert FEW.estimate(mean([0.7])) == Estimate(0.7)
    assert FEW.difference(mean([0.5]), mean([0.75])) == Estimate(0.25)


def test_other_samples_are_no_pairs():
    with pytest.raises(ValueError, match="same samples, got 2 and 3"):
        FEW.difference(mean([0, 1]), mean([0, 1, 1]))
