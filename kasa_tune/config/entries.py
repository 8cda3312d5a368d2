"""What a config may contain: the entries a schema is made of. Those of our recipes stand in schemas.py.

A schema is a plain dict from key to `Key`, `Section`, `Component` or `OneOrMany`, so a copied recipe adds its own keys
with `config.FINETUNE | {"my_key": config.Key(int, default=3)}`. Types are ordinary annotations: `int | None`,
`list[str]`, `Literal["a", "b"]`. A default may refer to another key: `"${batch_size}"`. Nothing here imports torch.
"""

import math
import os
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NewType, Union, get_args, get_origin

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()

FilePath = NewType("FilePath", str)  # of a file or folder; `~` stands for the home folder
_LONGEST_PATH = 4095

# --- values -----------------------------------------------------------------------------------------------------------

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    FilePath: "a path (a string)",
    tuple: "a list",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 4, 80, 80, 80
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = 20
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


def at_least(bound: float, most: float = math.inf) -> Check:
    """A finite number, `bound` or more, and `most` or less."""
    text = f"at least {bound}" + (f" and at most {most}" if most < math.inf else "")
    return Check(text, lambda value: bound <= value <= most and value < math.inf)


def above(bound: float, most: float = math.inf) -> Check:
    """A finite number, more than `bound`, and `most` or less."""
    text = f"greater than {bound}" + (f" and at most {most}" if most < math.inf else "")
    return Check(text, lambda value: bound < value <= most and value < math.inf)


def describe(kind: Any) -> str:
    """The type `kind` in words: `int | None` is "an integer or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(arg) for arg in args)
    if origin is list and args[0] is not Any:
        return f"a list, each {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, in turn {', '.join(map(describe, args))}"
    if origin is dict and args[1] is not Any:
        keys = f" of {', '.join(map(str, get_args(args[0])))}" * (get_origin(args[0]) is Literal)
        return f"a mapping{keys}, each to {describe(args[1])}"
    return _NAMES.get(kind if kind is FilePath else origin or kind, "a value")


def convert(value: Any, kind: Any) -> Any:
    """`value` as the type `kind`.

    Integers become floats where a float is wanted, and so do strings like 2e-4, which is how plain YAML 1.1 and
    environment variables give them. In a `FilePath`, `~` becomes the home folder. Nothing else is converted: True is
    no integer, 1.0 neither.

    Raises:
        TypeError: it is of another type.
        ValueError: it is of that type, but no program could use it: a number that is not finite, say.
    """
    origin, args = get_origin(kind), get_args(kind)
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
    elif origin is tuple:
        if isinstance(value, list) and len(value) == len(args):
            return [convert(item, arg) for item, arg in zip(value, args, strict=True)]
    elif origin is dict:
        if isinstance(value, dict):
            return {convert(k, args[0]): convert(item, args[1]) for k, item in value.items()}
    elif kind is FilePath:
        if isinstance(value, str):
            return _path(value)
    elif kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number or (isinstance(value, str) and _SCIENTIFIC.fullmatch(value)):
            return float(_usable(value if number else float(value)))
    elif kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return _usable(value)
    raise TypeError(f"expected {describe(kind)}")


def _usable(value: Any) -> Any:
    """`value` itself, once everything in it is seen to be a value that programs can handle."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number must be finite")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError("an integer must have fewer than 64 bits")
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise ValueError("a text must be Unicode without NUL characters")
    inside: Iterable[Any] = ()
    if isinstance(value, (list, dict)):
        inside = value if isinstance(value, list) else (*value, *value.values())
    for item in inside:
        _usable(item)
    return value


def _path(given: str) -> str:
    """A path with the home folder in place of `~`.

    Raises:
        ValueError: it is empty, too long for any file, holds control characters, or names an unknown user's home.
    """
    if not given.strip():
        raise ValueError("a path must not be empty")
    if not given.isprintable():
        raise ValueError("a path must not hold line breaks, control characters or odd spaces")
    if len(given.encode(errors="replace")) > _LONGEST_PATH:
        raise ValueError(f"a path has at most {_LONGEST_PATH} bytes")
    path = os.path.expanduser(given)
    if path.startswith("~"):
        raise ValueError("~ begins the name of a user whom this machine does not know; write ./~")
    return path


def shortened(text: str, length: int = 80) -> str:
    """`text` in one line of at most `length` characters; what is left out is marked by three dots."""
    text = text[: length + 1]
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def show(value: Any) -> str:
    """`value` as it stands in a message, in at most 80 characters."""
    return "null" if value is None else shortened(_REPR.repr(value))


def listed(names: Iterable[str], length: int = 120) -> str:
    """Names with commas between them; the last ones are only counted where they take more than `length` characters."""
    names = list(names)
    shown: list[str] = []
    for name in names:
        shown.append(shortened(name, 40))
        if sum(map(len, shown)) + 2 * len(shown) > length and len(names) - len(shown) > 1:
            return f"{', '.join(shown)} and {len(names) - len(shown)} more"
    return ", ".join(shown)


# --- entries ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One value of a config.

    Args:
        type: an annotation; a default of None allows null besides.
        default: the value when absent; REQUIRED when it must be given.
        check: a condition that every value but null meets: a `Check`, or any function that returns True or False.
        help: what it is for; `--help` prints it and docs/configs.md lists it.
        verbatim: `${...}` in it is text for another config, and stays as it is.
    """

    type: Any
    default: Any = REQUIRED
    check: Check | Callable[[Any], bool] | None = None
    help: str = ""
    verbatim: bool = False

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
        except (TypeError, OverflowError):
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


UNKNOWN = "unknown key"  # begins what is said of a key that a config may not have


class Problem(NamedTuple):
    """What is wrong with the value at dotted `key`: what was given, what is allowed."""

    key: str
    text: str

    def short(self) -> "Problem":
        """The same in fewer than 300 characters. Few are longer: those that hold several long paths."""
        key = shortened(self.key)
        return Problem(key, shortened(self.text, 290 - len(key)))

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class ConfigError(ValueError):
    """Everything that is wrong with a config, in `problems`."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, [problem.short() for problem in problems]
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(
            "\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)])
        )
