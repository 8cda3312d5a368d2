"""The comparison of mypy's errors with the baseline of `make typecheck`."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / ".ci" / "typecheck.py"

OUTPUT = """\
kasa_tune/a.py:1: error: Incompatible types  [assignment]
kasa_tune/a.py:1: note: Possible overload variants:
kasa_tune/a.py:7: error: Missing return  [return]
kasa_tune/b/c.py:3: error: "Tensor" not callable  [operator]
Found 3 errors in 2 files (checked 9 source files)
"""


@pytest.fixture(scope="module")
def typecheck():
    spec = importlib.util.spec_from_file_location("typecheck", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_errors_are_counted_by_file_without_notes(typecheck):
    assert typecheck.count_errors(OUTPUT) == {"kasa_tune/a.py": 2, "kasa_tune/b/c.py": 1}


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        ("2 kasa_tune/a.py\n1 kasa_tune/b/c.py\n", []),
        ("1 kasa_tune/a.py\n1 kasa_tune/b/c.py\n", ["a.py: 2 type errors, 1 allowed"]),
        ("2 kasa_tune/a.py\n", ["b/c.py: 1 type errors, 0 allowed"]),
        ("3 kasa_tune/a.py\n1 kasa_tune/b/c.py\n", ["a.py: 2 type errors, 3 in the baseline"]),
        ("2 kasa_tune/a.py\n1 kasa_tune/b/c.py\n1 kasa_tune/d.py\n", ["d.py: 0 type errors, 1"]),
    ],
)
def test_a_file_that_is_not_as_the_baseline_says_is_told(typecheck, baseline, words):
    told = typecheck.compare(typecheck.count_errors(OUTPUT), typecheck.read_baseline(baseline))
    assert len(told) == len(words)
    assert all(word in line for word, line in zip(words, told, strict=True))


def test_writing_lowers_counts_and_raises_none(typecheck):
    errors = Counter({"a.py": 1, "b.py": 5, "new.py": 2})
    text = typecheck.write_baseline(errors, Counter({"a.py": 3, "b.py": 4, "gone.py": 1}))
    assert typecheck.read_baseline(text) == {"a.py": 1, "b.py": 4}


def test_clean_folders_are_not_in_the_baseline(typecheck):
    """The rooms that are promised to be clean cannot be let off through the baseline."""
    baseline = typecheck.read_baseline(typecheck.BASELINE.read_text())
    assert not [file for file in baseline if file.startswith(typecheck.CLEAN)]
    file = f"{typecheck.CLEAN[0]}x.py"
    assert len(typecheck.compare(Counter({file: 1}), Counter({file: 1}))) == 1
