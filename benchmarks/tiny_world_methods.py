"""Learning and forgetting on the tiny world: LoRA, DoRA, PiSSA, MiLoRA, CorDA, CorDA++, KaSA and full fine-tuning.

    python benchmarks/tiny_world_methods.py --output /tmp/tiny_world_methods
    python benchmarks/tiny_world_methods.py --output /tmp/tiny_world_methods --methods lora corda_kpm --seeds 0

Every method fine-tunes the embedded model on its task (data to text) with the shipped recipes, same data order, rank,
steps and optimizer; then the same 1,000 facts of pretraining are asked again. A run's result is kept in the output
folder, so the command can be repeated to add methods or seeds. Prints a Markdown table of means and spreads over
seeds and draws `learning.png` and `forgetting.png`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from kasa_tune import config, registry
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.training.loggers import read_metrics
from kasa_tune.tiny_world import evaluate, world

CORDA, KASA = "corda_finetune_single_device", "kasa_finetune_single_device"
PLUS = ["calibration.rounds=5", "adapter.dynamic_ranks=True"]
PLUS_KPM = [*PLUS, "calibration.num_samples=200"]  # of the 1,000 facts, a fifth a round
# Name in the table: recipe, config, overrides.
METHODS: dict[str, tuple[str, str, list[str]]] = {
    "lora": (CORDA, "tiny_corda", ["adapter.method=lora"]),
    "lora_plus": (CORDA, "tiny_corda", ["adapter.method=lora", "adapter.lr_ratio=4"]),
    "dora": (CORDA, "tiny_dora", []),
    "pissa": (CORDA, "tiny_pissa", []),
    "milora": (CORDA, "tiny_milora", []),
    "corda_ipm": (CORDA, "tiny_corda", []),
    "corda_ipm_paper_split": (CORDA, "tiny_corda", ["adapter.split=paper"]),
    "corda_ipm_plus": (CORDA, "tiny_corda", [*PLUS]),
    "corda_kpm": (CORDA, "tiny_corda_kpm", []),
    "corda_kpm_balanced_split": (CORDA, "tiny_corda_kpm", ["adapter.split=balanced"]),
    "corda_kpm_plus": (CORDA, "tiny_corda_kpm", PLUS_KPM),
    "corda_kpm_plus_min_rank_4": (CORDA, "tiny_corda_kpm", [*PLUS_KPM, "adapter.min_rank=4"]),
    "kasa_published": (KASA, "tiny_kasa", ["model.truncation_rank=null", "model.diag_init=normal"]),
    "kasa_k1_ones": (KASA, "tiny_kasa", []),
    "full": (CORDA, "tiny_corda", ["adapter.method=lora"]),
}
SMOOTH = 20  # steps a training loss is averaged over


def load(recipe: str):
    """The recipe class of a script."""
    path = registry.find_recipe(recipe)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(
        value for name, value in vars(module).items() if name.endswith("FinetuneRecipeSingleDevice")
    )


def fine_tune(method: str, seed: int, lr: float, options: argparse.Namespace, folder: Path) -> dict:
    """One run: losses by step, validation loss, what is left of the facts and what was learned of the task."""
    recipe_name, name, overrides = METHODS[method]
    schema = config.CORDA if recipe_name == CORDA else config.FINETUNE
    overrides = [
        *overrides,
        f"output_dir={folder}",
        f"seed={seed}",
        f"optimizer.lr={lr}",
        f"model.rank={options.rank}",
    ]
    overrides += [
        f"model.alpha={2 * options.rank}",
        f"max_steps={options.steps}",
        "run_val_every_n_steps=10000",
    ]
    cfg = config.load(name, overrides, schema, about_to_run=True)
    recipe = load(recipe_name)(cfg)
    recipe.setup(cfg)
    if method == "full":
        train_everything(recipe)
    if status := recipe.train(cfg):
        raise SystemExit(status)  # stopped by a signal
    recipe.cleanup()
    metrics = read_metrics(folder / "metrics.jsonl")
    model = merged(recipe._model)
    scores = score(model)
    losses = [line["loss"] for line in metrics if "loss" in line]
    return scores | {
        "losses": losses,
        "val_loss": metrics[-1]["val_loss"],
        "trained": count(recipe),
    }


@torch.no_grad()
def score(model: torch.nn.Module) -> dict[str, float]:
    """Share of the facts answered exactly, and of the task's response tokens that are the likeliest given the text
    before.
    """
    tokenizer = evaluate.load_tokenizer(evaluate.HERE / "model")
    facts = evaluate.load_rows("facts_test.jsonl")
    kept = world.exact_match(evaluate.completer(model, tokenizer, max_new_tokens=12), facts)
    examples = [
        evaluate.task_example(tokenizer, row) for row in evaluate.load_rows("task_val.jsonl")
    ]
    tokens, labels = evaluate.pad(examples)
    answered = labels != evaluate.IGNORE
    right = torch.cat([model(part).argmax(-1) for part in tokens.split(50)]) == labels
    return {"facts_exact_match": kept, "task_token_accuracy": right[answered].float().mean().item()}


def train_everything(recipe) -> None:
    """Full fine-tuning in the same recipe: the adapters rest, every weight is trained."""
    for _, linear in adapter_linears(recipe._model):
        linear.disabled = True
    own = [
        parameter for name, parameter in recipe._model.named_parameters() if ".lora_" not in name
    ]
    recipe.steps.trained = [parameter.requires_grad_(True) for parameter in own]
    group = recipe._optimizer.param_groups[0]
    group["params"] = recipe.steps.trained


def count(recipe) -> int:
    return sum(parameter.numel() for parameter in recipe.steps.trained)


def merged(tuned: torch.nn.Module) -> torch.nn.Module:
    """The plain model with every adapter merged into its weight."""
    model = evaluate.load_model(evaluate.HERE / "model")
    state = {name: value for name, value in tuned.state_dict().items() if ".lora_" not in name}
    state |= {
        f"{n}.weight": linear.merged_weight()
        for n, linear in adapter_linears(tuned)
        if not linear.disabled
    }
    model.load_state_dict(state)
    return model.eval()


def smoothed(losses: list[float]) -> list[float]:
    """The mean of the last SMOOTH losses at every step."""
    return [statistics.fmean(losses[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(losses))]


def steps_to(losses: list[float], target: float) -> int | None:
    """The first step at which the smoothed loss is at most ``target``; None if none is."""
    return next(
        (i + 1 for i, loss in enumerate(smoothed(losses)) if i + 1 >= SMOOTH and loss <= target),
        None,
    )


def distribute_jobs(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(results: dict[str, dict[int, dict]], lr: float) -> list[str]:
    """Markdown: a row a method. LoRA's final training loss of the same seed is the goal for the steps."""
    lines = [
        f"| lr {lr:g} | seeds | trained | train loss, end | steps to LoRA's end "
        "| val loss | task accuracy | facts kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in results.items():
        ends = {seed: smoothed(run["losses"])[-1] for seed, run in runs.items()}
        reached = [
            steps_to(run["losses"], smoothed(results["lora"][seed]["losses"])[-1])
            for seed, run in runs.items()
            if seed in results.get("lora", {})
        ]
        steps = (
            distribute_jobs([float(step) for step in reached], 0)
            if reached and None not in reached
            else "not all"
        )
        columns = [
            f"{len(runs)}",
            f"{next(iter(runs.values()))['trained']:,}",
            distribute_jobs(list(ends.values())),
            steps,
            distribute_jobs([run["val_loss"] for run in runs.values()]),
            distribute_jobs([run["task_token_accuracy"] for run in runs.values()]),
            distribute_jobs([run["facts_exact_match"] for run in runs.values()]),
        ]
        lines.append(f"| {method} | " + " | ".join(columns) + " |")
    return lines


def draw(results: dict[str, dict[int, dict]], folder: Path) -> None:
    """The smoothed training loss by step, and facts kept against validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = plt.get_cmap("tab20").colors
    figure, axes = plt.subplots(figsize=(8, 5))
    for color, (method, runs) in zip(colors, results.items(), strict=False):
        curves = torch.tensor([smoothed(run["losses"]) for run in runs.values()])
        axes.plot(range(1, curves.shape[1] + 1), curves.mean(0), label=method, color=color)
    axes.set(
        xlabel="step", ylabel=f"training loss, mean of {SMOOTH} steps and all seeds", yscale="log"
    )
    axes.legend(fontsize=7)
    figure.savefig(folder / "learning.png", dpi=80, bbox_inches="tight")
    figure, axes = plt.subplots(figsize=(8, 5))
    for color, (method, runs) in zip(colors, results.items(), strict=False):
        points = [(run["val_loss"], run["facts_exact_match"]) for run in runs.values()]
        axes.scatter(*zip(*points, strict=True), label=method, color=color, s=25)
    axes.set(xlabel="validation loss of the task", ylabel="facts still answered exactly")
    axes.legend(fontsize=7)
    figure.savefig(folder / "forgetting.png", dpi=80, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="of every method but full fine-tuning"
    )
    parser.add_argument("--lr-full", type=float, default=5e-4, help="of full fine-tuning")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for method in options.methods:
            lr = options.lr_full if method == "full" else options.lr
            path = (
                options.output
                / f"{method}_lr{lr:g}_r{options.rank}_steps{options.steps}_seed{seed}.json"
            )
            if not path.exists():
                with tempfile.TemporaryDirectory() as folder:
                    path.write_text(json.dumps(fine_tune(method, seed, lr, options, Path(folder))))
                found = json.loads(path.read_text())
                print(
                    f"{path.stem}: val {found['val_loss']:.3f}, facts {found['facts_exact_match']:.3f}",
                    flush=True,
                )
    results: dict[str, dict[int, dict]] = {}
    for method in METHODS:
        lr = options.lr_full if method == "full" else options.lr
        for path in sorted(
            options.output.glob(
                f"{method}_lr{lr:g}_r{options.rank}_steps{options.steps}_seed*.json"
            )
        ):
            results.setdefault(method, {})[int(path.stem.rpartition("seed")[2])] = json.loads(
                path.read_text()
            )
    print("\n".join(table(results, options.lr)))
    draw(results, options.output)


if __name__ == "__main__":
    main()
