"""The clock of a run's phases: each moment belongs to one of them."""

import json

import pytest

from kasa_tune.components.training import Phases, phases


@pytest.fixture
def clock(monkeypatch):
    """Set the time."""
    now = [100.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


def test_phases_add_up_to_the_run(clock):
    found = Phases()
    for at, name in ((2, "reading"), (5, "training"), (6, "saving"), (10, "training")):
        clock(at)
        found.done(name)
    assert found.seconds == {"reading": 2, "training": 7, "saving": 1}
    clock(10.5)
    assert found.done("saving") == 0.5


def test_a_resumed_run_adds_to_what_there_is(clock, tmp_path):
    first = Phases()
    clock(3)
    first.done("training")
    first.write(tmp_path)
    second = Phases()
    clock(4)
    second.done("setting up")
    second.add_earlier(tmp_path)
    clock(6)
    second.done("training")
    second.write(tmp_path)
    assert json.loads((tmp_path / "phases.json").read_text()) == {"training": 5, "setting up": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["phases.json"]


def test_a_step_counts_waiting_and_logging_but_neither_validation_nor_saving(clock, tmp_path):
    first = Phases()
    at = 0.0
    for name, seconds in (
        ("setting up", 50), ("waiting for data", 1), ("forward and backward", 4), ("optimizer", 2),
    ):  # fmt: skip
        clock(at := at + seconds)
        first.done(name)
    assert first.of_step() == 7
    for name, seconds in (
        ("validation", 30), ("logging", 0.5), ("saving", 20), ("waiting for data", 2),
    ):  # fmt: skip
        clock(at := at + seconds)
        first.done(name)
    assert first.of_step() == 2.5
    first.write(tmp_path)
    second = Phases()
    second.add_earlier(tmp_path)
    clock(at + 3)
    second.done("optimizer")
    assert second.of_step() == 3
    assert "optimizer 5.0" in second.summary()
    assert f"{9 / 112.5:.1%} of them were passes and optimizer" in second.summary()


@pytest.mark.parametrize("content", [None, "", "[1]", '{"training": "x"}', '{"a": null}'])
def test_an_unreadable_file_counts_as_nothing(content, clock, tmp_path):
    if content is not None:
        (tmp_path / "phases.json").write_text(content)
    found = Phases()
    found.add_earlier(tmp_path)
    assert found.seconds == {}
