"""How fast a server is asked, and how long to wait after a failure."""

from __future__ import annotations

import random
import threading
import time

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0


class Pace:
    """Lets calls start at most so often. Threads share one.

    Args:
        per_minute: calls started in a minute; None: no bound.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def turn(self) -> float:
        """Take the next turn, and return the seconds until it."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
            return turn - now

    def hold(self, seconds: float) -> None:
        """Let no call start for so long, as the server asks."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def back_off(failures: int, rng: random.Random) -> float:
    """Seconds to wait after so many failures in a row: twice as long each time, half of it drawn."""
    longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2**failures)
    return longest * rng.uniform(0.5, 1.0)
