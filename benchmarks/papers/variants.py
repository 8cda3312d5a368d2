"""What the scripts of this folder share: a comparison of variants, and its options on the command line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from kasa_tune import config

FACTS = {
    "_component_": "kasa_tune.components.evaluation.QuestionAnswering",
    "name": "facts",
    "data_file": "kasa_tune://tiny_world/data/facts_test.jsonl",
    "measures": "kept",
    "prompt": "Q: {question} A:",
    "max_new_tokens": 12,
}
TEXTS = {
    "_component_": "kasa_tune.components.evaluation.QuestionAnswering",
    "name": "texts",
    "data_file": "kasa_tune://tiny_world/data/task_val.jsonl",
    "measures": "learned",
    "prompt": "{input}",
    "chat": True,
    "answer": "output",
    "normalization": "none",
    "max_new_tokens": 64,
}


def parser(doc: str | None, *, steps: int, rates: Sequence[float]) -> argparse.ArgumentParser:
    """The options that every script has.

    Args:
        doc: what ``--help`` begins with.
        steps: default number of optimizer steps of a run.
        rates: default learning rates to try.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--output", type=Path, required=True, help="folder; repeat the command to go on"
    )
    made.add_argument("--base", default="tiny_lora", help="a LoRA config, by name or path")
    made.add_argument(
        "--ipm", default="tiny_corda", help="config whose section calibration IPM gets"
    )
    made.add_argument("--kpm", default="tiny_corda_kpm", help="the same of KPM")
    made.add_argument(
        "--tasks", type=Path, help="YAML list of tasks; default: the tiny world's two"
    )
    made.add_argument("--overrides", nargs="*", default=[], help="changes of the base config")
    made.add_argument("--only", nargs="+", help="names of the variants to take; default: all")
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    made.add_argument("--sweep-seeds", type=int, default=1, help="seeds that choose the rate")
    made.add_argument("--steps", type=int, default=steps)
    made.add_argument("--rates", nargs="+", type=float, default=list(rates))
    return made


def calibration(name: str) -> str:
    """The override that gives a method the section ``calibration`` of a config."""
    return f"calibration={json.dumps(config.read_unchecked(name)['calibration'])}"


def compare(
    options: argparse.Namespace,
    methods: Mapping[str, Sequence[str]],
    *,
    reference: str = "lora",
    overrides: Sequence[str] = (),
    with_tasks: bool = True,
) -> int:
    """Run ``compare_methods`` on variants, each with its overrides, and return its exit status.

    Args:
        options: of :func:`parser`.
        methods: names of variants and their overrides, see the key ``methods``.
        reference: the variant that the others are compared with.
        overrides: of all variants, before those of the command line.
        with_tasks: whether the base and the chosen runs do the tasks.
    """
    tasks = yaml.safe_load(options.tasks.read_text()) if options.tasks else [TEXTS, FACTS]
    every = max(1, options.steps // 4)
    own = [
        f"max_steps={options.steps}",
        f"run_val_every_n_steps={every}",
        "save_every_n_steps=1000000",
    ]
    tree = {
        "output_dir": str(options.output.absolute()),
        "base": options.base,
        "overrides": [*overrides, *own, *options.overrides],
        "methods": {
            name: list(texts)
            for name, texts in methods.items()
            if not options.only or name in options.only
        },
        "reference": reference,
        "seeds": options.seeds,
        "sweep_seeds": options.sweep_seeds,
        "learning_rates": options.rates,
        "tasks": tasks if with_tasks else None,
        "batch_size": 64,
    }
    return run(options.output, tree)


def run(folder: Path, tree: Mapping[str, Any]) -> int:
    """Run ``compare_methods`` with a config that is written to a folder, and return its exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(dict(tree), sort_keys=False))
    command = [sys.executable, "-m", "kasa_tune", "run", "compare_methods", "--config", str(path)]
    return subprocess.run(command, check=False).returncode
