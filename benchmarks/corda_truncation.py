"""What a trained model loses with the last k components of every linear, by how the components were chosen.

    KASA_TUNE_DATA=... OMP_NUM_THREADS=1 python benchmarks/corda_truncation.py --output /tmp/truncation

CorDA++ (arXiv 2506.13187), figures 4 and 5, in miniature: all 35 linears of stories260K, a trained Llama of 260
thousand parameters; no training; perplexity on text that was not calibrated on. Every method takes ``U U' W`` out of a
weight W, and they differ in what the left singular vectors U, those of the smallest singular values, are of:

- `SVD`: W
- `ASVD`: W diag(s), s_i the mean of abs(x_i) to the power of 1/2 (arXiv 2312.05821)
- `other text`: W C, C of one round of the other text
- `CO-SVD`: W C, C of one round; `p = 1/2`: W C^(1/2), the least error of each linear's own outputs
- `selected`: W C, of 5 rounds the one that the linear's score prefers (CorDA++)
- `pooled`: W C, C of the same 5 rounds together
- `allocated`: as `CO-SVD`, but each linear loses as many as CorDA++ says, of as many parameters in all
- `CorDA++`: `selected` and `allocated`

A round has 64 x 128 tokens: 128 for each of the model's 64 dimensions, as the published 256 x 2048 are for 4096.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from common import machine, print_table
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE

from kasa_tune import config
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.corda.allocation import (
    POOLED,
    LayerSpectrum,
    allocate_ranks,
    layer_spectra,
    more_compact,
)
from kasa_tune.components.corda.calibration import damped_covariances, shared_inputs
from kasa_tune.components.corda.calibration_data import batched, draw_rounds
from kasa_tune.components.data.building import build_dataset, shift_labels
from kasa_tune.components.linalg.decomposition import Component, co_svd
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.components.training.loss import ChunkedCrossEntropy, return_hidden_states

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "stories260k_corda.yaml"
CPU = torch.device("cpu")
NUM_ROWS = (
    60  # to evaluate on: the last stories of the file, or so many windows of WikiText-2's test text
)
ASVD_ALPHA = 0.5
DECOMPOSITIONS = ("SVD", "ASVD", "other text", "CO-SVD", "p = 1/2")
STRATEGIES = ("selected", "pooled", "allocated", "CorDA++")
METHODS = (*DECOMPOSITIONS, *STRATEGIES)

Batch = Mapping[str, Tensor]
Components = dict[str, Component]  # of a layer all R of its components, the last one first


@dataclass(frozen=True)
class Subject:
    """The model with its base weights, the tokenizer, and which linears share their input."""

    model: nn.Module
    tokenizer: Any
    groups: list[tuple[str, ...]]

    @property
    def linears(self) -> dict[str, nn.Module]:
        return dict(adapter_linears(self.model))


@dataclass(frozen=True)
class Calibration:
    """What a seed's rounds say of every layer.

    Args:
        covariances: damped, by layer and round, POOLED for all rounds.
        magnitudes: mean ``|x| (d_in,)`` by layer, of the first round.
    """

    covariances: dict[str, dict[int, Tensor]]
    magnitudes: dict[str, Tensor]


def load_subject() -> Subject:
    """stories260K as the shipped config describes it, on the CPU in float32."""
    cfg = OmegaConf.load(CONFIG)
    model = build_on_meta(lambda: config.instantiate(cfg.model), dtype=torch.float32)
    groups = shared_inputs(model)
    return_hidden_states(model)
    with tempfile.TemporaryDirectory() as folder:
        cfg.checkpointer.output_dir = folder
        weights = read_base_weights(config.instantiate(cfg.checkpointer))
    load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32)
    tokenizer = config.instantiate(cfg.tokenizer)
    tokenizer.max_seq_len = None
    return Subject(model.eval(), tokenizer, groups)


# ---------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Text:
    """Something to calibrate on, and disjoint from it something to evaluate on.

    Args:
        calibration: rows to draw rounds from.
        evaluation: batches of tokens and labels.
        concatenate: rows are windows of the samples joined, not the beginnings of samples.
    """

    calibration: Dataset
    evaluation: list[Batch]
    concatenate: bool

    def rounds(self, tokenizer: Any, args: argparse.Namespace, seed: int) -> list[list[Batch]]:
        options = {
            "num_samples": args.num_samples,
            "rounds": args.rounds,
            "max_seq_len": args.seq_len,
        }
        rounds = draw_rounds(
            self.calibration,
            **options,
            concatenate=self.concatenate,
            seed=seed,
            longest=args.seq_len,
        )
        return [batched(rows, tokenizer=tokenizer, batch_size=16, device=CPU) for rows in rounds]


def load_texts(tokenizer: Any, data: Path, seq_len: int) -> dict[str, Text]:
    """TinyStories, which the model was trained on, and WikiText-2, which it was not."""

    def make(read: Callable[..., Dataset], concatenate: bool) -> Text:
        held_out = evaluation_rows(
            read(tokenizer, data, held_out=True), seq_len, concatenate=concatenate
        )
        return Text(
            read(tokenizer, data, held_out=False),
            evaluation_batches(held_out, tokenizer),
            concatenate,
        )

    return {"TinyStories": make(stories, False), "WikiText-2": make(wikitext, True)}


def stories(tokenizer: Any, data: Path, *, held_out: bool) -> Dataset:
    """The last stories of TinyStories' sample, or all others; one is a sample."""
    split = f"train[-{NUM_ROWS}:]" if held_out else f"train[:-{NUM_ROWS}]"
    return text(tokenizer, "json", data / "datasets/tinystories/sample_2MiB.jsonl", split)


def wikitext(tokenizer: Any, data: Path, *, held_out: bool) -> Dataset:
    """WikiText-2's test or validation text; a paragraph is a sample."""
    return text(
        tokenizer,
        "text",
        data / f"datasets/wikitext2/{'test' if held_out else 'valid'}.txt",
        "train",
    )


def text(tokenizer: Any, source: str, file: Path, split: str) -> Dataset:
    node = {
        "_component_": "torchtune.datasets.text_completion_dataset",
        "source": source,
        "data_files": str(file),
    }
    node |= {"split": split, "add_eos": False, "filter_fn": has_text}
    return build_dataset(node, tokenizer, name="text")


def has_text(row: Mapping[str, str]) -> bool:
    return bool(row["text"].strip())


def evaluation_rows(dataset: Dataset, length: int, *, concatenate: bool) -> list[np.ndarray]:
    """The beginnings of all samples, or the first windows of the samples joined in their order."""
    if not concatenate:
        return [dataset[i]["tokens"][:length] for i in range(len(dataset))]
    pieces: list[np.ndarray] = []
    while sum(map(len, pieces)) < NUM_ROWS * length:
        pieces.append(dataset[len(pieces)]["tokens"])
    return list(np.concatenate(pieces)[: NUM_ROWS * length].reshape(NUM_ROWS, length))


def evaluation_batches(
    rows: Iterable[np.ndarray], tokenizer: Any, batch_size: int = 12
) -> list[Batch]:
    """Right-padded batches of tokens and shifted labels."""
    batches = batched(
        [{"tokens": row} for row in rows], tokenizer=tokenizer, batch_size=batch_size, device=CPU
    )
    for batch in batches:
        tokens = torch.where(batch.pop("valid"), batch["tokens"], IGNORE)
        batch["labels"] = torch.from_numpy(np.stack([shift_labels(row) for row in tokens.numpy()]))
    return batches


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The exponential of the mean loss per predicted token."""
    loss_fn, total, num_tokens = ChunkedCrossEntropy(), 0.0, 0
    for batch in batches:
        total += loss_fn(model.output, model(batch["tokens"]), batch["labels"]).item()
        num_tokens += int((batch["labels"] != IGNORE).sum())
    return math.exp(total / num_tokens)


# ---------------------------------------------------------------------------------------------------- methods


def calibrate(subject: Subject, rounds: Sequence[Sequence[Batch]], damping: float) -> Calibration:
    """Covariances of every round and of all together."""
    covariances: dict[str, dict[int, Tensor]] = {name: {} for name in subject.linears}
    options = {
        "damping": damping,
        "damping_search": False,
        "normalization": "unit_mean_diag",
        "dtype": torch.float32,
    }
    everything = {"wanted": lambda name, round: True, "progress": lambda steps: steps}
    found = damped_covariances(subject.model, subject.groups, rounds, **everything, **options)
    for layers, round, covariance in found:
        for name in layers:
            covariances[name][round] = covariance
    return Calibration(covariances, mean_magnitudes(subject, rounds[0]))


@torch.no_grad()
def mean_magnitudes(subject: Subject, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean of ``|x|`` over the tokens, ``(d_in,)`` for every layer."""
    sums = {
        name: torch.zeros(linear.in_dim, dtype=torch.float64)
        for name, linear in subject.linears.items()
    }

    def add(name: str, inputs: tuple[Tensor]) -> None:
        sums[name] += inputs[0][valid].abs().sum(dim=0, dtype=torch.float64)

    with contextlib.ExitStack() as stack:
        for name, linear in subject.linears.items():
            hook = linear.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs))
            stack.callback(hook.remove)
        for batch in batches:
            valid = batch["valid"]
            subject.model(batch["tokens"])
    num_tokens = sum(int(batch["valid"].sum()) for batch in batches)
    return {name: total / num_tokens for name, total in sums.items()}


def asvd(weight: Tensor, magnitudes: Tensor) -> Component:
    """All components of ``W S``, ``S = diag(mean |x|^alpha)``, the smallest first.

    ``W S = U Σ V'``, and the part of some triplets, scaled back, is ``U Σ V' S⁻¹ = U U' W``: a CO-SVD under S.
    """
    scales = magnitudes.clamp_min(1e-6 * magnitudes.mean().item()) ** ASVD_ALPHA
    return co_svd(weight, scales.diag(), min(weight.shape), "kpm")


def decompose(
    weights: Mapping[str, Tensor], covariances: Mapping[str, Tensor | None], power: float
) -> Components:
    return {
        name: co_svd(weight, covariances[name], min(weight.shape), "kpm", covariance_power=power)
        for name, weight in weights.items()
    }


def select(
    subject: Subject, calibration: Calibration, rounds: Iterable[int]
) -> dict[str, LayerSpectrum]:
    """Of every layer the spectrum in the round of the least score."""
    best: dict[str, LayerSpectrum] = {}
    for round in rounds:
        for group in subject.groups:
            weights = {name: subject.linears[name].weight for name in group}
            covariance = calibration.covariances[group[0]][round]
            for name, newest in layer_spectra(weights, covariance, round).items():
                best[name] = more_compact(best.get(name), newest)
    return best


def all_methods(
    subject: Subject, calibration: Calibration, other: Calibration, num_rounds: int
) -> dict[str, tuple[Components, dict[str, LayerSpectrum] | None]]:
    """Every method's components and, where ranks are allocated, the spectra that decide."""
    weights = {name: linear.weight for name, linear in subject.linears.items()}
    one, chosen = select(subject, calibration, [0]), select(subject, calibration, range(num_rounds))

    def of_round(
        rounds: Mapping[str, int], power: float = 1.0, calibration: Calibration = calibration
    ) -> Components:
        return decompose(
            weights, {name: calibration.covariances[name][rounds[name]] for name in weights}, power
        )

    first, pooled = dict.fromkeys(weights, 0), dict.fromkeys(weights, POOLED)
    plain = of_round(first)
    selected = of_round({name: spectrum.round for name, spectrum in chosen.items()})
    return {
        "SVD": (decompose(weights, dict.fromkeys(weights), 1.0), None),
        "ASVD": (
            {name: asvd(weights[name], calibration.magnitudes[name]) for name in weights},
            None,
        ),
        "other text": (of_round(first, calibration=other), None),
        "CO-SVD": (plain, None),
        "p = 1/2": (of_round(first, 0.5), None),
        "selected": (selected, None),
        "pooled": (of_round(pooled), None),
        "allocated": (plain, one),
        "CorDA++": (selected, chosen),
    }


def counts(
    subject: Subject, k: int, spectra: Mapping[str, LayerSpectrum] | None, min_rank: int = 1
) -> dict[str, int]:
    """How many components each layer loses: k, or what the allocation says for the parameters of k everywhere."""
    if spectra is None or k == 0:
        return {name: min(k, *linear.weight.shape) for name, linear in subject.linears.items()}
    sizes = {name: linear.in_dim + linear.out_dim for name, linear in subject.linears.items()}
    return allocate_ranks(spectra, sizes, rank=k, mode="kpm", min_rank=min_rank)


@contextlib.contextmanager
def discarded(
    subject: Subject, components: Components, counts: Mapping[str, int]
) -> Iterator[None]:
    """While active, every layer is without its last ``counts[name]`` components."""
    originals = {name: linear.weight for name, linear in subject.linears.items()}
    try:
        for name, linear in subject.linears.items():
            part = components[name].first(counts[name])
            rest = torch.addmm(
                originals[name].double(), part.vectors.double(), part.projection.double(), alpha=-1
            )
            linear.weight = nn.Parameter(rest.to(originals[name].dtype), requires_grad=False)
        yield
    finally:
        for name, linear in subject.linears.items():
            linear.weight = originals[name]


# ---------------------------------------------------------------------------------------------------- measuring


def measure(
    subject: Subject, texts: Mapping[str, Text], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Seed after seed: perplexities by text, method and k, and what selection and allocation decided."""
    for seed in range(args.seeds):
        calibrations = {}
        for name, each in texts.items():
            calibrations[name] = calibrate(
                subject, each.rounds(subject.tokenizer, args, seed), args.damping
            )
        result: dict[str, Any] = {"seed": seed, "perplexity": {}, "counts": {}, "scores": {}}
        for name, each in texts.items():
            other = next(calibration for text, calibration in calibrations.items() if text != name)
            methods = all_methods(subject, calibrations[name], other, args.rounds)
            chosen = methods["CorDA++"][1]
            result["scores"][name] = {layer: spectrum.scores for layer, spectrum in chosen.items()}
            result["counts"][name] = {k: counts(subject, k, chosen) for k in args.k}
            found: dict[str, dict[int, float]] = defaultdict(dict)
            for method, (components, spectra) in methods.items():
                for k in args.k if seed == 0 or method != "SVD" else ():  # the SVD knows no seed
                    with discarded(subject, components, counts(subject, k, spectra)):
                        found[method][k] = perplexity(subject.model, each.evaluation)
            result["perplexity"][name] = found
        yield result


def over_seeds(results: Sequence[Mapping[str, Any]], text: str, method: str, k: int) -> list[float]:
    found = (result["perplexity"][text].get(method, {}) for result in results)
    return [values[k] for values in found if k in values]


def cell(values: Sequence[float]) -> str:
    digits = 2 if mean(values) < 100 else 0
    spread = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def draw(
    results: Sequence[Mapping[str, Any]], base: Mapping[str, float], path: Path, grid: Sequence[int]
) -> None:
    """A row of panels for each text: the decompositions, and what CorDA++ adds to CO-SVD; bands from least to most."""
    figure, rows = plt.subplots(
        len(base), 2, figsize=(9, 3.4 * len(base)), sharex=True, sharey="row", squeeze=False
    )
    colors = dict(zip(METHODS, plt.get_cmap("tab10").colors, strict=False))
    for panels, (text, start) in zip(rows, base.items(), strict=True):
        for axes, methods in zip(panels, (DECOMPOSITIONS, ("CO-SVD", *STRATEGIES)), strict=True):
            for method in methods:
                values = [over_seeds(results, text, method, k) for k in grid]
                axes.semilogy(
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
            axes.axhline(
                start, color="gray", linestyle="--", linewidth=1, label="nothing discarded"
            )
            axes.set(title=text, xlabel="components discarded of every linear, k")
            axes.legend(frameon=False, fontsize=7, loc="upper left")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("perplexity")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(48).save(path, optimize=True)  # a third of the bytes


def report(
    results: Sequence[Mapping[str, Any]], base: Mapping[str, float], grid: Sequence[int]
) -> None:
    """A table for each text, and how far apart the rounds' selection scores are."""
    for text, start in base.items():
        scores = [scores for result in results for scores in result["scores"][text].values()]
        apart = mean(max(each) / min(each) - 1 for each in scores)
        print(
            f"{text}: perplexity {start:.2f} before; a linear's largest selection score is {apart:.1%} over its least."
        )
        rows = [
            [str(k), *(cell(over_seeds(results, text, method, k)) for method in METHODS)]
            for k in grid
        ]
        print_table(["k", *METHODS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--k", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24], help="components to discard"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="of calibration draws, for mean and standard deviation"
    )
    parser.add_argument("--rounds", type=int, default=5, help="to select from")
    parser.add_argument("--num-samples", type=int, default=64, help="rows of a round")
    parser.add_argument(
        "--seq-len", type=int, default=128, help="of a row, in calibration and evaluation"
    )
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument(
        "--output", type=Path, help="folder for results.json and corda_truncation.png"
    )
    args = parser.parse_args()
    if "KASA_TUNE_DATA" not in os.environ:
        parser.error(
            "KASA_TUNE_DATA must name the folder with models/stories260K/hf and datasets (see docs/data.md)."
        )
    logging.getLogger("kasa_tune").setLevel(
        logging.ERROR
    )  # no advice on thin calibration: it is meant to be
    started, cpu = time.perf_counter(), time.process_time()
    subject = load_subject()
    texts = load_texts(subject.tokenizer, Path(os.environ["KASA_TUNE_DATA"]), args.seq_len)
    base = {name: perplexity(subject.model, text.evaluation) for name, text in texts.items()}
    results = []
    for result in measure(subject, texts, args):
        results.append(result)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            settings = {name: value for name, value in vars(args).items() if name != "output"}
            content = {"machine": machine(), "settings": settings, "base": base, "results": results}
            (args.output / "results.json").write_text(
                json.dumps(content, indent=1) + "\n", encoding="utf-8"
            )
            draw(results, base, args.output / "corda_truncation.png", args.k)
    print(f"{machine()}\n")
    report(results, base, args.k)
    print(
        f"{time.process_time() - cpu:.0f} CPU seconds, {time.perf_counter() - started:.0f} on the clock."
    )


if __name__ == "__main__":
    main()
