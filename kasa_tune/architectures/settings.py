"""config.json of a checkpoint, read value by value, each of a known type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kasa_tune.architectures.architecture import Rotary

# Beyond these, a number is a mistake, and building the model would take all memory.
_LARGEST = 2**31
_MOST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}


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


def rotary_of(
    settings: Settings,
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    interleaved: bool = False,
    head_dim: int,
    max_seq_len: int,
    level: str | None = None,
    absent: Mapping[str, Any] | None = None,
) -> Rotary:
    """Read the rotary embedding, under the keys that transformers 5 writes (``rope_parameters``)
    or under the old ones (``rope_theta``, ``rope_scaling``, ``partial_rotary_factor``).

    Args:
        settings: of the model.
        base: default of the base in the family.
        fraction: default of the rotated share of each head.
        interleaved: see :class:`~kasa_tune.architectures.Rotary`.
        head_dim: width of a head.
        max_seq_len: the most tokens of a sequence.
        level: the kind of layers, in families that have two bases: ``full_attention`` or
            ``sliding_attention``. The old ``rope_scaling`` is of full attention.
        absent: what stands for missing ``rope_parameters``.

    Raises:
        ValueError: a value is none that is supported, or old and new keys disagree.
    """
    new = _mapping(settings, "rope_parameters")
    old = _mapping(settings, "rope_scaling")
    if new and any(isinstance(value, Mapping) for value in new.values()):
        new = _mapping(
            Settings(new, f"{settings.name}: rope_parameters"), level or "full_attention"
        )
    if level == "sliding_attention":
        old = {}
    _check_agree(settings, new, old, level)
    given = new or old or ({} if "rope_theta" in settings else dict(absent or {}))
    values = Settings(given, settings.name)
    own_base = settings.number("rope_theta", base) if level != "sliding_attention" else base
    theta = values.number("rope_theta", own_base)
    share = values.number(
        "partial_rotary_factor", settings.number("partial_rotary_factor", fraction)
    )
    if share > 1:
        raise settings.wrong("partial_rotary_factor", "at most 1")
    kind = given.get("rope_type") or given.get("type") or "default"
    width = int(head_dim * share)
    if kind == "dynamic" and "alpha" in values:
        theta, kind = theta * values.number("alpha", 1.0) ** (width / (width - 2)), "default"
    options = _options(settings, values, kind, theta, max_seq_len)
    # Up to the model's own length a dynamic scaling is none.
    scaling = {"default": "none", "dynamic": "none", "su": "longrope"}.get(kind, kind)
    if kind == "yarn" and ("short_factor" in values or "long_factor" in values):
        scaling = "longrope"
        options = _options(settings, values, scaling, theta, max_seq_len)
    return Rotary(theta, share, interleaved, scaling, options)


def _mapping(settings: Settings, key: str) -> dict[str, Any]:
    value = settings.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise settings.wrong(key, "an object")
    return dict(value)


def _check_agree(
    settings: Settings, new: Mapping[str, Any], old: Mapping[str, Any], level: str | None
) -> None:
    """Raise ValueError if old and new keys say different things."""
    if not new:
        return
    pairs = {"rope_scaling": (old, {**new}) if old else (None, None)}
    if level != "sliding_attention":
        for key in ("rope_theta", "partial_rotary_factor"):
            pairs[key] = (settings.get(key), new.get(key))
    for key, (before, now) in pairs.items():
        if key == "rope_scaling" and before:
            ignored = ("type", "rope_type", "rope_theta", "partial_rotary_factor")
            kinds = [one.get("rope_type") or one.get("type") for one in (before, now)]
            agree = kinds[0] == kinds[1] and all(
                now.get(name) == value for name, value in before.items() if name not in ignored
            )
        else:
            agree = before is None or now is None or before == now
        if not agree:
            raise ValueError(
                f"{settings.name}: {key} is {shown(before)}, and rope_parameters says "
                f"{shown(now)}. Delete the one that is wrong."
            )


def _options(
    settings: Settings, values: Settings, kind: Any, theta: float, max_seq_len: int
) -> dict[str, Any]:
    """The numbers of a scaling by their names, defaults filled in."""
    original = settings.optional_size("original_max_position_embeddings")
    original = values.size("original_max_position_embeddings", original or max_seq_len)
    if kind in ("default", "dynamic"):
        return {}
    if kind == "linear":
        return {"factor": _needed(values, "factor")}
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        return {
            **{key: _needed(values, key) for key in keys},
            "original_max_position_embeddings": original,
        }
    if kind in ("longrope", "su"):
        factor = values.number("factor", max_seq_len / original)
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return {
            "short_factor": _factors(values, "short_factor"),
            "long_factor": _factors(values, "long_factor"),
            "attention_factor": values.number("attention_factor", scale),
            "original_max_position_embeddings": original,
        }
    if kind == "yarn":
        return _yarn(values, original, max_seq_len)
    raise ValueError(
        f"{settings.name}: the rotary embedding is of type {shown(kind)}; supported are default, "
        "linear, dynamic, llama3, yarn and longrope."
    )


def _yarn(values: Settings, original: int, max_seq_len: int) -> dict[str, Any]:
    factor = values.number("factor", max_seq_len / original)
    mscale, mscale_all = (values.number(key, 0.0) for key in ("mscale", "mscale_all_dim"))

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    both = bool(mscale and mscale_all)
    scale = magnitude(mscale) / magnitude(mscale_all) if both else magnitude(1.0)
    return {
        "factor": factor,
        "attention_factor": values.number("attention_factor", scale),
        "beta_fast": values.number("beta_fast", 32.0),
        "beta_slow": values.number("beta_slow", 1.0),
        "truncate": values.flag("truncate", True),
        "original_max_position_embeddings": original,
    }


def _needed(values: Settings, key: str) -> float:
    if key not in values:
        raise values.wrong(f"{key} of the rotary embedding's scaling", "a number above 0")
    return values.number(key, 1.0)


def _factors(values: Settings, key: str) -> tuple[float, ...]:
    given = values.get(key)
    if not isinstance(given, Sequence) or not all(is_number(one) and one > 0 for one in given):
        raise values.wrong(key, "a list of numbers above 0")
    return tuple(map(float, given))


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def shown(value: Any) -> str:
    """A value in a message, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
