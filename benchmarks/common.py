"""What the benchmarks share: a description of the machine, a Markdown table."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch


def machine(device: str = "cpu") -> str:
    """One line on what the figures were measured on."""
    names = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "torchtune", "peft", "transformers")
    )
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; Python {platform.python_version()}, {names}"
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {names}"
    )


def cpu_name() -> str:
    """The processor's name as Linux gives it, elsewhere its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)
