"""Text of a run as HTML: whatever is in it is shown, and nothing of it is obeyed."""

from __future__ import annotations

import html
import math
import unicodedata

LONGEST = 1200  # characters of a prompt or an answer that a page shows

# What changes how the text around it is shown: control characters, overrides of the reading
# direction and other format characters, halves of surrogate pairs, private and unassigned ones.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def shown(value: object, longest: int = LONGEST) -> str:
    """Return a value as text for HTML, inside an element or a quoted attribute's neighbour.

    ``<``, ``>``, ``&`` and quotes are escaped. Characters that a browser would hide or obey are
    written as their number, such as ``U+202E``. Line ends and tabs stay. Text beyond ``longest``
    characters is left out, and its length is said.
    """
    text = str(value)
    rest = len(text) - longest
    found = "".join(map(_character, text[:longest]))
    return f'{found} <span class="rest">… {rest:,} characters more</span>' if rest > 0 else found


def plain(value: object, longest: int = 200) -> str:
    """Return a value as text for a quoted attribute, a title or a description, where no element
    may stand.
    """
    text = str(value)
    cut = text[:longest] + ("…" if len(text) > longest else "")
    return html.escape("".join(_number(c) if _is_hidden(c) else c for c in cut))


def number(value: float | None) -> str:
    """Return a number in four significant digits. None and what is not finite become a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return a time for people, such as ``1 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _character(character: str) -> str:
    if _is_hidden(character):
        return f'<span class="code">{_number(character)}</span>'
    return html.escape(character)


def _is_hidden(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in _HIDDEN


def _number(character: str) -> str:
    return f"U+{ord(character):04X}"
