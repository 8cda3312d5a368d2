"""JSON objects in answers, which may have other text around them."""

from __future__ import annotations

from typing import Any

from kasa_tune.components.services.asking import MalformedError
from kasa_tune.json_text import parse_json


def object_in(text: str) -> dict[str, Any]:
    """The JSON object from the first ``{`` to the last ``}``.

    Raises:
        MalformedError: there is none, or what stands there is no JSON.
    """
    start, end = text.find("{"), text.rfind("}")
    try:
        found = parse_json(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise MalformedError("no JSON object")
    return found
