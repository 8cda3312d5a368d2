"""Training on a base in NF4: QLoRA, LoftQ, QPiSSA, QCorDA, QCorDA++ and QKaSA, and LoRA on the base as it is.

    python benchmarks/quantized_training.py --output /tmp/quantized_training
    KASA_TUNE_DATA=... python benchmarks/quantized_training.py --output /tmp/quantized_training --subject stories260k \
        --rank 4 --steps 150 --seeds 0 1 2

CorDA++ (arXiv 2506.13187), figure 8, in miniature, with the shipped recipes: the embedded model learns its task (data
to text), or stories260K learns E2E; same data order, rank, steps and optimizer. A run's result is kept in the output
folder, so the command can be repeated to add methods or seeds. Prints a Markdown table of means and spreads over seeds
for each subject that has results, and draws `quantized_training.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from common import print_table
from matplotlib.ticker import LogLocator
from PIL import Image
from quantization_error import cell
from tiny_world_methods import SMOOTH, load, merged, score, smoothed, steps_to

from kasa_tune import config
from kasa_tune.components.training.loggers import read_metrics

# How a run is told from QCorDA's.
METHODS: dict[str, list[str]] = {
    "lora": ["adapter.method=lora"],
    "qlora": ["adapter.method=qlora"],
    "loftq": ["adapter.method=loftq"],
    "qpissa": ["adapter.method=qpissa"],
    "qcorda": [],
    "qcorda_plus": ["calibration.rounds=5", "adapter.dynamic_ranks=True"],
    "qkasa": ["adapter.method=qkasa", "model.truncation_rank=1", "model.diag_init=ones"],
}
LABELS = dict(
    zip(
        METHODS,
        ("LoRA, base as it is", "QLoRA", "LoftQ", "QPiSSA", "QCorDA", "QCorDA++", "QKaSA"),
        strict=True,
    )
)
SUBJECTS = {"tiny": "tiny world", "stories260k": "stories260K learns E2E"}
LLAMA = {"tiny": "llama3", "stories260k": "llama2"}
GOAL = "qlora"  # whose final training loss the others are to reach

Runs = dict[str, dict[int, dict]]  # by method and seed


def fine_tune(
    subject: str, method: str, seed: int, options: argparse.Namespace, folder: Path
) -> dict:
    """One run: losses by step, validation loss before and after, and on the tiny world what is left of the facts."""
    overrides = [
        *METHODS[method],
        f"output_dir={folder}",
        f"seed={seed}",
        f"optimizer.lr={options.lr}",
    ]
    overrides += [
        f"model.rank={options.rank}",
        f"model.alpha={2 * options.rank}",
        f"max_steps={options.steps}",
    ]
    overrides += ["run_val_every_n_steps=10000"]  # before the first step and after the last
    if method == "qkasa":
        overrides.append(f"model._component_=kasa_tune.components.models.kasa_{LLAMA[subject]}")
    family, schema = ("corda", config.CORDA) if method == "lora" else ("qcorda", config.QCORDA)
    cfg = config.load(f"{subject}_{family}", overrides, schema, about_to_run=True)
    recipe = load(f"{family}_finetune_single_device")(cfg)
    recipe.setup(cfg)
    if status := recipe.train(cfg):
        raise SystemExit(status)  # stopped by a signal; half a run is no result
    recipe.cleanup()
    metrics = read_metrics(folder / "metrics.jsonl")
    result = {"losses": [line["loss"] for line in metrics if "loss" in line]}
    result |= {"val_loss_start": metrics[0]["val_loss"], "val_loss": metrics[-1]["val_loss"]}
    result["trained"] = sum(parameter.numel() for parameter in recipe.steps.trained)
    return result | (score(merged(recipe._model)) if subject == "tiny" else {})


def rows(runs: Runs) -> list[list[str]]:
    """A row of the table for each method."""
    goals = {seed: smoothed(run["losses"])[-1] for seed, run in runs.get(GOAL, {}).items()}
    found = []
    for method, by_seed in runs.items():
        reached = [
            steps_to(run["losses"], goals[seed]) for seed, run in by_seed.items() if seed in goals
        ]
        steps, missed = [step for step in reached if step], reached.count(None)
        row = [LABELS[method], str(len(by_seed)), f"{next(iter(by_seed.values()))['trained']:,}"]
        row.append(cell([run["val_loss_start"] for run in by_seed.values()], 3))
        row.append(cell([smoothed(run["losses"])[-1] for run in by_seed.values()], 3))
        row.append(
            ", ".join(
                [cell(steps, 0)] * bool(steps)
                + [f"{missed} of {len(reached)} never"] * bool(missed)
            )
        )
        row.append(cell([run["val_loss"] for run in by_seed.values()], 3))
        for name in ("task_token_accuracy", "facts_exact_match"):  # of the tiny world alone
            row.append(cell([run[name] for run in by_seed.values() if name in run], 3))
        found.append(row)
    return found


def draw(results: dict[str, Runs], path: Path) -> None:
    """A panel for each subject: the smoothed training loss by step, mean over seeds, bands from least to most."""
    figure, panels = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4), squeeze=False)
    colors = dict(zip(METHODS, ("gray", *plt.get_cmap("tab10").colors), strict=False))
    for axes, (subject, runs) in zip(panels[0], results.items(), strict=True):
        for method, by_seed in runs.items():
            curves = torch.tensor([smoothed(run["losses"]) for run in by_seed.values()])[
                :, SMOOTH - 1 :
            ]
            steps = range(SMOOTH, SMOOTH + curves.shape[1])
            style = "--" if method == "lora" else "-"
            axes.plot(
                steps,
                curves.mean(0),
                style,
                color=colors[method],
                label=LABELS[method],
                linewidth=1.3,
            )
            axes.fill_between(
                steps, curves.amin(0), curves.amax(0), color=colors[method], alpha=0.12, linewidth=0
            )
        axes.set(title=SUBJECTS[subject], xlabel="step", yscale="log")
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 5)))
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(f"training loss, mean of {SMOOTH} steps")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes


def read_results(folder: Path, subject: str, settings: str) -> Runs:
    """What the folder holds of a subject's runs of these settings."""
    runs: Runs = {}
    for method in METHODS:
        for path in sorted(folder.glob(f"{subject}-{method}-{settings}-seed*.json")):
            runs.setdefault(method, {})[int(path.stem.rpartition("seed")[2])] = json.loads(
                path.read_text()
            )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--subject", choices=SUBJECTS, default="tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    options.output.mkdir(parents=True, exist_ok=True)
    settings = f"lr{options.lr:g}-r{options.rank}-steps{options.steps}"
    for seed in options.seeds:
        for method in options.methods:
            path = options.output / f"{options.subject}-{method}-{settings}-seed{seed}.json"
            if not path.exists():
                with tempfile.TemporaryDirectory() as folder:
                    path.write_text(
                        json.dumps(fine_tune(options.subject, method, seed, options, Path(folder)))
                    )
                found = json.loads(path.read_text())
                print(
                    f"{path.stem}: val {found['val_loss_start']:.3f} -> {found['val_loss']:.3f}",
                    flush=True,
                )
    settings_path = (
        options.output / f"{options.subject}.json"
    )  # the latest, for the other subject's call to draw
    settings_path.write_text(json.dumps(settings))
    results = {}
    for subject in SUBJECTS:
        if (known := options.output / f"{subject}.json").exists():
            results[subject] = read_results(options.output, subject, json.loads(known.read_text()))
    header = [
        "",
        "seeds",
        "trained",
        "val loss, start",
        "train loss, end",
        f"steps to {LABELS[GOAL]}'s end",
        "val loss",
    ]
    for subject, runs in results.items():
        print(f"\n{SUBJECTS[subject]}:\n")
        print_table([*header, "task accuracy", "facts kept"], rows(runs))
    draw(results, options.output / "quantized_training.png")


if __name__ == "__main__":
    main()
