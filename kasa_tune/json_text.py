"""JSON from elsewhere."""

import json
from pathlib import Path
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


def read_json_lines(path: Path | str, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file.

    Args:
        path: of the file.
        limit: only read so many.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no rows, is not in UTF-8, or a line is no JSON object; the line is named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    rows: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8-sig"))
            except RecursionError:
                raise ValueError(f"{path}, line {number} is nested too deeply.") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is {row!r:.60}, and must be an object.")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows
