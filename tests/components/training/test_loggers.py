"""The metrics file: nothing lost in a float, nothing left over after a resume."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kasa_tune.components.training.loggers import JSONLLogger, SilentLogger, read_metrics
from tests.fuzzing import bounded


@pytest.fixture
def logger(tmp_path):
    logger = JSONLLogger(str(tmp_path / "new" / "folder"))
    yield logger
    logger.close()


def test_lines_are_readable_as_soon_as_they_are_logged(logger):
    logger.log_dict({"loss": 2.5, "lr": 1e-4}, step=1)
    assert read_metrics(logger.path) == [{"step": 1, "loss": 2.5, "lr": 1e-4}]
    logger.log("val_loss", 2.0, step=2)
    assert read_metrics(logger.path)[1] == {"step": 2, "val_loss": 2.0}
    assert logger.path.name == "metrics.jsonl"


@settings(max_examples=200, deadline=None)
@given(value=st.floats())
def test_floats_come_back_bit_for_bit(value, tmp_path_factory):
    logger = JSONLLogger(str(tmp_path_factory.getbasetemp() / "floats"))
    logger.log("loss", value, step=1)
    logger.close()
    found = read_metrics(logger.path)[-1]["loss"]
    assert found == value or (math.isnan(found) and math.isnan(value))
    assert math.copysign(1, found) == math.copysign(1, value) or math.isnan(value)


def test_tensors_are_logged_as_the_numbers_they_hold(logger):
    third = torch.tensor(1 / 3)
    logger.log_dict(
        {"loss": third, "tokens": torch.tensor(7), "half": third.bfloat16()},
        step=torch.tensor(3).item(),
    )
    (line,) = read_metrics(logger.path)
    assert line == {"step": 3, "loss": third.item(), "tokens": 7, "half": third.bfloat16().item()}
    assert torch.tensor(line["loss"]) == third


def test_a_second_logger_appends(logger):
    logger.log("loss", 1.0, step=1)
    again = JSONLLogger(str(logger.path.parent))
    again.log("loss", 2.0, step=2)
    again.close()
    assert [line["step"] for line in read_metrics(logger.path)] == [1, 2]


def test_rewinding_drops_later_lines_and_a_torn_one_and_goes_on(logger):
    for step in range(1, 7):
        logger.log_dict({"loss": step / 3}, step=step)
    logger.log("val_loss", 0.5, step=4)
    logger.close()
    with logger.path.open("a") as file:
        file.write('{"step": 3, "lo')  # the machine went down in mid-line
    resumed = JSONLLogger(str(logger.path.parent))
    resumed.rewind(4)
    resumed.log_dict({"loss": 9.0}, step=5)
    resumed.close()
    lines = read_metrics(logger.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5]
    assert lines[:4] == [{"step": step, "loss": step / 3} for step in range(1, 5)]
    assert lines[-1]["loss"] == 9.0
    assert [path.name for path in logger.path.parent.iterdir()] == ["metrics.jsonl"]


def test_rewinding_to_the_start_leaves_nothing(logger):
    logger.log("loss", 1.0, step=1)
    logger.rewind(0)
    assert read_metrics(logger.path) == []


def test_a_kill_while_rewinding_loses_no_line(logger, monkeypatch):
    for step in (1, 2, 3):
        logger.log("loss", 1.0, step=step)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            logger.rewind(2)
    assert [line["step"] for line in read_metrics(logger.path)] == [1, 2, 3]


def test_a_torn_last_line_is_left_out_silently_and_damage_before_it_with_a_warning(
    tmp_path, caplog
):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert not caplog.text
    path.write_text('{"step": 1, "lo\n{"step": 2, "loss": 2.0}\n')
    assert read_metrics(path) == [{"step": 2, "loss": 2.0}]
    assert "1 lines of" in caplog.text


DAMAGED = [
    b'{"step": 1, "lo',
    b"[1]",
    b"null",
    b'{"step": "1"}',
    b'{"step": true}',
    b'{"loss": 1.0}',
    b'{"step": 1, "\xff": 2}',
    b"\x00\x00",
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line)[:20])
def test_an_unreadable_line_is_kept_aside_and_costs_no_other(logger, line, caplog):
    logger.log("loss", 1.0, step=1)
    logger.close()
    with logger.path.open("ab") as file:
        file.write(line + b"\n")
    again = JSONLLogger(str(logger.path.parent))
    again.log("loss", 2.0, step=2)
    again.log("loss", 3.0, step=3)
    again.rewind(2)
    again.close()
    assert [entry["step"] for entry in read_metrics(logger.path)] == [1, 2]
    assert (logger.path.parent / "metrics.jsonl.unreadable").read_bytes() == line + b"\n"
    assert "metrics.jsonl.unreadable" in caplog.text


GOOD = st.builds(
    lambda step, loss: json.dumps({"step": step, "loss": loss}).encode(),
    st.integers(0, 9) | st.integers(),
    st.floats(allow_nan=False) | st.text(max_size=4) | st.none(),
)
BAD = st.one_of(
    st.sampled_from([*DAMAGED, b'{"step": ' + b"9" * 5000 + b"}", b"{" * 2000]),
    st.binary(max_size=40).filter(lambda junk: b"\n" not in junk and b"step" not in junk),
)


@pytest.mark.fuzz
@bounded("files", quick=200)
@given(
    lines=st.lists(GOOD.map(lambda line: (True, line)) | BAD.map(lambda line: (False, line))),
    torn=st.just(b"") | BAD,
    step=st.integers(0, 9),
)
def test_any_bytes_in_the_log_cost_no_good_line(lines, torn, step, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    path.write_bytes(b"".join(line + b"\n" for _, line in lines) + torn)
    good = [line for is_good, line in lines if is_good]
    assert read_metrics(path) == [json.loads(line) for line in good]
    logger = JSONLLogger(str(path.parent))
    logger.rewind(step)
    logger.log("loss", 1.0, step=step + 1)
    logger.close()
    kept = [line for line in good if json.loads(line)["step"] <= step]
    assert path.read_bytes().splitlines()[:-1] == kept
    bad = b"".join(line + b"\n" for is_good, line in lines if not is_good and line.strip())
    aside = path.with_name("metrics.jsonl.unreadable")
    assert (aside.read_bytes() if bad else b"") == bad
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("removed", ["file", "folder"])
def test_a_log_that_is_removed_while_the_run_writes_it_begins_anew(logger, removed, caplog):
    logger.log("loss", 1.0, step=1)
    logger.path.unlink() if removed == "file" else shutil.rmtree(logger.path.parent)
    logger.log("loss", 2.0, step=2)
    logger.log("loss", 3.0, step=3)
    assert [entry["step"] for entry in read_metrics(logger.path)] == [2, 3]
    assert caplog.text.count("was removed") == 1


def test_the_config_is_kept_beside_the_metrics_resolved(logger):
    logger.log_config(
        OmegaConf.create({"output_dir": "/runs/a", "log_dir": "${output_dir}/log", "lr": 2e-4})
    )
    found = OmegaConf.load(logger.path.parent / "config.yaml")
    assert found == {"output_dir": "/runs/a", "log_dir": "/runs/a/log", "lr": 2e-4}
    assert "${" not in (logger.path.parent / "config.yaml").read_text()


def test_a_silent_logger_takes_what_another_does_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    logger = SilentLogger()
    logger.log_config(OmegaConf.create({"lr": 2e-4}))
    logger.log("loss", 1.0, step=1)
    logger.log_dict({"loss": torch.tensor(1.0)}, step=2)
    logger.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    asked = {name for name in vars(JSONLLogger) if not name.startswith("_")} - {"rewind"}
    assert all(callable(getattr(logger, name)) for name in asked)
