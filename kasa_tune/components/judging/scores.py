"""Verdicts become a table: means by category and model, how many there are, and how far repeats agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from kasa_tune.components.judging.protocols import Item, outcome_of_pair

ALL = "all"


@dataclass(frozen=True)
class Verdict:
    """What became of an item.

    Args:
        item: that was judged.
        repeat: which verdict on it.
        values: the numbers by name; None where no answer of the judge could be read.
        why: as in :class:`kasa_tune.components.services.Outcome`.
        malformed: answers that could not be read.
    """

    item: Item
    repeat: int
    values: dict[str, float] | None
    why: str
    malformed: int

    def record(self) -> dict[str, Any]:
        """The line of a file, without the prompt."""
        about = {key: value for key, value in vars(self.item).items() if key != "prompt"}
        rest = {"repeat": self.repeat, "values": self.values, "why": self.why}
        return about | rest | {"malformed": self.malformed}


class Scores:
    """The numbers of all verdicts.

    Args:
        verdicts: of all items and repeats.
    """

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts = list(verdicts)
        self.whys = Counter(verdict.why for verdict in verdicts)
        self.malformed = sum(verdict.malformed for verdict in verdicts)
        self._numbers = list(_paired(verdicts) if _are_pairs(verdicts) else _named(verdicts))

    def summary(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return {
            "verdicts": len(self.verdicts),
            "outcomes": dict(self.whys),
            "malformed_answers": self.malformed,
            "scores": {
                category: {
                    model: self._of(category, model)
                    for model in self._models()
                    if self._of(category, model)
                }
                for category in self._categories()
            },
            "agreement": self.agreement(),
        }

    def agreement(self) -> dict[str, dict[str, float]]:
        """By number: the share of pairs of repeats that are equal, and the mean of their absolute differences.

        It is empty where nothing was judged twice.
        """
        repeated: dict[str, dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
        for category, model, identity, name, value in self._numbers:
            repeated[name][category, model, identity].append(value)
        found = {}
        for name, values in repeated.items():
            gaps = [abs(a - b) for each in values.values() for a, b in combinations(each, 2)]
            if gaps:
                equal = sum(gap == 0 for gap in gaps) / len(gaps)
                found[name] = {"equal": equal, "mean_difference": sum(gaps) / len(gaps)}
        return found

    def table(self) -> str:
        """A row for each category and model, then how many verdicts there are, and how far repeats agree."""
        names = list(dict.fromkeys(name for *_, name, _ in self._numbers))
        rows = [["category", "model", *names, "judged", "left out"]]
        for category in self._categories():
            for model in self._models():
                found = self._of(category, model)
                cells = [f"{found[name]:.2f}" if name in found else "" for name in names]
                counts = self._counted(category, model)
                if sum(counts):
                    rows.append([category, model, *cells, *map(str, counts)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
        told = ", ".join(f"{count} {why}" for why, count in self.whys.items())
        lines.append(
            f"{len(self.verdicts)} verdicts: {told}. {self.malformed} answers were malformed, and others were asked "
            "for as long as attempts were left."
        )
        for name, by in self.agreement().items():
            lines.append(
                f"Agreement of repeats, {name}: {by['equal']:.0%} equal, mean difference "
                f"{by['mean_difference']:.2f}."
            )
        return "\n".join(line.rstrip() for line in lines)

    def _categories(self) -> list[str]:
        named = list(dict.fromkeys(verdict.item.category for verdict in self.verdicts))
        return [*named, ALL] if len(named) > 1 else named

    def _models(self) -> list[str]:
        return list(dict.fromkeys(verdict.item.model for verdict in self.verdicts))

    def _of(self, category: str, model: str) -> dict[str, float]:
        """Means by name."""
        values: dict[str, list[float]] = defaultdict(list)
        for of_category, of_model, _, name, value in self._numbers:
            if category in (of_category, ALL) and of_model == model:
                values[name].append(value)
        return {name: sum(each) / len(each) for name, each in values.items()}

    def _counted(self, category: str, model: str) -> tuple[int, int]:
        """Verdicts that there are, and those left out of the means."""
        given = [
            verdict.values is not None
            for verdict in self.verdicts
            if category in (verdict.item.category, ALL) and verdict.item.model == model
        ]
        return sum(given), len(given) - sum(given)


_Number = tuple[str, str, str, str, float]  # category, model, identity, name, value


def _named(verdicts: Iterable[Verdict]) -> Iterator[_Number]:
    """The numbers under their own names; of turns, under that of the turn and in the mean of all."""
    for verdict in verdicts:
        item = verdict.item
        for name, value in (verdict.values or {}).items():
            about = (item.category, item.model, f"{item.identity} {item.part}")
            if item.part:
                yield (*about, item.part, value)
            yield (*about, name, value)


def _are_pairs(verdicts: Sequence[Verdict]) -> bool:
    return any(verdict.item.part == "swapped" for verdict in verdicts)


def _paired(verdicts: Iterable[Verdict]) -> Iterator[_Number]:
    """Shares of wins, ties and losses, and whether both orders said the same, of pairs with both verdicts."""
    orders: dict[tuple, dict[str, float]] = defaultdict(dict)
    for verdict in verdicts:
        item = verdict.item
        if verdict.values is not None:
            key = (item.category, item.model, item.identity, verdict.repeat)
            orders[key][item.part] = verdict.values["verdict"]
    for (category, model, identity, _), each in orders.items():
        if len(each) < 2:
            continue
        won = outcome_of_pair(each["in order"], each["swapped"])
        about = (category, model, identity)
        for name, sign in (("wins", 1.0), ("ties", 0.0), ("losses", -1.0)):
            yield (*about, name, float(won == sign))
        yield (*about, "consistent", float(each["in order"] == -each["swapped"]))
