"""What the fuzz tests share: how many examples they try, and a watch over what the tried code does to the machine.

`make fuzz` sets FUZZ_EXAMPLES, the number of configs; a tenth as many data files and logs are tried, and a twentieth as
many folders. Without it each test tries the few examples that it names.
"""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from kasa_tune.components.exchange.patterns import _MATCHER

_SHARES = {"configs": 1, "files": 10, "folders": 20}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.truncate",
}
_COMMANDS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.startfile",
    "socket.connect",
}
# Our own: one renders chat templates, one tries the patterns of adapter configs. Both are bounded.
_PROCESSES = ("template_process.py", repr(_MATCHER))


def examples(kind: str, quick: int) -> int:
    """The number of examples of a test of `configs`, `files` or `folders`; `quick` in the ordinary suite."""
    asked = os.environ.get("FUZZ_EXAMPLES")
    return quick if asked is None else max(1, int(asked) // _SHARES[kind])


def bounded(kind: str, quick: int) -> settings:
    """The same examples in every run, none of which may take longer than ten seconds."""
    return settings(
        max_examples=examples(kind, quick),
        deadline=timedelta(seconds=10),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def soon():
    """Fail a block that takes longer than ten seconds, even if it waits for a file."""

    def fail(*_):
        raise AssertionError("it took longer than ten seconds")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class _Watch:
    """An audit hook: it notes commands, and changes of files outside some folders, while it has folders."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.noted: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folders:
            return
        if event in _COMMANDS:
            if not any(ours in repr(args) for ours in _PROCESSES):
                self.noted.append(f"{event} {args!r:.300}")
        elif event == "open" and args[2] & _WRITING:
            self._note(event, args[0])
        elif event in _CHANGES:
            relative_to_a_folder = event != "os.truncate" and args[-1] != -1
            if not relative_to_a_folder:
                paths = {"os.rename": args[:2], "os.link": args[1:2], "os.symlink": args[1:2]}
                for path in paths.get(event, args[:1]):
                    self._note(event, path)

    def _note(self, event: str, path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        path = os.path.realpath(os.fsdecode(path))
        # A folder that is opened to write is asked whether a file can be made in it. The file has no name.
        harmless = event == "open" and os.path.isdir(path)
        harmless |= path == "/dev/null" or path.startswith(("/proc/", "/sys/"))
        harmless |= path.endswith(".pyc") or "__pycache__" in path
        if not harmless and not any(path.startswith(folder) for folder in self.folders):
            self.noted.append(f"{event} {path}")


_watch = _Watch()
_added: list[str] = []  # a hook cannot be removed, so it is added once


@contextlib.contextmanager
def watched(*folders: Path) -> Iterator[None]:
    """Fail if a command is run or a connection made inside, or a file is changed that lies in none of the folders.

    Temporary files are made in the first folder. An inner watch takes the place of an outer one.
    """
    if not _added:
        sys.addaudithook(_watch)
        _added.append("once")
    outer = (_watch.folders, _watch.noted, tempfile.tempdir)
    _watch.folders, noted = [os.path.realpath(folder) for folder in folders], []
    _watch.noted, tempfile.tempdir = noted, str(folders[0])
    try:
        yield
    finally:
        _watch.folders, _watch.noted, tempfile.tempdir = outer
    assert not noted, sorted(set(noted))[:20]
