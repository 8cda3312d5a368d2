"""Folders that appear whole or not at all, whatever happens while they are written."""

import os
import signal
import stat

import pytest

from kasa_tune.components.exchange.new_folder import check_new, check_outside, new_folder
from tests.components.failing_disk import died_by_kill, in_a_process_that_dies


def write_two(path, *, between=lambda: None):
    with new_folder(path) as folder:
        (folder / "first").write_text("1")
        between()
        (folder / "deep").mkdir()
        (folder / "deep" / "second").write_text("2")


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_it_appears_with_all_its_files_and_not_before(tmp_path):
    path = tmp_path / "new" / "out"
    write_two(path, between=lambda: not path.exists() or pytest.fail("it was there too early"))
    assert names(tmp_path) == [
        "new",
        "new/out",
        "new/out/deep",
        "new/out/deep/second",
        "new/out/first",
    ]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    def fail():
        raise error

    with pytest.raises(error):
        write_two(tmp_path / "out", between=fail)
    assert names(tmp_path) == []


def test_sigterm_leaves_nothing_and_its_handler_as_it_was(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        write_two(tmp_path / "out", between=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """Its own alone: neither that of a process that lives, nor files that only look like it."""
    path = tmp_path / "out[1]"
    killed = in_a_process_that_dies(
        lambda: write_two(path, between=lambda: os.kill(os.getpid(), signal.SIGKILL))
    )
    assert died_by_kill(killed)
    assert len(names(tmp_path)) == 2
    alive = tmp_path / f".out[1].{os.getppid()}.tmp"
    alive.mkdir()
    others = [tmp_path / ".out[1].mine.tmp", tmp_path / ".out[1].1a.tmp"]
    for other in others:
        other.write_text("")
    write_two(path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(["out[1]", alive.name, *(other.name for other in others)])


def test_what_exists_is_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for existing in ("folder", "file", "link"):
        for write in (check_new, write_two):
            with pytest.raises(FileExistsError, match="exists already"):
                write(tmp_path / existing)
    assert names(tmp_path) == ["file", "folder", "link"]


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    previous = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out") as folder:
            (folder / "private").write_text("")
            (folder / "private").chmod(0o600)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out" / "private").stat().st_mode) == 0o640


def test_outside(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    check_outside(tmp_path / "run_peft", run, "adapter_checkpoint")
    for inside in (run / "x", run / "a" / "b", run, tmp_path / "other" / "checkpoints" / "x"):
        with pytest.raises(ValueError, match="choose a place outside"):
            check_outside(inside, run, "adapter_checkpoint")
