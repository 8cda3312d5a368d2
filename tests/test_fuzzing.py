"""The watch of the fuzz tests sees what is run and what is changed outside the folders it is given."""

import os
import subprocess
import sys

import pytest

from tests.fuzzing import examples, watched


def write(folder):
    (folder / "file").write_text("x")


@pytest.mark.parametrize(
    ("act", "event"),
    [
        (write, "open"),
        (lambda folder: (folder / "more").mkdir(), "os.mkdir"),
        (lambda folder: (folder / "old").rename(folder / "new"), "os.rename"),
        (lambda folder: (folder / "old").unlink(), "os.remove"),
        (lambda folder: (folder / "link").symlink_to("old"), "os.symlink"),
        (lambda folder: os.system("true"), "os.system"),
        (lambda folder: subprocess.run([sys.executable, "-c", ""], check=True), "subprocess.Popen"),
    ],
)
def test_what_is_done_elsewhere_is_seen(act, event, tmp_path):
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    inside.mkdir(), elsewhere.mkdir()
    (elsewhere / "old").touch()
    with pytest.raises(AssertionError, match=event), watched(inside):
        act(elsewhere)


def test_what_is_done_inside_is_let_be(tmp_path):
    with watched(tmp_path):
        write(tmp_path)
        (tmp_path / "file").read_text()
        (tmp_path / "file").unlink()


def test_the_number_of_examples(monkeypatch):
    monkeypatch.setenv("FUZZ_EXAMPLES", "10000")
    asked = [examples(kind, quick=7) for kind in ("configs", "files", "folders")]
    assert asked == [10_000, 1_000, 500]
    monkeypatch.delenv("FUZZ_EXAMPLES")
    assert examples("folders", quick=7) == 7
