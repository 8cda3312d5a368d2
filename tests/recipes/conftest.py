"""Runs of the fine-tuning recipes, in this process and in one of their own, and what makes two of them the same."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.recipe_interfaces import FTRecipeInterface

from kasa_tune import config
from kasa_tune.components.checkpointing import list_checkpoints, load_part, verify_checkpoint
from kasa_tune.components.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "kasa_finetune_single_device"

# 40 samples in batches of 4, two batches a step: 5 steps an epoch. Dropout makes the result depend on the random state.
SMALL_RUN = [
    "dataset.split=train[:40]",
    "dataset_val.split=train[:8]",
    "run_val_every_n_steps=null",
    "batch_size=4",
    "gradient_accumulation_steps=2",
    "epochs=3",
    "max_steps=12",
    "save_every_n_steps=3",
    "keep_last=9",
    "model.dropout=0.1",
]
# 8 samples, all of them in every step, so that the losses of two steps can be compared; 8 to calibrate on.
SMALL_CORDA_RUN = [
    "dataset.split=train[:8]",
    "dataset_val.split=train[:8]",
    "run_val_every_n_steps=null",
    "batch_size=8",
    "epochs=4",
    "max_steps=4",
    "lr_scheduler=null",
    "save_every_n_steps=2",
    "keep_last=9",
]
SMALL_CALIBRATION = ["calibration.num_samples=8", "calibration.batch_size=8", "calibration.max_seq_len=64"]

# Every start of an adapter on a base in four bits: config and overrides.
PLUS_PLUS = ["calibration.rounds=3", "adapter.dynamic_ranks=True"]
QUANTIZED = {
    "qcorda": ("tiny_qcorda", []),
    "qcorda++": ("tiny_qcorda", PLUS_PLUS),
    "qpissa": ("tiny_qpissa", []),
    "loftq": ("tiny_loftq", []),
    "qlora": ("tiny_qlora", []),
    "qkasa": ("tiny_qkasa", []),
}
# 3 steps an epoch, random numbers in each; validated before the first step and after the last.
RESUMABLE = [
    "model.dropout=0.1",
    "dataset.split=train[:20]",
    "epochs=2",
    "max_steps=6",
    "run_val_every_n_steps=6",
    "lr_scheduler={_component_: kasa_tune.components.lr_schedules.cosine_schedule, num_warmup_steps: 1}",
]


@dataclass
class Run:
    """A finished run: its exit status, its folder, the live recipe object."""

    status: int
    folder: Path
    recipe: object

    @property
    def metrics(self) -> list[dict]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def curve(self) -> list[tuple]:
        """What must be reproduced exactly: everything logged but the speed."""
        return [tuple((k, v) for k, v in line.items() if k != "tokens_per_second") for line in self.metrics]

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.folder / "checkpoints")

    def part(self, name: str, index: int = -1):
        return load_part(self.checkpoints[index], name)


def recipe_class(module) -> type:
    """The recipe that a module defines."""
    (found,) = (value for value in vars(module).values() if FTRecipeInterface in getattr(value, "__mro__", ())[1:])
    return found


def run_recipe(
    module,
    folder: Path,
    *overrides: str,
    config_name: str = "tiny_kasa",
    schema=config.FINETUNE,
    small: bool | list[str] = True,
) -> Run:
    """Run the recipe of a loaded module in this process, on the embedded model unless told otherwise.

    ``small`` are overrides that come before all others; True for SMALL_RUN.
    """
    small = SMALL_RUN if small is True else small or []
    overrides = [f"output_dir={folder}", *small, *overrides]
    cfg = config.load(config_name, overrides, schema, about_to_run=True)
    recipe = recipe_class(module)(cfg)
    recipe.setup(cfg)
    status = recipe.train(cfg)
    recipe.cleanup()
    return Run(status, folder, recipe)


@pytest.fixture
def finetune(tmp_path, load_recipe):
    """Run the KaSA recipe with overrides; ``name`` gives the runs of one test their own folders."""
    module = load_recipe("kasa_finetune_single_device")

    def run(*overrides: str, name: str = "run", **options) -> Run:
        return run_recipe(module, tmp_path / name, *overrides, **options)

    return run


@pytest.fixture(scope="session")
def corda_recipe(load_recipe):
    """The module of the CorDA recipe."""
    return load_recipe("corda_finetune_single_device")


def run_corda(module, folder: Path, *overrides: str, config_name: str = "tiny_corda") -> Run:
    """Run the CorDA recipe in this process on the embedded model and a few samples."""
    small = SMALL_CORDA_RUN + SMALL_CALIBRATION * ("corda" in config_name)
    return run_recipe(module, folder, *overrides, config_name=config_name, schema=config.CORDA, small=small)


@pytest.fixture
def corda(tmp_path, corda_recipe):
    """Run the CorDA recipe with overrides; ``name`` gives the runs of one test their own folders."""

    def run(*overrides: str, name: str = "run", **options) -> Run:
        return run_corda(corda_recipe, tmp_path / name, *overrides, **options)

    return run


@pytest.fixture(scope="session")
def qcorda_recipe(load_recipe):
    """The module of the QCorDA recipe."""
    return load_recipe("qcorda_finetune_single_device")


def run_quantized(module, folder: Path, *overrides: str, config_name: str = "tiny_qcorda") -> Run:
    """Run the QCorDA recipe in this process on the embedded model and a few samples."""
    small = SMALL_CORDA_RUN + SMALL_CALIBRATION * (config_name == "tiny_qcorda")
    return run_recipe(module, folder, *overrides, config_name=config_name, schema=config.QCORDA, small=small)


@pytest.fixture
def qcorda(tmp_path, qcorda_recipe):
    """Run the QCorDA recipe with overrides; ``name`` gives the runs of one test their own folders."""

    def run(*overrides: str, name: str = "run", **options) -> Run:
        return run_quantized(qcorda_recipe, tmp_path / name, *overrides, **options)

    return run


@pytest.fixture(scope="session")
def whole_quantized(qcorda_recipe, tmp_path_factory):
    """The run of a method in QUANTIZED that nothing interrupts, with RESUMABLE; made when first asked for."""
    runs: dict[str, Run] = {}

    def whole(method: str) -> Run:
        if method not in runs:
            config_name, overrides = QUANTIZED[method]
            folder = tmp_path_factory.mktemp(method) / "run"
            runs[method] = run_quantized(qcorda_recipe, folder, *RESUMABLE, *overrides, config_name=config_name)
        return runs[method]

    return whole


def nf4_weights(model: nn.Module) -> dict[str, NF4Tensor]:
    """The weights that are in four bits, by the names of their linears."""
    parameters = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {name.removesuffix(".weight"): weight for name, weight in parameters if isinstance(weight, NF4Tensor)}


@pytest.fixture
def run_main(load_recipe, monkeypatch):
    """Call a recipe's entry point as the command line does; returns its status, raises what a user would be told."""
    monkeypatch.setenv("KASA_TUNE_TRACEBACK", "1")

    def run(recipe: str, *arguments: str) -> int:
        module = load_recipe(recipe)
        monkeypatch.setattr(sys, "argv", [recipe, *arguments])
        return module.recipe_main()

    return run


@pytest.fixture
def start_process():
    """Start a recipe as its own process, as a user does; ``small`` are overrides that come before all others."""
    started: list[subprocess.Popen] = []

    def start(folder: Path, *overrides: str, config_name: str = "tiny_kasa", recipe: str = RECIPE, small=SMALL_RUN):
        path = ROOT / "recipes" / f"{recipe}.py"
        process = subprocess.Popen(
            [sys.executable, str(path), "--config", config_name, f"output_dir={folder}", *small, *overrides],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for_steps(process: subprocess.Popen, folder: Path, steps: int, seconds: float = 120) -> None:
    """Until the run has logged ``steps`` steps."""
    deadline = time.monotonic() + seconds
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= steps):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the run did not get to step {steps}: {process.communicate()[1][-2000:]}")
        time.sleep(0.01)


def copy_run(run: Run, folder: Path, *, until_step: int) -> None:
    """The folder as it was when the checkpoint of ``until_step`` was the newest, metrics of later steps included."""
    shutil.copytree(run.folder, folder)
    for path in list_checkpoints(folder / "checkpoints"):
        if verify_checkpoint(path)["step"] > until_step:
            shutil.rmtree(path)


def assert_same_tree(a, b, where="") -> None:
    """Bit for bit, in values and types; ``where`` names the place in the tree."""
    assert type(a) is type(b), where
    if hasattr(a, "__tensor_flatten__"):  # quantized
        (parts, context), other = a.__tensor_flatten__(), b.__tensor_flatten__()
        assert other == (parts, context), where
        for part in parts:
            assert_same_tree(getattr(a, part), getattr(b, part), f"{where}/{part}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_tree(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tree(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_run(resumed: Run, whole: Run) -> None:
    """Bit for bit, in everything but the configs."""
    assert resumed.curve == whole.curve
    for name in ("adapter", "optimizer", "rng"):
        assert_same_tree(resumed.part(name), whole.part(name), name)
    ignored = ("config",)
    assert {k: v for k, v in resumed.part("run").items() if k not in ignored} == {
        k: v for k, v in whole.part("run").items() if k not in ignored
    }
