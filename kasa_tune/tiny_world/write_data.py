"""Write the data files of the synthetic world: `python -m kasa_tune.tiny_world.write_data --output
DIR`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kasa_tune.tiny_world import sentences, shapes, task, world


def data_files() -> dict[str, str]:
    """Return the JSON Lines text of every file in data/, by its name."""
    rows: dict[str, list] = {
        "task_train.jsonl": task.rows("train"),
        "task_val.jsonl": task.rows("val"),
        "facts_test.jsonl": world.facts_test(),
        "facts_calibration.jsonl": [
            row | {"text": _as_pretrained(row)} for row in world.facts_calibration()
        ],
    }
    rows |= {
        f"{name}_{split}.jsonl": sentences.rows(name, split)
        for name in sentences.TASKS
        for split in ("train", "val")
    }
    rows |= shapes.data_files()
    return {
        name: "".join(json.dumps(row) + "\n" for row in content) for name, content in rows.items()
    }


def _as_pretrained(row: dict[str, str]) -> str:
    """Return a fact in the form in which the model saw it in pretraining."""
    return f"{world.fact_prompt(row['question'])} {row['answer']}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data files of the synthetic world.")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "data", help="folder to write to"
    )
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in data_files().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"Wrote {text.count(chr(10))} rows to {folder / name}.")


if __name__ == "__main__":
    main()
