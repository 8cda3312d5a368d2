"""Starting CorDA on Llama-3.2-1B-wide blocks: seconds, peak memory and accuracy, ours and PEFT's in one run.

    OMP_NUM_THREADS=2 python benchmarks/corda_initialization.py
    python benchmarks/corda_initialization.py --mode ipm
    python benchmarks/corda_initialization.py --width 512 --kv 128 --hidden 2048 --blocks 1 4 16
    python benchmarks/corda_initialization.py --rounds-cost --skip-peft
    python benchmarks/corda_initialization.py --paper

Everything from calibration rows to started adapters, all seven linears of every block: ours block by block as in
recipes/corda_finetune_single_device.py, PEFT's `preprocess_corda` and `get_peft_model` as its documentation has them,
on the same float32 weights and tokens. Each runs in a process of its own, so that seconds and peaks do not mix; peaks
are above what the process held with its model built. The error is that of the update at the start against a float64
CO-SVD of the same weight under the covariance that this process itself collected.

The weights have a power-law spectrum (`--spectrum trained`, see kasa_initialization.py), the embeddings a power-law
covariance, and the norms a few large channels, so that activations are as uneven as those of trained models.
`--rounds-cost` measures CorDA++ (5 rounds, dynamic ranks) against one round of static ranks. `--paper` times the
decompositions alone at the shapes of Llama-3 8B and rank 128.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from common import machine, print_table
from kasa_initialization import make_weight
from kasa_step import resident
from torch import Tensor, nn
from torchtune.models.convert_weights import tune_to_hf

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.corda.allocation import allocate_ranks, layer_spectra, more_compact
from kasa_tune.components.corda.calibration import damped_covariances, shared_inputs
from kasa_tune.components.corda.covariance import damped
from kasa_tune.components.linalg.decomposition import Component, co_svd, split_component
from kasa_tune.components.models import corda_llama3
from kasa_tune.components.models.loading import build_on_meta, load_base_weights

VOCAB, HEAD_DIM, ROPE_BASE, DAMPING = 8192, 64, 500_000, 0.01
NUM_ROUNDS = 5  # of CorDA++ in the paper
PAPER_RANK, PAPER_BLOCKS = 128, 32
PAPER_SHAPES = {  # d_out, d_in of Llama-3 8B, and how many a block has
    "q, o": (4096, 4096, 2),
    "k, v": (1024, 4096, 2),
    "gate, up": (14336, 4096, 2),
    "down": (4096, 14336, 1),
}
# PEFT's (transformers') names of a block's linears, and ours (torchtune's).
NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
THEIRS = {ours: theirs.rpartition(".")[2] for theirs, ours in NAMES.items()}


class Meter:
    """Seconds on the clock, CPU seconds of all threads, and MiB at most above what is held at its start."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated() / 2**20
        else:
            with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
                file.write("5")  # resets the peak to what is held now (Linux)
            self.held = resident("VmRSS")
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}
        peak = (
            torch.cuda.max_memory_allocated() / 2**20
            if self.device == "cuda"
            else resident("VmHWM")
        )
        return seconds | {"model": self.held, "peak": peak - self.held}


class Clock:
    """Seconds (clock, CPU) by name, of calls that end before the next begins."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, {}

    def __call__(self, name: str, action: Callable[[], Any]) -> Any:
        before = self._now()
        result = action()
        self.seconds[name] = [
            after - start for after, start in zip(self._now(), before, strict=True)
        ]
        return result

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def make_weights(args: argparse.Namespace) -> dict[str, Tensor]:
    """A decoder's weights under torchtune's names, the same in every process."""
    width, generator = args.width, torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    directions = torch.arange(1, width + 1).pow(-0.5)
    weights = {
        "tok_embeddings.weight": torch.randn(VOCAB, width, generator=generator)
        * directions
        @ rotation,
        "norm.scale": torch.ones(width),
        "output.weight": torch.randn(VOCAB, width, generator=generator) * 0.02,
    }
    for block in range(args.num_blocks):
        for norm in ("sa_norm", "mlp_norm"):
            scale = torch.randn(width, generator=generator).mul(0.5).exp()
            scale[:4] *= 20
            weights[f"layers.{block}.{norm}.scale"] = scale
        for index, name in enumerate(NAMES.values()):
            d_out, d_in = shape_of(name, args)
            weights[f"layers.{block}.{name}.weight"] = make_weight(
                d_out, d_in, args.spectrum, 100 * block + index
            )
    return weights


def shape_of(name: str, args: argparse.Namespace) -> tuple[int, int]:
    """``d_out, d_in`` of a linear by our name."""
    leaf = name.rpartition(".")[2]
    d_out = {"k_proj": args.kv, "v_proj": args.kv, "w1": args.hidden, "w3": args.hidden}.get(
        leaf, args.width
    )
    return d_out, args.hidden if leaf == "w2" else args.width


def make_tokens(args: argparse.Namespace, num_rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (num_rows, args.seq_len), generator=generator).to(args.device)


def our_model(args: argparse.Namespace) -> tuple[nn.Module, list[tuple[str, ...]]]:
    """The decoder with its weights and adapters that have not started, and which linears share an input."""
    build = partial(
        corda_llama3,
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_to_mlp=True,
        rank=args.rank,
        alpha=float(args.rank),
        vocab_size=VOCAB,
        num_layers=args.num_blocks,
        num_heads=args.width // HEAD_DIM,
        num_kv_heads=args.kv // HEAD_DIM,
        embed_dim=args.width,
        intermediate_dim=args.hidden,
        max_seq_len=args.seq_len,
        rope_base=ROPE_BASE,
    )
    model = build_on_meta(build, dtype=torch.float32)
    groups = shared_inputs(model)
    load_base_weights(
        model, make_weights(args), device=torch.device(args.device), adapter_dtype=torch.float32
    )
    return model.eval(), groups


def our_covariances(
    model: nn.Module,
    groups: list[tuple[str, ...]],
    tokens: Tensor,
    wanted: Callable[[str, int], bool],
    num_rounds: int = 1,
) -> Iterator[tuple[list[str], int, Tensor]]:
    """As in the recipe, with the defaults of its keys; a row is a batch, as PEFT needs it."""
    valid = torch.ones(1, tokens.shape[1], dtype=torch.bool)
    rounds = [
        [{"tokens": row[None], "valid": valid} for row in part] for part in tokens.chunk(num_rounds)
    ]
    options = {
        "damping": DAMPING,
        "damping_search": False,
        "normalization": "unit_mean_diag",
        "progress": iter,
    }
    return damped_covariances(model, groups, rounds, wanted=wanted, **options)


def our_components(
    found: Iterator, model: nn.Module, ranks: Mapping[str, int], mode: str, clock: Clock
) -> dict:
    """Components of all layers from their covariances, as they come."""
    linears, components = dict(adapter_linears(model)), {}
    for layers, _, covariance in found:
        for name in layers:
            work = partial(co_svd, linears[name].weight, covariance, ranks[name], mode)
            components[name] = clock(name, work)
    return components


def start_from(model: nn.Module, components: Mapping[str, Component]) -> None:
    for name, linear in adapter_linears(model):
        linear.start_from(split_component(components[name], linear.scaling))


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Our start with one round and static ranks."""
    model, groups = our_model(args)
    tokens, clock = make_tokens(args, args.samples), Clock(args.device)
    ranks = {name: linear.rank for name, linear in adapter_linears(model)}
    meter = Meter(args.device)
    found = our_covariances(
        model, groups, tokens, lambda name, round: round == 0
    )  # and not all rounds pooled
    components = our_components(found, model, ranks, args.mode, clock)
    start_from(model, components)
    result = meter.read() | {"layers": clock.seconds, "errors": {}}
    result["solvers"] = {name: component.solver for name, component in components.items()}
    if args.measure:
        started, (model, groups) = dict(adapter_linears(model)), our_model(args)
        linears = dict(adapter_linears(model))
        for layers, _, covariance in our_covariances(
            model, groups, tokens, lambda name, round: round == 0 and measured(name, args)
        ):
            for name in layers:
                update = started[name].lora_b.weight.double() @ started[name].lora_a.weight.double()
                result["errors"][name] = relative_error(
                    update, linears[name].weight, covariance, args
                )
    return result


def peft_base(args: argparse.Namespace) -> nn.Module:
    """The Llama of transformers with the same weights."""
    import transformers

    heads = {
        "num_attention_heads": args.width // HEAD_DIM,
        "num_key_value_heads": args.kv // HEAD_DIM,
    }
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.num_blocks,
        max_position_embeddings=args.seq_len,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": float(ROPE_BASE), "rope_type": "default"},
        **heads,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    weights = tune_to_hf(make_weights(args), *heads.values(), dim=args.width)
    model.load_state_dict(weights, assign=True)
    return model.to(args.device)


def peft(args: argparse.Namespace) -> dict[str, Any]:
    """PEFT's start, with its defaults."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import corda
    from peft.tuners.lora.config import CordaConfig

    model, tokens, clock = peft_base(args), make_tokens(args, args.samples), Clock(args.device)
    blocks = [
        (f"layers.{i}.{ours}", f"model.layers.{i}.{n}")
        for i in range(args.num_blocks)
        for n, ours in NAMES.items()
    ]
    names = {model.get_submodule(theirs): ours for ours, theirs in blocks}
    covariances, collect = {}, corda.collect_eigens_for_layer

    def timed_collect(linear: nn.Module, config: Any) -> Any:
        if measured(names[linear], args):
            covariances[names[linear]] = (
                linear.covariance_matrix
            )  # PEFT itself holds it until after the peak
        return clock(names[linear], lambda: collect(linear, config))

    def run_model() -> None:
        for row in tokens:
            model.model(input_ids=row[None], use_cache=False)

    corda.collect_eigens_for_layer = timed_collect
    options = {"r": args.rank, "lora_alpha": args.rank, "target_modules": list(THEIRS.values())}
    config = LoraConfig(
        init_lora_weights="corda", corda_config=CordaConfig(corda_method=args.mode), **options
    )
    meter = Meter(args.device)
    corda.preprocess_corda(model, config, run_model)
    started = get_peft_model(model, config).base_model.model
    result = meter.read() | {"layers": clock.seconds, "errors": {}}
    base = peft_base(args) if args.measure else None
    for ours, theirs in blocks:
        if measured(ours, args):
            linear, weight = started.get_submodule(theirs), base.get_submodule(theirs).weight
            update = (
                linear.lora_B["default"].weight.double() @ linear.lora_A["default"].weight.double()
            )
            covariance = damped(
                covariances[ours], DAMPING, normalize=False, search=True
            )  # as PEFT damps
            result["errors"][ours] = relative_error(update, weight, covariance, args)
    return result


def measured(name: str, args: argparse.Namespace) -> bool:
    return name.startswith("layers.0.") and THEIRS[name.removeprefix("layers.0.")] in args.measure


def relative_error(
    update: Tensor, weight: Tensor, covariance: Tensor, args: argparse.Namespace
) -> float:
    """Of the update at the start (its scaling is 1 here), by the published formula in float64: V, inverse and all."""
    context = covariance.double()
    left, values, right = torch.linalg.svd(weight.double() @ context, full_matrices=False)
    chosen = slice(0, args.rank) if args.mode == "ipm" else slice(-args.rank, None)
    exact = (
        left[:, chosen] * values[chosen] @ torch.linalg.solve(context, right[chosen], left=False)
    )
    return (torch.linalg.vector_norm(update - exact) / torch.linalg.vector_norm(exact)).item()


def rounds(args: argparse.Namespace) -> dict[str, Any]:
    """CorDA++, in the recipe's three steps."""
    model, groups = our_model(args)
    tokens, clock, layers = (
        make_tokens(args, NUM_ROUNDS * args.samples),
        Clock(args.device),
        Clock(args.device),
    )
    linears, spectra = dict(adapter_linears(model)), {}
    calibrate = partial(our_covariances, model, groups, tokens, num_rounds=NUM_ROUNDS)

    def select() -> None:
        for names, round, covariance in calibrate(lambda name, round: round >= 0):
            weights = {name: linears[name].weight for name in names}
            for name, newest in layer_spectra(weights, covariance, round).items():
                spectra[name] = more_compact(spectra.get(name), newest)

    def allocate() -> dict[str, int]:
        sizes = {name: linear.in_dim + linear.out_dim for name, linear in linears.items()}
        return allocate_ranks(spectra, sizes, rank=args.rank, mode=args.mode)

    def decompose() -> dict[str, Component]:
        found = calibrate(lambda name, round: round == spectra[name].round)
        return our_components(found, model, ranks, args.mode, layers)

    meter = Meter(args.device)
    clock("select", select)
    ranks = clock("allocate", allocate)
    components = clock("decompose", decompose)
    clock("start", lambda: start_from(model, components))
    chosen = {name: spectrum.round for name, spectrum in spectra.items()}
    solvers = {name: component.solver for name, component in components.items()}
    return meter.read() | {
        "steps": clock.seconds,
        "layers": layers.seconds,
        "ranks": ranks,
        "rounds": chosen,
        "solvers": solvers,
    }


WORKERS = {"ours": ours, "PEFT": peft, "rounds": rounds}


def in_a_process(worker: str, args: argparse.Namespace, num_blocks: int) -> dict[str, Any]:
    """A worker's result, from a fresh process."""
    command = [
        sys.executable,
        __file__,
        *sys.argv[1:],
        "--worker",
        worker,
        "--num-blocks",
        str(num_blocks),
    ]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_comparison(args: argparse.Namespace) -> None:
    """Totals for every number of blocks; layer by layer for the first."""
    workers = ["ours"] if args.skip_peft else ["ours", "PEFT"]
    totals, first = [], None
    for num_blocks in args.blocks:
        results = {worker: in_a_process(worker, args, num_blocks) for worker in workers}
        first = first or results
        for worker, result in results.items():
            figures = [
                f"{result['wall']:.1f}",
                f"{result['cpu']:.1f}",
                f"{result['model']:.0f}",
                f"{result['peak']:.0f}",
            ]
            ratio = f"{result['cpu'] / results['ours']['cpu']:.1f}"
            totals.append([str(num_blocks), worker, *figures, ratio])
    header = [
        "blocks",
        "",
        "[s]",
        "[CPU s]",
        "process with model [MiB]",
        "peak above it [MiB]",
        "CPU to ours",
    ]
    print_table(header, totals)
    rows = []
    for name, theirs in THEIRS.items():
        layer, row = f"layers.0.{name}", [theirs, " x ".join(map(str, shape_of(name, args)))]
        row.append(first["ours"]["solvers"][layer])
        row += [f"{result['layers'][layer][1]:.2f}" for result in first.values()]
        if args.measure:
            row += [
                f"{result['errors'][layer]:.1e}" if layer in result["errors"] else ""
                for result in first.values()
            ]
        rows.append(row)
    names = [f"{worker} [CPU s]" for worker in workers]
    print_table(
        ["layer", "shape", "our solver", *names, *(f"error, {w}" for w in workers if args.measure)],
        rows,
    )


def print_rounds_cost(args: argparse.Namespace) -> None:
    """CorDA++ against one round of static ranks."""
    args.measure = []
    static, dynamic = in_a_process("ours", args, 1), in_a_process("rounds", args, 1)
    steps = {f"{NUM_ROUNDS} rounds: {name}": seconds for name, seconds in dynamic["steps"].items()}
    steps = {"1 round, static ranks": [static["wall"], static["cpu"]], **steps}
    steps[f"{NUM_ROUNDS} rounds, dynamic ranks"] = [dynamic["wall"], dynamic["cpu"]]
    rows = [
        [name, f"{wall:.1f}", f"{cpu:.1f}", f"{cpu / static['cpu']:.2f}"]
        for name, (wall, cpu) in steps.items()
    ]
    print_table(["", "[s]", "[CPU s]", "CPU to static"], rows)
    rows = [
        [theirs, *(str(dynamic[key][f"layers.0.{name}"]) for key in ("rounds", "ranks", "solvers"))]
        for name, theirs in THEIRS.items()
    ]
    print_table(["layer", "chosen round", f"rank (static {args.rank})", "solver"], rows)
    print(
        f"Peak above the model: {static['peak']:.0f} MiB static, {dynamic['peak']:.0f} MiB dynamic.\n"
    )


def print_paper(args: argparse.Namespace) -> None:
    """Decompositions of Llama-3 8B's shapes, one layer per shape, and what 32 blocks of them take."""
    rows, total = [], [0.0, 0.0]
    for name, (d_out, d_in, count) in PAPER_SHAPES.items():
        weight = make_weight(d_out, d_in, args.spectrum, d_out + d_in).to(args.device)
        inputs = uneven_inputs(d_in).to(args.device)
        covariance = damped(inputs.T @ inputs, DAMPING)
        del inputs
        meter, clock = Meter(args.device), Clock(args.device)
        component = clock(name, partial(co_svd, weight, covariance, PAPER_RANK, args.mode))
        seconds = clock.seconds[name]
        total = [
            so_far + PAPER_BLOCKS * count * one for so_far, one in zip(total, seconds, strict=True)
        ]
        figures = [f"{value:.1f}" for value in seconds]
        rows.append(
            [
                name,
                f"{d_out} x {d_in}",
                str(count),
                component.solver,
                *figures,
                f"{meter.read()['peak']:.0f}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    print()
    print_table(
        ["layer", "shape", "in a block", "solver", "[s]", "[CPU s]", "peak above W and C [MiB]"],
        rows,
    )
    wall, cpu = (value / 3600 for value in total)
    print(
        f"{PAPER_BLOCKS} blocks at rank {PAPER_RANK}, {args.mode}: {wall:.2f} h on the clock, {cpu:.2f} CPU hours."
    )


def uneven_inputs(width: int, num_tokens: int = 4096) -> Tensor:
    """Inputs ``(num_tokens, width)`` of a power-law covariance with a few large channels, in float32."""
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(num_tokens, width, generator=generator)
    inputs *= torch.arange(1, num_tokens + 1)[:, None].pow(
        -0.5
    )  # random directions, the first ones the longest
    inputs[:, :4] *= 20
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--kv", type=int, default=512, help="outputs of k_proj and v_proj")
    parser.add_argument("--hidden", type=int, default=8192, help="width of the MLP")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16, help="rows to calibrate on, in a round")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a row")
    parser.add_argument("--mode", choices=("ipm", "kpm"), default="kpm")
    parser.add_argument(
        "--spectrum", choices=("gaussian", "trained"), default="trained", help="of the weights"
    )
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[1], help="depths to measure, one after the other"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", nargs="*", choices=THEIRS.values(), default=["q_proj", "k_proj"],
                        help="layers of the first block whose error is measured; float64 SVDs, untimed")  # fmt: skip
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument(
        "--rounds-cost", action="store_true", help="5 rounds and dynamic ranks against 1 and static"
    )
    parser.add_argument(
        "--paper", action="store_true", help="decompositions at the shapes of Llama-3 8B, rank 128"
    )
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--num-blocks", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.linalg.svd(
        torch.eye(32, dtype=torch.float64, device=args.device)
    )  # loads LAPACK, on a GPU also its handles
    if args.worker:
        return print(json.dumps(WORKERS[args.worker](args)))
    print(f"{machine(args.device)}\n", flush=True)
    if args.paper:
        return print_paper(args)
    print_rounds_cost(args) if args.rounds_cost else print_comparison(args)


if __name__ == "__main__":
    with torch.no_grad():
        main()
