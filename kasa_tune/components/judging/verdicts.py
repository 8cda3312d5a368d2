"""What a judge wrote becomes numbers, or is refused as malformed."""

from __future__ import annotations

import re
from typing import Any

from kasa_tune.components.services import MalformedError
from kasa_tune.components.services.objects import object_in

CRITERIA = ("similarity", "precision")
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_SINGLE_BRACKETS = re.compile(r"\[(\d+(?:\.\d+)?)\]")
_PREFERENCE = re.compile(r"\[\[([ABC])\]\]")
_LOWEST, _HIGHEST_RATING = 1, 10


def read_assessment(text: str, highest: int) -> dict[str, float]:
    """Both scores of ``{"similarity_assessment": {"score": ..., "reason": ...}, "precision_assessment": {...}}``.

    Raises:
        MalformedError: it is no such JSON, or a score is no number from 1 to ``highest``.
    """
    tree = object_in(text)
    scores = {}
    for name in CRITERIA:
        entry = tree.get(f"{name}_assessment")
        if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str):
            raise MalformedError(f"no {name}_assessment with a score and a reason")
        scores[name] = _within(entry.get("score"), highest)
    return scores


def read_rating(text: str) -> float:
    """The last number in double brackets, or else in single ones, as FastChat falls back to them.

    Raises:
        MalformedError: there is none, or it is not from 1 to 10.
    """
    found = _RATING.findall(text) or _SINGLE_BRACKETS.findall(text)
    if not found:
        raise MalformedError("no rating in brackets")
    return _within(float(found[-1]), _HIGHEST_RATING)


def read_preference(text: str) -> str:
    """The last of ``[[A]]``, ``[[B]]`` and ``[[C]]``, as its letter.

    Raises:
        MalformedError: there is none.
    """
    if not (found := _PREFERENCE.findall(text)):
        raise MalformedError("no verdict in brackets")
    return found[-1]


def _within(score: Any, highest: int) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise MalformedError("a score is no number")
    if not _LOWEST <= score <= highest:
        raise MalformedError(f"a score is not from {_LOWEST} to {highest}")
    return float(score)
