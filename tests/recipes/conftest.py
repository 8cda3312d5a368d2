"""Runs of the fine-tuning recipe, in this process and in one of their own."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from kasa_tune import config
from kasa_tune.components.checkpointing import list_checkpoints, load_part
from kasa_tune.components.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "kasa_finetune_single_device.py"

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


def run_recipe(module, folder: Path, *overrides: str, config_name: str = "tiny_kasa", small: bool = True) -> Run:
    """Run the loaded recipe in this process, on the embedded model unless told otherwise."""
    cfg = config.load(
        config_name,
        [f"output_dir={folder}", *(SMALL_RUN if small else []), *overrides],
        config.FINETUNE,
        about_to_run=True,
    )
    recipe = module.KaSAFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    status = recipe.train(cfg)
    recipe.cleanup()
    return Run(status, folder, recipe)


@pytest.fixture
def finetune(tmp_path, load_recipe):
    """Run the recipe with overrides; ``name`` gives the runs of one test their own folders."""
    module = load_recipe("kasa_finetune_single_device")

    def run(*overrides: str, name: str = "run", **options) -> Run:
        return run_recipe(module, tmp_path / name, *overrides, **options)

    return run


@pytest.fixture
def start_process():
    """Start the recipe as its own process, as a user does."""
    started = []

    def start(folder: Path, *overrides: str, config_name: str = "tiny_kasa") -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(RECIPE), "--config", config_name, f"output_dir={folder}", *SMALL_RUN, *overrides],
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
