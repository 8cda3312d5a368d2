"""Drawings: that marks lie where the numbers say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasa_tune.components.reports.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LEVELS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Line,
    bars,
    heat_map,
    level,
    line_chart,
    log_ticks,
    thinned,
    ticks,
)

WORDS = {"title": "t", "x_label": "step", "y_label": "loss"}


def places(drawing):
    """The points of each line, in units of the drawing."""
    paths = re.findall(r'<path class="line [^"]*" d="M([^"a-z]+)"', drawing)
    return [[tuple(map(float, p.split())) for p in path.split("L")] for path in paths]


def test_points_lie_in_proportion():
    (line,) = places(line_chart([Line("a", [(0, 1.0), (5, 2.0), (10, 4.0)])], **WORDS))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1 / 3, abs=0.01)
    assert HEIGHT - BOTTOM > y0 > y1 > y2 > TOP  # upwards is towards zero


def test_a_logarithmic_axis_is_one_of_ratios_and_leaves_out_what_is_not_positive():
    (line,) = places(
        line_chart([Line("a", [(0, 1.0), (1, 10.0), (2, 100.0), (3, 0.0)])], log=True, **WORDS)
    )
    ys = [y for _, y in line]
    assert len(ys) == 3
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(3, -1.0), (3, 1.0)]])
@pytest.mark.parametrize("log", [False, True])
def test_degenerate_lines_are_drawn(points, log):
    drawing = line_chart([Line("a", points)], log=log, **WORDS)
    assert "nan" not in drawing
    assert drawing.startswith("<svg")


def test_no_points_no_drawing():
    assert line_chart([Line("a", [])], **WORDS) == ""


@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=300), st.integers(4, 40)
)
def test_thinning_keeps_order_and_extremes(values, most):
    points = list(enumerate(values))
    kept = thinned(points, most)
    assert len(kept) <= max(most, 0) or len(kept) == len(points)
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    assert min(values) in [y for _, y in kept]
    assert max(values) in [y for _, y in kept]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_inside(low, size):
    found = ticks(low, low + size)
    assert len(found) <= 6
    assert all(low - 1e-6 * size <= tick <= low + 1.000001 * size for tick in found)


def test_ticks_of_a_logarithmic_axis():
    assert log_ticks(0.9, 2000) == [1, 10, 100, 1000]
    assert log_ticks(0.9, 30) == [1, 2, 5, 10, 20]
    assert len(log_ticks(1e-12, 1e12)) <= 6
    assert log_ticks(3.0, 4.0) == [3.0]


def test_an_axis_maps_its_ends():
    axis = Axis(2.0, 6.0, 10, 110)
    assert [axis.at(x) for x in (2.0, 3.0, 6.0)] == [10, 35, 110]


def test_shades_are_even_parts_and_cells_are_where_they_belong():
    assert [level(x, 0, 1) for x in (0.0, 0.05, 0.1001, 0.95, 1.0)] == [0, 0, 1, 9, 9]
    assert level(3, 3, 3) < LEVELS
    values = [[0.0, 1.0, None], [float("nan"), 0.5, 0.5]]
    drawing = heat_map(
        values, title="t", rows=["a", "b"], columns=["x", "y", "z"], low=0, high=1, square=True
    )
    cells = {
        int(shade): [tuple(map(float, c.split())) for c in re.findall(r"M([\d.]+ [\d.]+)", path)]
        for shade, path in re.findall(r'<path class="h(\d)" d="([^"]*)"', drawing)
    }
    assert {shade: len(found) for shade, found in cells.items()} == {0: 1, 9: 1, 5: 2}
    ((x0, y0),), ((x1, y1),), ((x2, y2), (x3, y3)) = cells[0], cells[9], cells[5]
    assert y0 == y1 == TOP
    assert y2 == y3 > y0
    assert x2 == x1
    assert x3 - x2 == pytest.approx(x1 - x0, abs=0.11)


def test_bars_are_as_long_as_their_values():
    drawing = bars([("a", 1.0, "1 s"), ("b", 4.0, "4 s")], title="time")
    short, long = map(float, re.findall(r'class="bar"[^>]* width="([\d.]+)"', drawing))
    assert long / short == pytest.approx(4, rel=0.01)
    assert 'aria-label="time: a 1 s; b 4 s."' in drawing
