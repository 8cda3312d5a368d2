"""A training step (forward, backward, optimizer) of four trainers on one Llama, interleaved in one process.

    OMP_NUM_THREADS=2 python benchmarks/kasa_step.py
    python benchmarks/kasa_step.py --device cuda --preset llama3_2_1b --batch-size 8 --seq-len 512
    OMP_NUM_THREADS=2 python benchmarks/kasa_step.py --quantized

- `kasa`: ours, with both regularizers, as recipes/kasa_finetune_single_device.py does it
- `lora`: ours, the same without diagonal, edit and regularizers
- `torchtune lora`: torchtune's LoRA builder, loss and loss step of its lora_finetune_single_device recipe
- `peft kasa`: transformers' Llama of the same shapes with PEFT's KaSA and its regularizer

With `--quantized` the linears' weights are in NF4, and these take part instead of `kasa` and `peft kasa`:

- `qlora`, `qcorda`, `qkasa`: ours, as recipes/qcorda_finetune_single_device.py does it
- `torchtune qlora`: torchtune's builder with `quantize_base=True`

All adapt every linear of every layer at rank 8, without dropout, with the same AdamW. Every variant is timed once per
round; the table has medians over the rounds, and of the ratios to torchtune within a round (its QLoRA where that takes
part). PEFT's SVD and QCorDA's covariances, on which no step depends, are left out. Peak memory comes from a process per
variant.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from common import machine, print_table
from torch import Tensor, nn
from torchtune import training
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss

from kasa_tune.components.adapters import AdapterLinear, CorDALinear, KaSALinear
from kasa_tune.components.adapters.regularization import kasa_regularization
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.linalg.nf4 import quantize
from kasa_tune.components.models import corda_llama3_2, kasa_llama3_2
from kasa_tune.components.models import lora_llama3_2 as our_lora_llama3_2
from kasa_tune.components.models.norms import fuse_norms
from kasa_tune.components.quantized.start import quantized_start
from kasa_tune.components.training.loss import ChunkedCrossEntropy, return_hidden_states
from kasa_tune.components.training.memory import state_bytes
from kasa_tune.methods import METHODS

BETA, GAMMA, RANK, ALPHA = 1e-4, 1e-3, 8, 16.0
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
PRESETS = {
    "small": {
        "vocab_size": 8192,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 2,
        "embed_dim": 512,
        "intermediate_dim": 2048,
        "max_seq_len": 4096,
    },
    "llama3_2_1b": {
        "vocab_size": 128_256,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "embed_dim": 2048,
        "intermediate_dim": 8192,
        "max_seq_len": 4096,
    },
}
Step = Callable[[], None]
Variant = Callable[[dict, Tensor, Tensor], tuple[nn.Module, Step]]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
    )


def start_quantized(linear: AdapterLinear) -> None:
    """A linear's weight in NF4 and its adapter's start; QCorDA's component is that of the weight without a context."""
    weight, in_nf4 = linear.weight.float(), partial(quantize, dtype=linear.weight.dtype)
    method = {CorDALinear: "qpissa", KaSALinear: "qkasa"}.get(type(linear), "qlora")
    quantized_start(weight, linear, METHODS[method], quantize=in_nf4).put_into(linear)


def our_step(
    build: Callable[..., nn.Module],
    sizes: dict,
    tokens: Tensor,
    labels: Tensor,
    start: Callable[[AdapterLinear], object] = AdapterLinear.initialize,
    rank: int = RANK,
) -> tuple[nn.Module, Step]:
    """The step of our recipes; ``labels`` are shifted already."""
    model = build(ATTENTION, True, rank=rank, alpha=ALPHA, **sizes)
    return_hidden_states(fuse_norms(model))
    linears = [linear for _, linear in adapter_linears(model)]
    for linear in linears:
        linear.materialize(tokens.device, torch.float32)
        start(linear)
    loss_fn, optimizer = ChunkedCrossEntropy(), optimizer_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    labels = labels.cpu()  # where the recipes have them

    def step() -> None:
        num_labelled = int((labels != loss_fn.ignore_index).sum())
        loss = loss_fn(model.output, model(tokens), labels) / num_labelled
        loss.backward()
        l2, l3 = kasa_regularization(linears)
        if l2.requires_grad:
            (BETA * l2 + GAMMA * l3).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, float("inf"))
        torch.stack(
            [loss.detach(), l2.detach().to(loss.device), l3.detach().to(loss.device), norm]
        ).tolist()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def torchtune_step(
    sizes: dict, tokens: Tensor, labels: Tensor, quantize_base: bool = False, rank: int = RANK
) -> tuple[nn.Module, Step]:
    """The step of torchtune's recipe, whose labels are shifted in the step; without progress bar and logger."""
    model = lora_llama3_2(
        ATTENTION, True, lora_rank=rank, lora_alpha=ALPHA, quantize_base=quantize_base, **sizes
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    loss_fn, optimizer = CEWithChunkedOutputLoss(), optimizer_of(model)
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    unshifted = torch.hstack((tokens[:, :1], labels[:, :-1]))
    ignored = torch.full((len(tokens), 1), loss_fn.ignore_index, device=tokens.device)

    def step() -> None:
        num_tokens = (unshifted != loss_fn.ignore_index).sum()
        logits = model(tokens)
        loss = loss_fn(logits, torch.hstack((unshifted[..., 1:], ignored))) * num_tokens
        del logits
        loss.backward()
        training.scale_grads(model, 1 / num_tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return model, step


def peft_step(
    sizes: dict, tokens: Tensor, labels: Tensor, rank: int = RANK
) -> tuple[nn.Module, Step]:
    """The Llama of transformers under PEFT's KaSA, trained as PEFT's documentation says."""
    import peft
    import transformers
    from peft.tuners.lora.variants import KasaLinearVariant

    KasaLinearVariant._truncate_base_weight = staticmethod(lambda module, r: None)
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["embed_dim"],
        intermediate_size=sizes["intermediate_dim"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        max_position_embeddings=sizes["max_seq_len"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = peft.LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=targets,
        kasa_config=peft.KasaConfig(beta=BETA, gamma=GAMMA),
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config).to(torch.get_default_dtype()), adapter
    )
    optimizer = optimizer_of(model)
    unshifted = torch.hstack((tokens[:, :1], labels[:, :-1]))

    def step() -> None:
        loss = model(input_ids=tokens, labels=unshifted).loss + model.base_model._get_kasa_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return model, step


LORA: dict[str, Variant] = {
    "lora": partial(our_step, our_lora_llama3_2),
    "torchtune lora": torchtune_step,
}
FULL: dict[str, Variant] = {
    "kasa": partial(our_step, kasa_llama3_2),
    **LORA,
    "peft kasa": peft_step,
}
QUANTIZED: dict[str, Variant] = {
    "qlora": partial(our_step, our_lora_llama3_2, start=start_quantized),
    "qcorda": partial(our_step, corda_llama3_2, start=start_quantized),
    "qkasa": partial(our_step, kasa_llama3_2, start=start_quantized),
    "torchtune qlora": partial(torchtune_step, quantize_base=True),
    **LORA,
}
VARIANTS = FULL | QUANTIZED


def build(name: str, args: argparse.Namespace) -> tuple[nn.Module, Step]:
    """A variant's model and its step on random tokens, ``args.labelled`` of which are learned."""
    torch.manual_seed(0)
    sizes = PRESETS[args.preset]
    tokens = torch.randint(sizes["vocab_size"], (args.batch_size, args.seq_len), device=args.device)
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    labels[:, : round(args.seq_len * (1 - args.labelled))] = -100
    torch.set_default_dtype(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    try:
        with torch.device(args.device):
            return VARIANTS[name](sizes, tokens, labels)
    finally:
        torch.set_default_dtype(torch.float32)


def seconds_of(step: Step, num_steps: int, device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one step, the mean of ``num_steps``."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / num_steps, (time.process_time() - cpu) / num_steps


def peak_memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    """MiB of frozen weights, and held before the first step and at most during three, in this process."""
    model, step = build(name, args)
    base = state_bytes(p for p in model.parameters() if not p.requires_grad) / 2**20
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        for _ in range(3):
            step()
        return {"base": base, "before": before, "peak": torch.cuda.max_memory_allocated() / 2**20}
    ctypes.CDLL(None).malloc_trim(0)  # or the step fills what making the model has left free
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # resets the peak to what is held now (Linux)
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return {"base": base, "before": before, "peak": resident("VmHWM")}


def resident(key: str) -> float:
    """MiB of this process from Linux: ``VmRSS`` now, ``VmHWM`` the peak."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 2**10


def peak_memory_of_a_process(name: str, argv: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *argv, "--memory-of", name]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        help="of the base; default fp32 on a CPU, bf16 on a GPU",
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument(
        "--labelled", type=float, default=1.0, help="share of positions that are learned"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="of every variant in a round")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument(
        "--quantized", action="store_true", help="weights in NF4: QLoRA, QCorDA, QKaSA"
    )
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if args.memory_of:
        return print(json.dumps(peak_memory(args.memory_of, args)))
    print(
        f"{machine(args.device)}\n{args.preset}, {args.dtype}, {args.batch_size} x {args.seq_len} tokens\n",
        flush=True,
    )
    variants, reference = (
        (QUANTIZED, "torchtune qlora") if args.quantized else (FULL, "torchtune lora")
    )
    memory = {
        name: peak_memory_of_a_process(name, sys.argv[1:])
        for name in variants
        if not args.skip_memory
    }
    steps = {name: build(name, args)[1] for name in variants}
    for step in steps.values():
        step()
    rounds = []
    names = list(variants)
    for _ in range(args.rounds):
        rounds.append({name: seconds_of(steps[name], args.steps, args.device) for name in names})
        names.append(names.pop(0))  # nobody always comes after the same one
    rows = []
    for name in variants:
        wall, cpu = (median(each[name][i] for each in rounds) for i in (0, 1))
        ratios = [median(each[name][i] / each[reference][i] for each in rounds) for i in (0, 1)]
        figures = f"{1e3 * wall:.0f}", f"{ratios[0]:.3f}", f"{1e3 * cpu:.0f}", f"{ratios[1]:.3f}"
        base, before, peak = memory[name].values() if memory else (0, 0, 0)
        rows.append(
            [name, *figures, *(f"{value:.0f}" for value in (base, peak, peak - before) if memory)]
        )
    header = ["variant", "step [ms]", "ratio", "CPU [ms]", "ratio"]
    mib = ["base [MiB]", "peak memory [MiB]", "of it in the step [MiB]"] if memory else []
    print_table([*header, *mib], rows)


if __name__ == "__main__":
    main()
