"""What arguments a dotted path takes, read from source files without importing them.

Importing torchtune to check a config takes ten seconds; parsing the few files between `torchtune.models.llama3.lora_llama3_8b` and its
`def` takes a few milliseconds. Followed are re-exports, relative imports, aliases, `functools.partial`, base classes, and our own
`kasa_x, lora_x = builders(x)`. Whatever else Python can do to a name raises `Unreadable`; then `imported` asks Python itself.
"""

import ast
import importlib.machinery
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kasa_tune.schema import KASA_ARGUMENTS, LORA_ARGUMENTS, REQUIRED

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


class Unreadable(Exception):
    """The source does not say it: C extensions, computed names, values returned by functions."""


class NoSuchName(LookupError):
    """`where` has no `name`; `names` are those it has."""

    def __init__(self, where: str, name: str, names: list[str]) -> None:
        text = f"{where} has no {name!r}" if where else f"no package {name!r} is installed"
        super().__init__(text if name else f"{where} is a module, not something in one")
        self.where, self.name, self.names = where, name, names


@dataclass(frozen=True)
class Parameter:
    """`kind` is a plain annotation as `schema.convert` takes it, or Any."""

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
    """The signature of the callable at dotted `path`, from source alone.

    Raises:
        NoSuchName: a part of the path does not exist.
        Unreadable: the source does not say.
    """
    top, *names = path.split(".")
    return _signature(*_attribute(_package(top), names))


def members(path: str) -> list[str]:
    """The names an enumeration at dotted `path` assigns."""
    top, *names = path.split(".")
    node = _attribute(_package(top), names)[1]
    if not isinstance(node, ast.ClassDef):
        raise Unreadable(f"{path} is no class")
    return [name for name, value in _bindings(node.body) if isinstance(value, ast.expr)]


@lru_cache(maxsize=256)
def imported(path: str) -> Signature:
    """The signature of the callable at dotted `path`, by importing it (the working directory counts as a place for modules).

    Raises:
        ImportError, AttributeError, ValueError, TypeError: it cannot be imported, or is no callable with a signature.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    target = pkgutil.resolve_name(path)
    parameters, extra = {}, None
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations may name what is imported for type checkers only
        hints = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = name
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            positional = parameter.kind is not parameter.KEYWORD_ONLY
            parameters[name] = Parameter(
                _plain_kind(hints.get(name, Any)), parameter.default is parameter.empty, positional
            )
    return Signature(parameters, extra)


def _plain_kind(hint: Any) -> Any:
    """A run-time annotation reduced to what `schema.convert` takes; Any for the rest."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (int, float, bool, str, dict, type(None)) or origin is Literal:
        return hint
    if origin is list:
        return list[_plain_kind(args[0])]  # type: ignore[misc]
    if origin is not None and origin is not dict and str(origin) not in ("typing.Union", "<class 'types.UnionType'>"):
        return Any
    return _union([_plain_kind(arg) for arg in args]) if args and origin is not dict else Any


def _union(kinds: list[Any]) -> Any:
    return Any if Any in kinds else Union[tuple(kinds)]  # noqa: UP007 (built from a list)


# --- source files as tables of names ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Module:
    """A module's source file and dotted name; a namespace package has a folder for a file."""

    name: str
    file: Path

    @property
    def folder(self) -> Path:
        return self.file if self.file.is_dir() else self.file.parent

    @property
    def is_package(self) -> bool:
        return self.file.is_dir() or self.file.name == "__init__.py"


@lru_cache(maxsize=256)
def _names(file: Path) -> dict[str, Any]:
    """Top-level name -> what binds it: a def, a class, an `(level, module, name)` import, or an assigned expression."""
    if file.is_dir():
        return {}
    try:
        return dict(_bindings(ast.parse(file.read_bytes()).body))
    except (OSError, SyntaxError, ValueError) as error:
        raise Unreadable(f"{file}: {error}") from error


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Later pairs win; in `try` and `if` the first branch wins."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.split(".")[0],
                    (0, alias.name if alias.asname else alias.name.split(".")[0], None),
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, (node.level, node.module, alias.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        yield name.id, node.value
        elif isinstance(node, ast.Try):
            for branch in [*(handler.body for handler in node.handlers), node.orelse, node.body]:
                yield from _bindings(branch)
        elif isinstance(node, ast.If):
            yield from _bindings(node.orelse)
            yield from _bindings(node.body)


def _package(top: str) -> _Module:
    """The top-level module or package `top`, found but not imported."""
    try:
        spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):  # ValueError: a running script has no spec
        spec = None
    spec = spec or importlib.machinery.PathFinder.find_spec(top, [os.getcwd()])
    if spec is None:
        raise NoSuchName("", top, [])
    if spec.origin and spec.origin.endswith(".py"):
        return _Module(top, Path(spec.origin))
    if spec.submodule_search_locations:
        return _Module(top, Path(next(iter(spec.submodule_search_locations))))
    raise Unreadable(f"{top} is not written in Python")


def _submodule(module: _Module, name: str) -> _Module | None:
    if module.is_package:
        for file in (module.folder / name / "__init__.py", module.folder / f"{name}.py", module.folder / name):
            if file.is_file() or (file.is_dir() and file.name != "__pycache__"):
                return _Module(f"{module.name}.{name}", file)
    return None


def _attribute(module: _Module, names: list[str]) -> tuple[_Module, Any]:
    """What `names` lead to from `module`: the module that binds it, and the node (None: that module itself)."""
    if not names:
        return module, None
    name, *rest = names
    inner = _submodule(module, name)
    if inner and (rest or name not in _names(module.file)):
        return _attribute(inner, rest)
    table = _names(module.file)
    if name in table:
        found = _follow(module, name, table[name])
        if not rest:
            return found
        if found[1] is None:
            return _attribute(found[0], rest)
        raise Unreadable(f"{name} in {module.name} is not a module")
    if "*" in table or "__getattr__" in table:
        raise Unreadable(f"{module.name} computes its names")
    raise NoSuchName(module.name, name, _public(module))


def _public(module: _Module) -> list[str]:
    """Names to suggest: submodules, then what the module defines (of two that look alike the later is suggested)."""
    files = [file.stem for file in module.folder.iterdir()] if module.is_package else []
    return [name for name in [*sorted(files), *_names(module.file)] if name.isidentifier() and not name.startswith("_")]


def _follow(module: _Module, name: str, node: Any) -> tuple[_Module, Any]:
    """Past imports and aliases to the def, class or expression behind `name`."""
    if isinstance(node, tuple):
        level, source, attribute = node
        parts = source.split(".") if source else []
        start = module
        if level == 0:
            start = _package(parts.pop(0))
        else:
            folder = module.folder.parents[level - 2] if level > 1 else module.folder
            package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
            file = folder / "__init__.py"
            start = _Module(".".join(package[: len(package) - level + 1]), file if file.is_file() else folder)
        return _attribute(start, [*parts, attribute] if attribute else parts)
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _expression(module, node)
    if isinstance(node, ast.Call):  # `kasa_x, lora_x = builders(x)`: which of the two is told by the name
        node = (name, node)
        return module, node
    return module, node


def _expression(module: _Module, node: ast.expr) -> tuple[_Module, Any]:
    """What a (dotted) name means inside `module`."""
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise Unreadable(f"a computed name in {module.name}")
    return _attribute(module, [node.id, *names])


# --- from a node to its signature ---------------------------------------------------------------------------------------------


def _signature(module: _Module, node: Any) -> Signature:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _arguments(node.args)
    if isinstance(node, ast.ClassDef):
        return _constructor(module, node)
    if isinstance(node, tuple):
        return _called(module, *node)
    if node is None:
        raise NoSuchName(module.name, "", _public(module))
    raise Unreadable(f"a value in {module.name}")


def _arguments(args: ast.arguments, skip: int = 0) -> Signature:
    positional = [*args.posonlyargs, *args.args]
    parameters = {}
    for arg, default in list(zip(positional, [None] * (len(positional) - len(args.defaults)) + args.defaults))[skip:]:
        parameters[arg.arg] = Parameter(_kind(arg.annotation, default), default is None)
    for arg, default in zip(args.kwonlyargs, args.kw_defaults):
        parameters[arg.arg] = Parameter(_kind(arg.annotation, default), default is None, positional=False)
    return Signature(parameters, args.kwarg.arg if args.kwarg else None)


def _constructor(module: _Module, node: ast.ClassDef) -> Signature:
    """`__init__` of the class or of the first base that has one."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item.args, skip=1)
    if node.keywords or any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        raise Unreadable(f"{node.name} gets its constructor from elsewhere")
    for base in node.bases:
        where, found = _expression(module, base)
        if isinstance(found, ast.ClassDef):
            return _constructor(where, found)
        raise Unreadable(f"the base of {node.name}")
    return Signature({})


def _called(module: _Module, name: str, call: ast.Call) -> Signature:
    """`name = partial(f, ...)`, or `kasa_x, lora_x = builders(x)`."""
    function = ast.unparse(call.func).split(".")[-1]
    if function not in ("partial", "builders") or not call.args:
        raise Unreadable(f"{name} in {module.name} is the value of a call")
    base = _signature(*_expression(module, call.args[0]))
    parameters = dict(base.parameters)
    if function == "builders":
        ours = KASA_ARGUMENTS if name.startswith("kasa_") else LORA_ARGUMENTS
        parameters |= {key: Parameter(spec.type, spec.default is REQUIRED, False) for key, spec in ours.items()}
        return replace(base, parameters=parameters)
    for given in list(parameters)[: len(call.args) - 1]:
        del parameters[given]
    for keyword in call.keywords:
        if keyword.arg in parameters:
            parameters[keyword.arg] = replace(parameters[keyword.arg], required=False, positional=False)
    return replace(base, parameters=parameters)


def _kind(node: ast.expr | None, default: ast.expr | None = None) -> Any:
    """A source annotation reduced to what `schema.convert` takes; Any for the rest. A default of None allows null."""
    if isinstance(default, ast.Constant) and default.value is None:
        return _union([_kind(node), type(None)])
    if isinstance(node, ast.Constant):
        return type(None) if node.value is None else Any
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([_kind(node.left), _kind(node.right)])
    if not isinstance(node, ast.Subscript):
        return _SIMPLE.get(ast.unparse(node).split(".")[-1], Any) if node else Any
    outer = ast.unparse(node.value).split(".")[-1]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer == "Optional":
        return _union([_kind(inner[0]), type(None)])
    if outer == "Union":
        return _union([_kind(item) for item in inner])
    if outer in ("list", "List"):
        return list[_kind(inner[0])]  # type: ignore[misc]
    if outer == "Literal" and all(isinstance(item, ast.Constant) for item in inner):
        return Literal[tuple(item.value for item in inner)]  # type: ignore[misc]
    return _SIMPLE.get(outer, Any)
