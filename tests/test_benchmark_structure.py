"""The figures of benchmarks/structure.py on trees small enough to count by hand."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "structure.py"


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("structure", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("run", "expected"), [(1, 15), (6, 12), (7, 0)])
def test_repeated_lines_are_counted_alone_and_in_runs(structure, run, expected):
    """Six lines in a row stand in both; "g" stands in both in another order; "own" is twice in one recipe alone."""
    shared = list("abcdef")
    recipes = {"one": [*shared, "own", "g", "own"], "two": ["g", "x", *shared], "three": ["g", "y"]}
    assert structure.num_repeated(recipes, run) == expected


def test_longer_runs_count_every_line_once(structure):
    recipes = {"one": list("abcdefgh"), "two": list("abcdefgh")}
    assert structure.num_repeated(recipes, 6) == 16


@pytest.mark.parametrize(
    ("arrows", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
        ({"a": {"b"}, "b": {"a"}, "c": {"a", "d"}, "d": {"c"}}, [["a", "b"], ["c", "d"]]),
    ],
)
def test_circles(structure, arrows, expected):
    assert structure.circles(arrows) == expected


def test_rooms_are_folders_and_flat_files(structure, tmp_path):
    files = {
        "__init__.py": "from kasa_tune.components.one import x",
        "one/__init__.py": "from kasa_tune.components.one.part import x",
        "one/part.py": "from ..flat import x\nimport torch",
        "flat.py": "def late():\n    import kasa_tune.components.one.part",
    }
    for name, text in files.items():
        file = tmp_path / "kasa_tune" / "components" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert structure.room_arrows(tmp_path) == {"one": {"flat"}, "flat": {"one"}}


def test_a_docstring_names_no_method(structure, tmp_path):
    file = tmp_path / "code.py"
    file.write_text('"""pissa"""\ndef f():\n    """milora"""\n    return {"lora": "a lora"}\n')
    assert set(structure.strings(file)) == {"lora", "a lora"}
