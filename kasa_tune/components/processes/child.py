"""A process that does a part of the work by itself, with all its memory to itself."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

_UNITS = 2**30 if sys.platform == "darwin" else 2**20  # of ru_maxrss, in a GiB


class Children:
    """Processes one after another. On SIGTERM and Ctrl-C the running one gets SIGTERM, so that it can save and end, and
    no other one is started.

    Attributes:
        stopped: the first signal that came. None so far.
    """

    def __init__(self) -> None:
        self.stopped: int | None = None
        self._running: subprocess.Popen | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = self.stopped or number
        if self._running is not None:
            with suppress(ProcessLookupError):
                self._running.send_signal(signal.SIGTERM)

    def run(
        self, command: Sequence[str], log: Path, *, waiting: Callable[[], object] = lambda: None
    ) -> tuple[int, float]:
        """Run a command to its end. If a process that was started with the same log still runs,
        because its parent has been killed, wait for its end first.

        Args:
            command: the program and its arguments.
            log: file that all it prints is appended to.
            waiting: called once if there is a process to wait for.

        Returns:
            Its exit status, of one that a signal ended 128 + the signal's number; and the most memory that it or a
            process of its held, in GiB.
        """
        with log.open("ab") as file:
            self._lock(file, waiting)
            if self.stopped:
                return 128 + self.stopped, 0.0
            # In a session of its own, a Ctrl-C reaches it only through us.
            self._running = subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True
            )
            _, status, usage = os.wait4(self._running.pid, 0)
        code = self._running.returncode = os.waitstatus_to_exitcode(status)
        self._running = None
        return (code if code >= 0 else 128 - code), usage.ru_maxrss / _UNITS

    def _lock(self, file: BufferedWriter, waiting: Callable[[], object]) -> None:
        """Lock the log. The process that prints into it inherits the lock and holds it as long as it
        lives, from its first moment on.
        """
        told = False
        while not self.stopped:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    waiting()
                told = True
                time.sleep(0.5)
            except OSError:  # some network file systems have no locks
                return None
        return None
