"""The schema that a recipe's file gives to `@config.parse(...)`, without running it, and configs of another recipe."""

import ast
from pathlib import Path
from typing import Any

from kasa_tune.config.entries import UNKNOWN, Problem, Schema, shortened
from kasa_tune.config.schemas import RECIPES


def schema_of_recipe(path: Path) -> Schema | None:
    """The schema in the file's `@config.parse(<expression>)`; None where that takes the config of any recipe.

    Of the file, only the expression is evaluated, after the imports and assignments at its top level that the
    expression needs. So a recipe that imports torch for its training alone is read without torch.

    Raises:
        ValueError: the file has no such decorator, or its expression cannot be evaluated.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no Python file: {shortened(str(error), 160)}") from None
    expression = _decorator_argument(tree)
    if expression is None:
        raise ValueError(
            f"{path} has no function with the decorator @config.parse(<schema>), which tells the "
            "keys of a recipe's configs."
        )
    needed: list[ast.stmt] = []
    _add_needed(expression, tree.body, needed)
    body = ast.Module(sorted(needed, key=lambda node: node.lineno), [])
    names: dict[str, Any] = {"__name__": "recipe", "__file__": str(path)}
    try:
        exec(compile(body, str(path), "exec"), names)
        schema = eval(compile(ast.Expression(expression), str(path), "eval"), names)
    except Exception as error:  # whatever the recipe's own lines may raise
        said = shortened(f"{type(error).__name__}: {error}", 160)
        raise ValueError(f"The schema of {path} cannot be evaluated. {said}") from error
    if schema is not None and not isinstance(schema, dict):
        raise ValueError(f"The schema of {path} is no mapping of keys, see docs/configs.md.")
    return schema


def of_another_recipe(own: Schema, schema: Schema, problems: list[Problem]) -> list[Problem]:
    """One problem in place of all, where a config has the keys of another recipe than the one that is to run it.

    Args:
        own: the schema that the config belongs to, see `schema_of`.
        schema: that of the recipe. Copied recipes with keys of their own have another than ours.
        problems: those of the config under `schema`.
    """
    names = {id(of_recipe): recipe for recipe, of_recipe in RECIPES.items()}
    wanted, named = names.get(id(own)), names.get(id(schema))
    unknown = [problem.text for problem in problems if problem.text.startswith(UNKNOWN)]
    if not (wanted and named and unknown) or wanted == named:
        return []
    if not all(wanted in text for text in unknown):
        return []
    either = f"{wanted} (or _distributed)" if wanted.endswith("_single_device") else wanted
    advice = f"run {wanted}, or give a config of {named}"
    return [Problem("", f"this is a config of {either}, and {named} does not take it; {advice}")]


def _decorator_argument(tree: ast.Module) -> ast.expr | None:
    """The argument of the first decorator `config.parse(...)` or `parse(...)`."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for mark in [mark for function in functions for mark in function.decorator_list]:
        match mark:
            case ast.Call(func=ast.Name("parse") | ast.Attribute(attr="parse"), args=[schema]):
                return schema
    return None


def _add_needed(expression: ast.AST, body: list[ast.stmt], needed: list[ast.stmt]) -> None:
    """Add the statements of `body` that bind the names in `expression`, and those that these need in turn."""
    used = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
    for statement in body:
        if statement not in needed and used & _bound(statement):
            needed.append(statement)
            _add_needed(statement, body, needed)


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement at the top level binds."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        nodes = ast.walk(statement)
        return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return set()
