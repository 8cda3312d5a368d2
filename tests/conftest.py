"""What many tests share: real data, recipes loaded by file path, a small real run."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from tests.fuzzing import watched

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that KASA_TUNE_DATA names; tests that need it are skipped without it."""
    if not (folder := os.environ.get("KASA_TUNE_DATA")):
        pytest.skip("KASA_TUNE_DATA does not name the folder with real models and datasets")
    return Path(folder)


@pytest.fixture(scope="session")
def load_recipe():
    """Load a recipe's module by name, as `tune` does: by its file, since torchtune owns a package called recipes."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            f"recipe_{name}", ROOT / "recipes" / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def _watch(request, tmp_path_factory):
    """Nothing that a fuzz test feeds to the code may run a command or change a file elsewhere."""
    if not request.node.get_closest_marker("fuzz"):
        yield
        return
    # `datasets` unpacks a file that begins like a compressed one into this folder.
    hugging_face = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    with watched(tmp_path_factory.getbasetemp(), ROOT / ".hypothesis", hugging_face):
        yield


# Left out of `make test-fast`, besides the tests marked slow one by one.
SLOW_PATHS = ("install", "parity", "recipes", "test_benchmark_corda_truncation.py")
SLOW_FIXTURES = {
    "load_recipe",  # a whole run takes a second or more
    "processes",  # these start processes
    "two_processes",
    "two_by_two_processes",
}
FAST_PATHS = ("recipes/test_two_steps.py",)  # fast in spite of the lists above


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what stands in a slow folder or file, runs a recipe, starts processes, or imports a peer."""
    for item in items:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        slow_path, slow_fixture = (
            path.startswith(SLOW_PATHS),
            SLOW_FIXTURES & set(item.fixturenames),
        )
        slow = slow_path or slow_fixture or item.get_closest_marker("parity")
        if slow and not path.startswith(FAST_PATHS):
            item.add_marker("slow")
