"""The rows of a synthetic set with where each came from, and the counts of how they were won."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Counts:
    """How many there were, so that every row asked for is accounted for.

    ``asked = unanswered + missing + bad + over + duplicates + contaminated + kept``.

    Args:
        prompts: questions, by what became of them.
        asked: rows that the questions asked for.
        unanswered: of questions without an answer that can be used.
        missing: that an answer gave fewer of.
        bad: entries that are no pair.
        duplicates: by how they are similar to an earlier row.
        contaminated: by how they are similar to a test row.
        over: new rows beyond those wanted.
        kept: in the set.
        malformed: answers that could not be used, for which others were asked.
    """

    prompts: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    unanswered: int = 0
    missing: int = 0
    bad: int = 0
    duplicates: Counter[str] = field(default_factory=Counter)
    contaminated: Counter[str] = field(default_factory=Counter)
    over: int = 0
    kept: int = 0
    malformed: int = 0

    @property
    def parsed(self) -> int:
        """Rows that were read as pairs."""
        return self.asked - self.unanswered - self.missing - self.bad

    def check(self) -> None:
        """See that the counts add up."""
        told = sum(self.duplicates.values()) + sum(self.contaminated.values())
        assert self.parsed == told + self.over + self.kept, self

    def table(self) -> str:
        """The counts, a line each."""
        lines = [
            ("rows asked for", self.asked, _listed(self.prompts, "questions")),
            ("- without an answer", self.unanswered, f"{self.malformed} answers were malformed"),
            ("- missing in an answer", self.missing, ""),
            ("- no pair of texts", self.bad, ""),
            ("= parsed", self.parsed, ""),
            ("- contaminated", sum(self.contaminated.values()), _listed(self.contaminated)),
            ("- duplicates", sum(self.duplicates.values()), _listed(self.duplicates)),
            ("- more than wanted", self.over, ""),
            ("= kept", self.kept, ""),
        ]
        return "\n".join(
            f"{label:<24}{number:>9,}  {note}".rstrip() for label, number, note in lines
        )


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines: the file is complete, or as it was before."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _listed(counts: Mapping[str, int], what: str = "") -> str:
    text = ", ".join(f"{number:,} {name}" for name, number in counts.items() if number)
    return f"{sum(counts.values()):,} {what}: {text}" if what and text else text
