"""Measures the structure of a tree of this project: rooms, repetition in recipes, long lines, names of methods, YAML.

    python benchmarks/structure.py [TREE] [--methods kasa,lora,pissa]

Nothing of the tree is imported but ``kasa_tune/methods.py``, plain data, and that only when ``--methods`` is not given.

How each figure is defined:

- **Rooms**: the folders of ``kasa_tune/components`` with Python files, and every file that lies flat beside them. An
  **arrow** goes from a room to another one that any of its files imports, inside functions too. **Circles** are the
  largest sets of rooms that all reach one another along arrows.
- **Lines of a recipe**: as ``wc -l`` counts them.
- **Repeated lines**: of each recipe the non-blank lines are taken, stripped of the spaces at both ends. A line is
  repeated when an equal line stands in another recipe. It is repeated *in a run* when it is part of at least six lines
  that follow each other, blank lines left out, in this recipe and in another. Shares are those of all lines taken.
- **Long lines**: lines of more than 100 characters among all lines of ``.py`` files.
- **Files that name a method**: Python files with a string, not a docstring, that is a method's name and nothing else.
  ``methods.py`` is among the code files.
- **YAML**: non-blank lines of ``configs/*.yaml``, and how many distinct lines they are; the same without the
  lines that are comments.
"""

import argparse
import ast
import runpy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

RUN = 6
LONG = 100
CODE = ("kasa_tune", "recipes", "benchmarks")


def python_files(tree: Path, *folders: str) -> list[Path]:
    """The Python files under some folders of a tree, sorted."""
    return sorted(file for folder in folders for file in (tree / folder).glob("**/*.py"))


def parse(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ rooms


def imported_names(file: Path, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names that a file of a package imports; ``from a import b`` gives a.b."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_arrows(tree: Path) -> dict[str, set[str]]:
    """Each room, and the rooms that it imports."""
    components = tree / "kasa_tune" / "components"
    files = [
        f
        for f in python_files(tree, "kasa_tune/components")
        if f.parent != components or f.name != "__init__.py"
    ]
    room_of = {file: file.relative_to(components).with_suffix("").parts[0] for file in files}
    arrows: dict[str, set[str]] = {room: set() for room in room_of.values()}
    for file, room in room_of.items():
        for name in imported_names(file, file.relative_to(tree).parent.parts):
            parts = name.split(".")
            if parts[:2] == ["kasa_tune", "components"] and len(parts) > 2 and parts[2] in arrows:
                arrows[room].add(parts[2])
        arrows[room].discard(room)
    return arrows


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The largest sets of two or more rooms of which each reaches every other, sorted."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for room in arrows[waiting.pop()] - found:
                found.add(room)
                waiting.append(room)
        return found

    reach = {room: reached(room) for room in arrows}
    sets = {frozenset(o for o in reach[room] if room in reach[o]) for room in arrows}
    return sorted(sorted(each) for each in sets if len(each) > 1)


# ------------------------------------------------------------------------------------------ recipes


def stripped_lines(file: Path) -> list[str]:
    """The non-blank lines of a file without the spaces at their ends."""
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def num_repeated(recipes: dict[str, list[str]], run: int) -> int:
    """How many lines of all recipes are part of ``run`` or more in a row that stand in another recipe too."""
    owners: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, lines in recipes.items():
        for i in range(len(lines) - run + 1):
            owners[tuple(lines[i : i + run])].add(name)
    total = 0
    for lines in recipes.values():
        repeated: set[int] = set()
        for i in range(len(lines) - run + 1):
            if len(owners[tuple(lines[i : i + run])]) > 1:
                repeated.update(range(i, i + run))
        total += len(repeated)
    return total


def print_recipes(tree: Path) -> None:
    """Lines of each recipe, and the repeated share among those that fine-tune and among all."""
    files = python_files(tree, "recipes")
    for file in files:
        print(f"  {len(file.read_text(encoding='utf-8').splitlines()):5d}  {file.stem}")
    for what, chosen in (
        ("fine-tuning recipes", [f for f in files if "_finetune_" in f.stem]),
        ("all recipes", files),
    ):
        recipes = {file.stem: stripped_lines(file) for file in chosen}
        lines = sum(map(len, recipes.values()))
        single, runs = num_repeated(recipes, 1), num_repeated(recipes, RUN)
        print(
            f"  {what}: {lines} non-blank lines, {single / lines:.0%} repeated in another, "
            f"{runs / lines:.0%} in runs of {RUN} or more"
        )


# ------------------------------------------------------------------------------------------ the rest


def long_lines(files: Iterable[Path]) -> tuple[int, int]:
    """How many lines have more than LONG characters, and how many lines there are."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return sum(len(line) > LONG for line in lines), len(lines)


def strings(file: Path) -> Iterator[str]:
    """The string constants of a file, docstrings left out."""
    tree = parse(file)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            yield node.value


def method_names(tree: Path, given: str | None) -> list[str]:
    """The names given, else those of the tree's table of methods."""
    if given:
        return given.split(",")
    table = tree / "kasa_tune" / "methods.py"
    if not table.is_file():
        raise SystemExit(f"{table} does not exist: give the names, --methods kasa,lora,...")
    return list(runpy.run_path(str(table))["METHODS"])


def print_methods(tree: Path, methods: list[str]) -> None:
    """How many files name one of the methods, and which."""
    for what, files in (
        ("code files", python_files(tree, *CODE)),
        ("test files", python_files(tree, "tests")),
    ):
        naming = [
            str(f.relative_to(tree)) for f in files if not set(methods).isdisjoint(strings(f))
        ]
        print(f"  {len(naming)} of {len(files)} {what}: {', '.join(naming)}")


def main() -> None:
    """Print every figure of the tree on the command line."""
    parser = argparse.ArgumentParser(description="Measure the structure of a tree of this project.")
    parser.add_argument(
        "tree", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent
    )
    parser.add_argument("--methods", help="names of methods, separated by commas")
    options = parser.parse_args()
    tree = options.tree.resolve()
    methods = method_names(tree, options.methods)

    arrows = room_arrows(tree)
    found = circles(arrows)
    print(f"rooms: {len(arrows)}, arrows: {sum(map(len, arrows.values()))}, circles: {len(found)}")
    for room in sorted(arrows):
        print(f"  {room} -> {', '.join(sorted(arrows[room])) or 'none'}")
    for circle in found:
        print(f"  circle of {len(circle)}: {', '.join(circle)}")
    print("lines of recipes")
    print_recipes(tree)
    long, lines = long_lines(python_files(tree, *CODE, "tests"))
    print(f"lines over {LONG} characters: {long} of {lines}, {long / lines:.2%}")
    print(f"files that name one of {len(methods)} methods ({', '.join(methods)})")
    print_methods(tree, methods)
    configs = sorted((tree / "configs").glob("*.yaml"))
    yaml = [line for file in configs for line in stripped_lines(file)]
    settings = [line for line in yaml if not line.startswith("#")]
    print(
        f"YAML: {len(configs)} files, {len(yaml)} lines, {len(set(yaml))} distinct; "
        f"without comments {len(settings)}, {len(set(settings))} distinct"
    )


if __name__ == "__main__":
    main()
