r"""Final answers of worked solutions: the last number (GSM8K), the last boxed expression (MATH)."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANSWER_IS = re.compile(r"answer is:?(.*)", re.IGNORECASE)
_BOXES = ("\\boxed", "\\fbox")


def last_number(text: str) -> Decimal | None:
    """The last number in a text, commas left out; None where there is none.

    A minus sign that follows a digit or a letter, as in 7-3, is no part of the number.
    """
    found = None
    for match in _NUMBER.finditer(text):
        number = match[0]
        if number.startswith("-") and match.start() and text[match.start() - 1].isalnum():
            number = number[1:]
        found = number
    return None if found is None else Decimal(found.replace(",", ""))


def marked_number(text: str) -> Decimal | None:
    """The number after the last ``####``, as GSM8K's solutions mark it; None where there is none."""
    _, mark, after = text.rpartition("####")
    match = _NUMBER.search(after) if mark else None
    return Decimal(match[0].replace(",", "")) if match else None


def boxed_expression(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, or the word after a ``\boxed`` without braces; None without one."""
    start = max(text.rfind(box) for box in _BOXES)
    if start < 0:
        return None
    rest = re.sub(r"^\\(boxed|fbox)", "", text[start:], count=1)
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for position, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[1:position]
    return None  # it was cut off


def final_expression(text: str) -> str | None:
    """The boxed expression of a solution, or else what stands after its last "answer is"; None without either."""
    boxed = boxed_expression(text)
    if boxed is not None:
        return boxed
    found = _ANSWER_IS.findall(text)
    return found[-1].strip().rstrip(".").strip("$ ") if found else None


def same_expression(given: str, wanted: str) -> bool:
    """Whether two expressions in LaTeX are equal once their spelling is (the rules of MATH, Hendrycks 2021)."""
    left, right = normalized_expression(given), normalized_expression(wanted)
    if left == right:
        return True
    numbers = _as_number(left), _as_number(right)
    return None not in numbers and numbers[0] == numbers[1]


_DROPPED = (
    "\n", "\\!", "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$", "\\%", "%", "\\,", "\\;", "\\ ",
)  # fmt: skip
_REPLACED = (("tfrac", "frac"), ("dfrac", "frac"), ("\\\\", "\\"))


def normalized_expression(text: str) -> str:
    r"""An expression in LaTeX in one of its spellings.

    Signs that carry no value, units (``\text{ cm}``), the left side of a short equation and spaces are left out;
    ``\frac12``, ``\sqrt3``, ``1/2`` and ``0.5`` become ``\frac{1}{2}``, ``\sqrt{3}``, ``\frac{1}{2}``, ``\frac{1}{2}``.
    """
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for sign in _DROPPED:
        text = text.replace(sign, "")
    text = re.sub(r"\\text\{ [^{}]*\}$", "", text.strip())
    text = re.sub(r"(^|\{)\s*\.(?=\d)", r"\g<1>0.", text)
    parts = text.split("=")
    if len(parts) == 2 and len(parts[0].strip()) <= 2:
        text = parts[1]
    text = re.sub(r"\\sqrt\s*([^{\s\[])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac(\{[^{}]*\})([^{])", r"\\frac\1{\2}", text)
    if text == "0.5":
        return "\\frac{1}{2}"
    slash = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return f"\\frac{{{slash[1]}}}{{{slash[2]}}}" if slash else text


def _as_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
