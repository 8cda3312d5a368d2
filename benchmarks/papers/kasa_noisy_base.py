"""LoRA and KaSA on a base whose weights were given noise: does truncation win there (KaSA, section 3.1)?

    python benchmarks/papers/kasa_noisy_base.py --output /tmp/noisy
    python benchmarks/papers/kasa_noisy_base.py --output /tmp/noisy --base mine.yaml --tasks mine_tasks.yaml

KaSA's premise is that the smallest singular components of a weight are noise. So this script adds noise to every
projection W of the base, ``W + noise · rms(W) · N(0, 1)``, or leaves of it what NF4 keeps, and fine-tunes that. Each
noise has a comparison of its own in the output folder. The base config must read one local folder of safetensors.
"""

import argparse
import shutil
import sys
from pathlib import Path

from premise_without_training import noisy
from safetensors.torch import load_file, save_file
from variants import compare, parser

from kasa_tune import config, registry

METHODS = {
    "lora": [],
    "kasa_k1": ["method=kasa", "model.truncation_rank=1"],
    "kasa_k8": ["method=kasa", "model.truncation_rank=8"],
}


def noisy_base(source: Path, folder: Path, noise: str) -> Path:
    """A copy of a base's folder with noise in its projections, unless it is there already.

    Args:
        source: the folder of the base.
        folder: the folder to write.
        noise: see :func:`premise_without_training.noisy`; "0" leaves the weights as they are.
    """
    if folder.exists():
        return folder
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished)
    for file in sorted(unfinished.glob("*.safetensors")):
        weights = load_file(file)
        names = [name for name in weights if name.endswith("_proj.weight")]
        if noise != "0":
            changed = {n: noisy(weights[n].float(), noise, seed=i) for i, n in enumerate(names)}
            weights |= {n: w.to(weights[n].dtype).contiguous() for n, w in changed.items()}
        save_file(weights, file, metadata={"format": "pt"})
    return unfinished.rename(folder)


def main() -> int:
    made = parser(__doc__, steps=80, rates=[8e-3])
    made.add_argument("--noise", nargs="+", default=["0", "nf4", "0.1", "0.3"])
    options = made.parse_args()
    given = config.read_unchecked(options.base)["checkpointer"]["checkpoint_dir"]
    is_ours = given.startswith(registry.RESOURCE_SCHEME)
    source = registry.resource(given) if is_ours else Path(given)
    for noise in options.noise:
        output = options.output.absolute() / f"noise_{noise}"
        output.mkdir(parents=True, exist_ok=True)
        base = noisy_base(source, output / "base", noise)
        own = argparse.Namespace(**{**vars(options), "output": output})
        print(f"Noise: {noise}", flush=True)
        sizes = ["model.rank=8", "model.alpha=16", "batch_size=8"]
        if status := compare(
            own, METHODS, overrides=[*sizes, f"checkpointer.checkpoint_dir={base}"]
        ):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
