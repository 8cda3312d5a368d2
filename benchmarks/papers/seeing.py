"""LoRA and CorDA KPM on a model that sees: it learns a kind of question, and is to keep others (CorDA++, Figure 7).

    python benchmarks/papers/seeing.py --output /tmp/seeing
    python benchmarks/papers/seeing.py --output /tmp/okvqa --base llava1_5_7b_okvqa_lora \
        --kpm llava1_5_7b_okvqa_corda_kpm --tasks my_tasks.yaml --rates 2e-5

Both train the connector whole. The tasks are those of tiny_llava_evaluate: the kind that is learned, and five that the
base knows.
"""

import argparse
import sys
from pathlib import Path

import yaml
from variants import calibration, compare, parser

from kasa_tune import config


def tasks_of_tiny_llava(folder: Path) -> Path:
    """The tasks of the shipped config, as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump(config.read_unchecked("tiny_llava_evaluate")["tasks"]))
    return path


def options_of(doc: str | None) -> argparse.Namespace:
    made = parser(doc, steps=150, rates=[2e-3, 4e-3])
    made.set_defaults(base="tiny_llava_lora", kpm="tiny_llava_corda_kpm", seeds=[1, 2, 3, 4, 5])
    return made.parse_args()


if __name__ == "__main__":
    options = options_of(__doc__)
    options.tasks = options.tasks or tasks_of_tiny_llava(options.output)
    methods = {"lora": [], "corda_kpm": [calibration(options.kpm), "adapter.split=paper"]}
    sys.exit(compare(options, methods))
