"""What torchtune imports of torchao is found, whatever torchao has: with stand-ins of both packages, each case in a
process of its own, and with the installed ones.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from kasa_tune.registry import PACKAGE_ROOT

NF4 = "class NF4Tensor: pass\n"
NEW_HOME = "torchao/quantization/quantize_/workflows/nf4/nf4_tensor.py"
OLD_HOME = "torchao/dtypes/nf4tensor.py"
NAMES = ("TensorCoreTiledLayout", "int4_weight_only", "int8_dynamic_activation_int4_weight")
LAYOUT = "class TensorCoreTiledLayout: pass\n"
FUNCTIONS = "int4_weight_only = int8_dynamic_activation_int4_weight = len\n"

# What each version of torchao has, by file.
TORCHAO = {
    "0.15": {OLD_HOME: NF4, "torchao/dtypes/__init__.py": LAYOUT, "torchao/quantization/__init__.py": FUNCTIONS},
    "0.17": {OLD_HOME: NF4, "torchao/dtypes/__init__.py": LAYOUT, "torchao/quantization/__init__.py": ""},
    "0.18": {NEW_HOME: NF4, "torchao/dtypes/__init__.py": "", "torchao/quantization/__init__.py": ""},
}  # fmt: skip
TORCHTUNE = {
    "torchtune/__init__.py": "import torchao\nfrom torchtune import modules\n",
    "torchtune/modules.py": "from torchao.dtypes.nf4tensor import NF4Tensor\n",
    "torchtune/training/__init__.py": "from torchtune.training import quantization\n",
    "torchtune/training/quantization.py": "from torchao.dtypes import TensorCoreTiledLayout\n"
    "from torchao.quantization import int4_weight_only, int8_dynamic_activation_int4_weight\n",
}


@pytest.fixture
def python(tmp_path):
    """Runs statements beside stand-ins of torchtune and of one version of torchao; returns what they print."""

    def run(version, code):
        files = {"torchao/__init__.py": "", **TORCHAO[version], **TORCHTUNE}
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in path.parents[: len(Path(name).parents) - 1]:
                (folder / "__init__.py").touch()
            path.write_text(text)
        metadata = tmp_path / f"torchao-{version}.0.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: torchao\nVersion: {version}.0\n")
        head = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(PACKAGE_ROOT.parent)!r}]\n"
        done = subprocess.run(
            [sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.mark.parametrize("version", TORCHAO)
@pytest.mark.parametrize(
    "code",
    [
        "import kasa_tune, torchtune.training",
        "import torchao, kasa_tune, torchtune.training",
        "import kasa_tune, torchtune, kasa_tune.torchao_bridge as b; b.install(); import torchtune.training",
    ],
)  # fmt: skip
def test_torchtune_is_imported_beside_every_torchao(python, version, code):
    home = (NEW_HOME if version == "0.18" else OLD_HOME).removesuffix(".py").replace("/", ".")
    check = "\nprint(torchtune.modules.NF4Tensor.__module__, torchtune.training.__name__)"
    assert python(version, code + check) == f"{home} torchtune.training"


def test_it_is_in_time_when_torchtune_itself_imports_torch(python, tmp_path):
    """The hook of torch imports kasa_tune when torchtune is half imported."""
    (tmp_path / "torch.py").write_text("import kasa_tune")
    text = "import torch\nimport torchao\nfrom torchtune import modules"
    prepare = f"open({str(tmp_path / 'torchtune' / '__init__.py')!r}, 'w').write({text!r})\n"
    show = (
        "import torchtune.training\nprint('kasa_tune' in sys.modules, torchtune.modules.NF4Tensor)"
    )
    assert python("0.18", prepare + show).startswith("True <class 'torchao.quantization.")


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("import torch, torchtune", ""),  # as a recipe of torchrun's begins
        ("import torchtune", ""),  # as `tune` begins; torchao imports torch
        ("import torch, torchao", "not loaded"),  # for something else
    ],
)
def test_what_torchao_logs_is_hidden_where_torchtune_imports_it(python, tmp_path, first, said):
    (tmp_path / "torch.py").write_text("import kasa_tune")
    text = (
        "import logging, sys, torch\n"
        "logging.getLogger('torchao').addHandler(logging.StreamHandler(sys.stdout))\n"
        "logging.getLogger('torchao').warning('not loaded')\n"
    )
    prepare = f"open({str(tmp_path / 'torchao' / '__init__.py')!r}, 'w').write({text!r})\n"
    assert python("0.18", f"{prepare}{first}") == said


def test_both_names_of_the_nf4_module_are_one_module(python):
    code = (
        "import kasa_tune, torchtune\nimport torchao.dtypes.nf4tensor as former\n"
        f"import {NEW_HOME.removesuffix('.py').replace('/', '.')} as home\n"
        "print(former is home, torchao.dtypes.nf4tensor is home, home.__spec__.name == home.__name__)"
    )
    assert python("0.18", "import torchao\n" + code) == "True True True"


@pytest.mark.parametrize(("version", "has"), [("0.15", 3), ("0.17", 1), ("0.18", 0)])
def test_torchao_looks_afterwards_as_before(python, version, has):
    """Other packages tell by these names what torchao can do."""
    look = f"have = [n for p in (d, q) for n in {NAMES} if hasattr(p, n)]; "
    code = (
        f"import kasa_tune, torchao.dtypes as d, torchao.quantization as q\n{look}before = have\n"
        f"import torchtune.training\n{look}print(have == before, len(have))"
    )
    assert python(version, code) == f"True {has}"


def test_without_torchtune_nothing_is_added(python):
    code = (
        "import kasa_tune, torchao.dtypes\n"
        "try:\n    import torchao.dtypes.nf4tensor\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
        "print([n for n in sys.modules if 'nf4' in n])"
    )
    assert python("0.18", code) == "No module named 'torchao.dtypes.nf4tensor'\n[]"


@pytest.mark.parametrize("version", ["0.17", "0.18"])
def test_a_name_that_is_gone_says_so_when_it_is_called(python, version):
    gone = NAMES if version == "0.18" else NAMES[1:]
    code = (
        "import kasa_tune, torchtune.training.quantization as module\n"
        f"for name in {gone}:\n"
        "    try:\n        getattr(module, name)(8, key=1)\n"
        "    except RuntimeError as error:\n        print(error)"
    )
    assert python(version, code).splitlines() == [
        f"torchtune's quantizers call {name}, which torchao {version}.0 no longer has. Install "
        "torchao<0.16 to use them, or quantize the model with torchao's own quantize_."
        for name in gone
    ]


# ------------------------------------------------------------------------- the installed packages


def work(_):
    """In a worker that was spawned: all of torchtune."""
    import torchtune.training

    return torchtune.training.quantization.Int4WeightOnlyQuantizer.__name__


SPAWNS = f"""
import sys
sys.path.insert(0, {str(PACKAGE_ROOT.parent)!r})
from multiprocessing import get_context
from tests.test_torchao_bridge import work
if __name__ == "__main__":
    with get_context("spawn").Pool(1) as pool:
        print(pool.map(work, [0]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "autoload"),
    [
        ("import torchtune.training, kasa_tune.components.linalg.nf4", "1"),
        ("import kasa_tune.components.linalg.nf4, torchtune.training", "0"),
        (SPAWNS, "0"),
    ],
    ids=["hook", "no hook", "spawned"],
)
def test_the_installed_torchtune_is_imported(tmp_path, monkeypatch, code, autoload):
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", autoload)
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE_ROOT.parent))
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
