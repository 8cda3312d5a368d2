"""However the two packages come to be installed, the stock `tune` sees our recipes and configs, beside the torchao of
the environment and beside the last one that torchtune can be imported with by itself.

Each case is an environment of its own. Everything heavy (torch and the rest) is borrowed from the environment that runs
the tests, through a folder of links that leaves out torchtune and kasa_tune; those two are then really installed.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPE, CONFIG = "kasa_finetune_single_device", "tiny_kasa"
DISTRIBUTED = "kasa_finetune_distributed"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
UV = shutil.which(
    "uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
)


def run(*command, cwd=None, code=0, **environment):
    """Run a command, check its exit code and return what it printed."""
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Our wheel, built from the sources; torchtune's and that of an old torchao, from the package index."""
    folder = tmp_path_factory.mktemp("wheels")
    run(*PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    run(*PIP, "download", "--no-deps", "--dest", folder, "torchtune==0.6.1", "torchao==0.15.0")
    found = {path.name.split("-")[0]: str(path) for path in folder.glob("*.whl")}
    return {
        "ours": found["kasa_tune"],
        "torchtune": found["torchtune"],
        "old_torchao": found["torchao"],
    }


@pytest.fixture(scope="session")
def borrowed(tmp_path_factory):
    """Links to every installed package but torchtune (which owns a package `recipes` too) and kasa_tune."""
    folder = tmp_path_factory.mktemp("borrowed")
    left_out = ("torchtune", "recipes", "kasa_tune", "_kasa_tune", "__pycache__")
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            if not entry.name.startswith(left_out) and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
    return folder


class Environment:
    """A virtual environment in which `tune` and `kasa-tune` run from an empty working directory."""

    def __init__(self, folder, borrowed, wheels):
        self.wheels, self.work, self.bin = wheels, folder / "work", folder / "env" / "bin"
        self.work.mkdir()
        venv.create(folder / "env", with_pip=False)
        self.python = self.bin / "python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(run(self.python, "-c", where).strip())
        (self.site / "borrowed.pth").write_text(f"{borrowed}\n")

    def install(self, step):
        """Take one step such as `pip ours`, `uv -e ours`, `pip again torchtune` or `uv ours torchtune`."""
        installer, *words = step.split()
        command = [*PIP, "--python", self.python, "install"]
        if installer == "uv":
            if UV is None:
                pytest.skip("uv is not installed")
            command = [UV, "pip", "install", "--python", self.python]
        if "again" in words:
            command.append("--force-reinstall")
        if "-e" in words:
            words = [ROOT if word == "ours" else word for word in words]
        run(
            *command,
            "--no-deps",
            *[self.wheels.get(word, word) for word in words if word != "again"],
        )

    def tune(self, *args, **options):
        return run(self.bin / "tune", *args, cwd=self.work, **options)

    def kasa_tune(self, *args, **options):
        return run(self.bin / "kasa-tune", *args, cwd=self.work, **options)

    def check_tune_sees_us(self, **environment):
        """`tune ls`, `cat` and `cp` in one process, because importing torch takes long."""
        commands = [
            ["ls"],
            ["cat", CONFIG],
            ["cp", RECIPE, "my_copy.py"],
            ["cp", CONFIG, "my.yaml"],
        ]
        driver = (
            "import json, runpy, sys\n"
            "script, commands = sys.argv[1], json.loads(sys.argv[2])\n"
            "for command in commands:\n"
            "    sys.argv = [script, *command]\n"
            "    try:\n"
            "        print('#', *command, flush=True); runpy.run_path(script, run_name='__main__')\n"
            "    except SystemExit as done:\n"
            "        assert not done.code, (command, done.code)\n"
        )
        shown = run(
            self.python,
            "-c",
            driver,
            self.bin / "tune",
            json.dumps(commands),
            cwd=self.work,
            **environment,
        )
        listed, printed = shown.split(f"# cat {CONFIG}\n")
        assert {RECIPE, CONFIG, "lora_finetune_single_device"} <= set(listed.split())
        assert yaml.safe_load(printed.split("# cp")[0]) == yaml.safe_load(
            (ROOT / f"configs/{CONFIG}.yaml").read_text()
        )
        assert (self.work / "my_copy.py").read_text() == (ROOT / f"recipes/{RECIPE}.py").read_text()
        assert (self.work / "my.yaml").read_text() == (ROOT / f"configs/{CONFIG}.yaml").read_text()


@pytest.fixture
def environment(tmp_path, borrowed, wheels):
    return Environment(tmp_path, borrowed, wheels)


@pytest.mark.parametrize(
    "steps",
    [
        "pip ours, pip torchtune, pip again torchtune",
        "pip -e ours, pip torchtune",
        "uv torchtune ours",
        "uv ours, pip torchtune, uv again torchtune",
        "pip torchtune ours old_torchao",
    ],
)
def test_tune_sees_us(environment, steps):
    for step in steps.split(", "):
        environment.install(step)
    environment.check_tune_sees_us()
    copied = (environment.site / "kasa_tune").exists()
    assert copied == ("-e" not in steps), (
        "an editable install must not hold copies, which would go stale"
    )


@pytest.mark.parametrize("steps", ["pip torchtune, pip ours", "uv torchtune, uv -e ours"])
def test_a_copied_recipe_runs_from_the_working_directory(environment, steps):
    for step in steps.split(", "):
        environment.install(step)
    environment.kasa_tune("cp", RECIPE, "my_copy")
    environment.kasa_tune("cp", CONFIG, "my")
    shown = environment.tune(
        "run", "my_copy.py", "--config", "my.yaml", "dry_run=True", "output_dir=out"
    )
    assert "trainable" in shown.lower()


def test_tune_runs_ours_by_name_and_answers_a_misspelt_one(environment):
    environment.install("pip torchtune ours")
    shown = environment.tune("run", RECIPE, "--config", CONFIG, "dry_run=True", "output_dir=out")
    assert "trainable" in shown.lower()
    shown = environment.tune("run", RECIPE.replace("single", "singel"), "--config", CONFIG, code=1)
    assert f"Did you mean the recipe {RECIPE}" in shown


def test_tune_without_the_hook_is_torchtunes_own_and_ours_needs_none(environment):
    """Beside a new torchao, torchtune's own cannot start at all."""
    environment.install("pip torchtune ours")
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    shown = environment.tune("ls", **off, code=1)
    assert "No module named 'torchao.dtypes.nf4tensor'" in shown
    assert {RECIPE, CONFIG} <= set(environment.kasa_tune("ls", **off).split())
    for processes, recipe in ([], RECIPE), (["--nproc_per_node", "2"], DISTRIBUTED):
        shown = environment.kasa_tune(
            "run", *processes, recipe, "--config", CONFIG, "dry_run=True", "output_dir=out", **off
        )
        assert "trainable" in shown.lower()
    environment.install("pip old_torchao")
    listed = environment.tune("ls", **off)
    assert "lora_finetune_single_device" in listed
    assert RECIPE not in listed


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_uninstalling_ours_leaves_tune(environment, installer):
    environment.install("pip torchtune ours old_torchao")
    if installer == "pip":
        run(*PIP, "--python", environment.python, "uninstall", "--yes", "kasa_tune")
    elif UV is None:
        pytest.skip("uv is not installed")
    else:
        run(UV, "pip", "uninstall", "--python", environment.python, "kasa_tune")
    assert not (environment.bin / "kasa-tune").exists()
    assert not (environment.site / "kasa_tune").exists()
    listed = environment.tune("ls")
    assert "lora_finetune_single_device" in listed
    assert "kasa" not in listed


def test_target_folder(environment, tmp_path):
    environment.install("pip torchtune")
    target = tmp_path / "target"
    run(*PIP, "install", "--no-deps", "--target", target, environment.wheels["ours"])
    environment.check_tune_sees_us(PYTHONPATH=str(target))
    listed = run(
        environment.python, "-m", "kasa_tune", "ls", cwd=environment.work, PYTHONPATH=str(target)
    )
    assert {RECIPE, CONFIG} <= set(listed.split())


def test_wheel_holds_everything_inside_the_package(wheels):
    with zipfile.ZipFile(wheels["ours"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {Path(name).parts[0] for name in names} == {"kasa_tune"}, (
        "torchtune owns a top-level package `recipes`"
    )
    for folder, pattern in (("recipes", "*.py"), ("configs", "*.yaml")):
        assert {
            f"kasa_tune/{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)
        } <= names
    data = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kasa_tune/tiny_world").rglob("*.[jst]*")
    }
    assert {name for name in data if "__pycache__" not in name} <= names
    assert "kasa_tune/tiny_world/model/tokenizer.model" in names


def test_source_archive_builds_the_same_wheel(tmp_path):
    if UV is None:
        pytest.skip("uv is not installed")
    run(UV, "build", "--sdist", "--out-dir", tmp_path, ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    contents = []
    for folder, source in (("from_tree", ROOT), ("from_archive", archive)):
        run(*PIP, "wheel", "--no-deps", "--wheel-dir", tmp_path / folder, source)
        (path,) = (tmp_path / folder).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            contents.append({name: wheel.read(name) for name in wheel.namelist()})
    assert contents[0] == contents[1]
