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


def write_plan(folder: Path, entries: list[dict]) -> Path:
    """A plan for several_runs.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.yaml").write_text(yaml.safe_dump(entries))
    return folder / "plan.yaml"


def pairs_of(plan: Path) -> dict[str, Pair]:
    """The runs of a plan that has been carried out, by name."""
    found = {}
    for entry in yaml.safe_load(plan.read_text()):
        ends = [
            json.loads((plan.parent / f"{entry['name']}.rank{rank}.json").read_text())
            for rank in (0, 1)
        ]
        (output_dir,) = (
            o.partition("=")[2] for o in entry["overrides"] if o.startswith("output_dir=")
        )
        found[entry["name"]] = Pair(ends[0].get("status", 1), Path(output_dir), None, ends)
    return found


def planned_pairs(root: Path, alone: dict[str, Run]) -> list[dict]:
    """All that two processes do in one start."""
    entries = []

    def add(name: str, what: str, *overrides: str, folder: str | None = None, **more) -> None:
        method, config_name = BOTH_WAYS[what][:2] if what in BOTH_WAYS else ("kasa", "tiny_kasa")
        output = root / (folder or name)
        base = (
            overrides_of(what, output, 2) if what in BOTH_WAYS else [f"output_dir={output}", *ROUGH]
        )
        entries.append(
            {
                "name": name,
                "recipe": method,
                "config": config_name,
                "overrides": [*base, *overrides],
                **more,
            }
        )

    for name in BOTH_WAYS:
        add(name, name)
    for name in ("kasa", "qcorda"):
        add(f"{name} from one", name, f"resume_from_checkpoint={alone[name].checkpoints[0]}")
    step = root / "qcorda" / "checkpoints" / "step_00000004"
    add("qcorda resumed", "qcorda", f"resume_from_checkpoint={step}")
    resume = f"resume_from_checkpoint={root / 'kasa'}"
    add("other product", "kasa", resume, "batch_size=2", "gradient_accumulation_steps=3")
    add("again", "kasa", folder="kasa")
    add("rough", "rough")
    add("locked", "rough")
    add("stopped", "rough", "save_every_n_steps=1000", trouble={"kind": "SIGTERM", "step": 5})
    add("stopped resumed", "rough", f"resume_from_checkpoint={root / 'stopped'}")
    add("nan", "rough", "save_every_n_steps=2", trouble={"kind": "nan", "step": 4})
    add("other config", "rough", overrides_of_rank_1=["optimizer.lr=1e-3"])
    component = [
        "dataset._component_=several_runs.rows_by_rank",
        "dataset.split_of_rank_1=train[1:23]",
    ]
    add("other rows", "rough", *component)
    return entries


@pytest.fixture(scope="session")
def runs(load_recipe, tmp_path_factory) -> tuple[dict[str, Run], dict[str, Pair]]:
    """The runs of one device and of two processes, by name; made once, whatever the number of pytest's own workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = root / "distributed"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        alone = {name: Run(0, root / "alone" / name, None) for name in BOTH_WAYS}
        if not (root / "done").exists():
            shutil.rmtree(root / "alone", ignore_errors=True)
            shutil.rmtree(root / "pairs", ignore_errors=True)
            for name, run in alone.items():
                run_alone(load_recipe, name, run.folder)
            plan = write_plan(root / "pairs", planned_pairs(root / "pairs", alone))
            with run_lock(root / "pairs" / "locked" / "checkpoints"):
                for entry in yaml.safe_load(plan.read_text()):  # a start each, as users have
                    (plan.parent / "next.yaml").write_text(yaml.safe_dump([entry]))
                    command = torchrun(
                        Path(__file__).with_name("several_runs.py"), plan.parent / "next.yaml"
                    )
                    end = subprocess.run(
                        command, env=environment(), capture_output=True, text=True, timeout=120
                    )
                    assert end.returncode == 0, f"{entry['name']}: {end.stderr[-4000:]}"
            (root / "done").touch()
    return alone, pairs_of(root / "pairs" / "plan.yaml")


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
