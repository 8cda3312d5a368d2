"""Memory and time of taking an adapter out of training: merged into its base, as a PEFT LoRA, and what PEFT takes.

    OMP_NUM_THREADS=2 python benchmarks/export_memory.py --preset llama3_2_1b --blocks 16
    OMP_NUM_THREADS=2 python benchmarks/export_memory.py --preset llama3_8b --blocks 32 --workers merged peft_lora

A random bfloat16 checkpoint of that shape is written in Hugging Face's layout, with a KaSA adapter on all its linears
(rank 16, 16 components truncated). `merged` and `peft_lora` are what recipes/export_adapter.py writes of it, `peft` is
PEFT's merge_and_unload of that LoRA in transformers and save_pretrained with shards of the same size. Each runs in a
process of its own, whose memory a thread reads every few milliseconds: anonymous memory, which is what was allocated,
and pages of files that are mapped, which the system takes back when it needs room. All above what the process held
before; the C library is told to give memory back as soon as it is free (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table
from kasa_step import ATTENTION
from qcorda_memory import PRESETS, Meter, files_of, write_checkpoint
from torchtune.training import FullModelHFCheckpointer

from kasa_tune.components import models
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.checkpoints import save_checkpoint
from kasa_tune.components.exchange.merged import INDEX, write_merged
from kasa_tune.components.exchange.peft_lora import write_peft
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.models.base_weights import read_base_weights, weights_fingerprint
from kasa_tune.components.models.loading import build_on_meta

BUILDER = "kasa_llama3_2"
PRESETS = PRESETS | {
    "llama3_8b": PRESETS["llama3_2_1b"]
    | {"num_layers": 32, "num_heads": 32, "embed_dim": 4096, "intermediate_dim": 14_336},
}
MIB = 2**20


def write_base(folder: Path, sizes: dict) -> None:
    """The checkpoint with all that transformers wants to know: whole config, index."""
    write_checkpoint(folder, sizes)
    names = {
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "num_kv_heads": "num_key_value_heads",
    }
    names |= {"intermediate_dim": "intermediate_size", "max_seq_len": "max_position_embeddings"}
    settings = json.loads((folder / "config.json").read_text()) | {
        theirs: sizes[ours] for ours, theirs in names.items()
    }
    settings |= {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    weights = dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight"), "ends.safetensors")
    for file in files_of(sizes["num_layers"])[1:]:
        with (folder / file).open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        weights |= dict.fromkeys(header.keys() - {"__metadata__"}, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def write_run(folder: Path, base: Path, sizes: dict, rank: int) -> None:
    """A checkpoint as the KaSA recipe leaves it, with random factors."""
    model_node = sizes | {
        "_component_": f"kasa_tune.components.models.{BUILDER}",
        "attn_modules": ATTENTION,
    }
    model_node |= {"apply_to_mlp": True, "rank": rank, "alpha": float(rank)}
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(base),
    }
    checkpointer |= {"checkpoint_files": files_of(sizes["num_layers"]), "model_type": "LLAMA3_2"}
    checkpointer |= {"output_dir": str(folder)}
    options = {key: value for key, value in model_node.items() if key != "_component_"}
    model = build_on_meta(partial(getattr(models, BUILDER), **options), dtype=torch.bfloat16)
    generator, adapter = torch.Generator().manual_seed(1), {}
    for name, linear in adapter_linears(model):
        for key, value in linear.state_dict().items():
            if key.startswith("lora_"):
                random = torch.randn(value.shape, generator=generator)
                adapter[f"{name}.{key}"] = random / max(value.shape) ** 0.5 * 0.1
    weights = read_base_weights(
        FullModelHFCheckpointer(
            **{key: value for key, value in checkpointer.items() if key != "_component_"}
        )
    )
    config = {"model": model_node, "checkpointer": checkpointer, "adapter": {}, "dtype": "bf16"}
    config |= {"tokenizer": {}}
    run = {"step": 1, "base": weights_fingerprint(weights), "config": config}
    save_checkpoint(folder / "checkpoints", 1, {"adapter": adapter, "run": run})


def ours(write: Callable, args: argparse.Namespace) -> dict[str, Any]:
    """What export_adapter does after it has looked at its config."""
    meter = Meter()
    run = meter.during("open", open_run)(args.folder / "run")
    (args.folder / args.worker).mkdir()
    meter.during("write", write)(run, args.folder / args.worker)
    return {"peaks": meter.peaks, "seconds": meter.seconds}


def peft_merge(args: argparse.Namespace) -> dict[str, Any]:
    """PEFT's way: the whole model, the adapter into it, all of it out again."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    meter = Meter()
    load = partial(AutoModelForCausalLM.from_pretrained, args.folder / "base", dtype=torch.bfloat16)
    model = meter.during("load", load)()
    adapted = meter.during("adapter", PeftModel.from_pretrained)(model, args.folder / "peft_lora")
    merged = meter.during("merge", adapted.merge_and_unload)()
    meter.during("write", merged.save_pretrained)(args.folder / "peft", max_shard_size=args.shard)
    return {"peaks": meter.peaks, "seconds": meter.seconds}


def in_a_process(worker: str, folder: Path) -> dict[str, Any]:
    """A worker's result, from a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", worker, "--folder", str(folder)]
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"} | os.environ
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> None:
    """Write model and run, let every worker at them, print what it took."""
    sizes, rows = PRESETS[args.preset] | {"num_layers": args.blocks}, []
    folder = Path(tempfile.mkdtemp(prefix="export_memory_", dir=args.folder))
    try:
        (folder / "base").mkdir()
        write_base(folder / "base", sizes)
        write_run(folder / "run", folder / "base", sizes, args.rank)
        whole = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")) / MIB
        print(f"The model in bfloat16: {whole:,.0f} MiB; shards of {args.shard}.\n", flush=True)
        for worker in args.workers:
            result = in_a_process(worker, folder)
            for phase, (allocated, of_files) in result["peaks"].items():
                if phase:
                    seconds = result["seconds"][phase]
                    rows.append(
                        [worker, phase, f"{seconds:.0f}", f"{allocated:,.0f}", f"{of_files:,.0f}"]
                    )
                    print(" | ".join(rows[-1]), flush=True)
            if worker != "peft_lora":
                shutil.rmtree(folder / worker)
    finally:
        shutil.rmtree(folder)
    print()
    print_table(["", "phase", "[s]", "allocated at most [MiB]", "file pages at most [MiB]"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="llama3_2_1b")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard", default="1GB", help="size of a file")
    workers = ("peft_lora", "merged", "peft")
    parser.add_argument(
        "--workers",
        nargs="+",
        choices=workers,
        default=workers,
        help="peft needs peft_lora before it",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="with room for three times the model; default that of temporary files",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = {
        "merged": partial(ours, partial(write_merged, max_shard_size=args.shard)),
        "peft_lora": partial(ours, partial(write_peft, base_model="base")),
        "peft": peft_merge,
    }
    if args.worker:
        return print(json.dumps(work[args.worker](args)))
    print(f"{machine()}\n", flush=True)
    measure(args)


if __name__ == "__main__":
    main()
