"""Runs of the fine-tuning recipes, in this process and in one of their own, and what makes two of them the same."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torchtune.recipe_interfaces import FTRecipeInterface

from kasa_tune import config
from kasa_tune.components.checkpoints import (
    list_checkpoints,
    load_part,
    run_lock,
    verify_checkpoint,
)
from kasa_tune.components.linalg.nf4 import NF4Tensor
from kasa_tune.components.models import digests
from kasa_tune.components.training.loggers import read_metrics
from kasa_tune.methods import methods_of

from .several_runs import carry_out

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
SMALL_CALIBRATION = [
    "calibration.num_samples=8",
    "calibration.batch_size=8",
    "calibration.max_seq_len=64",
]

# Every start of an adapter on a base in four bits: config and overrides.
PLUS_PLUS = ["calibration.rounds=3", "adapter.dynamic_ranks=True"]
QUANTIZED = {
    **{method.name: (f"tiny_{method.name}", []) for method in methods_of("qcorda_finetune")},
    "qcorda++": ("tiny_qcorda", PLUS_PLUS),
}
# 3 steps an epoch, random numbers in each; validated before the first step and after the last.
RESUMABLE = [
    "model.dropout=0.1",
    "dataset.split=train[:20]",
    "epochs=2",
    "max_steps=6",
    "run_val_every_n_steps=6",
    "lr_scheduler={_component_: kasa_tune.components.training.cosine_schedule, num_warmup_steps: 1}",
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
        return [
            tuple((k, v) for k, v in line.items() if k not in ("tokens_per_second", "seconds"))
            for line in self.metrics
        ]

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.folder / "checkpoints")

    def part(self, name: str, index: int = -1):
        return load_part(self.checkpoints[index], name)


def recipe_class(module) -> type:
    """The recipe that a module defines."""
    (found,) = (
        value
        for value in vars(module).values()
        if FTRecipeInterface in getattr(value, "__mro__", ())[1:]
    )
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


@pytest.fixture(autouse=True)
def _digests_of_their_own(monkeypatch, tmp_path_factory):
    """What is known of bases' digests stays in the tests' folder, not in the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "digests"
    monkeypatch.setattr(digests, "cache_file", lambda: folder / "weights_digests.json")


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
    return run_recipe(
        module, folder, *overrides, config_name=config_name, schema=config.CORDA, small=small
    )


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
    return run_recipe(
        module, folder, *overrides, config_name=config_name, schema=config.QCORDA, small=small
    )


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
            runs[method] = run_quantized(
                qcorda_recipe, folder, *RESUMABLE, *overrides, config_name=config_name
            )
        return runs[method]

    return whole


def nf4_weights(model: nn.Module) -> dict[str, NF4Tensor]:
    """The weights that are in four bits, by the names of their linears."""
    parameters = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {
        name.removesuffix(".weight"): weight
        for name, weight in parameters
        if isinstance(weight, NF4Tensor)
    }


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

    def start(
        folder: Path,
        *overrides: str,
        config_name: str = "tiny_kasa",
        recipe: str = RECIPE,
        small=SMALL_RUN,
    ):
        path = ROOT / "recipes" / f"{recipe}.py"
        process = subprocess.Popen(
            [
                sys.executable,
                str(path),
                "--config",
                config_name,
                f"output_dir={folder}",
                *small,
                *overrides,
            ],
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


def wait_for_steps(
    process: subprocess.Popen, folder: Path, steps: int, seconds: float = 120
) -> None:
    """Until the run has logged ``steps`` steps."""
    deadline = time.monotonic() + seconds
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= steps):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(
                f"the run did not get to step {steps}: {process.communicate()[1][-2000:]}"
            )
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


# ------------------------------------------------------------------------------------------------- several processes

SHARED = [
    "dataset_val.split=train[:8]",
    "run_val_every_n_steps=4",
    "save_every_n_steps=4",
    "keep_last=9",
]
CALIBRATED = [*SHARED, "dataset.split=train[:20]", "epochs=4", "max_steps=10", *SMALL_CALIBRATION]
# What one device and two processes both do. The batch sizes of one device and of each of two processes follow.
BOTH_WAYS = {
    # Packed, and rows that do not divide: an epoch's last step has fewer.
    "kasa": (
        "kasa",
        "tiny_kasa",
        [*SHARED, "dataset.split=train[:46]", "dataset.packed=True", "epochs=3"],
        2,
        1,
    ),
    "corda++": (
        "corda",
        "tiny_corda",
        [
            *CALIBRATED,
            "calibration.rounds=2",
            "adapter.dynamic_ranks=True",
            "enable_activation_checkpointing=True",
        ],
        8,
        4,
    ),
    "qcorda": ("qcorda", "tiny_qcorda", CALIBRATED, 8, 4),
    # Steps of 8, 8 and 1 samples: in the last, rank 1 has none.
    "qlora": (
        "qcorda",
        "tiny_qlora",
        [*SHARED, "dataset.split=train[:17]", "epochs=4", "max_steps=12"],
        8,
        4,
    ),
    "qkasa": (
        "qcorda",
        "tiny_qkasa",
        [*SHARED, "dataset.split=train[:20]", "epochs=4", "max_steps=10"],
        8,
        4,
    ),
}
ACCUMULATED = {"kasa": ["gradient_accumulation_steps=2"]}
STEP_OF_ONE = 4  # where one device stops for two processes to go on
# A run that only two processes do: with random numbers, which the processes draw for themselves.
ROUGH = [
    *SHARED,
    "dataset.split=train[:22]",
    "batch_size=2",
    "epochs=2",
    "max_steps=8",
    "model.dropout=0.1",
    "lr_scheduler=null",
    "save_every_n_steps=3",
]


def overrides_of(name: str, folder: Path, processes: int) -> list[str]:
    """The overrides of a run in BOTH_WAYS on so many processes."""
    _, _, overrides, alone, each = BOTH_WAYS[name]
    batch_size = alone if processes == 1 else each
    # the cache is named by what it is made from, so the second of two equal runs would not work anything out
    cache = [f"calibration.cache_dir={folder}/cache"] * name.endswith(("corda", "corda++"))
    batches = [f"batch_size={batch_size}", *ACCUMULATED.get(name, [])]
    return [f"output_dir={folder}", *overrides, *batches, *cache]


def run_alone(load_recipe, name: str, folder: Path, *more: str) -> Run:
    """A run in BOTH_WAYS, or the rest of one, on one device in this process."""
    method, config_name, *_ = BOTH_WAYS[name]
    module, schema = load_recipe(f"{method}_finetune_single_device"), SCHEMAS[method]
    overrides = [*overrides_of(name, folder, 1)[1:], *more]
    return run_recipe(
        module, folder, *overrides, config_name=config_name, schema=schema, small=False
    )


SCHEMAS = {"kasa": config.FINETUNE, "corda": config.CORDA, "qcorda": config.QCORDA}


@dataclass
class Pair(Run):
    """A run of two processes: how it ended on each of them."""

    ends: list[dict] | None = None


def torchrun(
    recipe: str | Path, config_name: str | Path, *overrides: str, options: tuple = ()
) -> list[str]:
    """The command that starts a recipe as a user does, on two processes unless ``options`` say otherwise."""
    options = options or ("--nproc_per_node", "2")
    return [
        sys.executable,
        "-m",
        "kasa_tune",
        "run",
        *options,
        str(recipe),
        "--config",
        str(config_name),
        *overrides,
    ]


def environment() -> dict[str, str]:
    """Of a started process: one thread, no progress bars, this checkout."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": path}


def write_plan(folder: Path, entry: dict) -> Path:
    """A plan for several_runs.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.yaml").write_text(yaml.safe_dump(entry))
    return folder / "plan.yaml"


def run_pair(entry: dict, folder: Path) -> Pair:
    """Make a run of two processes, see several_runs.py. What is kept of it besides its output goes to the folder."""
    carry_out(entry, folder)
    return made_pair(entry, folder)


def made_pair(entry: dict, folder: Path) -> Pair:
    """A run of two processes that has been made."""
    ends = [
        json.loads((folder / f"{entry['name']}.rank{rank}.json").read_text()) for rank in (0, 1)
    ]
    given = [o.partition("=")[2] for o in entry["overrides"] if o.startswith("output_dir=")]
    return Pair(ends[0].get("status", 1), Path(given[-1]), None, ends)


class MadeOnce:
    """Runs by name. Each is made when it is first asked for, and once for all of pytest's workers.

    Args:
        root: folder of the runs, the same for all workers.
        make: makes the run of a name in its folder.
        read: returns it.
    """

    def __init__(self, root: Path, make: Callable[[str], object], read: Callable[[str], Run]):
        self._root, self._make, self._read = root, make, read
        root.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, name: str) -> Run:
        done = self._root / f"{name}.done"
        with (self._root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                self._make(name)
                done.touch()
        return self._read(name)


class Pairs(MadeOnce):
    """All that two processes do for more than one test.

    Args:
        root: folder of the runs.
        alone: the runs of one device, which some go on from.
    """

    def __init__(self, root: Path, alone: MadeOnce):
        super().__init__(root, self._carry_out, lambda name: made_pair(self._entry(name), root))
        self._folder = root
        resume = "resume_from_checkpoint={}".format
        component = "dataset._component_=tests.recipes.several_runs.rows_by_rank"
        # What a run has beside those of its method, or beside ROUGH.
        self._overrides = {
            "kasa from one": lambda: [resume(alone["kasa"].checkpoints[0])],
            "qcorda from one": lambda: [resume(alone["qcorda"].checkpoints[0])],
            "qcorda resumed": lambda: [resume(self["qcorda"].checkpoints[0])],
            "kasa other product": lambda: [
                resume(self["kasa"].folder),
                "batch_size=2",
                "gradient_accumulation_steps=3",
            ],
            "kasa again": lambda: [f"output_dir={self['kasa'].folder}"],
            "stopped": lambda: ["save_every_n_steps=1000"],
            "stopped resumed": lambda: [resume(self["stopped"].folder)],
            "nan": lambda: ["save_every_n_steps=2"],
            "other rows": lambda: [component, "dataset.split_of_rank_1=train[1:23]"],
        }

    def _entry(self, name: str) -> dict:
        what = name.split()[0]
        method, config_name = BOTH_WAYS[what][:2] if what in BOTH_WAYS else ("kasa", "tiny_kasa")
        folder = self._folder / name.replace(" ", "_")
        base = (
            overrides_of(what, folder, 2) if what in BOTH_WAYS else [f"output_dir={folder}", *ROUGH]
        )
        overrides = [*base, *self._overrides.get(name, list)()]
        entry = {"name": name, "recipe": method, "config": config_name, "overrides": overrides}
        return entry | SPECIAL.get(name, {})

    def _carry_out(self, name: str) -> None:
        locked = self._folder / "locked" / "checkpoints"
        with run_lock(locked) if name == "locked" else contextlib.nullcontext():
            carry_out(self._entry(name), self._folder)


SPECIAL = {
    "stopped": {"trouble": {"kind": "SIGTERM", "step": 5}},
    "nan": {"trouble": {"kind": "nan", "step": 4}},
    "other config": {"overrides_of_rank_1": ["optimizer.lr=1e-3"]},
}


@pytest.fixture(scope="session")
def runs(load_recipe, tmp_path_factory) -> tuple[MadeOnce, Pairs]:
    """The runs of one device and of two processes, by name."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "distributed"
    folder = root / "alone"
    alone = MadeOnce(
        folder,
        lambda name: run_alone(load_recipe, name, folder / name),
        lambda name: Run(0, folder / name, None),
    )
    return alone, Pairs(root / "pairs", alone)


def children(process: int) -> list[int]:
    """Processes that a process has started and that still run."""
    with contextlib.suppress(OSError):
        return [
            int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    return []


def finish(process: subprocess.Popen, seconds: float = 240) -> str:
    """Wait for the end of a process; all that it printed."""
    return "".join(process.communicate(timeout=seconds))


@pytest.fixture
def start():
    """Start a command; whatever of it still runs at the end of the test, its own children included, is ended then."""
    started: list[subprocess.Popen] = []

    def start(command: list[str], **variables: str) -> subprocess.Popen:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | variables,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in [*children(process.pid), process.pid] if process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
