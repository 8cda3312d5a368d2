"""The tables of docs/configs.md on what a step of each config takes, from the figures of the configs' headers.

A page marks the place of a table by two comments; what stands between them is replaced:

    <!-- memory of kasa, written by `make configs` -->
    <!-- end of memory -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kasa_tune.families.combining import TrainingConfig, training_configs
from kasa_tune.families.headers import Figures, gpu

_PLACE = re.compile(
    r"(<!-- memory of (\w+), written by `make configs` -->\n).*?(<!-- end of memory -->)", re.DOTALL
)
_METHODS = {"kasa": ("kasa",), "corda": ("corda", "corda_kpm")}  # of a table; a row has them all
_HEAD = """\
| config | trained parameters | batch × accumulation | activation checkpointing | GiB a step | GiB to start | GPU |
|---|---|---|---|---|---|---|"""


def fill(page: str, figures: Mapping[str, Figures]) -> str:
    """The text of a page with every marked table written anew, from the figures of all configs by name."""
    return _PLACE.sub(lambda found: f"{found[1]}\n{_table(found[2], figures)}\n\n{found[3]}", page)


def _table(method: str, figures: Mapping[str, Figures]) -> str:
    rows = [
        _row(config, [figures[f"{config.prefix}_{name}"] for name in _METHODS[method]])
        for config in training_configs()
        if config.method.name == method and config.name in figures
    ]
    return "\n".join([_HEAD, *rows])


def _row(config: TrainingConfig, counted: list[Figures]) -> str:
    def each(values: list[str]) -> str:
        return " / ".join(dict.fromkeys(values))

    first = counted[0]
    cells = [
        f"`{config.name}`",
        f"{first.parameters:,}",
        f"{config.model.batch_size} × {config.accumulation}",
        "yes" if config.model.checkpointing else "no",
        f"{first.step / 2**30:.1f}",
        each([f"{figures.set_up / 2**30:.1f}" for figures in counted]),
        f"{each([str(gpu(figures)) for figures in counted])} GB",
    ]
    return f"| {' | '.join(cells)} |"
