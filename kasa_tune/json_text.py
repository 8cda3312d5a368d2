"""JSON from elsewhere."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Read JSON whose texts can be written again.

    Raises:
        ValueError: it is no JSON, or a text in it holds half of a surrogate pair, which is no
            character and fits in no file.
        RecursionError: it is nested too deeply.
    """
    content = json.loads(text)
    if "\\ud" in text.lower():  # only an escape can give half of a pair
        json.dumps(content, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return content
