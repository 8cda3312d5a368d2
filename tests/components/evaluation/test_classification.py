"""GLUE's metrics against numpy's correlations and their definitions."""

import numpy as np
import pytest

from kasa_tune.components.evaluation import classification as metrics


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_numpys(seed):
    rng = np.random.default_rng(seed)
    given, predicted = rng.integers(0, 6, 60) / 2, rng.integers(0, 20, 60) / 7  # with ties
    expected = np.corrcoef(given, predicted)[0, 1]
    assert metrics.pearson(predicted, given) == pytest.approx(expected, abs=1e-14)

    def ranks(values):  # of equal values the mean of the places that they could have
        return [np.mean([np.sum(values < v) + 1, np.sum(values <= v)]) for v in values]

    expected = np.corrcoef(ranks(given), ranks(predicted))[0, 1]
    assert metrics.spearman(predicted, given) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_matthews_is_the_correlation_of_one_hot_labels(num_labels):
    rng = np.random.default_rng(num_labels)
    given = rng.integers(0, num_labels, 80)
    predicted = np.where(rng.random(80) < 0.6, given, rng.integers(0, num_labels, 80))
    one_hot = [np.eye(num_labels)[labels] for labels in (given, predicted)]
    x, y = (matrix - matrix.mean(0) for matrix in one_hot)
    expected = np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))
    assert metrics.matthews(predicted, given) == pytest.approx(expected, abs=1e-14)


def test_a_case_by_hand():
    given, predicted = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0])
    assert metrics.accuracy(predicted, given) == pytest.approx(4 / 6)
    assert metrics.f1(predicted, given) == pytest.approx(4 / 6)  # precision and recall are 2/3
    assert metrics.matthews(predicted, given) == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert metrics.f1(np.zeros(2, int), np.zeros(2, int)) == 0.0


def test_constant_predictions_have_no_correlation_and_say_so():
    labels = np.array([0, 1, 1])
    found = metrics.score(np.tile([0.3, 0.2], (3, 1)), labels)
    assert found == {"accuracy": 1 / 3, "f1": 0.0, "matthews": 0.0, "constant": 1.0}
    found = metrics.score(np.ones((3, 1)), labels.astype(float))
    assert found == {"pearson": 0.0, "spearman": 0.0, "constant": 1.0}


def test_scores_that_are_no_numbers_are_refused_with_their_row():
    outputs = np.array([[0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]])
    with pytest.raises(ValueError, match=r"2 of 3 validation rows .* first is row 1"):
        metrics.score(outputs, np.array([0, 1, 0]))


@pytest.mark.parametrize(("metric", "num_labels"), [("pearson", 2), ("accuracy", 1), ("f1", 3)])
def test_a_metric_of_another_task_is_refused(metric, num_labels):
    with pytest.raises(ValueError, match="Set metric to one of"):
        metrics.check_metric(metric, num_labels)
