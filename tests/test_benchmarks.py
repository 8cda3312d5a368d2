"""The benchmarks are run by hand, and so is what they import checked here: a name that has moved breaks them unseen."""

import ast
import importlib
from pathlib import Path

import pytest

from kasa_tune import config

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.rglob("*.py"))


def imported(script: Path) -> list[tuple[str, str | None]]:
    """Modules of ours that a script imports anywhere in it, and the names it takes from them."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == "kasa_tune"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_what_a_benchmark_imports_is_there(script):
    for module, name in imported(script):
        there = importlib.import_module(module)
        if name and not hasattr(there, name):
            importlib.import_module(f"{module}.{name}")  # a module, or it is missing


def test_the_first_gpu_run_has_every_recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    checks = importlib.import_module("first_gpu_run").recipe_checks()
    words = " ".join(argument for check in checks for argument in check.arguments)
    recipes = {path.stem for path in (FOLDER.parent / "recipes").glob("*.py")}
    without_gpu = {"compare_methods", "judge_responses", "synthesize_data"}
    assert sorted(name for name in recipes - without_gpu if name not in words) == []
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {check.after for check in checks} - {None} <= set(names)


def test_the_first_gpu_run_trains_with_valid_configs(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("first_gpu_run")
    places = {"device": "cpu", "output": "/tmp/first_gpu", "root": str(FOLDER.parent)}
    trained = [c for c in script.recipe_checks() if "_finetune_" in " ".join(c.arguments)]
    assert len(trained) > 20
    for check in trained:
        words = script.fill(check, places)
        name, *overrides = words[words.index("--config") + 1 :]
        config.load(name, [o for o in overrides if not check.gpu or "offload" not in o])


def test_a_failed_check_does_not_end_the_first_gpu_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("first_gpu_run")
    checks = [
        script.Check("good", ("-c", "print('fine')")),
        script.Check("bad", ("-c", "import sys; sys.exit('no room')")),
        script.Check("of a GPU", ("-c", "print('never')"), gpu=True),
        script.Check("left out", ("-c", "print('SKIP no peer here')"), after="bad"),
        script.Check("slow", ("-c", "import time; time.sleep(60)")),
    ]
    places = {"device": "cpu", "output": str(tmp_path)}
    results = script.run_all(checks, lambda check: script.run(check, places, 2.0), 2)
    assert {result.name: (result.verdict, result.detail) for result in results} == {
        "good": ("PASS", "fine"),
        "bad": ("FAIL", "status 1: no room"),
        "of a GPU": ("SKIP", "needs a GPU"),
        "left out": ("SKIP", "no peer here"),
        "slow": ("FAIL", "took too long: "),
    }
