"""Answers in words, held against references: normalization, exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)
_QUOTES = set("‘’´`")


def squad_normalized(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as the script of SQuAD 1.1 compares answers."""
    kept = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def triviaqa_normalized(text: str) -> str:
    """As the script of TriviaQA compares answers: like SQuAD's, but punctuation and curly quotes become spaces."""
    spaced = "".join(
        " " if letter in _PUNCTUATION or letter in _QUOTES else letter for letter in text.lower()
    )
    return " ".join(_ARTICLES.sub(" ", spaced).split())


def stripped(text: str) -> str:
    """The text without spaces around it."""
    return text.strip()


NORMALIZATIONS: dict[str, Callable[[str], str]] = {
    "squad": squad_normalized,
    "triviaqa": triviaqa_normalized,
    "none": stripped,
}


def exact_match(
    answer: str, references: Sequence[str], normalize: Callable[[str], str] = squad_normalized
) -> float:
    """1 if the answer equals one of the references, both normalized, else 0."""
    given = normalize(answer)
    return float(any(given == normalize(reference) for reference in references))


def f1(
    answer: str, references: Sequence[str], normalize: Callable[[str], str] = squad_normalized
) -> float:
    """The harmonic mean of precision and recall of words, of the reference where it is largest (SQuAD 1.1)."""
    given = normalize(answer).split()
    return max((_f1(given, normalize(reference).split()) for reference in references), default=0.0)


def _f1(given: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(given) & Counter(wanted)).values())
    if not shared:
        return 0.0
    return 2 * shared / (len(given) + len(wanted))
