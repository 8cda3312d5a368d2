"""Learning-rate schedules against closed forms and torchtune's, and through a resume."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from kasa_tune.components.training import lr_schedules
from kasa_tune.components.training.lr_schedules import cosine_schedule, linear_schedule

PEAK = 0.3


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def rates(make_schedule, steps, **options):
    """The rate that each of ``steps`` optimizer steps would use."""
    sgd = optimizer()
    schedule = make_schedule(sgd, **options)
    found = []
    for _ in range(steps):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    return found


@settings(deadline=None)
@given(total=st.integers(1, 40), warmup=st.integers(0, 50))
def test_cosine_is_torchtunes(total, warmup):
    ours = rates(cosine_schedule, total, num_training_steps=total, num_warmup_steps=warmup)
    theirs = rates(
        get_cosine_schedule_with_warmup, total, num_training_steps=total, num_warmup_steps=warmup
    )
    assert ours == pytest.approx(theirs, abs=1e-15)


@settings(deadline=None)
@given(total=st.integers(1, 40), warmup=st.integers(0, 39), floor=st.sampled_from([0.0, 0.1, 1.0]))
def test_cosine_in_closed_form(total, warmup, floor):
    warmup = min(warmup, total - 1)
    expected = []
    for step in range(total):
        if step < warmup:
            expected.append(PEAK * step / warmup)
        else:
            half_cosine = math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2
            expected.append(PEAK * (floor + (1 - floor) * half_cosine))
    options = {"num_training_steps": total, "num_warmup_steps": warmup, "min_lr_ratio": floor}
    assert rates(cosine_schedule, total, **options) == pytest.approx(expected, abs=1e-15)


@settings(deadline=None)
@given(total=st.integers(1, 40), warmup=st.integers(0, 39))
def test_linear_in_closed_form(total, warmup):
    warmup = min(warmup, total - 1)
    up = [PEAK * step / warmup for step in range(warmup)]
    down = [PEAK * (total - step) / (total - warmup) for step in range(warmup, total)]
    found = rates(linear_schedule, total, num_training_steps=total, num_warmup_steps=warmup)
    assert found == pytest.approx(up + down, abs=1e-15)


@pytest.mark.parametrize(("schedule", "end"), [(cosine_schedule, 0.0), (linear_schedule, 0.0)])
def test_rates_stay_at_the_end_after_the_last_step(schedule, end):
    assert rates(schedule, 20, num_training_steps=10)[10:] == pytest.approx([end] * 10, abs=1e-15)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 5), (0.11, 6), (0.0, 0), (1.0, 50), (None, 0)])
def test_warmup_as_a_share_is_rounded_up(schedule, ratio, steps):
    by_ratio = rates(schedule, 50, num_training_steps=50, warmup_ratio=ratio)
    assert by_ratio == rates(schedule, 50, num_training_steps=50, num_warmup_steps=steps)
    if steps < 50:
        assert by_ratio[steps] == PEAK == max(by_ratio)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
@pytest.mark.parametrize("stop", [0, 3, 5, 11])
def test_a_schedule_goes_on_where_it_was_stopped(schedule, stop):
    options = {"num_training_steps": 20, "num_warmup_steps": 5}
    whole = rates(schedule, 20, **options)
    first = optimizer()
    schedule_first = schedule(first, **options)
    for _ in range(stop):
        first.step()
        schedule_first.step()
    second = optimizer()
    schedule_second = schedule(second, **options)
    second.load_state_dict(first.state_dict())
    schedule_second.load_state_dict(schedule_first.state_dict())
    rest = []
    for _ in range(stop, 20):
        rest.append(second.param_groups[0]["lr"])
        second.step()
        schedule_second.step()
    assert rest == whole[stop:]


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_warmup_steps": 3, "warmup_ratio": 0.1},
            "num_warmup_steps or as warmup_ratio, not both",
        ),
        ({"warmup_ratio": 1.1}, r"warmup_ratio must lie in \[0, 1\]; got 1.1"),
        ({"warmup_ratio": -0.1}, "got -0.1"),
        ({"num_warmup_steps": -1}, "num_warmup_steps must not be negative; got -1"),
    ],
    ids=str,
)
def test_impossible_warmups_are_refused(schedule, options, message):
    with pytest.raises(ValueError, match=message):
        schedule(optimizer(), num_training_steps=10, **options)


@pytest.mark.parametrize("floor", [-0.1, 1.5])
def test_impossible_final_rates_are_refused(floor):
    with pytest.raises(ValueError, match=rf"min_lr_ratio must lie in \[0, 1\]; got {floor}"):
        cosine_schedule(optimizer(), num_training_steps=10, min_lr_ratio=floor)


@pytest.mark.parametrize("schedule", [cosine_schedule, linear_schedule])
@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"num_warmup_steps": 11}, True),
        ({"num_warmup_steps": 10}, True),
        ({"warmup_ratio": 1.0}, True),
        ({"num_warmup_steps": 9}, False),
        ({}, False),
    ],
)
def test_a_warmup_as_long_as_the_run_is_a_warning(schedule, options, warned, monkeypatch):
    told = []
    monkeypatch.setattr(lr_schedules.log, "warning", told.append)
    rates(schedule, 10, num_training_steps=10, **options)
    assert len(told) == warned
    assert all("of the run: 10." in text and "num_warmup_steps" in text for text in told)
