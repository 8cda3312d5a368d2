"""What arguments a dotted path takes, read from source files without importing them.

Importing torchtune to check a config takes seconds; parsing the few files between `torchtune.models.llama3.llama3_8b`
and its `def` takes milliseconds (:mod:`~kasa_tune.config.sources`). Followed besides are `functools.partial`, base
classes and our own `kasa_x, lora_x, corda_x = builders(x)`. For whatever else Python can do to a name there is
`imported`, which asks Python.
"""

import ast
import importlib.util
import inspect
import os
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, Union

from kasa_tune.config.sources import (
    Call,
    Module,
    NoSuchNameError,
    UnreadableError,
    bindings,
    expression,
    find,
    public,
)
from kasa_tune.methods import LINEARS

__all__ = [
    "NoSuchNameError",
    "Parameter",
    "Signature",
    "UnreadableError",
    "imported",
    "members",
    "static",
]

_SIMPLE = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "dict": dict,
    "Dict": dict,
    "tuple": list,
    "Tuple": list,
}


class Parameter(NamedTuple):
    """`kind` is an annotation that `schema.convert` understands; Any when the target's is of another sort."""

    kind: Any = Any
    required: bool = False
    positional: bool = True


@dataclass(frozen=True)
class Signature:
    """Parameters by name, in order; `extra` is the name of `**kwargs`, if the target takes any."""

    parameters: dict[str, Parameter]
    extra: str | None = None


@lru_cache(maxsize=256)
def static(path: str) -> Signature:
    """The signature of the function or class at dotted `path`, from source alone.

    Raises:
        NoSuchNameError: a part of the path does not exist.
        UnreadableError: the source does not say.
    """
    return _signature(*find(path))


def constants(path: str) -> dict[str, Any]:
    """The numbers that the builder at dotted `path` passes on by keyword, such as `num_heads`; raises as `static`.

    A builder is a function that returns the value of one call, as torchtune's `llama3_8b` does, or passes such a value
    to another function.
    """
    return _constants(*find(path))


def _constants(module: Module, node: Any) -> dict[str, Any]:
    while isinstance(node, Call) and node.call.args:
        module, node = expression(module, node.call.args[0])
    last = node.body[-1] if isinstance(node, ast.FunctionDef) else None
    if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Call):
        return {}
    passed = last.value.args[0] if last.value.args else None
    inner = _constants(*expression(module, passed.func)) if isinstance(passed, ast.Call) else {}
    return inner | {
        keyword.arg: keyword.value.value
        for keyword in last.value.keywords
        if keyword.arg and isinstance(keyword.value, ast.Constant)
    }


def built_from(path: str) -> tuple[str, dict[str, Any]]:
    """The name of the function that the builder at dotted `path` hands its work to in the end, such as `llama3`, and
    the numbers that it gets: its defaults, and what the builders before pass on by keyword. Raises as `static`.
    """
    return _built_from(*find(path))


def _built_from(module: Module, node: Any) -> tuple[str, dict[str, Any]]:
    while isinstance(node, Call) and node.call.args:
        module, node = expression(module, node.call.args[0])
    if not isinstance(node, ast.FunctionDef):
        raise UnreadableError(f"{module.name} does not say what is built")
    own, last = _defaults(node.args), node.body[-1]
    if not isinstance(last, ast.Return) or not isinstance(last.value, ast.Call):
        return node.name, own
    outer = last.value
    inner = outer.args[0] if outer.args else outer
    if not isinstance(inner, ast.Call):  # it goes on with what it has built
        return node.name, own
    module, target = expression(module, inner.func)
    if isinstance(target, ast.ClassDef):
        return node.name, own
    name, values = _built_from(module, target)
    for call in dict.fromkeys((inner, outer)):
        values |= {
            keyword.arg: keyword.value.value
            if isinstance(keyword.value, ast.Constant)
            else own.get(ast.unparse(keyword.value))
            for keyword in call.keywords
            if keyword.arg
        }
    return name, values


def _defaults(args: ast.arguments) -> dict[str, Any]:
    """The constants that parameters have as defaults."""
    positional = [*args.posonlyargs, *args.args]
    pairs = [*zip(reversed(positional), reversed(args.defaults))]
    pairs += zip(args.kwonlyargs, (default or ast.Constant(None) for default in args.kw_defaults))
    return {arg.arg: value.value for arg, value in pairs if isinstance(value, ast.Constant)}


def members(path: str) -> list[str]:
    """The names that the enumeration at dotted `path` assigns; raises as `static`."""
    _, node = find(path)
    if not isinstance(node, ast.ClassDef):
        raise UnreadableError(f"{path} is no class")
    return [name for name, value in bindings(node.body) if isinstance(value, ast.expr)]


@lru_cache(maxsize=256)
def imported(path: str) -> Signature:
    """The signature of the callable at dotted `path`, by importing it; modules of the working directory count.

    Raises:
        NoSuchNameError: a part of the path does not exist.
        Exception: whatever the import raises; TypeError and ValueError for what has no signature.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    top, *names = path.split(".")
    target: Any = importlib.import_module(top)
    for name in names:
        if isinstance(target, ModuleType) and not hasattr(target, name):
            inner = f"{target.__name__}.{name}"
            if not hasattr(target, "__path__") or importlib.util.find_spec(inner) is None:
                raise NoSuchNameError(target.__name__, name, dir(target))
            target = importlib.import_module(inner)
        else:
            target = getattr(target, name)
    parameters, extra = {}, None
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = name
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            hint = (
                Any
                if parameter.annotation is parameter.empty
                else _kind_of_text(parameter.annotation)
            )
            positional = parameter.kind is not parameter.KEYWORD_ONLY
            parameters[name] = Parameter(hint, parameter.default is parameter.empty, positional)
    return Signature(parameters, extra)


def _signature(module: Module, binding: Any) -> Signature:
    if isinstance(binding, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _arguments(binding.args)
    if isinstance(binding, ast.ClassDef):
        return _constructor(module, binding)
    if isinstance(binding, Call):
        return _called(module, binding)
    if binding is None:
        raise NoSuchNameError(module.name, "", public(module))
    raise UnreadableError(f"a value in {module.name}")


def _arguments(args: ast.arguments, skip: int = 0) -> Signature:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    parameters = {
        arg.arg: Parameter(_kind(arg.annotation, default), default is None)
        for arg, default in list(zip(positional, defaults))[skip:]
    }
    for arg, default in zip(args.kwonlyargs, args.kw_defaults):
        parameters[arg.arg] = Parameter(
            _kind(arg.annotation, default), default is None, positional=False
        )
    return Signature(parameters, args.kwarg.arg if args.kwarg else None)


def _constructor(module: Module, node: ast.ClassDef) -> Signature:
    """`__init__` of the class, or of its first base."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item.args, skip=1)
    if _is_dataclass(node):
        return _fields(module, node)
    if node.keywords or node.decorator_list or not node.bases:  # metaclass, object
        raise UnreadableError(f"{node.name} has no __init__ of its own")
    return _signature(*expression(module, node.bases[0]))


def _is_dataclass(node: Any) -> bool:
    marks = (
        [ast.unparse(mark) for mark in node.decorator_list]
        if hasattr(node, "decorator_list")
        else []
    )
    return marks in (["dataclass"], ["dataclasses.dataclass"])


def _fields(module: Module, node: ast.ClassDef) -> Signature:
    """What a dataclass takes: the fields of its bases, then its own."""
    parameters: dict[str, Parameter] = {}
    for base in node.bases:
        where, found = expression(module, base)
        if _is_dataclass(found):
            parameters |= _fields(where, found).parameters
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            parameters[item.target.id] = Parameter(
                _kind(item.annotation, item.value), item.value is None
            )
    return Signature(parameters)


def _called(module: Module, binding: Call) -> Signature:
    """`name = partial(f, ...)`, or `kasa_x, lora_x, corda_x = builders(x)`."""
    name, call = binding
    function = ast.unparse(call.func).split(".")[-1]
    if function not in ("partial", "builders") or not call.args:
        raise UnreadableError(f"{name} in {module.name} is the value of a call")
    base = _signature(*expression(module, call.args[0]))
    if function == "builders":
        linear = LINEARS.get(name.partition("_")[0])
        if linear is None:
            raise UnreadableError(f"{name} in {module.name} does not say which linears it has")
        return _adapted(base, linear)
    given = [
        *list(base.parameters)[: len(call.args) - 1],
        *(keyword.arg for keyword in call.keywords),
    ]
    parameters = {
        name: parameter._replace(required=False, positional=False) if name in given else parameter
        for name, parameter in base.parameters.items()
    }
    return replace(base, parameters=parameters)


def _adapted(base: Signature, linear: str) -> Signature:
    """What our builders take: where to adapt, the adapter linear's options, the plain model's arguments."""
    where = static("kasa_tune.components.adapters.attach.attach").parameters
    options = static(f"kasa_tune.components.adapters.{linear}").parameters
    supplied = ("model", "linear", "in_dim", "out_dim", "use_bias")
    parameters = {name: value for name, value in (where | options).items() if name not in supplied}
    return replace(base, parameters=parameters | base.parameters)


def _kind(node: ast.expr | None, default: ast.expr | None = None) -> Any:
    """An annotation as `schema.convert` understands it, else Any. A default of None allows null."""
    if isinstance(default, ast.Constant) and default.value is None:
        return _union(_kind(node), None)
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union(*map(_kind, _from_yaml([node.left, node.right])))
    if not isinstance(node, ast.Subscript):
        return _SIMPLE.get(ast.unparse(node).split(".")[-1], Any) if node else Any
    outer = ast.unparse(node.value).split(".")[-1]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer in ("Optional", "Union"):
        return _union(*map(_kind, _from_yaml(inner)), *([None] if outer == "Optional" else []))
    if outer in ("list", "List"):
        return list[_kind(inner[0])]  # type: ignore[misc]
    if outer in ("dict", "Dict", "Mapping") and len(inner) == 2:
        return dict[_kind(inner[0]), _kind(inner[1])]  # type: ignore[misc]
    if outer in ("tuple", "Tuple"):
        if isinstance(inner[-1], ast.Constant) and inner[-1].value is ...:
            return list[_kind(inner[0])]  # type: ignore[misc]
        return tuple[tuple(map(_kind, inner))]  # type: ignore[misc]
    values = [item.value for item in inner if isinstance(item, ast.Constant)]
    if outer == "Literal" and len(values) == len(inner):
        return Literal[tuple(values)]
    return _SIMPLE.get(outer, Any)


def _from_yaml(kinds: list[ast.expr]) -> list[ast.expr]:
    """Those of several annotations whose values YAML can give: a rate may be a float or a tensor, but not here."""
    return [kind for kind in kinds if ast.unparse(kind).split(".")[-1] != "Tensor"] or kinds


def _kind_of_text(annotation: Any) -> Any:
    """The same of an annotation at run time, which may be a string."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    try:
        return _kind(ast.parse(text, mode="eval").body)
    except SyntaxError:  # `<class ...>` and the like
        return Any


def _union(*kinds: Any) -> Any:
    return Any if Any in kinds else Union[kinds]  # noqa: UP007 (a tuple of them)
