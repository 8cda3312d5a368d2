"""Memory of making a 4-bit base: what streaming holds at most, phase by phase, and what large models will take.

    OMP_NUM_THREADS=1 python benchmarks/qcorda_memory.py --methods qlora qpissa qcorda --blocks 4 16
    OMP_NUM_THREADS=1 python benchmarks/qcorda_memory.py --methods qlora --preset llama3_2_3b --blocks 28
    python benchmarks/qcorda_memory.py --budget

The first two write a random bfloat16 checkpoint of that shape in Hugging Face's layout, and take
recipes/qcorda_finetune_single_device.py through its set-up on it, on a CPU. `torchtune` is the set-up of its QLoRA:
the whole checkpoint read, the model built with `quantize_base=True`, and the one loaded into the other. Each runs in a
process of its own, whose memory a thread reads every few milliseconds: anonymous memory, which is what was allocated,
and pages of files that happen to be mapped. All figures are above what the process held before the weights. The C
library is told to give memory back as soon as it is free (MALLOC_MMAP_THRESHOLD_), or the peaks would be of what it
keeps: set another value to see that.

`--budget` counts, without any weights, what the shipped QCorDA configs take on a GPU, by default at 1 x 512 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
from kasa_step import ATTENTION, PRESETS
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torchtune import modules, training
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.training import FullModelHFCheckpointer

from kasa_tune import config
from kasa_tune.components.corda.calibration import calibration_bytes, shared_inputs
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.components.quantized import base as quantized_base
from kasa_tune.components.training.loss import return_hidden_states
from kasa_tune.components.training.memory import SET_UP, WEIGHTS, memory_budget, state_bytes

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "qcorda_finetune_single_device.py"
PRESETS = PRESETS | {
    "llama3_2_3b": PRESETS["llama3_2_1b"] | {"num_layers": 28, "num_heads": 24, "embed_dim": 3072},
}
MODELS = {
    "llama2_7b_qcorda": 12,
    "llama2_70b_qcorda": 80,
    "llama3_70b_qcorda": 80,
}  # config: GB of the device
METHODS = ("qlora", "qpissa", "qcorda")
RANKS, ADAPTERS = (128, 32), {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = {  # purposes of a budget
    "NF4": ["base weights in NF4"],
    "embedding, output, norms": ["base weights"],
    "adapters": ["adapters"],
    "gradients": ["gradients"],
    "optimizer": ["optimizer"],
    "activations, logits": [
        "activations (estimate)",
        "one block recomputed",
        "logits of one chunk",
    ],
    "one weight dequantized": ["dequantizing one weight"],
}
OPTIMIZERS = {"AdamW": "torch.optim.AdamW", "AdamW8bit": "torchao.optim.AdamW8bit"}
MIB, GIB = 2**20, 2**30


class Meter:
    """Memory of this process above what it held at first, at most, by phase; a thread reads it.

    Attributes:
        phase: what is going on.
        peaks: MiB of anonymous and of file pages, by phase.
        seconds: by phase.
    """

    def __init__(self) -> None:
        self.phase, self.peaks, self.seconds = "", {}, {}
        self._base = self._now()
        threading.Thread(target=self._run, daemon=True).start()

    def during(self, phase: str, action: Callable) -> Callable:
        """The action, with its time and memory counted as ``phase``'s and not as that of the phase it is called in."""

        def measured(*args: Any, **options: Any) -> Any:
            before, self.phase, started = self.phase, phase, time.perf_counter()
            try:
                return action(*args, **options)
            finally:
                took = time.perf_counter() - started
                self.seconds[phase] = self.seconds.get(phase, 0) + took
                self.seconds[before] = self.seconds.get(before, 0) - took
                self.phase = before

        return measured

    def _run(self) -> None:
        while True:
            phase, above = self.phase, self.above()
            self.peaks[phase] = [
                max(pair) for pair in zip(above, self.peaks.get(phase, (0, 0)), strict=True)
            ]
            time.sleep(0.003)

    def above(self) -> list[float]:
        """MiB of anonymous and of file pages now, above those at first."""
        return [now - base for now, base in zip(self._now(), self._base, strict=True)]

    @staticmethod
    def _now() -> list[float]:
        """MiB of this process from Linux."""
        with open("/proc/self/status", encoding="ascii") as file:
            sizes = dict(line.split(":", 1) for line in file)
        return [int(sizes[key].split()[0]) / 2**10 for key in ("RssAnon", "RssFile")]


def write_checkpoint(folder: Path, sizes: dict) -> None:
    """Random bfloat16 weights, a file for every block; each has some large directions, as those of trained models."""
    generator = torch.Generator().manual_seed(0)

    def weight(d_out: int, d_in: int) -> Tensor:
        random = partial(torch.randn, generator=generator)
        strong = random(d_out, 64) * torch.arange(1, 65).pow(-0.5)
        return (0.02 * torch.addmm(random(d_out, d_in), strong, random(64, d_in))).bfloat16()

    dim, hidden = sizes["embed_dim"], sizes["intermediate_dim"]
    kv = dim // sizes["num_heads"] * sizes["num_kv_heads"]
    linears = {
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
    }
    linears |= {
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (hidden, dim),
        "mlp.up_proj": (hidden, dim),
    }
    linears |= {"mlp.down_proj": (dim, hidden)}
    ones = partial(torch.ones, dim, dtype=torch.bfloat16)
    ends = {
        "model.embed_tokens.weight": weight(sizes["vocab_size"], dim),
        "model.norm.weight": ones(),
    }
    save_file(ends, folder / "ends.safetensors")
    for index in range(sizes["num_layers"]):
        block = {f"{name}.weight": weight(*shape) for name, shape in linears.items()}
        block |= {"input_layernorm.weight": ones(), "post_attention_layernorm.weight": ones()}
        block = {f"model.layers.{index}.{name}": tensor for name, tensor in block.items()}
        save_file(block, folder / f"block_{index}.safetensors")
    heads = {
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
    }
    settings = heads | {
        "hidden_size": dim,
        "head_dim": dim // sizes["num_heads"],
        "model_type": "llama",
    }
    (folder / "config.json").write_text(json.dumps(settings))


def files_of(num_blocks: int) -> list[str]:
    return ["ends.safetensors", *(f"block_{index}.safetensors" for index in range(num_blocks))]


def overrides_of(method: str, sizes: dict, args: argparse.Namespace) -> list[str]:
    """What makes a config of the embedded model one of the written checkpoint."""
    kind = "lora" if method == "qlora" else "corda"
    output, files = (
        args.folder / f"{method}_{sizes['num_layers']}",
        ",".join(files_of(sizes["num_layers"])),
    )
    settings = {f"model.{name}": size for name, size in sizes.items()}
    settings |= {
        "model._component_": f"kasa_tune.components.models.{kind}_llama3_2",
        "model.rank": args.rank,
    }
    settings |= {
        "checkpointer.checkpoint_dir": args.folder / "base",
        "checkpointer.model_type": "LLAMA3_2",
    }
    settings |= {"checkpointer.checkpoint_files": f"[{files}]", "output_dir": output}
    settings |= {"dataset.split": "train[:8]", "dataset_val.split": "train[:8]", "dtype": "bf16"}
    if method == "qcorda":
        settings |= {"calibration.num_samples": args.samples, "calibration.batch_size": 1}
        settings |= {"calibration.cache_dir": output / "cache", "calibration.max_seq_len": 128}
    return [f"{key}={value}" for key, value in settings.items()]


def our_set_up(method: str, sizes: dict, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe's set-up."""
    spec = importlib.util.spec_from_file_location("qcorda_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = config.load(
        f"tiny_{method}", overrides_of(method, sizes, args), config.QCORDA, about_to_run=True
    )
    recipe = module.QCorDAFinetuneRecipeSingleDevice(cfg)
    set_up_weights, meters = recipe._setup_weights, []

    def measured_set_up(cfg: DictConfig) -> None:
        meters.append(meter := Meter())
        recipe._decompose = meter.during("decompose", recipe._decompose)
        recipe._start_adapters = meter.during("quantize", recipe._start_adapters)
        quantized_base.keep_quantized = meter.during("write", quantized_base.keep_quantized)
        meter.during("load", set_up_weights)(cfg)

    recipe._setup_weights = measured_set_up
    recipe.setup(cfg)
    starts = [
        tensor
        for linear in recipe._linears.values()
        for tensor in (linear.lora_edit_out, linear.lora_edit_in)
    ]
    return summary(recipe._model, meters[0], starts)


def torchtune_set_up(sizes: dict, args: argparse.Namespace) -> dict[str, Any]:
    """That of torchtune's lora_finetune_single_device."""
    options = {"model_type": "LLAMA3_2", "checkpoint_files": files_of(sizes["num_layers"])}
    folders = {
        "checkpoint_dir": str(args.folder / "base"),
        "output_dir": str(args.folder / "torchtune"),
    }
    checkpointer, meter = FullModelHFCheckpointer(**folders, **options), Meter()
    weights = meter.during("load", checkpointer.load_checkpoint)()["model"]
    build = partial(
        lora_llama3_2,
        ATTENTION,
        True,
        lora_rank=args.rank,
        lora_alpha=args.rank,
        quantize_base=True,
    )
    with training.set_default_dtype(torch.bfloat16):
        model = meter.during("build", build)(**sizes)
    meter.during("quantize", model.load_state_dict)(weights, strict=False)
    del weights
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return summary(model, meter, [])


def summary(model: nn.Module, meter: Meter, starts: list[Tensor]) -> dict[str, Any]:
    """What the phases took, and MiB of a model's frozen blocks, of its adapters, of where they started, of all."""
    parameters = dict(model.named_parameters())
    blocks = [
        p for name, p in parameters.items() if name.startswith("layers.") and not p.requires_grad
    ]
    adapters = [p for p in parameters.values() if p.requires_grad]
    sizes = {
        "blocks": state_bytes(blocks),
        "adapters": state_bytes(adapters),
        "starts": state_bytes(starts),
    }
    sizes = {name: size / MIB for name, size in sizes.items()} | {"end": meter.above()[0]}
    return {"peaks": meter.peaks, "seconds": meter.seconds, **sizes}


def in_a_process(worker: str, num_blocks: int, folder: Path) -> dict[str, Any]:
    """A worker's result, from a fresh process."""
    command = [
        sys.executable,
        __file__,
        *sys.argv[1:],
        "--worker",
        worker,
        "--depth",
        str(num_blocks),
    ]
    command += ["--folder", str(folder)]
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"} | os.environ
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def print_set_ups(args: argparse.Namespace) -> None:
    """What every method holds and takes, at every depth."""
    sizes, rows, phases = PRESETS[args.preset] | {"num_layers": max(args.blocks)}, [], []
    folder = Path(tempfile.mkdtemp(prefix="qcorda_memory_", dir=args.folder))
    base = folder / "base"
    try:
        base.mkdir()
        write_checkpoint(base, sizes)
        block, ends = (
            (base / name).stat().st_size / MIB
            for name in ("block_0.safetensors", "ends.safetensors")
        )
        print(
            f"In bfloat16: a block {block:,.0f} MiB, embedding and last norm {ends:,.0f} MiB.\n",
            flush=True,
        )
        for num_blocks in args.blocks:
            for worker in args.methods:
                result = in_a_process(worker, num_blocks, folder)
                peaks = {phase: peak for phase, peak in result["peaks"].items() if phase}
                peak = max(anonymous for anonymous, _ in peaks.values())
                figures = [
                    ends + num_blocks * block,
                    *(result[key] for key in ("blocks", "adapters", "starts", "end")),
                ]
                figures += [peak, peak - result["end"]]
                rows.append([str(num_blocks), worker, *(f"{figure:,.0f}" for figure in figures)])
                for phase, (anonymous, of_files) in peaks.items():
                    line = (
                        f"{result['seconds'][phase]:.0f}",
                        f"{anonymous:,.0f}",
                        f"{of_files:,.0f}",
                    )
                    phases.append([str(num_blocks), worker, phase, *line])
                print(
                    " | ".join(rows[-1]),
                    *(" | ".join(row) for row in phases[-len(peaks) :]),
                    sep="\n",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder)
    print()
    header = [
        "whole model in bf16",
        "blocks in NF4",
        "adapters",
        "starts on the host",
        "allocated in the end",
    ]
    print_table(["blocks", "", *header, "at most", "difference"], rows)
    print_table(
        ["blocks", "", "phase", "[s]", "allocated at most [MiB]", "file pages at most [MiB]"],
        phases,
    )


def budget_of(
    name: str, adapter_dtype: torch.dtype, optimizer: str, batch_size: int, overrides: list[str]
) -> dict[str, int]:
    """Bytes by purpose of a shipped config at 512 tokens with its activations checkpointed."""
    cfg = config.load(name, overrides, config.QCORDA, check_files=False)
    model = build_on_meta(partial(config.instantiate, cfg.model), dtype=torch.bfloat16)
    return_hidden_states(model)
    groups, linears = (
        shared_inputs(model),
        quantized_base.quantized_linears(model, cfg.quantization.block_size),
    )
    base = quantized_base.base_bytes(model, linears, **cfg.quantization)
    rows = [
        {"tokens": torch.empty(1, 512, device="meta")} for _ in range(cfg.calibration.num_samples)
    ]
    options = {
        "dtype": training.get_dtype(cfg.calibration.accumulate),
        "offload": cfg.calibration.offload,
    }
    calibration = calibration_bytes(model, groups, [rows], **options)
    training.set_activation_checkpointing(model, {modules.TransformerSelfAttentionLayer})
    shape = {
        "batch_size": batch_size,
        "seq_len": 512,
        "vocab_size": model.tok_embeddings.num_embeddings,
    }
    shape |= {"loss_chunk": config.instantiate(cfg.loss).chunk_size, "adapter_dtype": adapter_dtype}
    make = partial(
        config.instantiate, DictConfig({"_component_": OPTIMIZERS[optimizer], "lr": 1e-5})
    )
    return memory_budget(model, make, **shape) | base | calibration


def print_budgets(batch_size: int) -> None:
    """What large models take with which settings; nothing is loaded."""
    rows = []
    torch.compiler.set_stance("force_eager")  # AdamW8bit would compile a step for every shape
    for name, room in MODELS.items():
        for rank in RANKS:
            for (label, dtype), optimizer in product(ADAPTERS.items(), OPTIMIZERS):
                budget = budget_of(
                    name,
                    dtype,
                    optimizer,
                    batch_size,
                    [f"model.rank={rank}", f"model.alpha={rank}"],
                )
                set_up, step = totals(budget)
                figures = [
                    sum(budget[purpose] for purpose in purposes) for purposes in COLUMNS.values()
                ]
                left = room - max(set_up, step) / GIB
                cells = [*figures, set_up, step]
                rows.append([name.removesuffix("_qcorda"), f"{rank}, {label}, {optimizer}"])
                rows[-1] += [*(f"{cell / GIB:.2f}" for cell in cells), f"{left:.1f} of {room}"]
                print(" | ".join(rows[-1]), flush=True)
    print()
    print_table(
        ["model", "rank, adapters, optimizer", *COLUMNS, "set-up", "training step", "left [GiB]"],
        rows,
    )


def totals(budget: dict[str, int]) -> tuple[int, int]:
    """Bytes at most while the base is made, and in training; as budget_report sums them up."""
    phases = [sum(budget[purpose] for purpose in phase) for phase in SET_UP]
    over = {purpose for phase in SET_UP for purpose in phase} - {"base weights in NF4"}
    step = sum(size for purpose, size in budget.items() if purpose not in over)
    return sum(budget[purpose] for purpose in WEIGHTS) + max(phases), step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", action="store_true", help="count what large models take, and measure nothing"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="rows of 512 tokens in a step of the budget"
    )
    parser.add_argument("--preset", choices=PRESETS, default="llama3_2_1b")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[4, 16], help="depths, one after the other"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=(*METHODS, "torchtune"), default=[*METHODS, "torchtune"]
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--samples",
        type=int,
        default=4,
        help="rows of at most 128 tokens that QCorDA calibrates on",
    )
    parser.add_argument(
        "--folder", type=Path, help="with room for the checkpoint; default that of temporary files"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sizes = PRESETS[args.preset] | {"num_layers": args.depth}
        work = torchtune_set_up if args.worker == "torchtune" else partial(our_set_up, args.worker)
        return print(json.dumps(work(sizes, args)))
    print(f"{machine()}\n", flush=True)
    print_budgets(args.batch_size) if args.budget else print_set_ups(args)


if __name__ == "__main__":
    main()
