"""A process that does a part of the work by itself, with all its memory to itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
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

    def run(self, command: Sequence[str], log: Path) -> tuple[int, float]:
        """Run a command to its end.

        Args:
            command: the program and its arguments.
            log: file that all it prints is appended to.

        Returns:
            Its exit status, of one that a signal ended 128 + the signal's number; and the most memory that it or a
            process of its held, in GiB.
        """
        if self.stopped:
            return 128 + self.stopped, 0.0
        with log.open("ab") as file:
            # In a session of its own, a Ctrl-C reaches it only through us.
            self._running = subprocess.Popen(
                command, stdout=file, stderr=file, start_new_session=True
            )
            _, status, usage = os.wait4(self._running.pid, 0)
        code = self._running.returncode = os.waitstatus_to_exitcode(status)
        self._running = None
        return (code if code >= 0 else 128 - code), usage.ru_maxrss / _UNITS
