"""What a config may contain: the entries a schema is made of. Those of our recipes stand in schemas.py.

A schema is a plain dict from key to `Key`, `Section`, `Component` or `OneOrMany`, so a copied recipe adds its own keys
with `config.FINETUNE | {"my_key": config.Key(int, default=3)}`. Types are ordinary annotations: `int | None`,
`list[str]`, `Literal["a", "b"]`. A default may refer to another key: `"${batch_size}"`. Nothing here imports torch.
"""

import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()

# --- values -----------------------------------------------------------------------------------------------------------

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class Check:
    """A condition on a value.

    Args:
        allowed: completes the sentence "expected an integer, ...".
        holds: the condition.
        because: the reason against single values that people try often.
    """

    allowed: str
    holds: Callable[[Any], bool]
    because: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, value: Any) -> bool:
        return self.holds(value)


def at_least(bound: float) -> Check:
    """A finite number, `bound` or more."""
    return Check(f"at least {bound}", lambda value: bound <= value < math.inf)


def above(bound: float) -> Check:
    """A finite number, more than `bound`."""
    return Check(f"greater than {bound}", lambda value: bound < value < math.inf)


def describe(kind: Any) -> str:
    """The type `kind` in words: `int | None` is "an integer or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(arg) for arg in args)
    if origin is list and args[0] is not Any:
        return f"a list, each {describe(args[0])}"
    return _NAMES.get(origin or kind, "a value")


def convert(value: Any, kind: Any) -> Any:
    """`value` as the type `kind`.

    Integers become floats where a float is wanted, and so do strings like 2e-4, which is how plain YAML 1.1 and
    environment variables give them. Nothing else is converted: True is no integer, 1.0 neither.

    Raises:
        TypeError: it is of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return convert(value, arg)
            except TypeError:
                continue
    elif origin is Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [convert(item, args[0]) for item in value]
    elif kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number or (isinstance(value, str) and _SCIENTIFIC.fullmatch(value)):
            return float(value)
    elif isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise TypeError(f"expected {describe(kind)}")


def show(value: Any) -> str:
    """`value` as it stands in a message, shortened."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- entries ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One value of a config.

    Args:
        type: an annotation; a default of None allows null besides.
        default: the value when absent; REQUIRED when it must be given.
        check: a condition that every value but null meets: a `Check`, or any function that returns True or False.
        help: what it is for; `--help` prints it and docs/configs.md lists it.
    """

    type: Any
    default: Any = REQUIRED
    check: Check | Callable[[Any], bool] | None = None
    help: str = ""

    @property
    def allowed(self) -> str:
        """What the key takes, in words."""
        extra = getattr(self.check, "allowed", "one its check accepts") if self.check else ""
        return ", ".join(filter(None, (describe(self._kind), extra)))

    @property
    def _kind(self) -> Any:
        return Union[self.type, None] if self.default is None else self.type  # noqa: UP007 (type may be any annotation)

    def accept(self, value: Any) -> Any:
        """`value`, converted to the key's type.

        Raises:
            ValueError: it is not allowed; the message says what is.
        """
        try:
            value = convert(value, self._kind)
            good = value is None or self.check is None or self.check(value)
        except TypeError:
            good = False
        if good:
            return value
        reason = getattr(self.check, "because", {}).get(str(value))
        raise ValueError(f"expected {self.allowed}" + (f" ({reason})" if reason else ""))


@dataclass(frozen=True)
class Ignored(Key):
    """A key of other recipes' configs that a recipe takes, whatever its value, and has no use for: it becomes null."""

    type: Any = Any
    default: Any = None

    def accept(self, value: Any) -> None:
        """None."""


@dataclass(frozen=True)
class Section:
    """A mapping with a schema of its own; absent, every key takes its default."""

    keys: "Schema"
    help: str = ""


@dataclass(frozen=True)
class Component:
    """A node with a `_component_`, called with the node's other keys.

    Args:
        default: the node when absent; its keys also complete a node of the same component. None allows null.
        positional: how many leading parameters of the target the recipe supplies.
        runtime: keyword parameters the recipe supplies, which the target must take.
        own: keys the recipe reads from the node and takes out before the call.
        values: what parameters may be, where that is more than the target's annotations say.
        help: what it is for; `--help` prints it and docs/configs.md lists it.
    """

    default: Any = REQUIRED
    positional: int = 0
    runtime: tuple[str, ...] = ()
    own: Mapping[str, Key] = field(default_factory=dict)
    values: Mapping[str, Key] = field(default_factory=dict)
    help: str = ""


@dataclass(frozen=True)
class OneOrMany:
    """One such entry, or a list of them."""

    entry: Component
    help: str = ""

    @property
    def default(self) -> Any:
        return self.entry.default


Schema = Mapping[str, Key | Section | Component | OneOrMany]


class Problem(NamedTuple):
    """What is wrong with the value at dotted `key`: what was given, what is allowed."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class ConfigError(ValueError):
    """Everything that is wrong with a config, in `problems`."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(
            "\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)])
        )
