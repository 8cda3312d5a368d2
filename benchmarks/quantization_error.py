"""How far a model in NF4 starts from the one it was: QLoRA, LoftQ, QPiSSA, QCorDA and QKaSA, before any training.

    KASA_TUNE_DATA=... OMP_NUM_THREADS=1 python benchmarks/quantization_error.py --output /tmp/quantization_error

For every linear the relative output error ||(W - W_eff) X|| / ||W X|| on held-out context X, W_eff = Q + s B A at the
start, for stories260K and the embedded tiny world model, and for weights of a power-law spectrum behind inputs of a
power-law spectrum of which some channels are outliers. QCorDA is calibrated on other text (other draws) than X is of.
The synthetic errors also by how far the outliers stand out. Draws `quantization_error.png`.

- `QLoRA`: NF4(W)
- `LoftQ`: Q + E, E the first r triplets of W - Q, five turns
- `QPiSSA`: NF4(W - E) + E, E the first r triplets of W; `QPiSSA 5`: E found again four times, of W - Q
- `QCorDA`: NF4(W - E) + E, E = U U' W, U the first r left vectors of W C; `p = 1/2`: of W C^(1/2)
- `QKaSA`: NF4(W) - E, E the last r triplets of W, as published

Then what the models are worth as they start: perplexity on held-out stories; the loss of the answers to questions about
the tiny world's facts, and the share of them that is right.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from common import machine, print_table
from corda_truncation import (
    CPU,
    Subject,
    Text,
    calibrate,
    evaluation_batches,
    evaluation_rows,
    perplexity,
    stories,
)
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from kasa_tune import config
from kasa_tune.components.corda.calibration import shared_inputs
from kasa_tune.components.corda.calibration_data import batched
from kasa_tune.components.corda.covariance import damped
from kasa_tune.components.data.building import build_dataset
from kasa_tune.components.linalg.decomposition import co_svd, smallest_triplets
from kasa_tune.components.linalg.nf4 import dequantize, quantize
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.components.quantized.start import fit_quantization
from kasa_tune.components.training.loss import return_hidden_states
from kasa_tune.tiny_world import evaluate, world

METHODS = ("QLoRA", "LoftQ", "QPiSSA", "QPiSSA 5", "QCorDA", "QCorDA, p = 1/2", "QKaSA")
DAMPING = 0.01
CALIBRATION = argparse.Namespace(num_samples=256, rounds=1, seq_len=128)
STORIES, TASK, FACTS = "stories260K", "tiny world, task", "tiny world, facts"
SHAPES = {"512 x 512": (512, 512), "512 x 2048": (512, 2048)}  # of synthetic weights
SWEEP_RANK = 32  # where the size of the outliers is varied
OUTLIERS = 16.0  # how much larger than others the outlier channels are, 1 in 100
NUM_FACTS = 100  # of the tiny world, to ask
NUM_TOKENS = 8192  # synthetic, to calibrate on and to measure on

Quantizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Context:
    """Weights, and the inputs they see: ``sum of x x'`` of what to calibrate on, damped, and of what to measure on.

    Args:
        weights: ``(d_out, d_in)`` by name.
        calibration, held_out: ``(d_in, d_in)`` by the same names.
        worth: what a model with other weights in these places is worth; None of weights without a model.
    """

    weights: Mapping[str, Tensor]
    calibration: Mapping[str, Tensor]
    held_out: Mapping[str, Tensor]
    worth: Callable[[Mapping[str, Tensor]], dict[str, float]] | None = None


# ---------------------------------------------------------------------------------------------------- the starts


@torch.no_grad()
def effective_weight(
    method: str, weight: Tensor, covariance: Tensor, rank: int, in_nf4: Quantizer
) -> Tensor:
    """``W_eff = Q + s B A`` of a method at its start, float32.

    Args:
        method: one of METHODS.
        weight: ``W (d_out, d_in)`` float32.
        covariance: ``C (d_in, d_in)``, damped; only QCorDA looks at it.
        rank: of the update, of QKaSA's edit also.
        in_nf4: float32 to a quantized weight.
    """
    if method == "QLoRA":
        return dequantize(in_nf4(weight))
    if method == "QKaSA":
        return dequantize(in_nf4(weight)) - smallest_triplets(weight, rank)[0].dense()
    if method == "LoftQ":
        component, base = fit_quantization(weight, None, rank, 5, quantize=in_nf4)
        return dequantize(base) + component.vectors @ component.projection
    power = {"QCorDA": 1.0, "QCorDA, p = 1/2": 0.5}.get(method, 0.0)
    component = co_svd(weight, covariance, rank, "ipm", covariance_power=power)
    if method == "QPiSSA 5":
        component, _ = fit_quantization(weight, component, rank, 4, quantize=in_nf4)
    part = component.vectors @ component.projection
    return dequantize(in_nf4(weight - part)) + part


@torch.no_grad()
def output_error(weight: Tensor, effective: Tensor, covariance: Tensor | None = None) -> float:
    """``||(W - W_eff) X|| / ||W X||`` where ``X X' = C``; without C that of white inputs, the error of the weight."""

    def size(matrix: Tensor) -> Tensor:
        oriented = matrix if covariance is None else matrix @ covariance.double()
        return (oriented * matrix).sum().clamp_min(0).sqrt()

    return (size((weight - effective).double()) / size(weight.double())).item()


def outlier_share(covariance: Tensor) -> float:
    """Of the inputs' energy, the share that the largest channel in 100 has (at least one channel)."""
    energy = covariance.diagonal().double()
    return (energy.topk(math.ceil(len(energy) / 100)).values.sum() / energy.sum()).item()


# ---------------------------------------------------------------------------------------------------- real models


def load_subject(name: str) -> tuple[Subject, Any]:
    """A shipped config's model with its base weights, on the CPU in float32, and the config."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config.load(name, [f"output_dir={folder}"], config.QCORDA, about_to_run=True)
        model = build_on_meta(lambda: config.instantiate(cfg.model), dtype=torch.float32)
        groups = shared_inputs(model)
        return_hidden_states(model)
        weights = read_base_weights(config.instantiate(cfg.checkpointer))
        load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32)
    return Subject(model.eval(), config.instantiate(cfg.tokenizer), groups), cfg


def of_stories(seed: int) -> Context:
    """stories260K and the stories it was trained on; perplexity on the last ones of the file."""
    subject, _ = load_subject("stories260k_qcorda")
    data = Path(os.environ["KASA_TUNE_DATA"])
    subject.tokenizer.max_seq_len = None
    held_out = stories(subject.tokenizer, data, held_out=True)
    rows = evaluation_rows(held_out, CALIBRATION.seq_len, concatenate=False)
    batches = evaluation_batches(rows, subject.tokenizer)

    def worth(weights: Mapping[str, Tensor]) -> dict[str, float]:
        for name, weight in weights.items():
            subject.linears[name].weight = nn.Parameter(weight, requires_grad=False)
        return {"perplexity": perplexity(subject.model, batches)}

    return context_of(subject, stories(subject.tokenizer, data, held_out=False), rows, seed, worth)


def of_tiny_world(seed: int, *, facts: bool) -> Context:
    """The embedded model, in the context of the task it is to learn or of the facts that it knows."""
    subject, cfg = load_subject("tiny_qcorda")
    node = dict(cfg.dataset)
    if facts:
        node |= {"_component_": "kasa_tune.components.data.completion_dataset", "column": "text"}
        node["data_files"] = node["data_files"].replace("task_train", "facts_calibration")
        halves = node | {"split": "train[:500]"}, node | {"split": "train[500:]"}
    else:
        halves = node, dict(cfg.dataset_val)
    first, second = (build_dataset(half, subject.tokenizer, name="dataset") for half in halves)
    model = evaluate.load_model(evaluate.HERE / "model")
    tokenizer = evaluate.load_tokenizer(evaluate.HERE / "model")
    asked = evaluate.load_rows("facts_test.jsonl")[:NUM_FACTS]

    def worth(weights: Mapping[str, Tensor]) -> dict[str, float]:
        model.load_state_dict(
            {f"{name}.weight": weight for name, weight in weights.items()}, strict=False
        )
        answers = evaluate.completer(model, tokenizer, max_new_tokens=12)
        return {
            "loss of answers": loss_of_answers(model, tokenizer, asked),
            "right": world.exact_match(answers, asked),
        }

    rows = evaluation_rows(second, CALIBRATION.seq_len, concatenate=False)
    return context_of(subject, first, rows, seed, worth)


@torch.no_grad()
def loss_of_answers(model: nn.Module, tokenizer: Any, facts: Iterable[Mapping[str, str]]) -> float:
    """Mean cross-entropy per token of the answers."""
    examples = []
    for fact in facts:
        question = tokenizer.encode(
            world.fact_prompt(fact["question"]), add_bos=True, add_eos=False
        )
        answer = tokenizer.encode(fact["answer"], add_bos=False, add_eos=True)
        labels = [evaluate.IGNORE] * (len(question) - 1) + answer + [evaluate.IGNORE]
        examples.append((question + answer, labels))
    tokens, labels = evaluate.pad(examples)
    return F.cross_entropy(
        model(tokens).flatten(0, 1), labels.flatten(), ignore_index=evaluate.IGNORE
    ).item()


def context_of(
    subject: Subject, dataset: Any, held_out: Iterable, seed: int, worth: Callable
) -> Context:
    """Calibrate on rows drawn from a dataset, and sum up the rows held out."""
    drawn = Text(dataset, [], concatenate=False).rounds(subject.tokenizer, CALIBRATION, seed)
    rows = [{"tokens": row} for row in held_out]
    measured_on = [batched(rows, tokenizer=subject.tokenizer, batch_size=16, device=CPU)]
    weights = {name: linear.weight.detach() for name, linear in subject.linears.items()}
    found = (
        calibrate(subject, rounds, damping)
        for rounds, damping in ((drawn, DAMPING), (measured_on, 0.0))
    )
    calibration, measured = (
        {name: each.covariances[name][0] for name in weights} for each in found
    )
    return Context(weights, calibration, measured, worth)


# ---------------------------------------------------------------------------------------------------- synthetic


def synthetic(seed: int, *, d_out: int, d_in: int, outliers: float = OUTLIERS) -> Context:
    """One weight with singular values ``i^(-1/2)``, and inputs of covariance ``D H D``: eigenvalues of H are ``1 / i``,
    in D one channel in 100 is ``outliers`` times the others.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = min(d_out, d_in)
    left, right = (torch.linalg.qr(normal(d, n))[0] for d in (d_out, d_in))
    weight = left * torch.arange(1, n + 1, dtype=torch.float64) ** -0.5 @ right.T
    mix = (
        torch.linalg.qr(normal(d_in, d_in))[0]
        * torch.arange(1, d_in + 1, dtype=torch.float64) ** -0.5
    )
    scale = torch.ones(d_in, dtype=torch.float64)
    scale[torch.randperm(d_in, generator=generator)[: round(d_in / 100)]] = outliers
    first, second = (
        scale[:, None] * (mix @ normal(d_in, NUM_TOKENS)) for _ in range(2)
    )  # [d_in, tokens]
    covariance = damped((first @ first.T).float(), DAMPING)
    return Context(
        {"weight": weight.float()}, {"weight": covariance}, {"weight": second @ second.T}
    )


# ---------------------------------------------------------------------------------------------------- measuring


def contexts() -> dict[str, Callable[[int], Context]]:
    """What to measure, by name; a seed is of the calibration's draw, or of all that is synthetic."""
    return {
        STORIES: of_stories,
        TASK: partial(of_tiny_world, facts=False),
        FACTS: partial(of_tiny_world, facts=True),
        **{
            name: partial(synthetic, d_out=d_out, d_in=d_in)
            for name, (d_out, d_in) in SHAPES.items()
        },
    }


def sweep_name(strength: float) -> str:
    return f"outliers {strength:g}"


def measure(
    name: str, make: Callable[[int], Context], ranks: Sequence[int], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Results of one seed, method and rank each: the linears' output errors, the weights' errors, the model's worth."""
    in_nf4 = partial(quantize, block_size=args.block_size)
    for seed in range(args.seeds):
        context = make(seed)
        shares = {
            layer: outlier_share(covariance) for layer, covariance in context.held_out.items()
        }
        yield {"context": name, "method": "inputs", "seed": seed, "shares": shares}
        if context.worth and seed == 0:
            yield {
                "context": name,
                "method": "full precision",
                "worth": context.worth(context.weights),
            }
        for method in METHODS:
            if seed and context.worth and not method.startswith("QCorDA"):
                continue  # no draw has a say in it
            for rank in ranks[:1] if method == "QLoRA" else ranks:
                made = {
                    layer: effective_weight(
                        method, weight, context.calibration[layer], rank, in_nf4
                    )
                    for layer, weight in context.weights.items()
                }
                pairs = {layer: (weight, made[layer]) for layer, weight in context.weights.items()}
                result = {"context": name, "method": method, "rank": rank, "seed": seed}
                result["errors"] = {
                    layer: output_error(*pair, context.held_out[layer])
                    for layer, pair in pairs.items()
                }
                result["weight_errors"] = {
                    layer: output_error(*pair) for layer, pair in pairs.items()
                }
                yield result | ({"worth": context.worth(made)} if context.worth else {})


def choose(
    results: Iterable[Mapping], context: str, method: str, rank: int | None = None
) -> list[Mapping]:
    """Results of a context and method, of a rank if the method has one."""
    found = [each for each in results if each["context"] == context and each["method"] == method]
    return [each for each in found if rank is None or method == "QLoRA" or each["rank"] == rank]


def overall(results: Iterable[Mapping], key: str = "errors", kind: str = "") -> list[float]:
    """Of every result the mean over linears, those whose name ends in ``kind``."""
    return [
        mean(value for layer, value in each[key].items() if layer.endswith(kind))
        for each in results
    ]


def cell(values: Sequence[float], digits: int = 4) -> str:
    spread = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" if values else ""


def report(results: Sequence[Mapping], ranks: Mapping[str, Sequence[int]]) -> None:
    """For every context: output error by rank; the weights' error, the ratio of both and the output error by kind of
    linear, with the share of the energy in outlier channels; the model's worth.
    """
    for context, grid in ranks.items():
        print(f"{context}, output error by rank:\n")
        rows = [
            [str(r), *(cell(overall(choose(results, context, m, r))) for m in METHODS)]
            for r in grid
        ]
        print_table(["rank", *METHODS], rows)
        middle = grid[len(grid) // 2]
        chosen = {method: choose(results, context, method, middle) for method in METHODS}
        print(
            f"{context}, rank {middle}: weights' error, that of outputs over it, output error by kind:\n"
        )
        errors = {
            method: (overall(found, "weight_errors"), overall(found))
            for method, found in chosen.items()
        }
        rows = [["weights", *(cell(weights) for weights, _ in errors.values())]]
        rows.append(
            [
                "ratio",
                *(f"{mean(outputs) / mean(weights):.2f}" for weights, outputs in errors.values()),
            ]
        )
        kinds = dict.fromkeys(layer.rpartition(".")[2] for layer in chosen["QLoRA"][0]["errors"])
        rows += [
            [kind, *(cell(overall(found, kind=kind)) for found in chosen.values())]
            for kind in kinds
        ]
        inputs = choose(results, context, "inputs")[:1]
        shares = [overall(inputs, "shares", kind) for kind in ("", "", *kinds)]
        print_table(
            ["", "outliers", *METHODS],
            [[r[0], f"{mean(s):.0%}", *r[1:]] for r, s in zip(rows, shares, strict=True)],
        )
        report_worth(results, context, grid)


def report_worth(results: Sequence[Mapping], context: str, grid: Sequence[int]) -> None:
    for before in choose(results, context, "full precision"):
        for name, value in before["worth"].items():
            print(f"{context}, {name} (full precision {value:.3f}):\n")
            found = [
                [choose(results, context, method, rank) for method in METHODS] for rank in grid
            ]
            cells = [
                [cell([each["worth"][name] for each in chosen], 3) for chosen in row]
                for row in found
            ]
            print_table(
                ["rank", *METHODS],
                [[str(rank), *row] for rank, row in zip(grid, cells, strict=True)],
            )


def report_sweep(results: Sequence[Mapping], strengths: Sequence[float]) -> None:
    """A table of output errors, and of their ratio to the weights' errors, by how far outlier channels stand out."""
    rows = []
    for strength in strengths:
        chosen = [choose(results, sweep_name(strength), method) for method in METHODS]
        errors = [(overall(each), overall(each, "weight_errors")) for each in chosen]
        cells = [
            f"{cell(outputs)} ({mean(outputs) / mean(weights):.2f})" for outputs, weights in errors
        ]
        rows.append([f"{strength:g}", *cells])
    print(
        f"512 x 512, rank {SWEEP_RANK}, output error (and its ratio to the weights') by the size of outlier channels:\n"
    )
    print_table(["outliers", *METHODS], rows)


def draw(
    results: Sequence[Mapping],
    ranks: Mapping[str, Sequence[int]],
    strengths: Sequence[float],
    path: Path,
) -> None:
    """Output error, mean and range over seeds: a panel for each context by rank, the last by the size of outliers."""
    panels = {
        name: ("rank", grid, {m: [choose(results, name, m, r) for r in grid] for m in METHODS})
        for name, grid in ranks.items()
    }
    if strengths:
        found = {m: [choose(results, sweep_name(s), m) for s in strengths] for m in METHODS}
        panels[f"512 x 512, rank {SWEEP_RANK}"] = ("size of outlier channels", strengths, found)
    figure, grid_of_axes = plt.subplots(
        -(-len(panels) // 3), 3, figsize=(9, 3.1 * -(-len(panels) // 3)), squeeze=False
    )
    colors = dict(zip(METHODS, plt.get_cmap("tab10").colors, strict=False))
    for axes, (title, (label, grid, found)) in zip(grid_of_axes.flat, panels.items(), strict=False):
        for method in METHODS:
            values = [overall(each) for each in found[method]]
            axes.loglog(
                grid,
                list(map(mean, values)),
                "o-",
                color=colors[method],
                markersize=3,
                label=method,
            )
            axes.fill_between(
                grid,
                list(map(min, values)),
                list(map(max, values)),
                color=colors[method],
                alpha=0.2,
            )
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=label, xticks=grid, xticklabels=[f"{x:g}" for x in grid])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="both", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid_of_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid_of_axes[:, 0]:
        axes.set_ylabel("relative output error", fontsize=9)
    handles, labels = grid_of_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncol=len(METHODS), loc="lower center")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", nargs="*", choices=contexts(), default=list(contexts()))
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4, 8, 16], help="of the models' linears"
    )
    parser.add_argument("--synthetic-ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument(
        "--outliers", type=float, nargs="*", default=[1, 4, 16, 64], help="of the sweep"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--block-size", type=int, default=64, help="weights that share a scale")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for results.json, quantization_error.png"
    )
    args = parser.parse_args()
    if STORIES in args.contexts and "KASA_TUNE_DATA" not in os.environ:
        parser.error(
            "KASA_TUNE_DATA must name the folder with models/stories260K/hf and datasets (see docs/data.md)."
        )
    started, cpu, results = time.perf_counter(), time.process_time(), []
    ranks = {name: args.synthetic_ranks if name in SHAPES else args.ranks for name in args.contexts}
    wanted = [(name, contexts()[name], grid) for name, grid in ranks.items()]
    for strength in args.outliers:
        wanted.append(
            (
                sweep_name(strength),
                partial(synthetic, d_out=512, d_in=512, outliers=strength),
                [SWEEP_RANK],
            )
        )
    args.output.mkdir(parents=True, exist_ok=True)
    for name, make, grid in wanted:
        results += measure(name, make, grid, args)
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        content = {"machine": machine(), "settings": settings, "results": results}
        (args.output / "results.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )
    print(f"{machine()}\n")
    report(results, ranks)
    if args.outliers:
        report_sweep(results, args.outliers)
    draw(results, ranks, args.outliers, args.output / "quantization_error.png")
    print(
        f"{time.process_time() - cpu:.0f} CPU seconds, {time.perf_counter() - started:.0f} on the clock."
    )


if __name__ == "__main__":
    main()
