"""What a dotted path leads to, found in source files without importing them.

A module is a table of names and what binds them. Followed are re-exports, `from x import *` and aliases.
"""

import ast
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from typing import Any, NamedTuple


class UnreadableError(Exception):
    """The source does not say it: a C extension, a computed name, the value of a call."""


class NoSuchNameError(LookupError):
    """`where` has no `name`, but `names`. No `where`: it is not installed. No `name`: `where` itself is a module."""

    def __init__(self, where: str, name: str, names: list[str]) -> None:
        text = f"{where} has no {name!r}" if where else f"no package {name!r} is installed"
        super().__init__(text if name else f"{where} is a module, not something in one")
        self.where, self.name, self.names = where, name, names


class Module(NamedTuple):
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


class Call(NamedTuple):
    """`name = function(...)`."""

    name: str
    call: ast.Call


def find(path: str) -> tuple[Module, Any]:
    top, *names = path.split(".")
    return _attribute(_package(top), names)


def _package(top: str) -> Module:
    """The top-level module `top`, found but not imported."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # the running script has no spec
        spec = None
    spec = spec or PathFinder.find_spec(top, [os.getcwd()])
    if spec is None:
        raise NoSuchNameError("", top, list(_installed(tuple(sys.path))))
    folders = list(spec.submodule_search_locations or ())
    if spec.origin and spec.origin.endswith(".py"):
        return Module(top, Path(spec.origin))
    if len(folders) == 1:
        return Module(top, Path(folders[0]))
    raise UnreadableError(f"{top} is not Python source in one place")


@lru_cache(maxsize=4)
def _installed(folders: tuple[str, ...]) -> tuple[str, ...]:
    """The top-level modules in the folders; a walk through all of them takes a tenth of a second."""
    return tuple(module.name for module in pkgutil.iter_modules(folders))


# Begins the keys of `from x import *` in a module's names. The key "*" means that the module computes its names.
_STAR = "* from "


@lru_cache(maxsize=256)
def _names(file: Path) -> dict[str, Any]:
    """Top-level names of a file and what binds them: a def, a class, an `_Import` or an assigned expression."""
    if file.is_dir():
        return {}
    try:
        source = file.read_bytes()
        names = dict(bindings(ast.parse(source).body))
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableError(f"{file}: {error}") from error
    return names | ({"*": None} if b"globals()" in source else {})


def bindings(body: list[ast.stmt]) -> Iterator[tuple[str, Any]]:
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
                if alias.name == "*":
                    yield _STAR + (node.module or ""), _Import(node.level, node.module or "", None)
                    continue
                yield alias.asname or alias.name, _Import(node.level, node.module or "", alias.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        yield name.id, node.value
        else:
            branches = [handler.body for handler in getattr(node, "handlers", [])]
            for branch in [*branches, getattr(node, "orelse", []), getattr(node, "body", [])]:
                yield from bindings(branch)


def _attribute(module: Module, names: list[str]) -> tuple[Module, Any]:
    """What `names` lead to from `module`: the module that binds it and the binding, None for that module itself."""
    if not names:
        return module, None
    name, *rest = names
    inner, table = _submodule(module, name), _names(module.file)
    if inner and (
        rest or name not in table
    ):  # a package may define the name too, but then as this submodule
        return _attribute(inner, rest)
    if name not in table and (found := _starred(module, name)):
        module, table = found
    if name not in table:
        if "*" in table or "__getattr__" in table:
            raise UnreadableError(f"{module.name} computes its names")
        raise NoSuchNameError(module.name, name, public(module))
    where, found = _follow(module, name, table[name])
    if rest and found is not None:
        raise UnreadableError(f"{name} in {module.name} is no module")
    return _attribute(where, rest) if rest else (where, found)


def _starred(
    module: Module, name: str, seen: frozenset[Path] = frozenset()
) -> tuple[Module, dict[str, Any]] | None:
    """The module that `name` comes from by a `from x import *`, and that module's names; None when it comes from none.

    Raises:
        UnreadableError: such a module has an `__all__`, which may be computed, or other names that are.
    """
    seen |= {module.file}
    for source in _star_sources(module):
        if source.file in seen:  # two modules that import each other
            continue
        table = _names(source.file)
        if {"__all__", "__getattr__", "*"} & table.keys():
            raise UnreadableError(f"{module.name} takes what {source.name} exports")
        if name in table and not name.startswith("_"):
            return source, table
        if found := _starred(source, name, seen):
            return found
    return None


def _star_sources(module: Module) -> list[Module]:
    """The modules that a module imports everything from, the last one first, which has the last word.

    Raises:
        UnreadableError: one of them is not installed, or is no source.
    """
    stars = [value for key, value in _names(module.file).items() if key.startswith(_STAR)]
    try:
        return [_follow(module, "", star)[0] for star in reversed(stars)]
    except NoSuchNameError as error:
        raise UnreadableError(f"{module.name} takes what is not there: {error}") from None


def _submodule(module: Module, name: str) -> Module | None:
    if module.folder is None:
        return None
    full, folder = f"{module.name}.{name}", module.folder / name
    for file in (folder / "__init__.py", module.folder / f"{name}.py"):
        if file.is_file():
            return Module(full, file)
    if any((module.folder / f"{name}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        raise UnreadableError(f"{full} is compiled")
    return Module(full, folder) if folder.is_dir() and name != "__pycache__" else None


def public(module: Module) -> list[str]:
    """Names to suggest: submodules, then what the module defines (of two that look alike the later is suggested)."""
    files = sorted(file.stem for file in module.folder.iterdir()) if module.folder else []
    starred = [
        name
        for source in _star_sources(module)
        if source.file != module.file
        for name in _names(source.file)
    ]
    return [
        name
        for name in [*files, *starred, *_names(module.file)]
        if name.isidentifier() and not name.startswith("_")
    ]


def _follow(module: Module, name: str, binding: Any) -> tuple[Module, Any]:
    """Past imports and aliases to the definition behind `name`, with the module it stands in."""
    if isinstance(binding, (ast.Name, ast.Attribute)):
        return expression(module, binding)
    if isinstance(binding, ast.Call):
        return module, Call(name, binding)
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
    return find(".".join(parts))


def expression(module: Module, node: ast.expr) -> tuple[Module, Any]:
    """What a dotted name means inside `module`."""
    text = ast.unparse(node)
    if not all(part.isidentifier() for part in text.split(".")):
        raise UnreadableError(f"{text} in {module.name} is computed")
    return _attribute(module, text.split("."))
