"""Rows that are too similar to one that is there already: equal instructions, MinHash, ROUGE-L.

Texts are compared in lower case, by their letters and digits alone.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kasa_tune.components.synthesis.pairs import Pair

SHINGLE = 5  # characters
_FAVOUR_RECALL = (0.1, 0.9)  # what the index finds too much, exact Jaccard removes
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Likeness:
    """From when on two rows count as one.

    Equal instructions always do. Comparing by ROUGE-L takes time that grows with the square of the rows.

    Args:
        minhash: Jaccard similarity of the sets of 5-character shingles of instruction and response together, which
            candidates of a MinHash index must have; None: not compared.
        rouge_l: F1 of the longest common subsequence of the instructions' words, as Self-Instruct takes it; None: not
            compared.
        num_permutations: of the MinHash index.

    Raises:
        ValueError: datasketch is needed and not installed.
    """

    minhash: float | None = 0.8
    rouge_l: float | None = None
    num_permutations: int = 128

    def __post_init__(self) -> None:
        if self.minhash is not None:
            _datasketch()


class Similar:
    """Rows that are kept, and the search among them.

    Args:
        likeness: when two rows count as one.
    """

    def __init__(self, likeness: Likeness) -> None:
        self.likeness = likeness
        self._labels: dict[str, str] = {}  # by the normalized instruction
        self._rows: list[tuple[str, str]] = []  # normalized text, label
        self._words: list[tuple[list[str], str]] = []
        self._index: Any = None
        if likeness.minhash is not None:
            self._index = _datasketch().MinHashLSH(
                threshold=likeness.minhash,
                num_perm=likeness.num_permutations,
                weights=_FAVOUR_RECALL,
            )

    def find(self, pair: Pair) -> tuple[str, str] | None:
        """By what a pair is too similar to a row that was added (``equal``, ``minhash``, ``rouge_l``), and that row's
        label. None where it is new.
        """
        instruction = normalized(pair.instruction)
        if (label := self._labels.get(instruction)) is not None:
            return "equal", label
        if self._index is not None:
            text = normalized(f"{pair.instruction} {pair.response}")
            for number in sorted(self._index.query(self._signature(text))):
                other, label = self._rows[number]
                if jaccard(text, other) >= (self.likeness.minhash or 0):
                    return "minhash", label
        if self.likeness.rouge_l is not None:
            words = instruction.split()
            for others, label in self._words:
                if rouge_l_f1(words, others, self.likeness.rouge_l) >= self.likeness.rouge_l:
                    return "rouge_l", label
        return None

    def add(self, pair: Pair, label: str) -> None:
        """Add a row, to which later ones are compared.

        Args:
            pair: the row.
            label: what :meth:`find` says of it.
        """
        instruction = normalized(pair.instruction)
        self._labels.setdefault(instruction, label)
        if self._index is not None:
            text = normalized(f"{pair.instruction} {pair.response}")
            self._index.insert(len(self._rows), self._signature(text))
            self._rows.append((text, label))
        if self.likeness.rouge_l is not None:
            self._words.append((instruction.split(), label))

    def _signature(self, text: str) -> Any:
        signature = _datasketch().MinHash(num_perm=self.likeness.num_permutations, seed=1)
        signature.update_batch([shingle.encode() for shingle in shingles(text)])
        return signature


def normalized(text: str) -> str:
    """Its words in lower case with a space between; the text itself where it has no words."""
    return " ".join(_WORD.findall(text.lower())) or text.strip()


def shingles(text: str) -> set[str]:
    """All runs of five characters; the text itself where it is shorter."""
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def jaccard(one: str, other: str) -> float:
    """The share that two texts' shingles have in common, of all of both."""
    left, right = shingles(one), shingles(other)
    return len(left & right) / len(left | right)


def rouge_l_f1(one: list[str], other: list[str], least: float = 0.0) -> float:
    """F1 of the longest common subsequence of two lists of words; 0 where their lengths keep it below ``least``.

    The subsequence is found a machine word at a time (Hyyrö 2004): bits of ``row`` are 0 where its length grows.
    """
    total = len(one) + len(other)
    if not total or 2 * min(len(one), len(other)) < least * total:
        return 0.0
    places: Mapping[str, int] = _places(one)
    full = row = (1 << len(one)) - 1
    for word in other:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return 2 * (full ^ row).bit_count() / total


def _places(words: list[str]) -> dict[str, int]:
    places: dict[str, int] = {}
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    return places


def _datasketch() -> Any:
    try:
        return importlib.import_module("datasketch")
    except ImportError as error:
        raise ValueError(
            f"deduplication.minhash needs the package datasketch ({error}). `pip install "
            "'kasa_tune[synthesis]'` or `pip install datasketch`, or set deduplication.minhash=null."
        ) from None
