"""The arithmetic of a comparison, on numbers small enough to work out by hand."""

import pytest

from kasa_tune.components.reports.comparison import (
    Comparison,
    Trained,
    paired_difference,
    t_quantile,
)

# Student's distribution, as printed in statistical tables.
TABLE = {
    (0.95, 1): 12.7062, (0.95, 2): 4.3027, (0.95, 3): 3.1824, (0.95, 4): 2.7764,
    (0.95, 9): 2.2622, (0.95, 10): 2.2281, (0.95, 30): 2.0423, (0.99, 4): 4.6041,
    (0.9, 5): 2.0150, (0.5, 1): 1.0, (0.95, 120): 1.9799,
}  # fmt: skip


@pytest.mark.parametrize("given", TABLE)
def test_quantiles_are_those_of_the_tables(given):
    assert t_quantile(*given) == pytest.approx(TABLE[given], abs=5e-5)


def test_paired_difference():
    found = paired_difference({1: 1.0, 2: 2.0, 3: 3.0, 9: 0.0}, {1: 2.0, 2: 4.0, 3: 6.0})
    assert (found.mean, found.pairs) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert found.low == pytest.approx(4.0 - found.high)
    assert paired_difference({1: 1.0}, {1: 3.0}).low is None
    assert paired_difference({1: 1.0}, {2: 3.0}) is None


def run(method, lr, seed, *values, metric="val_loss"):
    """Validated at steps 0, 2, 4 ...; a step takes half a second, every second one is logged."""
    lines = [{"step": 2 * i, metric: v, "seconds": 0.5} for i, v in enumerate(values)]
    return Trained(method, lr, seed, lines, 10)


RUNS = [
    run("lora", 0.1, 1, 9.0, 4.0, 3.0),
    run("lora", 0.2, 1, 9.0, 2.0, 2.5),
    run("lora", 0.2, 2, 9.0, 3.0, 1.5),
    run("kasa", 0.1, 1, 9.0, 2.0, 1.0),
    run("kasa", 0.2, 1, 9.0, float("nan"), float("nan")),
    run("kasa", 0.1, 2, 9.0, 3.0, 3.0),
]


def test_each_method_at_its_best_rate():
    found = Comparison(RUNS)
    assert [found.best_rate(method) for method in ("lora", "kasa")] == [0.2, 0.1]
    assert found.rates("lora")[0.2].count == 1  # over the seed that both rates have
    told = found.summary()["methods"]
    assert told["lora"]["final"]["mean"] == 2.0
    assert told["lora"]["best"]["mean"] == 1.75
    assert told["lora"]["at_edge_of_sweep"]
    assert told["kasa"]["difference"]["mean"] == 0.0
    assert found.goal == 2.0
    assert [found.reached(each) for each in found.chosen("lora").values()] == [(2, 1.0), (4, 2.0)]
    assert [found.reached(each) for each in found.chosen("kasa").values()] == [(2, 1.0), None]
    assert "| kasa | 0.1 (end of the sweep) | 2 | 2 ± 1.4 |" in found.table()
    assert "2 (1 of 2)" in found.table()


def test_of_a_metric_that_is_better_when_it_is_higher():
    runs = [
        run("lora", None, 1, 0.0, 0.5, 0.4, metric="m"),
        run("kasa", None, 1, 0.0, 0.3, 0.6, metric="m"),
    ]
    found = Comparison(runs, "m", lower_is_better=False, target=0.5)
    assert found.best(runs[0]) == 0.5
    assert [found.reached(each) for each in runs] == [(2, 1.0), (4, 2.0)]
    assert (
        Comparison(runs, "m", reference="dora").summary()["methods"]["kasa"]["difference"] is None
    )
