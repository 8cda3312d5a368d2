"""SIGKILLs at random moments of a run on two processes, which is resumed until it finishes and compared bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 20

KaSA on the embedded model with dropout, a checkpoint every second step. Each kill hits rank 0, rank 1, or torchrun and
both ranks, at a random moment of a step that is drawn from those left. At the first step after a start that moment may
fall into the set-up. Then the same command is started again with `resume_from_checkpoint=True`. A run that finishes is
compared with the undisturbed one: every line of metrics.jsonl without `tokens_per_second`, the adapter and the
optimizer's state. The next run begins after five kills at most, until all are spent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

LAST_STEP = 24
KILLS_OF_A_RUN = 5  # more of them would fall on its last steps
COMMAND = [
    *(sys.executable, "-c", "from kasa_tune.cli import main; main()"),
    *("run", "--nproc_per_node", "2"),
    *("kasa_finetune_distributed", "--config", "tiny_kasa", "dataset_val=null"),
    "run_val_every_n_steps=null",
    *("batch_size=4", "model.dropout=0.1", f"max_steps={LAST_STEP}", "save_every_n_steps=2"),
]
COMPARED = ("adapter.safetensors", "optimizer.safetensors")
VICTIMS = ("rank 0", "rank 1", "all")


def start(output: Path, log: Path, *overrides: str) -> subprocess.Popen:
    """Start or resume the run in a folder; what it prints is added to a log."""
    with log.open("a") as file:
        return subprocess.Popen(
            [*COMMAND, f"output_dir={output}", *overrides], stdout=file, stderr=file
        )


def ranks_of(run: subprocess.Popen) -> dict[int, int]:
    """The process ids of a run's ranks, which are children of torchrun."""
    found = {}
    with suppress(OSError):
        for child in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
            with suppress(OSError):
                entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                rank = dict(entry.partition(b"=")[::2] for entry in entries).get(b"RANK")
                if rank is not None:
                    found[int(rank)] = int(child)
    return found


def kill(run: subprocess.Popen, victim: str) -> bool:
    """Kill what is named, if it is there to be killed, and wait for the end of the rest."""
    ranks = ranks_of(run)
    named = [run.pid, *ranks.values()] if victim == "all" else [ranks.get(int(victim[-1]), 0)]
    if run.poll() is not None or not all(named) or not ranks:
        return False
    for process in named:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    run.wait()
    return True


def begun(run: subprocess.Popen, output: Path, step: int) -> None:
    """Wait until there are ranks and that many lines in the run's log, or the run ends."""
    log = output / "metrics.jsonl"
    while run.poll() is None:
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        if lines >= step and ranks_of(run):
            return
        time.sleep(0.02)


def steps_saved(output: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = [path.name for path in (output / "checkpoints").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def result(output: Path) -> tuple[list[dict], list[bytes]]:
    """The log without speeds, and the bytes of the last checkpoint's tensors."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")}
        for line in lines
    ]
    last = output / "checkpoints" / f"step_{LAST_STEP:08d}"
    return metrics, [(last / name).read_bytes() for name in COMPARED]


def undisturbed(folder: Path) -> tuple[tuple[list[dict], list[bytes]], float]:
    """The result of a run without a kill, and the seconds of one of its steps."""
    run = start(folder / "reference", folder / "reference.log")
    begun(run, folder / "reference", 1)
    started = time.monotonic()
    if run.wait():
        raise SystemExit(f"The undisturbed run failed, see {folder}/reference.log.")
    return result(folder / "reference"), (time.monotonic() - started) / LAST_STEP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill after these")
    args = parser.parse_args()
    draw, deadline = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    folder = Path(tempfile.mkdtemp(prefix="kills_"))
    expected, seconds = undisturbed(folder)
    print(f"Undisturbed: {seconds:.2f} s a step. Logs are in {folder}.", flush=True)
    done, compared, differing = Counter(), 0, 0
    while done.total() < args.kills and time.monotonic() < deadline:
        output, log = folder / f"run_{compared}", folder / f"run_{compared}.log"
        killed = 0
        while True:
            run = start(output, log, "resume_from_checkpoint=True")
            more = done.total() < args.kills and time.monotonic() < deadline
            if more and killed < KILLS_OF_A_RUN:
                begun(run, output, draw.randrange(steps_saved(output), LAST_STEP))
                time.sleep(draw.uniform(0, seconds))
                victim = draw.choice(VICTIMS)
                if kill(run, victim):
                    done[victim], killed = done[victim] + 1, killed + 1
                    at = f"newest checkpoint {steps_saved(output)}"
                    print(f"kill {done.total()}: {victim}, {at}", flush=True)
                    continue
            if run.wait():
                raise SystemExit(f"A run that was not killed failed, see {log}.")
            break
        same = result(output) == expected
        compared, differing = compared + 1, differing + (not same)
        print(f"run {compared}: {'the same bits' if same else 'DIFFERS'}", flush=True)
    print(f"{dict(done)}: {done.total()} kills, {compared} runs finished, {differing} differ.")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
