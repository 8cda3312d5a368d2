"""A run of a distributed recipe on two processes, given as a dict, the entry: ``name``, ``recipe``, ``config``,
``overrides``, and where wanted ``overrides_of_rank_1`` and ``trouble``, see :func:`make_trouble`. Every rank writes how
the run ended into a folder: ``<name>.rank<rank>.json``.

:func:`carry_out` forks the processes from a server that has imported torch once. As a script, started by torchrun, this
module carries out the entry of a plan:

    kasa-tune run --nproc_per_node 2 tests/recipes/several_runs.py --config plan.yaml
"""

import faulthandler
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import yaml
from torchtune.recipe_interfaces import FTRecipeInterface

from kasa_tune import config
from kasa_tune.components.data.datasets import instruct_dataset
from tests.components.several_processes import CONTEXT, torchrun_variables

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SCHEMAS = {
    "kasa": config.FINETUNE,
    "corda": config.CORDA,
    "qcorda": config.QCORDA,
    "classify": config.CLASSIFY,
}
ENDS_WITHIN = 120  # seconds; a loaded machine takes ten for a run


def rank() -> int:
    """Of this process."""
    return int(os.environ.get("RANK", "0"))


def rows_by_rank(tokenizer, *, split_of_rank_1: str, split: str, **options):
    """The embedded task, of which rank 1 is given other rows."""
    return instruct_dataset(tokenizer, split=split_of_rank_1 if rank() == 1 else split, **options)


def make_trouble(recipe: object, kind: str, step: int, mark: str = "") -> None:
    """On rank 1, in the step of that number: a signal, a loss that is no number, an error in the forward
    pass, the backward pass, the optimizer or a validation, or, the first time, a sudden end.
    """
    real_loss, real_step = recipe._loss_sum, recipe._optimizer.step

    def full(*args, **options):
        raise torch.OutOfMemoryError(f"out of memory {kind}")

    def fail_in_backward(module, args, hidden):
        if hidden.requires_grad:
            hidden.register_hook(full)

    def optimizer_step(*args, **options):
        return full() if recipe.steps.step + 1 == step else real_step(*args, **options)

    def loss_sum(batch):
        now = recipe.steps.step + 1 == step and recipe._model.training
        if kind == "validating" and not recipe._model.training and recipe.steps.step == step:
            full()
        if now and kind == "in forward":
            recipe._model.layers[1].mlp.register_forward_hook(full)
        if now and kind == "in backward":
            recipe._model.layers[1].mlp.register_forward_hook(fail_in_backward)
        if now and kind == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        if now and kind == "SIGKILL" and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real_loss(batch) * (float("nan") if now and kind == "nan" else 1.0)

    if rank() == 1:
        recipe._loss_sum = recipe.steps._loss_sum = loss_sum
        if kind == "in optimizer":
            recipe._optimizer.step = optimizer_step


def load(method: str) -> ModuleType:
    """The module of a distributed recipe, by its file."""
    path = RECIPES / f"{method}_finetune_distributed.py"
    spec = importlib.util.spec_from_file_location(f"recipe_{method}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(entry: dict) -> dict:
    """One run of the plan; how it ended on this rank."""
    module = load(entry["recipe"])
    (recipe_class,) = (
        value
        for value in vars(module).values()
        if FTRecipeInterface in getattr(value, "__mro__", ())[1:]
    )
    overrides = [
        *entry["overrides"],
        *(entry.get("overrides_of_rank_1", []) if rank() == 1 else []),
    ]
    try:
        cfg = config.load(entry["config"], overrides, SCHEMAS[entry["recipe"]], about_to_run=True)
        recipe = recipe_class(cfg)
        recipe.setup(cfg)
        if entry.get("trouble"):
            make_trouble(recipe, **entry["trouble"])
        status = recipe.train(cfg)
        recipe.cleanup()
    except Exception as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        return {"error": type(error).__name__, "message": str(error)}
    return {"status": status, "step": recipe.steps.step}


def write_end(entry: dict, folder: Path) -> None:
    """Make this rank's part of the run, and write how it ended."""
    end = run(entry)
    (folder / f"{entry['name']}.rank{rank()}.json").write_text(json.dumps(end))


def carry_out(entry: dict, folder: Path) -> None:
    """Make a run on two processes as torchrun would start them. What they print goes to ``<name>.txt`` in the folder.

    A process has been seen to die in native code, once in about 200 runs, see docs/distributed.md. A run of a new
    output folder is therefore made a second time after such an end. A warning then says where each thread was.

    Raises:
        AssertionError: a process died, or has not ended in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    printed = folder / f"{entry['name']}.txt"
    output = [o.partition("=")[2] for o in entry["overrides"] if o.startswith("output_dir=")][-1]
    may_repeat = not Path(output).exists()
    codes = _exit_codes(entry, folder, printed)
    if {-signal.SIGABRT, -signal.SIGSEGV} & set(codes) and may_repeat:
        warnings.warn(f"{entry['name']}: {codes}: {printed.read_text()[-4000:]}", stacklevel=2)
        shutil.rmtree(output, ignore_errors=True)
        codes = _exit_codes(entry, folder, printed)
    assert codes == [0, 0], f"{codes}: {printed.read_text()[-4000:]}"


def _exit_codes(entry: dict, folder: Path, printed: Path) -> list[int | None]:
    """How the two processes end; when one dies, the other is killed."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    processes = [
        CONTEXT.Process(target=_serve, args=(rank, store.port, entry, folder, printed), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    try:
        until = time.monotonic() + ENDS_WITHIN
        waiting = {process.sentinel: process for process in processes}
        while waiting and not any(process.exitcode for process in processes):
            ended = wait(list(waiting), timeout=until - time.monotonic())
            if not ended:
                break
            for sentinel in ended:
                waiting.pop(sentinel).join()
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    return codes


def _serve(rank: int, port: int, entry: dict, folder: Path, printed: Path) -> None:
    """What each forked process does."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= torchrun_variables(rank, 2, port)
    write_end(entry, folder)


def main() -> None:
    """Carry out the entry of a plan."""
    plan = Path(sys.argv[sys.argv.index("--config") + 1])
    write_end(yaml.safe_load(plan.read_text()), plan.parent)


if __name__ == "__main__":
    main()
