"""SIGINT and SIGTERM as a request to finish the running step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """While active, SIGINT and SIGTERM are remembered instead of obeyed; a second one is obeyed at once.

    ``received`` is the signal's number or None. The exit status of a program that stops for signal n is ``128 + n``.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)
