"""How long each phase of a run takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

FILE = "phases.json"
WAITING, PASSES, OPTIMIZER, LOGGING = (
    "waiting for data",
    "forward and backward",
    "optimizer",
    "logging",
)
STEP = (WAITING, PASSES, OPTIMIZER, LOGGING)


class Phases:
    """A clock that runs through a run. Each moment belongs to one phase, so that the phases add up
    to the run.

    Attributes:
        seconds: by phase, in the order in which the phases first ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since, self._counted = time.perf_counter(), 0.0

    def done(self, name: str) -> float:
        """Add the time since the last call, or since the clock was made, to a phase, and return it
        in seconds.
        """
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        self.seconds[name] = self.seconds.get(name, 0.0) + passed
        return passed

    def of_step(self) -> float:
        """Return the seconds of a step, at least a nanosecond: what has come to the phases of steps
        since the last call. Waiting for data and logging are among them; validation and saving are
        not.
        """
        before, self._counted = self._counted, self._in_steps()
        return max(self._counted - before, 1e-9)

    def _in_steps(self) -> float:
        return sum(self.seconds.get(name, 0.0) for name in STEP)

    def summary(self) -> str:
        """A line to log: seconds of each phase, and how much of the run the steps were."""
        found = "; ".join(f"{name} {seconds:,.1f}" for name, seconds in self.seconds.items())
        total = max(sum(self.seconds.values()), 1e-9)
        working = self.seconds.get(PASSES, 0.0) + self.seconds.get(OPTIMIZER, 0.0)
        return f"Seconds: {found}. {working / total:.1%} of them were passes and optimizer."

    def add_earlier(self, folder: Path) -> None:
        """Add what an earlier part of a resumed run has written. What cannot be read counts as
        nothing.
        """
        try:
            earlier = json.loads((folder / FILE).read_text(encoding="utf-8"))
            added = {str(name): float(seconds) for name, seconds in earlier.items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return
        names = dict.fromkeys([*added, *self.seconds])
        self.seconds = {n: added.get(n, 0.0) + self.seconds.get(n, 0.0) for n in names}
        self._counted = self._in_steps()

    def write(self, folder: Path) -> None:
        """Write ``phases.json`` into a folder."""
        rounded = {name: round(seconds, 3) for name, seconds in self.seconds.items()}
        temporary = folder / f".{FILE}.tmp"
        temporary.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / FILE)
