"""How long each phase of a run takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

FILE = "phases.json"


class Phases:
    """A clock that runs through a run. Each moment belongs to one phase, so that the phases add up
    to the run.

    Attributes:
        seconds: by phase, in the order in which the phases first ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def done(self, name: str) -> float:
        """Add the time since the last call, or since the clock was made, to a phase, and return it
        in seconds.
        """
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        self.seconds[name] = self.seconds.get(name, 0.0) + passed
        return passed

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

    def write(self, folder: Path) -> None:
        """Write ``phases.json`` into a folder."""
        rounded = {name: round(seconds, 3) for name, seconds in self.seconds.items()}
        temporary = folder / f".{FILE}.tmp"
        temporary.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / FILE)
