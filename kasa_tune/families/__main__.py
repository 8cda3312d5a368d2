"""Writes the shipped configs, and the tables of a page on what they take, from the tables of models and methods.

python -m kasa_tune.families configs docs/configs.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from kasa_tune.families import Figures, tables, training_configs, training_text
from kasa_tune.families.classification import classification_texts
from kasa_tune.families.comparing import comparison_texts
from kasa_tune.families.exchange import evaluation_texts, exchange_texts, generation_texts
from kasa_tune.families.services import service_texts


def texts(figures: Mapping[str, Figures]) -> dict[str, str]:
    """Every shipped config, by name.

    Args:
        figures: those of the headers, by the names of the configs.
    """
    training = {
        config.name: training_text(config, figures.get(config.name))
        for config in training_configs()
    }
    others = (
        generation_texts(),
        evaluation_texts(),
        comparison_texts(),
        exchange_texts(),
        service_texts(),
        classification_texts(),
    )
    return training | {name: text for each in others for name, text in each}


def main(folder: Path, page: Path) -> None:
    """Write the YAML files and the page, and name the files that have no row any more."""
    from kasa_tune.families.figures import figures_of_all

    figures = figures_of_all(training_configs())
    written = texts(figures)
    changed = 0
    for name, text in written.items():
        path = folder / f"{name}.yaml"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed += 1
    page.write_text(tables.fill(page.read_text(encoding="utf-8"), figures), encoding="utf-8")
    print(f"{len(written)} configs are in {folder}; {changed} of them changed.")
    for path in sorted(folder.glob("*.yaml")):
        if path.stem not in written:
            print(f"{path} has no row in the tables. Delete it, or write its row.")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
