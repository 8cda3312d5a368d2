"""The rooms of kasa_tune/components: imports between them go one way, and files and functions stay short.

Everything is read with ``ast``; nothing of the package is imported.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = ROOT / "kasa_tune" / "components"
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
LONGEST_RECIPE, LONGEST_DISTRIBUTED_RECIPE = 300, 350

# Above the bar, and known. A file that gets short enough must leave the list.
KNOWN_LONG_FILES = {
    "kasa_tune/tiny_world/world.py",
}
KNOWN_LONG_FUNCTIONS: set[str] = set()

Arrows = dict[tuple[str, str], set[str]]  # (importing room, imported room): the files that import


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def module_name(file: Path) -> str:
    """The dotted name of a file of the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, root: Path = ROOT) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it; ``from a import b`` gives a.b, relative names are resolved."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_graph(root: Path = ROOT) -> Arrows:
    """Which room imports which other room, and in which files."""
    arrows: Arrows = defaultdict(set)
    for file in sorted((root / "kasa_tune" / "components").glob("*/**/*.py")):
        room = file.relative_to(root / "kasa_tune" / "components").parts[0]
        for name in imports(file, root):
            parts = name.split(".")
            if parts[:2] == ["kasa_tune", "components"] and len(parts) > 2 and parts[2] != room:
                arrows[room, parts[2]].add(str(file.relative_to(root)))
    return arrows


def find_circle(arrows: Arrows) -> list[str]:
    """Rooms along a circle, the first of them again at the end; empty when there is none."""
    nexts = defaultdict(list)
    for source, target in sorted(arrows):
        nexts[source].append(target)
    done: set[str] = set()

    def search(room: str, path: list[str]) -> list[str]:
        if room in path:
            return [*path[path.index(room) :], room]
        if room in done:
            return []
        for following in nexts[room]:
            if circle := search(following, [*path, room]):
                return circle
        done.add(room)
        return []

    return next((circle for room in sorted(nexts) if (circle := search(room, []))), [])


def describe(circle: list[str], arrows: Arrows) -> str:
    lines = [f"The rooms import each other in a circle: {' -> '.join(circle)}"]
    for source, target in pairwise(circle):
        lines.append(f"  {source} -> {target} in {', '.join(sorted(arrows[source, target]))}")
    return "\n".join(lines)


def write_tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "kasa_tune" / "components" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_imports_between_rooms_go_one_way():
    arrows = room_graph()
    assert len(arrows) > 10, "the imports of the rooms were not found"
    circle = find_circle(arrows)
    assert not circle, describe(circle, arrows)


@pytest.mark.parametrize(
    "back",
    [
        "from kasa_tune.components import one",
        "from kasa_tune.components.one.files import x",
        "import kasa_tune.components.one.files",
        "from ..one import x",
        "def late():\n    from kasa_tune.components.one import x",
    ],
)
def test_a_circle_is_found_and_described(tmp_path, back):
    """Every way to write an import counts, one inside a function too."""
    files = {
        "one/files.py": "from kasa_tune.components.two import x",
        "two/files.py": "from kasa_tune.components.three import x",
        "three/files.py": back,
        "outside/files.py": "from kasa_tune.components.one import x",
    }
    arrows = room_graph(write_tree(tmp_path, files))
    circle = find_circle(arrows)
    assert len(circle) == 4
    assert circle[0] == circle[-1]
    assert set(circle) == {"one", "two", "three"}
    message = describe(circle, arrows)
    assert "three -> one in kasa_tune/components/three/files.py" in message
    assert "outside" not in message


def test_rooms_that_share_a_room_are_no_circle(tmp_path):
    files = {
        "one/files.py": "from kasa_tune.components import two, three",
        "two/files.py": "from kasa_tune.components.three import x",
        "three/files.py": "from kasa_tune.components.three.others import x",
    }
    arrows = room_graph(write_tree(tmp_path, files))
    assert set(arrows) == {("one", "two"), ("one", "three"), ("two", "three")}
    assert find_circle(arrows) == []


def test_every_component_lies_in_a_room():
    """A room is a folder with an ``__init__.py`` that says in its docstring what the room is for."""
    loose = [file.name for file in COMPONENTS.glob("*.py") if file.name != "__init__.py"]
    assert not loose, f"in no room: {loose}"
    folders = [each for each in COMPONENTS.iterdir() if any(each.glob("*.py"))]
    assert len(folders) > 5
    silent = [
        each.name
        for each in folders
        if not (each / "__init__.py").is_file()
        or not ast.get_docstring(parse(each / "__init__.py"))
    ]
    assert not silent, f"rooms without an __init__.py that describes them: {silent}"


def test_components_import_neither_recipes_nor_config():
    forbidden = ("recipes", "kasa_tune.config", "kasa_tune.cli")
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted(COMPONENTS.glob("**/*.py"))
        for name in imports(file)
        if any(f"{name}.".startswith(f"{each}.") for each in forbidden)
    ]
    assert not wrong, "\n".join(wrong)


def check_bar(lengths: dict[str, int], bar: int, known: set[str]) -> None:
    """Raise when something is above the bar and not known to be, or known to be and not above it."""
    long = {name for name, length in lengths.items() if length > bar}
    new = {name: lengths[name] for name in sorted(long - known)}
    assert not new, f"longer than {bar} lines: {new}"
    assert known <= long, f"no longer above {bar} lines, take off the list: {sorted(known - long)}"


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def library_files() -> list[Path]:
    return sorted((ROOT / "kasa_tune").glob("**/*.py"))


def test_library_files_are_short():
    lengths = {str(file.relative_to(ROOT)): num_lines(file) for file in library_files()}
    check_bar(lengths, LONGEST_FILE, KNOWN_LONG_FILES)


def test_functions_are_short():
    """A function's length counts its decorators' lines not, its docstring yes."""
    lengths = {
        f"{file.relative_to(ROOT)}::{node.name}": node.end_lineno - node.lineno + 1
        for file in [*library_files(), *sorted((ROOT / "recipes").glob("*.py"))]
        for node in ast.walk(parse(file))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    check_bar(lengths, LONGEST_FUNCTION, KNOWN_LONG_FUNCTIONS)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "recipes").glob("*.py")), ids=lambda file: file.stem
)
def test_recipes_are_short(file):
    bar = LONGEST_DISTRIBUTED_RECIPE if "distributed" in file.stem else LONGEST_RECIPE
    assert num_lines(file) <= bar
