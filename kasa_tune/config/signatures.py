"""What arguments a dotted path takes, read from source files without importing them.

Importing torchtune to check a config takes seconds; parsing the few files between `torchtune.models.llama3.llama3_8b`
and its `def` takes milliseconds. Followed are re-exports, aliases, `functools.partial`, base classes and our own
`kasa_x, lora_x, corda_x = builders(x)`. For whatever else Python can do to a name there is `imported`, which asks
Python.
"""

import ast
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Union

from kasa_tune.methods import LINEARS

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


class UnreadableError(Exception):
    """The source does not say it: a C extension, a computed name, the value of a call."""


class NoSuchNameError(LookupError):
    """`where` has no `name`, but `names`. No `where`: it is not installed. No `name`: `where` itself is a module."""

    def __init__(self, where: str, name: str, names: list[str]) -> None:
        text = f"{where} has no {name!r}" if where else f"no package {name!r} is installed"
        super().__init__(text if name else f"{where} is a module, not something in one")
        self.where, self.name, self.names = where, name, names


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
    return _signature(*_find(path))


def members(path: str) -> list[str]:
    """The names that the enumeration at dotted `path` assigns; raises as `static`."""
    _, node = _find(path)
    if not isinstance(node, ast.ClassDef):
        raise UnreadableError(f"{path} is no class")
    return [name for name, value in _bindings(node.body) if isinstance(value, ast.expr)]


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


# --- modules as tables of names ---------------------------------------------------------------------------------------


class _Module(NamedTuple):
    """A module's dotted name and its source file, or the folder of a package without `__init__.py`."""

    name: str
    file: Path

    @property
    def folder(self) -> Path | None:
        """Where its submodules lie; None for a plain module."""
        if self.file.is_dir():
            return self.file
        return self.file.parent if self.file.name == "__init__.py" else None


class _Import(NamedTuple):
    """`from <level dots><module> import <name>`, or `import module` when there is no name."""

    level: int
    module: str
    name: str | None


class _Call(NamedTuple):
    """`name = function(...)`."""

    name: str
    call: ast.Call


def _find(path: str) -> tuple[_Module, Any]:
    top, *names = path.split(".")
    return _attribute(_package(top), names)


def _package(top: str) -> _Module:
    """The top-level module `top`, found but not imported."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # the running script has no spec
        spec = None
    spec = spec or PathFinder.find_spec(top, [os.getcwd()])
    if spec is None:
        raise NoSuchNameError("", top, [module.name for module in pkgutil.iter_modules()])
    folders = list(spec.submodule_search_locations or ())
    if spec.origin and spec.origin.endswith(".py"):
        return _Module(top, Path(spec.origin))
    if len(folders) == 1:
        return _Module(top, Path(folders[0]))
    raise UnreadableError(f"{top} is not Python source in one place")


@lru_cache(maxsize=256)
def _names(file: Path) -> dict[str, Any]:
    """Top-level names of a file and what binds them: a def, a class, an `_Import` or an assigned expression."""
    if file.is_dir():
        return {}
    try:
        source = file.read_bytes()
        names = dict(_bindings(ast.parse(source).body))
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableError(f"{file}: {error}") from error
    return names | ({"*": None} if b"globals()" in source else {})


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, Any]]:
    """Pairs of name and binding; of several for a name the last holds (in `try` and `if` that is the first branch)."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield alias.asname or top, _Import(0, alias.name if alias.asname else top, None)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, _Import(node.level, node.module or "", alias.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        yield name.id, node.value
        else:
            branches = [handler.body for handler in getattr(node, "handlers", [])]
            for branch in [*branches, getattr(node, "orelse", []), getattr(node, "body", [])]:
                yield from _bindings(branch)


def _attribute(module: _Module, names: list[str]) -> tuple[_Module, Any]:
    """What `names` lead to from `module`: the module that binds it and the binding, None for that module itself."""
    if not names:
        return module, None
    name, *rest = names
    inner, table = _submodule(module, name), _names(module.file)
    if inner and (
        rest or name not in table
    ):  # a package may define the name too, but then as this submodule
        return _attribute(inner, rest)
    if name not in table:
        if "*" in table or "__getattr__" in table:
            raise UnreadableError(f"{module.name} computes its names")
        raise NoSuchNameError(module.name, name, _public(module))
    where, found = _follow(module, name, table[name])
    if rest and found is not None:
        raise UnreadableError(f"{name} in {module.name} is no module")
    return _attribute(where, rest) if rest else (where, found)


def _submodule(module: _Module, name: str) -> _Module | None:
    if module.folder is None:
        return None
    full, folder = f"{module.name}.{name}", module.folder / name
    for file in (folder / "__init__.py", module.folder / f"{name}.py"):
        if file.is_file():
            return _Module(full, file)
    if any((module.folder / f"{name}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        raise UnreadableError(f"{full} is compiled")
    return _Module(full, folder) if folder.is_dir() and name != "__pycache__" else None


def _public(module: _Module) -> list[str]:
    """Names to suggest: submodules, then what the module defines (of two that look alike the later is suggested)."""
    files = sorted(file.stem for file in module.folder.iterdir()) if module.folder else []
    return [
        name
        for name in [*files, *_names(module.file)]
        if name.isidentifier() and not name.startswith("_")
    ]


def _follow(module: _Module, name: str, binding: Any) -> tuple[_Module, Any]:
    """Past imports and aliases to the definition behind `name`, with the module it stands in."""
    if isinstance(binding, (ast.Name, ast.Attribute)):
        return _expression(module, binding)
    if isinstance(binding, ast.Call):
        return module, _Call(name, binding)
    if not isinstance(binding, _Import):
        return module, binding
    parts = [part for part in (*binding.module.split("."), binding.name) if part]
    if binding.level:
        packages = module.name.split(".")[
            : None if module.folder else -1
        ]  # the package that one dot stands for
        parts = [*packages[: len(packages) - binding.level + 1], *parts]
    if parts == [*module.name.split("."), name]:  # `from . import name`: the submodule
        inner = _submodule(module, name)
        if inner is None:
            raise UnreadableError(f"{module.name} computes {name}")
        return inner, None
    return _find(".".join(parts))


def _expression(module: _Module, node: ast.expr) -> tuple[_Module, Any]:
    """What a dotted name means inside `module`."""
    text = ast.unparse(node)
    if not all(part.isidentifier() for part in text.split(".")):
        raise UnreadableError(f"{text} in {module.name} is computed")
    return _attribute(module, text.split("."))


# --- from a definition to its signature -------------------------------------------------------------------------------


def _signature(module: _Module, binding: Any) -> Signature:
    if isinstance(binding, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return _arguments(binding.args)
    if isinstance(binding, ast.ClassDef):
        return _constructor(module, binding)
    if isinstance(binding, _Call):
        return _called(module, binding)
    if binding is None:
        raise NoSuchNameError(module.name, "", _public(module))
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


def _constructor(module: _Module, node: ast.ClassDef) -> Signature:
    """`__init__` of the class, or of its first base."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _arguments(item.args, skip=1)
    if node.keywords or node.decorator_list or not node.bases:  # metaclass, dataclass, object
        raise UnreadableError(f"{node.name} has no __init__ of its own")
    return _signature(*_expression(module, node.bases[0]))


def _called(module: _Module, binding: _Call) -> Signature:
    """`name = partial(f, ...)`, or `kasa_x, lora_x, corda_x = builders(x)`."""
    name, call = binding
    function = ast.unparse(call.func).split(".")[-1]
    if function not in ("partial", "builders") or not call.args:
        raise UnreadableError(f"{name} in {module.name} is the value of a call")
    base = _signature(*_expression(module, call.args[0]))
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
        return _union(_kind(node.left), _kind(node.right))
    if not isinstance(node, ast.Subscript):
        return _SIMPLE.get(ast.unparse(node).split(".")[-1], Any) if node else Any
    outer = ast.unparse(node.value).split(".")[-1]
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer in ("Optional", "Union"):
        return _union(*map(_kind, inner), *([None] if outer == "Optional" else []))
    if outer in ("list", "List"):
        return list[_kind(inner[0])]  # type: ignore[misc]
    values = [item.value for item in inner if isinstance(item, ast.Constant)]
    if outer == "Literal" and len(values) == len(inner):
        return Literal[tuple(values)]
    return _SIMPLE.get(outer, Any)


def _kind_of_text(annotation: Any) -> Any:
    """The same of an annotation at run time, which may be a string."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    try:
        return _kind(ast.parse(text, mode="eval").body)
    except SyntaxError:  # `<class ...>` and the like
        return Any


def _union(*kinds: Any) -> Any:
    return Any if Any in kinds else Union[kinds]  # noqa: UP007 (a tuple of them)
