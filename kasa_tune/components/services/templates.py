"""Prompts with places to fill, kept in text files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from pathlib import Path


class Template:
    """A prompt from a file, with places such as ``$instruction``.

    Places are filled in one pass, so that a text which holds ``$response`` itself stays as it is. Every other ``$`` of
    the file stays too.

    Args:
        path: of a text file.
        needed: places that the file must have.
        optional: places that it may have.

    Attributes:
        digest: the first 12 digits of the SHA-256 of its text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not in UTF-8, or lacks a place.
    """

    def __init__(
        self, path: str | Path, needed: Collection[str], optional: Collection[str] = ()
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no template {path}.")
        try:
            self.text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"The template {path} is not in UTF-8.") from None
        names = "|".join(sorted({*needed, *optional}, key=len, reverse=True))
        self._places = re.compile(rf"\$({names})\b")
        found = set(self._places.findall(self.text))
        if missing := sorted(set(needed) - found):
            raise ValueError(
                f"The template {path} has no place {', '.join(f'${name}' for name in missing)}."
            )
        self.digest = hashlib.sha256(self.text.encode()).hexdigest()[:12]

    def filled(self, **values: object) -> str:
        """The prompt with its places filled."""
        return self._places.sub(lambda place: str(values[place[1]]), self.text)
