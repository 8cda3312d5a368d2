"""The first contact with a GPU: every recipe and every option that only a GPU shows, then times and memory at the
shapes of Llama-3 8B. One line for each check, and going on after a failure.

    python benchmarks/first_gpu_run.py --output first_gpu                 # about ten minutes on one data-center GPU
    python benchmarks/first_gpu_run.py --device cpu --tiny --output /tmp/first_gpu

A line says PASS, FAIL or SKIP, with seconds, peak memory and what was measured. SKIP gives the reason; without a GPU
these are the checks that need one. ``results.json`` in the output folder holds all of it, ``<check>.log`` what a check
printed. The exit status is the number of failures, at most 100. ``--only`` takes parts of names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from first_gpu_measurements import MEASUREMENTS, measure

RECIPE_STEPS = 6


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        name: what it is called, in the output and for ``--only``.
        arguments: of the interpreter, each after a name in braces has been filled in.
        gpu: whether it needs a GPU.
        after: the check whose output folder it reads.
    """

    name: str
    arguments: tuple[str, ...]
    gpu: bool = False
    after: str | None = None


@dataclass
class Result:
    """What a check gave: PASS, FAIL or SKIP, seconds, the host's peak memory, and its own last line."""

    name: str
    verdict: str
    seconds: float = 0.0
    host_gib: float = 0.0
    detail: str = ""


def training(name: str, recipe: str, config: str, *overrides: str, **options: object) -> Check:
    """A short run of a recipe on the tiny world, in bfloat16 with packed rows."""
    common = (
        f"output_dir={{output}}/{name}", "device={device}", "dtype=bf16", "dataset.packed=True",
        f"max_steps={RECIPE_STEPS}", f"save_every_n_steps={RECIPE_STEPS // 2}",
        "dataset_val=null", "run_val_every_n_steps=null",
    )  # fmt: skip
    arguments = ("-m", "kasa_tune", "run", recipe, "--config", config, *common, *overrides)
    return Check(name, arguments, **options)  # type: ignore[arg-type]


def distributed(name: str, recipe: str, config: str, *overrides: str, **options: object) -> Check:
    """The same under torchrun, on one process: NCCL on a GPU, gloo without."""
    alone = training(name, recipe, config, *overrides, **options)
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    script = f"{{root}}/recipes/{recipe}.py"
    return Check(name, (*start, script, *alone.arguments[4:]), alone.gpu, alone.after)


def other(name: str, recipe: str, config: str, *overrides: str, **options: object) -> Check:
    """A recipe that trains nothing."""
    arguments = ("-m", "kasa_tune", "run", recipe, "--config", config, "device={device}")
    return Check(name, (*arguments, *overrides), **options)  # type: ignore[arg-type]


def recipe_checks() -> list[Check]:
    """Every recipe once, and the options that behave differently on a GPU."""
    kasa, corda, qcorda = (f"{m}_finetune_single_device" for m in ("kasa", "corda", "qcorda"))
    several = ("calibration.rounds=3", "adapter.dynamic_ranks=True")
    first = "kasa"
    adapter = f"adapter_checkpoint={{output}}/{first}"
    checks = [
        training(first, kasa, "tiny_kasa"),
        training("resume", kasa, "tiny_kasa", f"max_steps={2 * RECIPE_STEPS}",
                 f"output_dir={{output}}/{first}", "resume_from_checkpoint=True", after=first),
        training("lora", kasa, "tiny_lora"),
        training("checkpointing", kasa, "tiny_kasa", "enable_activation_checkpointing=True"),
        training("offloading", kasa, "tiny_kasa", "enable_activation_checkpointing=True",
                 "enable_activation_offloading=True", gpu=True),
        training("fused optimizer", kasa, "tiny_kasa", "optimizer.fused=True"),
        training("muon", kasa, "tiny_kasa",
                 "optimizer._component_=kasa_tune.components.training.MuonWithAdamW"),
        training("unpacked", kasa, "tiny_kasa", "dataset.packed=False"),
        training("workers", kasa, "tiny_kasa", "num_workers=2"),
        training("compile", kasa, "tiny_kasa", "compile=True"),
        training("dora", corda, "tiny_dora"),
        training("corda", corda, "tiny_corda"),
        training("corda++ compile", corda, "tiny_corda_kpm", *several, "compile=True"),
        training("corda hidden states on host", corda, "tiny_corda", "calibration.offload=True",
                 gpu=True),
        training("eva", corda, "tiny_eva"),
        training("qcorda", qcorda, "tiny_qcorda"),
        training("qcorda compile", qcorda, "tiny_qcorda", "compile=True"),
        training("qkasa", qcorda, "tiny_qkasa"),
        training("qlora 8-bit optimizer", qcorda, "tiny_qlora",
                 "optimizer._component_=torchao.optim.AdamW8bit", gpu=True),
        distributed("kasa on torchrun", "kasa_finetune_distributed", "tiny_kasa"),
        distributed("kasa on torchrun, weights on host", "kasa_finetune_distributed", "tiny_kasa",
                    "fsdp_cpu_offload=True", gpu=True),
        distributed("corda on torchrun", "corda_finetune_distributed", "tiny_corda", *several),
        distributed("qcorda on torchrun", "qcorda_finetune_distributed", "tiny_qcorda"),
        distributed("qcorda on torchrun, weights on host", "qcorda_finetune_distributed",
                    "tiny_qcorda", "fsdp_cpu_offload=True", gpu=True),
        other("generate", "generate_text", "tiny_kasa_generate", adapter, after="resume"),
        other("evaluate", "evaluate_model", "tiny_evaluate", "output_dir={output}/evaluate",
              f"adapters={{kasa: {{output}}/{first}}}", after="resume"),
    ]  # fmt: skip
    for kind in ("peft", "merged", "native"):
        command = ("-m", "kasa_tune", "run", "export_adapter", "--config", f"{kind}_export")
        to = f"output_dir={{output}}/export {kind}"
        checks.append(Check(f"export {kind}", (*command, to, adapter), after="resume"))
    imported = ("peft_adapter={output}/export peft", "output_dir={output}/import")
    checks.append(other("import", "import_adapter", "tiny_lora", *imported, after="export peft"))
    classified = ("output_dir={output}/classify", "epochs=1")
    recipe = "classify_finetune_single_device"
    checks.append(other("classify", recipe, "tiny_roberta_kasa_classify", *classified))
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    script = "{root}/recipes/classify_finetune_distributed.py"
    several_classify = ("--config", "tiny_roberta_corda_classify", "device={device}", "epochs=1")
    to = "output_dir={output}/classify on torchrun"
    checks.append(Check("classify on torchrun", (*start, script, *several_classify, to)))
    report = ("-m", "kasa_tune", "run", "report_run", "--config", f"{{output}}/{first}/config.yaml")
    checks.append(Check("report", report, after="resume"))
    return checks


def measurement_checks() -> list[Check]:
    """What is measured at large shapes, each in a process of its own."""
    script = "{root}/benchmarks/first_gpu_measurements.py"
    options = ("--device", "{device}", "--output", "{output}", "{tiny}")
    return [
        Check(name, (script, name, *options), gpu=each.gpu) for name, each in MEASUREMENTS.items()
    ]


def fill(check: Check, places: dict[str, str]) -> list[str]:
    """The command of a check."""
    filled = [sys.executable]
    for argument in check.arguments:
        for name, value in places.items():
            argument = argument.replace(f"{{{name}}}", value)
        filled += [argument] if argument else []
    return filled


def run(check: Check, places: dict[str, str], limit: float) -> Result:
    """Do a check in a process of its own, its output in a file."""
    if check.gpu and not places["device"].startswith("cuda"):
        return Result(check.name, "SKIP", detail="needs a GPU")
    log = Path(places["output"], f"{check.name.replace('/', '-')}.log")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    seconds, host, status = measure(fill(check, places), log, environment, limit)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].rsplit("\r", 1)[-1][:160] if lines else ""
    if status:
        reason = "took too long" if status == "timeout" else f"status {status}"
        return Result(check.name, "FAIL", seconds, host, f"{reason}: {last}")
    if last.startswith("SKIP "):
        return Result(check.name, "SKIP", seconds, host, last.removeprefix("SKIP "))
    trained = (
        training_line(Path(places["output"], check.name)) if check.arguments[0] == "-m" else ""
    )
    return Result(check.name, "PASS", seconds, host, trained or last)


def training_line(folder: Path) -> str:
    """What the last metrics of a run say of its loss and, on a GPU, of its memory; empty for another folder."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return ""
    line = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    peak = f", peak {line['peak_memory_gib']:.2f} GiB" if "peak_memory_gib" in line else ""
    return f"step {line['step']}, loss {line['loss']:.3f}{peak}"


def run_all(checks: Iterable[Check], do: Callable[[Check], Result], parallel: int) -> list[Result]:
    """Do the checks, several at once, those that read another's output after it."""
    waiting, results = list(checks), {}
    names = {check.name for check in waiting}
    with ThreadPoolExecutor(parallel) as pool:
        while waiting:
            ready = [c for c in waiting if c.after not in names or c.after in results]
            waiting = [c for c in waiting if c not in ready]
            for result in pool.map(do, ready):
                results[result.name] = result
                print_line(result)
    return list(results.values())


def print_line(result: Result) -> None:
    """Print a result as one line."""
    used = f"{result.seconds:7.1f} s  host {result.host_gib:6.2f} GiB"
    print(f"{result.verdict}  {result.name:<38} {used}  {result.detail}", flush=True)


def main() -> int:
    """Do all checks; return the number of failures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to try the script itself")
    parser.add_argument("--output", type=Path, required=True, help="a folder; made if missing")
    parser.add_argument("--parallel", type=int, default=4, help="runs of recipes at once")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each check")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of checks")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    places = {
        "device": args.device,
        "output": str(args.output.resolve()),
        "root": str(Path(__file__).resolve().parents[1]),
        "tiny": "--tiny" if args.tiny else "",
    }
    started, results = time.perf_counter(), []
    for checks, parallel in ((recipe_checks(), args.parallel), (measurement_checks(), 1)):
        wanted = [c for c in checks if any(part in c.name for part in args.only)]
        results += run_all(wanted, lambda check: run(check, places, args.limit), parallel)
    counts = {v: sum(r.verdict == v for r in results) for v in ("PASS", "FAIL", "SKIP")}
    seconds = time.perf_counter() - started
    whole = {"seconds": seconds, **counts, "checks": [asdict(result) for result in results]}
    (args.output / "results.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    print(f"{counts} in {seconds:.0f} s; {args.output / 'results.json'}")
    return min(counts["FAIL"], 100)


if __name__ == "__main__":
    sys.exit(main())
