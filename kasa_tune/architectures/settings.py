"""config.json of a checkpoint, read value by value, each of a known type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Beyond these, a number is a mistake, and building the model would take all memory.
_LARGEST = 2**31
_FINEST, _GREATEST = 1e-30, 1e30  # of other numbers, well within float32
_MOST = {
    "num_hidden_layers": 1000,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
    "vocab_size": 2**24,
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), 2**20),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 2**16),
    **{"n_layer": 1000, "n_head": 2**16, "n_embd": 2**20, "n_inner": 2**20},
}


class Settings:
    """The values of a config.json. It remembers which keys were asked for.

    Args:
        values: the JSON object. Of a model that also sees or hears, its part ``text_config``.
        name: of the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values, self.name = values, name
        self.asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str) -> Any:
        """The value of a key as it is. None if it is absent or null."""
        self.asked.add(key)
        return self.values.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0.

        Raises:
            ValueError: it is something else, or it is absent and has no default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        most = _MOST.get(key, _LARGEST)
        if type(value) is not int or not 0 < value <= most:
            raise self.wrong(key, f"a whole number from 1 to {most}")
        return value

    def optional_size(self, key: str, default: int | None = None) -> int | None:
        """A whole number above 0, or None for null; ``default`` if the key is absent."""
        self.asked.add(key)
        if key not in self.values:
            return default
        return None if self.values[key] is None else self.size(key)

    def number(self, key: str, default: float) -> float:
        """A finite number above 0; ``default`` if it is absent or null."""
        value = self.get(key)
        if value is None:
            return default
        if not is_number(value) or value <= 0:
            raise self.wrong(key, "a number above 0")
        if not is_usual(value):
            raise self.wrong(key, f"a number from {_FINEST} to {_GREATEST}")
        return float(value)

    def probability(self, key: str, default: float) -> float:
        """A number from 0 to below 1; ``default`` if it is absent or null."""
        value = self.get(key)
        if value is None:
            return default
        if not is_number(value) or not 0 <= value < 1:
            raise self.wrong(key, "a number from 0 to below 1")
        return float(value)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """A number above 0, or None for null; ``default`` if the key is absent."""
        self.asked.add(key)
        if key not in self.values:
            return default
        return None if self.values[key] is None else self.number(key, 1.0)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; ``default`` if it is absent or null."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def either(self, key: str, other: str, default: int) -> int:
        """A whole number above 0 under either of two keys.

        Raises:
            ValueError: it is something else, or the two say different things.
        """
        both = [self.size(one) for one in (key, other) if one in self]
        if len({*both}) > 1:
            raise self.wrong(key, f"{both[1]}, as {other} is")
        return both[0] if both else default

    def numbers(self, key: str, length: int) -> list[int] | None:
        """A list of ``length`` whole numbers. None if it is absent, null or empty."""
        value = self.get(key)
        if value is None or value == []:
            return None
        if (
            not isinstance(value, list)
            or len(value) != length
            or any(type(entry) is not int for entry in value)
        ):
            raise self.wrong(key, f"a list of {length} whole numbers")
        return value

    def layer_types(self, num_layers: int) -> list[bool] | None:
        """Of each layer whether its attention has a window. None if the key is absent.

        Raises:
            ValueError: a layer is of a type without attention.
        """
        value = self.get("layer_types")
        if value is None:
            return None
        known = {"full_attention": False, "sliding_attention": True}
        if (
            not isinstance(value, list)
            or len(value) != num_layers
            or any(not isinstance(entry, str) or entry not in known for entry in value)
        ):
            raise self.wrong(
                "layer_types", f"a list of {num_layers} times full_attention or sliding_attention"
            )
        return [known[entry] for entry in value]

    def one_of(self, key: str, allowed: Mapping[str, Any], default: str) -> Any:
        """What ``allowed`` has for a text."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(key, " or ".join(allowed))
        return allowed[value]

    def must_be(self, key: str, value: Any, *, default: Any = None) -> None:
        """See that a key has the one value that is supported.

        Raises:
            ValueError: it has another.
        """
        given = self.get(key)
        if (default if given is None else given) != value:
            raise ValueError(
                f"{self.name}: {key} is {shown(given)}; only {shown(value)} is supported."
            )

    def wrong(self, key: str, expected: str) -> ValueError:
        """The error of a value that is not what is expected."""
        given = f"is {shown(self.values[key])}" if key in self.values else "is missing"
        return ValueError(f"{self.name}: {key} {given}; it must be {expected}.")


def is_number(value: Any) -> bool:
    """Whether a value is a finite float, or an int that fits into one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < math.inf if isinstance(value, float) else abs(value) < 2**1023


def is_usual(value: Any) -> bool:
    """Whether a value is a number above 0 with which float32 can compute."""
    return is_number(value) and _FINEST <= value <= _GREATEST


def named(text: str) -> str:
    """A name from a file in a message: as it is if it is plain and short."""
    return text if text.isidentifier() and len(text) <= 80 else shown(text)


def shown(value: Any) -> str:
    """A value in a message, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
