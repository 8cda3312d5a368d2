"""What a model wrote becomes pairs, or is refused. It is data throughout, and nothing of it is followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kasa_tune.components.services import MalformedError
from kasa_tune.components.services.objects import object_in
from kasa_tune.components.synthesis.pairs import Pair

LONGEST_TEXT = 20_000  # characters of an instruction or a response


@dataclass(frozen=True)
class ParsedReply:
    """The pairs of an answer, and how many entries of it were none."""

    pairs: list[Pair]
    num_bad: int


def parse_reply(text: str, *, most: int, longest: int = LONGEST_TEXT) -> ParsedReply:
    """Read ``{"contents": [{"instruction": ..., "response": ...}, ...]}``.

    Args:
        text: the answer. What stands before the first ``{`` and after the last ``}`` is ignored.
        most: the number of pairs that were asked for; those beyond are left out.
        longest: the most characters of a text.

    Raises:
        MalformedError: it is no such JSON, or no entry is a pair.
    """
    entries = object_in(text).get("contents")
    if not isinstance(entries, list):
        raise MalformedError("no list of contents")
    entries = entries[:most]
    pairs = [pair for entry in entries if (pair := _pair(entry, longest)) is not None]
    if not pairs:
        raise MalformedError("no pair")
    return ParsedReply(pairs, len(entries) - len(pairs))


def _pair(entry: Any, longest: int) -> Pair | None:
    if not isinstance(entry, dict):
        return None
    texts = [entry.get("instruction"), entry.get("response")]
    good = [text.strip() for text in texts if isinstance(text, str) and _is_text(text, longest)]
    return Pair(*good) if len(good) == len(texts) else None


def _is_text(text: str, longest: int) -> bool:
    """Whether it is text of a usable length, without control characters but for tabs and line breaks."""
    return 0 < len(text.strip()) <= longest and all(
        letter >= " " or letter in "\t\n\r" for letter in text
    )
