"""Distributed runs as a user starts them, one at a time: stopped, killed, fed with a bad row, spread over machines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from kasa_tune.components.checkpoints import run_lock
from kasa_tune.registry import PACKAGE_ROOT

from .conftest import (
    ROUGH,
    Pair,
    Run,
    assert_same_run,
    assert_same_tree,
    children,
    finish,
    overrides_of,
    run_alone,
    run_pair,
    torchrun,
    wait_for_steps,
    write_plan,
)
from .test_distributed import SAME, assert_same_losses

pytestmark = pytest.mark.slow
RECIPE, CONFIG = "kasa_finetune_distributed", "tiny_kasa"
# How long torchrun waits for the processes beside one that died; 30 seconds where it cannot be told.
SOON = (
    ("--shutdown-timeout", "3") if "--shutdown-timeout" in get_args_parser().format_help() else ()
)
SEVERAL = Path(__file__).with_name("several_runs.py")


def rank_of(pid: int) -> int:
    """The rank of a process that torchrun started."""
    variables = dict(
        entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
    )
    return int(variables["RANK"])


def test_sigterm_to_torchrun_saves_and_one_device_goes_on(runs, start, load_recipe, tmp_path):
    alone, pairs = runs
    folder = tmp_path / "run"
    different = ["save_every_n_steps=1000", "run_val_every_n_steps=null"]
    process = start(torchrun(RECIPE, CONFIG, *overrides_of("kasa", folder, 2), *different))
    wait_for_steps(process, folder, 3, seconds=240)
    process.send_signal(signal.SIGTERM)
    finish(process, 60)
    assert process.returncode != 0
    stopped = Run(process.returncode, folder, None)
    assert [path.name for path in stopped.checkpoints] == [
        f"step_{stopped.metrics[-1]['step']:08d}"
    ]
    losses, undisturbed = (
        [line["loss"] for line in run.metrics if line["step"]] for run in (stopped, pairs["kasa"])
    )
    assert losses == undisturbed[: len(losses)]
    assert 3 <= len(losses) < len(undisturbed)
    rest = run_alone(load_recipe, "kasa", folder, "resume_from_checkpoint=True", *different)
    assert_same_losses(
        rest.metrics, alone["kasa"].metrics[1:], SAME, names=("loss", "l2", "l3", "grad_norm")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of the ranks in /proc")
def test_a_rank_that_is_killed_ends_the_job(start, tmp_path):
    folder = tmp_path / "run"
    process = start(
        torchrun(
            RECIPE,
            CONFIG,
            *overrides_of("kasa", folder, 2),
            "save_every_n_steps=2",
            options=("--nproc_per_node", "2", *SOON),
        )
    )
    wait_for_steps(process, folder, 4, seconds=240)
    ranks = {rank_of(pid): pid for pid in children(process.pid)}
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    finish(process, 90)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert Run(process.returncode, folder, None).part("run")["step"] >= 2
    with run_lock(folder / "checkpoints"):  # nobody writes there any more
        pass


def test_torchrun_restarts_a_job_from_its_last_checkpoint(runs, start, tmp_path):
    """Bit for bit: it is also the test that two processes go on exactly where two processes stopped."""
    _, pairs = runs
    folder, mark = tmp_path / "run", tmp_path / "killed_once"
    trouble = {"kind": "SIGKILL", "step": 6, "mark": str(mark)}
    overrides = [f"output_dir={folder}", *ROUGH, "resume_from_checkpoint=True"]
    entry = {
        "name": "run",
        "recipe": "kasa",
        "config": CONFIG,
        "overrides": overrides,
        "trouble": trouble,
    }
    plan = write_plan(tmp_path / "plan", entry)
    process = start(
        torchrun(SEVERAL, plan, options=("--nproc_per_node", "2", "--max-restarts", "1", *SOON))
    )
    output = finish(process)
    assert process.returncode == 0, output[-4000:]
    assert mark.exists()
    assert f"Resuming from {folder / 'checkpoints' / 'step_00000003'}" in output
    assert_same_run(Run(0, folder, None), pairs["rough"])


def test_a_bad_row_that_one_rank_meets_costs_no_finished_step(tmp_path):
    rows = (
        (PACKAGE_ROOT / "tiny_world" / "data" / "task_train.jsonl").read_text().splitlines()[:100]
    )
    rows[85] = json.dumps(
        json.loads(rows[85]) | {"output": None}
    )  # the start looks at the first 64
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        f"dataset.data_files={tmp_path / 'rows.jsonl'}",
        "shuffle=False",
    ]
    overrides += [
        "batch_size=16",
        "run_val_every_n_steps=null",
        "max_steps=3",  # a run over all rows would not begin
    ]  # of steps of 32, rank 1 takes 80 to 95 in the third
    run = run_pair(
        {"name": "run", "recipe": "kasa", "config": CONFIG, "overrides": overrides}, tmp_path
    )
    others, own = (end["message"] for end in run.ends)
    assert "row 85 holds null in column 'output'" in own
    assert "A batch could not be read on another rank; its message says why." in others
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert [path.name for path in run.checkpoints] == ["step_00000002"]


def failed_run(folder: Path, kind: str, *overrides: str) -> Pair:
    """A run in which rank 1 fails in its fifth step, or when it validates after it."""
    overrides = [f"output_dir={folder / 'run'}", *ROUGH, "save_every_n_steps=1000", *overrides]
    entry = {"name": "run", "recipe": "kasa", "config": CONFIG, "overrides": overrides}
    return run_pair(entry | {"trouble": {"kind": kind, "step": 5}}, folder)


def check_saved(run: Pair, done: int) -> None:
    output = run.folder.with_name("run.txt").read_text()
    assert [end["error"] for end in run.ends] == ["OtherRankError", "OutOfMemoryError"], output
    assert run.ends[0]["message"] == "Training failed on rank 1; its message says why."
    assert f"The {done} finished steps are saved in {run.folder}" in output
    assert [path.name for path in run.checkpoints] == [f"step_{done:08d}"]
    assert run.metrics[-1]["step"] == done


def test_an_error_on_one_rank_costs_no_finished_step(runs, tmp_path):
    """The other waits in a collective of the backward pass. The run goes on bit for bit."""
    run = failed_run(tmp_path, "in backward")
    check_saved(run, done=4)
    overrides = [f"output_dir={run.folder}", *ROUGH, "resume_from_checkpoint=True"]
    run_pair({"name": "rest", "recipe": "kasa", "config": CONFIG, "overrides": overrides}, tmp_path)
    assert "Resuming from" in (tmp_path / "rest.txt").read_text()
    whole = runs[1]["rough"]
    assert run.curve == whole.curve
    for part in ("adapter", "optimizer", "rng"):
        assert_same_tree(run.part(part), whole.part(part), part)


@pytest.mark.parametrize(("kind", "done"), [("in forward", 4), ("validating", 5)])
def test_an_error_on_one_rank_in_other_places(tmp_path, kind, done):
    check_saved(failed_run(tmp_path, kind, f"run_val_every_n_steps={done}"), done)


def test_an_error_while_weights_change_on_one_rank_ends_both(tmp_path):
    run = failed_run(tmp_path, "in optimizer")
    assert [end["error"] for end in run.ends] == ["OtherRankError", "OutOfMemoryError"]
    assert not run.checkpoints  # half a step is not saved


# ------------------------------------------------------------------------------------------------------ two machines


@pytest.fixture
def machines():
    """What two commands need that run on two machines: before the command, torchrun's options, variables; of each.

    The machines are network namespaces; where these are not to be had, one address stands for both.
    """
    names = [f"kasa{os.getpid()}a", f"kasa{os.getpid()}b"]
    try:
        yield linked_namespaces(*names) or [([], [], {})] * 2
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def linked_namespaces(*names: str) -> list[tuple] | None:
    """Two network namespaces with a cable between them, each with an address of its own; None without the right."""
    link = ("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0")
    commands = [*(("netns", "add", name) for name in names), (*link, "netns", names[1])]
    machines = []
    for hosts, name, address in zip("10", names, ("10.111.0.1", "10.111.0.2"), strict=True):
        commands += [
            ("-n", name, "addr", "add", f"{address}/24", "dev", "link0"),
            ("-n", name, "link", "set", "link0", "up"),
            ("-n", name, "link", "set", "lo", "up"),
        ]
        before = ["ip", "netns", "exec", name]
        # no name stands for these addresses
        options = ["--local_addr", address, "--rdzv_conf", f"is_host={hosts}"]
        machines.append((before, options, {"GLOO_SOCKET_IFNAME": "link0"}))
    if not shutil.which("ip"):
        return None
    for words in commands:
        if subprocess.run(["ip", *words], capture_output=True).returncode:
            return None
    return machines


def test_two_machines_do_what_one_does(runs, start, machines, tmp_path):
    _, pairs = runs
    folder = tmp_path / "run"
    address = next(iter(machines[0][1][1:]), "localhost")
    options = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_id",
        "job",
        "--rdzv_backend",
        "c10d",
    ]
    options += ["--rdzv_endpoint", f"{address}:{29_600 + os.getpid() % 300}"]
    processes = []
    for before, more, variables in machines:
        command = torchrun(
            RECIPE, CONFIG, f"output_dir={folder}", *ROUGH, "max_steps=4", options=(*options, *more)
        )
        processes.append(start([*before, *command], **variables))
    deadline = time.monotonic() + 240
    for process in processes:
        output = finish(process, deadline - time.monotonic())
        assert process.returncode == 0, output[-4000:]
    run = Run(0, folder, None)
    assert run.curve == pairs["rough"].curve[:5]  # with that of step 0
    assert run.part("run")["world_size"] == 2
    assert_same_tree(run.part("adapter", 0), pairs["rough"].part("adapter", 0))
