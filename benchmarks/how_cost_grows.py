"""How the cost of a fine-tuning step grows with depth, width, rank, length, calibration rows and processes.

    python benchmarks/how_cost_grows.py

Nothing is run. Arithmetic and memory are what ``dry_run=true`` counts, on the meta device, for CorDA on all linears of
a Llama with the layers of Llama-3 8B, eight of them, in bfloat16 with activation checkpointing, on one row of 2048
tokens at rank 128. One size is changed at a time. The exponent ``e`` of ``cost ~ size^e`` is the slope between the last
two sizes, where constant parts count least. It writes docs/images/cost_growth.svg and prints the table of
docs/benchmarks/cost_growth.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from common import print_table
from torch import nn
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from kasa_tune.components.corda import calibration_bytes, shared_inputs
from kasa_tune.components.models import corda_llama3
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.components.reports import svg
from kasa_tune.components.reports.style import STYLE
from kasa_tune.components.training import memory_budget, peaks, per_process
from kasa_tune.components.training.costs import step_flops
from kasa_tune.components.training.loss import return_hidden_states

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "cost_growth.svg"
LINEARS = ["q_proj", "k_proj", "v_proj", "output_proj"]
LENGTH, RANK = 2048, 128


class Axis(NamedTuple):
    """What is changed, to which sizes, and what is counted at each: name and unit to a function."""

    name: str
    sizes: tuple[int, ...]
    counts: dict[str, Callable[[int], float]]


def model(depth: int = 8, width: int = 4096, rank: int = RANK) -> nn.Module:
    """A Llama on the meta device with heads of 128 and 8B's other proportions."""
    sizes = {
        "vocab_size": 128_256,
        "num_layers": depth,
        "num_heads": width // 128,
        "num_kv_heads": max(1, width // 512),
        "embed_dim": width,
        "intermediate_dim": 7 * width // 2,
        "max_seq_len": 131_072,
    }
    build = partial(corda_llama3, LINEARS, apply_to_mlp=True, rank=rank, alpha=rank, **sizes)
    made = build_on_meta(build, dtype=torch.bfloat16)
    return_hidden_states(made)
    training.set_activation_checkpointing(made, {TransformerSelfAttentionLayer})
    return made


def budget(made: nn.Module, length: int = LENGTH) -> dict[str, int]:
    """Bytes of a step of one row, by purpose."""
    return memory_budget(
        made,
        partial(torch.optim.AdamW, lr=1e-4),
        batch_size=1,
        seq_len=length,
        vocab_size=128_256,
        loss_chunk=2048,
        adapter_dtype=torch.float32,
    )


def tflop(made: nn.Module, length: int = LENGTH) -> float:
    """TFLOP of a step of one row."""
    budget(made, 128)  # gives the adapters their tensors
    return step_flops(made, batch_size=1, seq_len=length) / 1e12


def gib(made: nn.Module, length: int = LENGTH, processes: int = 1) -> float:
    """GiB of a step of one row, on each process."""
    return peaks(per_process(budget(made, length), made, processes))[1] / 2**30


def calibration_gib(rows: int, offload: bool) -> float:
    """GiB that calibration takes beside the model."""
    made = model()
    batch = {"tokens": torch.empty(1, LENGTH, dtype=torch.long, device="meta")}
    options = {"dtype": torch.float32, "offload": offload}
    found = calibration_bytes(made, shared_inputs(made), [[batch] * rows], **options)
    return sum(found.values()) / 2**30


def _of(**names: str) -> dict[str, Callable[[int], float]]:
    """Arithmetic and memory of a step where one size of the model is changed."""
    (name,) = names.values()
    return {
        "TFLOP a step": lambda size: tflop(model(**{name: size})),
        "GiB": lambda size: gib(model(**{name: size})),
    }


AXES = (
    Axis("depth", (4, 8, 16, 32), _of(name="depth")),
    Axis("width", (1024, 2048, 4096, 8192), _of(name="width")),
    Axis("rank", (8, 32, 128, 512), _of(name="rank")),
    Axis(
        "length",
        (512, 2048, 8192, 32768),
        {
            "TFLOP a step": lambda length: tflop(model(), length),
            "GiB": lambda length: gib(model(), length),
        },
    ),
    Axis(
        "calibration rows",
        (64, 128, 256, 512),
        {
            "GiB beside the model": lambda rows: calibration_gib(rows, False),
            "GiB, offloaded": lambda rows: calibration_gib(rows, True),
        },
    ),
    Axis(
        "processes",
        (1, 4, 16, 64),
        {"GiB on each": lambda number: gib(model(), processes=number)},
    ),
)


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope between the last two points, both axes logarithmic."""
    (x0, y0), (x1, y1) = points[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)


def picture(charts: list[tuple[str, list[svg.Line]]]) -> str:
    """All charts in one drawing, three in a row, in the reader's light or dark.

    Args:
        charts: what is changed, and the costs as lines.
    """
    wide, high = 3 * (svg.WIDTH + 16), math.ceil(len(charts) / 3) * (svg.HEIGHT + 48)
    parts = [
        f"<style>{STYLE}</style>",
        f'<rect width="{wide}" height="{high}" fill="var(--card)"/>',
    ]
    for i, (name, lines) in enumerate(charts):
        x, y = i % 3 * (svg.WIDTH + 16), i // 3 * (svg.HEIGHT + 48)
        for line in lines:
            place = f'x="{x + svg.LEFT}" y="{y + 18 + 16 * line.style}"'
            parts.append(f'<text class="dot s{line.style}" {place}>{line.label}</text>')
        chart = svg.line_chart(
            lines, title=name, x_label=name, y_label="cost", log=True, log_x=True
        )
        place = f'<svg x="{x}" y="{y + 36}" width="{svg.WIDTH}" height="{svg.HEIGHT}" '
        parts.append(chart.replace("<svg ", place, 1))
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}">'
    return f"{opening}{''.join(parts)}</svg>\n"


def main() -> None:
    """Write the picture and print the table."""
    torch.set_num_threads(1)
    charts, table = [], []
    for axis in AXES:
        lines = []
        for style, (what, count) in enumerate(axis.counts.items()):
            points = [(float(size), count(size)) for size in axis.sizes]
            grows = f"{exponent(points):.2f}"
            lines.append(svg.Line(f"{what}, exponent {grows}", points, style=style, marked=True))
            values = " / ".join(f"{y:,.3g}" for _, y in points)
            sizes = " / ".join(f"{size:,}" for size in axis.sizes)
            table.append([axis.name, sizes, what, values, grows])
        charts.append((axis.name, lines))
    PICTURE.write_text(picture(charts), encoding="utf-8")
    print_table(["changed", "sizes", "cost", "at these sizes", "exponent"], table)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
