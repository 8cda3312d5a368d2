"""The rotary embedding that a config.json describes, under old keys and new ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kasa_tune.architectures.architecture import Rotary
from kasa_tune.architectures.settings import Settings, is_usual, shown


def rotary_of(
    settings: Settings,
    *,
    base: float = 10_000.0,
    fraction: float | None = None,
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
        fraction: default of the rotated share of each head. None in a family that rotates whole
            heads, whatever a file says.
        interleaved: see :class:`~kasa_tune.architectures.Rotary`.
        head_dim: width of a head.
        max_seq_len: the most tokens of a sequence.
        level: the kind of layers, in families that have two bases: ``full_attention`` or
            ``sliding_attention``. The old ``rope_scaling`` is of full attention.
        absent: what stands for missing ``rope_parameters``.

    Raises:
        ValueError: a value is none that is supported, or old and new keys disagree.
    """
    given = _given(settings, level) or ({} if "rope_theta" in settings else dict(absent or {}))
    values = Settings(given, settings.name)
    own_base = settings.number("rope_theta", base) if level != "sliding_attention" else base
    theta = values.number("rope_theta", own_base)
    own_share = settings.number("partial_rotary_factor", fraction or 1.0)
    share = values.number("partial_rotary_factor", own_share)
    if fraction is None and share != 1.0:
        raise settings.wrong("partial_rotary_factor", "1, because this family rotates whole heads")
    width = _width(settings, head_dim, share)
    kind = given.get("rope_type", given.get("type"))
    kind = "default" if kind is None else kind
    if kind == "dynamic" and "alpha" in values:
        theta, kind = _stretched(settings, values, theta, width), "default"
    if theta <= 1:
        raise settings.wrong("rope_theta", "above 1")
    if kind == "su" or (kind == "yarn" and "short_factor" in values):
        kind = "longrope"  # what early files of Phi call it
    options = _options(settings, values, kind, max_seq_len, level)
    for key in ("short_factor", "long_factor"):
        if len(options.get(key, ())) not in (0, width // 2):
            raise values.wrong(key, f"a list of {width // 2} numbers")
    # Up to the model's own length a dynamic scaling is none.
    scaling: Any = "none" if kind in ("default", "dynamic") else kind
    return Rotary(theta, share, interleaved, scaling, options)


def _stretched(settings: Settings, values: Settings, base: float, width: int) -> float:
    """The base of Hunyuan's kind of scaling, which changes nothing else."""
    alpha = values.number("alpha", 1.0)
    if settings.get("model_type") != "hunyuan_v1_dense":
        raise values.wrong("alpha", "absent: transformers heeds it in Hunyuan alone")
    if width < 4 or alpha > 1e9:
        raise values.wrong("alpha", "at most 1e9, and heads must have 4 values or more")
    return base * alpha ** (width / (width - 2))


def _given(settings: Settings, level: str | None) -> dict[str, Any]:
    """What the file says of the scaling, under the new key or under the old one."""
    new = _mapping(settings, "rope_parameters")
    old = _mapping(settings, "rope_scaling") if level != "sliding_attention" else {}
    has_levels = any(isinstance(value, Mapping) for value in new.values())
    if new and has_levels != (level is not None):
        wanted = "by kind of layer" if level else "the same for all layers"
        raise settings.wrong("rope_parameters", f"an object of values, {wanted} in this family")
    if level and old and not old.get("rope_type"):
        raise settings.wrong("rope_scaling", "an object with rope_type in this family")
    if level:
        new = _mapping(Settings(new, f"{settings.name}: rope_parameters"), level)
    _check_agree(settings, new, old, level)
    return new or old


def _width(settings: Settings, head_dim: int, share: float) -> int:
    """How many values of a head are rotated."""
    if share > 1:
        raise settings.wrong("partial_rotary_factor", "at most 1")
    width = int(head_dim * share)
    if width % 2 or not width:
        raise ValueError(
            f"{settings.name}: head_dim is {head_dim}, of which {width} values would be rotated in "
            "pairs; it must be an even number above 0."
        )
    return width


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
    pairs: dict[str, tuple[Any, Any]] = {"rope_scaling": (old, {**new}) if old else (None, None)}
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


def _original(settings: Settings, values: Settings, max_seq_len: int, level: str | None) -> int:
    """The most tokens of a sequence before the scaling."""
    key = "original_max_position_embeddings"
    outer = None if level else settings.optional_size(key)
    inner = values.size(key, outer or max_seq_len)
    if outer is not None and outer != inner:
        raise settings.wrong(key, f"{inner}, as the scaling of the rotary embedding says")
    if inner < 2:
        raise settings.wrong(key, "at least 2")
    return inner


def _options(
    settings: Settings, values: Settings, kind: Any, max_seq_len: int, level: str | None
) -> dict[str, Any]:
    """The numbers of a scaling by their names, defaults filled in."""
    if kind in ("default", "dynamic"):
        return {}
    if kind == "linear":
        return {"factor": _needed(values, "factor")}
    original = _original(settings, values, max_seq_len, level)
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        return {
            **{key: _needed(values, key) for key in keys},
            "original_max_position_embeddings": original,
        }
    if kind == "longrope":
        factor = values.number("factor", max_seq_len / original)
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return {
            "short_factor": _factors(values, "short_factor"),
            "long_factor": _factors(values, "long_factor"),
            "attention_factor": values.number("attention_factor", scale),
            "original_max_position_embeddings": original,
        }
    if kind == "yarn":
        if level and not values.flag("truncate", True):
            raise values.wrong("truncate", "true: transformers ignores it in this family")
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
    if not isinstance(given, Sequence) or not all(map(is_usual, given)):
        raise values.wrong(key, "a list of numbers above 0")
    return tuple(map(float, given))
