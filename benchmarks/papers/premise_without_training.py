"""KaSA's premise: the smallest singular values of a weight are noise, so that a model is better without them.

    python benchmarks/papers/premise_without_training.py
    python benchmarks/papers/premise_without_training.py --config mine_kasa.yaml --seeds 1 2 3

Every adapted weight W becomes ``W + noise · rms(W) · N(0, 1)``, or what NF4 keeps of W, and then loses its k smallest
singular triplets. Nothing is trained. The loss on the config's validation data says what that does; on the tiny world
these are facts of pretraining. If the premise holds, some k > 0 has a lower loss than k = 0.
"""

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path

import torch

from kasa_tune import config, registry
from kasa_tune.components.adapters import adapter_linears
from kasa_tune.components.linalg.nf4 import dequantize, quantize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import print_table

FACTS = (
    "dataset_val={_component_: kasa_tune.components.data.completion_dataset, source: json, "
    "data_files: 'kasa_tune://tiny_world/data/facts_calibration.jsonl', column: text, "
    "split: 'train[:200]'}"
)


def ready_recipe(name: str, overrides: list[str]):
    """The KaSA recipe of a config, set up with the base's weights as they are."""
    path = registry.find_recipe("kasa_finetune_single_device")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = config.load(name, ["model.truncation_rank=0", *overrides], config.FINETUNE)
    recipe = module.KaSAFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    return recipe


def noisy(weight: torch.Tensor, noise: str, seed: int) -> torch.Tensor:
    """The weight with noise of a size relative to it, or after NF4."""
    if noise == "nf4":
        return dequantize(quantize(weight, block_size=64, scaler_block_size=256)).to(weight)
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight + float(noise) * weight.square().mean().sqrt() * drawn.to(weight)


@torch.no_grad()
def losses(recipe, noise: str, ranks: list[int], seed: int) -> list[float]:
    """The validation loss for each number of triplets that every weight loses."""
    linears = [linear for _, linear in adapter_linears(recipe._model)]
    kept = [linear.weight.clone() for linear in linears]
    parts = [
        torch.linalg.svd(noisy(weight, noise, seed + i).double(), full_matrices=False)
        for i, weight in enumerate(kept)
    ]
    found = []
    for k in ranks:
        for linear, (u, s, v) in zip(linears, parts, strict=True):
            n = max(0, len(s) - k)
            linear.weight.copy_((u[:, :n] * s[:n]) @ v[:n])
        found.append(recipe.steps.validate())
    for linear, weight in zip(linears, kept, strict=True):
        linear.weight.copy_(weight)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny_kasa")
    parser.add_argument("--overrides", nargs="*", default=["dataset.split=train[:8]", FACTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--noise", nargs="+", default=["0", "nf4", "0.1", "0.3"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 1, 2, 4, 8, 16, 32])
    options = parser.parse_args()
    recipe = ready_recipe(options.config, [*options.overrides, "output_dir=/tmp/premise"])
    rows = []
    for noise in options.noise:
        seeds = options.seeds[:1] if noise in ("0", "nf4") else options.seeds  # nothing is drawn
        runs = [losses(recipe, noise, options.ranks, 1000 * seed) for seed in seeds]
        cells = [
            f"{statistics.fmean(values):.4f}"
            + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
            for values in zip(*runs, strict=True)
        ]
        gains = [run[0] - min(run[1:]) for run in runs]
        better = sum(gain > 0 for gain in gains)
        rows.append([noise, *cells, f"{statistics.fmean(gains):+.4f}", f"{better} of {len(runs)}"])
    print_table(["noise", *(f"k = {k}" for k in options.ranks), "best gain", "better"], rows)


if __name__ == "__main__":
    main()
