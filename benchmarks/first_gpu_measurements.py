"""What first_gpu_run.py measures at large shapes. Each measurement is a process of its own, which prints a table and,
as its last line, a summary, or SKIP with a reason.

    python benchmarks/first_gpu_measurements.py decompositions --device cuda --output first_gpu
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# torch is imported by the measurements, and not by first_gpu_run.py, which only starts processes.

# Of Llama-3 8B, and how many of them a block has.
SHAPES = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
TOY_SHAPES = {(96, 96): 2, (32, 96): 2, (256, 96): 2, (96, 256): 1}
BLOCKS_OF_8B, BLOCKS = 32, 2  # in the model, and in the folder that is set up here
EIGHT_B = {
    "num_layers": BLOCKS,
    "num_heads": 32,
    "num_kv_heads": 8,
    "embed_dim": 4096,
    "intermediate_dim": 14336,
}
TOY = EIGHT_B | {"num_heads": 8, "num_kv_heads": 4, "embed_dim": 256, "intermediate_dim": 384}


def measure(
    command: Sequence[str], log: Path, environment: Mapping[str, str], limit: float
) -> tuple[float, float, int | str]:
    """Run a command with its output in a file.

    Returns:
        Seconds, GiB of host memory that its largest process held, and its exit status, or ``timeout``.
    """
    started, killed = time.perf_counter(), threading.Event()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

        def kill() -> None:
            killed.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    verdict = "timeout" if killed.is_set() else process.returncode
    return time.perf_counter() - started, usage.ru_maxrss / 2**20, verdict


def timed(work: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Seconds of the second of two runs, GiB of GPU memory it took beyond what was held, and its result."""
    import torch

    on_gpu = device == "cuda"
    work()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, (torch.cuda.max_memory_allocated() - held) / 2**30 if on_gpu else 0.0, result


def ceilings(args: Namespace) -> str:
    """Rates of large products and of copying. The step measurements compare with the first."""
    import torch

    n, rates = 256 if args.tiny else 8192, {}
    for name, dtype, size in (
        ("bf16", torch.bfloat16, n),
        ("fp32", torch.float32, n),
        ("fp64", torch.float64, n // 2),
    ):
        a, b = (torch.randn(size, size, dtype=dtype, device=args.device) for _ in range(2))
        seconds, _, _ = timed(lambda a=a, b=b: [a @ b for _ in range(10)], args.device)
        rates[name] = 10 * 2 * size**3 / seconds
    block = torch.empty(n * n, dtype=torch.float32, device=args.device)
    seconds, _, _ = timed(block.clone, args.device)
    rates["bytes"] = 2 * 4 * n * n / seconds
    (args.output / "ceilings.json").write_text(json.dumps(rates), encoding="utf-8")
    shown = ", ".join(
        f"{name} {rates[name] / 1e12:.3g} TFLOP/s" for name in ("bf16", "fp32", "fp64")
    )
    return f"torch {torch.__version__}; {shown}; copies {rates['bytes'] / 1e9:.3g} GB/s"


def decompositions(args: Namespace) -> str:
    """Seconds and memory of each decomposition at the shapes of Llama-3 8B, beside the predicted workspace."""
    import torch
    from kasa_initialization import make_weight

    from kasa_tune.components.corda.allocation import layer_spectra
    from kasa_tune.components.corda.covariance import damped
    from kasa_tune.components.linalg.decomposition import (
        co_svd,
        co_svd_workspace,
        smallest_triplets,
    )
    from kasa_tune.components.training.memory import truncation_workspace

    rank, total = 4 if args.tiny else 128, {}
    for (d_out, d_in), count in (TOY_SHAPES if args.tiny else SHAPES).items():
        weight = make_weight(d_out, d_in, "trained", 0).to(args.device, torch.bfloat16)
        inputs = torch.randn(2 * d_in, d_in, device=args.device)
        covariance = damped(inputs.T @ inputs)
        oriented = partial(co_svd, weight, covariance, rank)
        works = {
            "kasa": (partial(smallest_triplets, weight, 8), truncation_workspace(d_out, d_in)),
            "co-svd ipm": (partial(oriented, "ipm"), co_svd_workspace(d_out, d_in)),
            "co-svd kpm": (partial(oriented, "kpm"), co_svd_workspace(d_out, d_in)),
            "spectrum": (
                partial(layer_spectra, {"w": weight}, covariance, 0),
                co_svd_workspace(d_out, d_in),
            ),
            "sum of x x'": (partial(torch.mm, inputs.T, inputs), 4 * d_in * d_in),
        }
        for name, (work, predicted) in works.items():
            seconds, gib, _ = timed(work, args.device)
            total[name] = total.get(name, 0.0) + BLOCKS_OF_8B * count * seconds
            line = f"{d_out:>6} x {d_in:<6} {name:<12} {seconds:8.3f} s   {gib:6.2f} GiB"
            print(f"{line} of {predicted / 2**30:.2f} predicted")
    return "whole 8B: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in total.items())


def filled_card(args: Namespace) -> str:
    """A decomposition on a card that is full but for 2 % is done on the CPU, with a line in the log."""
    import torch

    from kasa_tune.components.linalg.decomposition import co_svd

    weight = torch.randn(2048, 8192, device=args.device)
    expected = co_svd(weight.cpu(), None, 8, "ipm")
    free, whole = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - whole // 50), dtype=torch.uint8, device=args.device)
    little = torch.empty(
        max(1, torch.cuda.mem_get_info()[0] - 2**26), dtype=torch.uint8, device=args.device
    )
    found = co_svd(weight, None, 8, "ipm")
    error = (found.singular_values.cpu() / expected.singular_values - 1).abs().max().item()
    if not error < 1e-6:
        raise SystemExit(f"the singular values are wrong by {error:.1e}")
    return f"{(held.numel() + little.numel()) / 2**30:.1f} GiB held; singular values to {error:.0e}"


def steps(args: Namespace, *, rank: int, seq_len: int, quantized: bool = False) -> str:
    """Training steps of our linears, torchtune's and PEFT's on the same shapes, in turn in one process."""
    import kasa_step
    import torch

    kasa_step.RANK = rank
    more = (
        {"num_layers": 2, "vocab_size": 512}
        if args.tiny
        else {"num_layers": 8, "vocab_size": 128_256}
    )
    kasa_step.PRESETS["8b"] = (TOY if args.tiny else EIGHT_B) | more | {"max_seq_len": seq_len}
    options = Namespace(
        preset="8b", batch_size=8192 // seq_len, seq_len=64 if args.tiny else seq_len,
        device=args.device, dtype="bf16", labelled=1.0,
    )  # fmt: skip
    path = args.output / "ceilings.json"
    ceiling = json.loads(path.read_text(encoding="utf-8"))["bf16"] if path.is_file() else math.nan
    flops = kasa_flops(kasa_step.PRESETS["8b"], rank, options)
    names, best = kasa_step.QUANTIZED if quantized else kasa_step.FULL, {}
    for name in names:
        try:
            _, step = kasa_step.build(name, options)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        seconds, gib, _ = timed(lambda step=step: [step() for _ in range(3)], args.device)
        rate = 3 * options.batch_size * options.seq_len / seconds
        best[name] = rate
        share = 3 * flops / seconds / ceiling
        print(
            f"{name:<18} {rate:12,.0f} tokens/s   {share:6.1%} of the ceiling   {gib:6.2f} GiB in a step",
            flush=True,
        )
        del step
        if args.device == "cuda":
            torch.cuda.empty_cache()
    peer = "torchtune qlora" if quantized else "torchtune lora"
    ours = "qcorda" if quantized else "kasa"
    return f"{ours} {best[ours]:,.0f} tokens/s, {peer} {best[peer]:,.0f}: ratio {best[ours] / best[peer]:.3f}"


def kasa_flops(sizes: dict[str, int], rank: int, options: Namespace) -> int:
    """Operations of a KaSA step, by which the share of the ceiling is counted for all of them."""
    import torch
    from kasa_step import ATTENTION, kasa_llama3_2

    from kasa_tune.components.adapters import adapter_linears
    from kasa_tune.components.training.costs import step_flops

    with torch.device("meta"):
        model = kasa_llama3_2(ATTENTION, True, rank=rank, alpha=16.0, **sizes)
    for _, linear in adapter_linears(model):
        linear.materialize("meta", torch.float32)
    return step_flops(model, batch_size=options.batch_size, seq_len=options.seq_len)


def set_up(args: Namespace, *, method: str) -> str:
    """The set-up of a recipe on two random blocks of 8B's shapes, and what 32 blocks would take at that rate."""
    recipe, config, rank = {
        "kasa": ("kasa", "tiny_kasa", 8),
        "corda kpm": ("corda", "tiny_corda_kpm", 128),
        "qcorda": ("qcorda", "tiny_qcorda", 128),
    }[method]
    sizes = TOY if args.tiny else EIGHT_B
    folder = write_folder(args.output / "8b_blocks", sizes)
    overrides = [f"model.{name}={value}" for name, value in sizes.items()]
    command = [
        sys.executable, "-m", "kasa_tune", "run", f"{recipe}_finetune_single_device", "--config", config,
        f"device={args.device}", "dtype=bf16", "max_steps=1", "run_val_every_n_steps=null",
        f"model.rank={8 if args.tiny else rank}", f"checkpointer.checkpoint_dir={folder}",
        f"output_dir={args.output / f'set-up {method}'}", *overrides,
    ]  # fmt: skip
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    found = re.search(r"adapters started in ([\d.]+) s", done.stdout, re.IGNORECASE)
    if done.returncode or not found:
        raise SystemExit(done.stdout.strip().splitlines()[-1])
    seconds = float(found[1])
    return f"{BLOCKS} blocks in {seconds:.1f} s, so {BLOCKS_OF_8B} in about {seconds * BLOCKS_OF_8B / BLOCKS:.0f} s"


def write_folder(folder: Path, sizes: dict[str, int]) -> Path:
    """A checkpoint of a random Llama of some blocks, with the tiny world's vocabulary, so that its data fit."""
    import torch
    from safetensors.torch import save_file

    from kasa_tune import tiny_world

    folder.mkdir(exist_ok=True)
    source = Path(tiny_world.__file__).parent / "model"
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    width, hidden = sizes["embed_dim"], sizes["intermediate_dim"]
    head = width // sizes["num_heads"]
    config |= {
        "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"], "num_key_value_heads": sizes["num_kv_heads"], "head_dim": head,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {
        "model.embed_tokens": (config["vocab_size"], width),
        "lm_head": (config["vocab_size"], width),
    }
    for index in range(sizes["num_layers"]):
        block = f"model.layers.{index}"
        narrow = sizes["num_kv_heads"] * head
        of_block = {
            "q": (width, width),
            "k": (narrow, width),
            "v": (narrow, width),
            "o": (width, width),
        }
        shapes |= {f"{block}.self_attn.{name}_proj": shape for name, shape in of_block.items()}
        mlp = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        shapes |= {f"{block}.mlp.{name}_proj": shape for name, shape in mlp.items()}
        shapes |= {f"{block}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    shapes["model.norm"] = (width,)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Measurement:
    """A measurement and its options. ``gpu`` says whether it means nothing without a GPU."""

    work: Callable[..., str]
    options: Mapping[str, Any]
    gpu: bool = False


MEASUREMENTS: dict[str, Measurement] = {
    "ceilings": Measurement(ceilings, {}),
    "decompositions": Measurement(decompositions, {}),
    "filled card": Measurement(filled_card, {}, gpu=True),
    **{
        f"steps rank {rank}, {length} tokens": Measurement(steps, {"rank": rank, "seq_len": length})
        for rank, length in ((8, 2048), (32, 2048), (8, 8192))
    },
    "steps in NF4 rank 32, 2048 tokens": Measurement(
        steps, {"rank": 32, "seq_len": 2048, "quantized": True}
    ),
    **{
        f"set-up {method}": Measurement(set_up, {"method": method})
        for method in ("kasa", "corda kpm", "qcorda")
    },
}


def main() -> None:
    """Do one measurement and print its summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("this torch finds no GPU")
    chosen = MEASUREMENTS[args.name]
    print(chosen.work(args, **chosen.options))


if __name__ == "__main__":
    main()
