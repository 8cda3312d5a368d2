"""Starting KaSA on one Llama-3.2-1B-wide block (7 linears, r 8): seconds and accuracy, ours and PEFT's in one run.

    OMP_NUM_THREADS=2 python benchmarks/kasa_initialization.py
    python benchmarks/kasa_initialization.py --device cuda --spectrum trained

Both start from the same float32 weights. The accuracy of the part that each removed is measured against a float64 SVD,
one layer per shape. `gaussian` weights have the crowded lower edge of a random matrix; `trained` ones a power law (σ_i
about i^-0.7), so that the smallest singular value of a square layer is some 1e-5 of the largest, as in trained models.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from common import machine, print_table
from torch import Tensor, nn

from kasa_tune.components.adapters import KaSALinear

SHAPES = {  # d_out, d_in
    "q_proj": (2048, 2048),
    "k_proj": (512, 2048),
    "v_proj": (512, 2048),
    "o_proj": (2048, 2048),
    "gate_proj": (8192, 2048),
    "up_proj": (8192, 2048),
    "down_proj": (2048, 8192),
}
MEASURED = ("q_proj", "k_proj", "gate_proj", "down_proj")  # one layer per shape
RANK = 8


class Seconds(NamedTuple):
    """How long an action took: by the clock, and of all cores together, hardly touched by other programs."""

    wall: float
    cpu: float


def make_weight(d_out: int, d_in: int, spectrum: str, seed: int) -> Tensor:
    """A float32 weight ``(d_out, d_in)`` with entries of about 0.02."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    if spectrum == "trained":
        n = min(d_out, d_in)
        rotation = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
        rotation *= torch.arange(1, n + 1).pow(-0.7)
        weight = rotation @ weight if d_out <= d_in else weight @ rotation.T
    return weight * (0.02 / weight.std())


def start_ours(weights: dict[str, Tensor]) -> tuple[dict[str, Seconds], dict[str, KaSALinear]]:
    """Seconds per layer and the layers after ``initialize``."""
    seconds, layers = {}, {}
    for name, weight in weights.items():
        d_out, d_in = weight.shape
        layers[name] = KaSALinear(d_in, d_out, RANK, alpha=16.0).to(weight.device, weight.dtype)
        layers[name].weight.copy_(weight)
        seconds[name] = timed(layers[name].initialize)
    return seconds, layers


def start_peft(weights: dict[str, Tensor]) -> tuple[dict[str, Seconds], dict[str, Tensor]]:
    """Seconds per layer's truncation, of ``get_peft_model`` in all under ``block``, and the truncated weights."""
    from peft import KasaConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.variants import KasaLinearVariant

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, weight in weights.items():
                linear = nn.Linear(
                    *weight.shape[::-1], bias=False, device="meta", dtype=weight.dtype
                )
                linear.weight = nn.Parameter(weight.clone())
                self.add_module(name, linear)

    seconds: list[Seconds] = []
    truncate = KasaLinearVariant._truncate_base_weight

    def timed_truncate(*args):
        seconds.append(timed(lambda: truncate(*args)))

    KasaLinearVariant._truncate_base_weight = staticmethod(timed_truncate)
    try:
        config = LoraConfig(
            r=RANK, lora_alpha=16, target_modules=list(weights), kasa_config=KasaConfig()
        )
        block, models = Block(), []
        total = timed(lambda: models.append(get_peft_model(block, config)))
    finally:
        KasaLinearVariant._truncate_base_weight = staticmethod(truncate)
    layers = {
        name: getattr(models[0].base_model.model, name).get_base_layer().weight.data
        for name in weights
    }
    return dict(zip(weights, seconds, strict=True)) | {"block": total}, layers


def removed_part(weight: Tensor) -> Tensor:
    """The part of the ``RANK`` smallest singular triplets by a float64 SVD."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return (left[:, -RANK:] * values[-RANK:]) @ right[-RANK:]


def timed(action: Callable[[], object]) -> Seconds:
    """Seconds an action takes, the device's queue included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def relative(error: Tensor, reference: Tensor) -> str:
    return f"{(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(reference)).item():.1e}"


def run(spectrum: str, args: argparse.Namespace) -> None:
    """One table: ours before PEFT, PEFT, ours again."""
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    weights = {
        name: make_weight(*SHAPES[name], spectrum, list(SHAPES).index(name)).to(args.device, dtype)
        for name in args.layers
    }
    first, layers = start_ours(weights)
    peft, peft_layers = start_peft(weights)
    runs = [first, *(start_ours(weights)[0] for _ in range(args.repeats - 1))]
    ours = {
        name: Seconds(*(median(run[name][i] for run in runs) for i in (0, 1))) for name in weights
    }
    ours["block"] = Seconds(*(sum(ours[name][i] for name in weights) for i in (0, 1)))
    wall, cpu = (peft["block"][i] / ours["block"][i] for i in (0, 1))
    print(
        f"Spectrum: {spectrum}. PEFT takes {wall:.1f} times as long, {cpu:.1f} times the CPU seconds.\n",
        flush=True,
    )
    rows = []
    for name in (*weights, "block"):
        shape = " x ".join(map(str, SHAPES[name])) if name in SHAPES else ""
        seconds = [f"{value:.2f}" for value in (*ours[name], *peft[name])]
        errors = [""] * 5
        if name in MEASURED and not args.skip_accuracy:
            errors = measure(weights[name], layers[name], peft_layers[name])
        rows.append([name, shape, *seconds, *([] if args.skip_accuracy else errors)])
    names = (
        "E, ours",
        "E in the weight, ours",
        "E in the weight, PEFT",
        "kept, ours",
        "kept, PEFT",
    )
    header = ["layer", "shape", "ours [s]", "ours [CPU s]", "PEFT [s]", "PEFT [CPU s]"]
    print_table([*header, *(names if not args.skip_accuracy else [])], rows)


@torch.no_grad()
def measure(original: Tensor, layer: KaSALinear, peft_weight: Tensor) -> list[str]:
    """Relative errors against float64: of the removed part E as factors and as stored, and of the kept weight."""
    exact, weight = removed_part(original), original.double()
    factors = layer.edit.out.double() @ layer.edit.into.double()
    peft, kept = peft_weight.double(), weight - exact
    ours = layer.weight.double() if layer.folded else weight - factors
    return [
        relative(factors - exact, exact),
        relative(weight - ours - exact, exact) if layer.folded else "not folded",
        relative(weight - peft - exact, exact),
        relative(ours - kept, kept),
        relative(peft - kept, kept),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spectrum", choices=("gaussian", "trained", "both"), default="both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--layers", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--repeats", type=int, default=3, help="of ours, around the one run of PEFT"
    )
    parser.add_argument("--skip-accuracy", action="store_true", help="leave out the float64 SVDs")
    args = parser.parse_args()
    print(machine(args.device) + "\n", flush=True)
    torch.linalg.eigh(torch.eye(32, device=args.device))  # loads LAPACK, on a GPU also its handles
    for spectrum in ("gaussian", "trained") if args.spectrum == "both" else (args.spectrum,):
        run(spectrum, args)


if __name__ == "__main__":
    with torch.no_grad():
        main()
