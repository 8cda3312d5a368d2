"""What a run's folder says of the run, read for a report. Whatever is not there, or is not of its
form, is left out.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kasa_tune.components.reports.plots import DrawnSpectrum

log = logging.getLogger(__name__)

SAMPLES = ("samples.jsonl", "completions.jsonl")
LARGEST = 64 * 2**20  # bytes of a file that is read for a report

Number = float | int


@dataclass(frozen=True)
class LayerInput:
    """A layer seen through the inputs of calibration, for CorDA's pictures.

    Args:
        covariance: ``|C|`` of its inputs, in rows, each entry the largest of a square of entries;
            as a share of the largest of all.
        width: d_in.
        spectra: by name (``W``, ``ASVD``, ``CO-SVD``) singular values, descending.
    """

    covariance: list[list[float]]
    width: int
    spectra: Mapping[str, list[float]]


@dataclass
class ReportedRun:
    """All that a page shows of a run.

    Args:
        name: of the run on the page.
        folder: its output_dir.
        about: what the run was, by name, for the table at the top.
        metrics: lines of its log.
        samples: records of what it wrote during training.
        evaluations: by file, what evaluate_model found.
        phases: seconds of each phase.
        layers: by layer, what decomposition.json says.
        ranks: by layer, its rank.
        diagonals: by step and layer, the mean of ``|d|``.
        spectra: by layer, singular values of the base and of the update.
        words: what the removed part and the update are called.
        inputs: by layer, its calibration.
    """

    name: str
    folder: Path
    about: dict[str, str] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    diagonals: dict[int, dict[str, float]] = field(default_factory=dict)
    spectra: dict[str, DrawnSpectrum] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, LayerInput] = field(default_factory=dict)

    def values(self, name: str) -> list[tuple[float, float]]:
        """Steps and finite values of what the run logged under a name, in the order of steps."""
        found = [
            (float(line["step"]), float(line[name]))
            for line in self.metrics
            if is_number(line.get(name)) and is_number(line.get("step"))
        ]
        return sorted(found, key=lambda point: point[0])


def read_folder(name: str, folder: Path, metrics: list[dict[str, Any]]) -> ReportedRun:
    """Read the small files of a run's folder that a report shows.

    Args:
        name: of the run on the page.
        folder: its output_dir.
        metrics: lines of its log.
    """
    run = ReportedRun(name, folder, metrics=metrics)
    for path in (folder / file for file in SAMPLES):
        run.samples += [line for line in _lines(path) if isinstance(line, dict)]
    for path in sorted([*folder.glob("results.json"), *folder.glob("*/results.json")]):
        found = _json(path)
        if isinstance(found, dict) and isinstance(found.get("tasks"), dict):
            run.evaluations[path.relative_to(folder).as_posix()] = found
    phases = _json(folder / "phases.json")
    if isinstance(phases, dict):
        run.phases = {
            str(phase): float(seconds)
            for phase, seconds in phases.items()
            if is_number(seconds) and seconds >= 0
        }
    decomposition = _json(folder / "decomposition.json")
    layers = decomposition.get("layers") if isinstance(decomposition, dict) else None
    if isinstance(layers, dict):
        run.layers = {str(k): layer for k, layer in layers.items() if isinstance(layer, dict)}
    return run


def is_number(value: object) -> bool:
    """Tell whether a value of a JSON file is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Number):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _lines(path: Path) -> Iterator[Any]:
    for line in (_text(path) or "").split("\n"):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue  # a torn line, as of a run that is going on


def _json(path: Path) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        log.warning(f"{path} is left out: it is no JSON ({error!s:.100}).")
        return None


def _text(path: Path) -> str | None:
    if not path.is_file():
        return None
    if path.stat().st_size > LARGEST:
        log.warning(f"{path} is left out: it is larger than {LARGEST // 2**20} MiB.")
        return None
    return path.read_text(encoding="utf-8", errors="replace")
