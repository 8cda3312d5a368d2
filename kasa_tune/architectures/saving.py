"""An architecture as JSON, as it is kept beside adapters, and read back from files of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, get_args, get_origin, get_type_hints

from kasa_tune.architectures.architecture import ATTENTION, MLP, Architecture
from kasa_tune.architectures.settings import is_number, shown

_MOST_LAYERS = 1000


def to_json(architecture: Architecture) -> dict[str, Any]:
    """The architecture in plain containers. Layers that are alike stand there once, with how many
    times they follow one another.
    """
    found = asdict(architecture)
    runs: list[list[Any]] = []
    for layer in found.pop("layers"):
        if runs and runs[-1][1] == layer:
            runs[-1][0] += 1
        else:
            runs.append([1, layer])
    found["layers"] = runs
    found["biases"] = sorted(architecture.biases)
    return _plain(found)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def from_json(value: Any, source: object) -> Architecture:
    """What :func:`to_json` wrote. Every value is looked at; none is called or trusted.

    Args:
        value: the content.
        source: the file or folder that holds it, for messages.

    Raises:
        ValueError: a value is missing, unknown or of a wrong type; the message names it.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{source}: architecture is {shown(value)}; it must be an object.")
    return _dataclass(Architecture, {**value, "layers": _layers(value, source)}, source, "")


def _layers(value: Mapping[str, Any], source: object) -> list[Any]:
    """The layers one by one."""
    runs: Any = value.get("layers")
    layers: list[Any] = []
    for run in runs if isinstance(runs, list) else [None]:
        count, layer = run if isinstance(run, list) and len(run) == 2 else (None, None)
        if type(count) is not int or not 0 < count <= _MOST_LAYERS - len(layers):
            raise ValueError(
                f"{source}: architecture.layers is {shown(runs)}; it must be a list of how many "
                f"layers, at most {_MOST_LAYERS} in all, and what they are like."
            )
        layers += [layer] * count
    return layers


def _dataclass(kind: Any, value: Any, source: object, name: str) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(value, Mapping):
        raise _wrong(source, name, value)
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"{source}: architecture has unknown values: {shown(sorted(unknown))}.")
    found = {}
    for entry in fields(kind):
        inner = f"{name}.{entry.name}" if name else entry.name
        if entry.name in value:
            found[entry.name] = _value(hints[entry.name], value[entry.name], source, inner)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{source}: architecture.{inner} is missing.")
    return kind(**found)


def _value(kind: Any, value: Any, source: object, name: str) -> Any:
    """A value of a known type."""
    alternatives = get_args(kind)
    if type(None) in alternatives:
        if value is None:
            return None
        (kind,) = (one for one in alternatives if one is not type(None))
    if hasattr(kind, "__dataclass_fields__"):
        return _dataclass(kind, value, source, name)
    if name.endswith(".options"):
        return _options(value, source, name)
    if name == "biases":
        allowed = {*ATTENTION, *MLP}
        if isinstance(value, list) and all(type(one) is str and one in allowed for one in value):
            return frozenset(value)
    elif get_origin(kind) is tuple:
        inner = get_args(kind)
        if isinstance(value, list) and (inner[-1] is ... or len(value) == len(inner)):
            kinds = inner[:1] * len(value) if inner[-1] is ... else inner
            return tuple(
                _value(one, part, source, f"{name}.{index}")
                for index, (one, part) in enumerate(zip(kinds, value, strict=True))
            )
    elif _fits(kind, value):
        return float(value) if kind is float else value
    raise _wrong(source, name, value)


def _fits(kind: Any, value: Any) -> bool:
    if kind is bool or kind is str:
        return type(value) is kind
    if kind is int:
        return type(value) is int and 0 < value < 2**31
    if kind is float:
        return is_number(value) and value > 0
    return type(value) is str and value in get_args(kind)  # a Literal


def _options(value: Any, source: object, name: str) -> dict[str, Any]:
    """The numbers of a rotary embedding's scaling."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(source, name, value)
    found = {}
    for key, one in value.items():
        numbers = one if isinstance(one, list) else [one]
        if not all(isinstance(number, bool) or is_number(number) for number in numbers):
            raise _wrong(source, f"{name}.{key}", one)
        found[key] = tuple(one) if isinstance(one, list) else one
    return found


def _wrong(source: object, name: str, value: Any) -> ValueError:
    return ValueError(f"{source}: architecture.{name} is {shown(value)}, which it cannot be.")
