"""The sections of a report's page that go through a run's layers: diagonals, spectra, covariances,
ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kasa_tune.components.reports.page import Section, chart, grid, heat
from kasa_tune.components.reports.run_files import ReportedRun, is_number
from kasa_tune.components.reports.svg import Line, Point

_BLOCK = re.compile(r"layers\.(\d+)\.(.+)")


def diagonals(runs: Sequence[ReportedRun]) -> Section:
    """How large d is in each layer, over the saved checkpoints (KaSA, Fig. 4)."""
    about = (
        "KaSA's singular values d of each layer and module. Where |d| moved away from its start, "
        "training used that layer."
    )
    content = grid(part for run in runs for part in _diagonals(run, _prefix(run, runs)))
    return Section("diagonals", "Singular values of the adapters", content, about)


def _diagonals(run: ReportedRun, prefix: str) -> Iterator[str]:
    steps = sorted(run.diagonals)
    if not steps:
        return
    values = [value for found in run.diagonals.values() for value in found.values()]
    ends: dict[str, Any] = {"low": min(values), "high": max(values), "unit": "mean |d|"}
    last = run.diagonals[steps[-1]]
    title = f"{prefix}Every layer at step {steps[-1]:,}"
    yield _by_module(title, last, **ends, written=True)
    if len(steps) == 1:
        return
    for kind, of_block in _kinds(last).items():
        names = list(of_block.values())
        yield heat(
            f"{prefix}{kind} over the checkpoints",
            [[run.diagonals[step].get(name) for step in steps] for name in names],
            rows=[_block(block, name) for block, name in of_block.items()],
            columns=[f"{step}" for step in steps],
            x_label="step",
            **ends,
        )


def spectra(runs: Sequence[ReportedRun]) -> Section:
    """Singular values of base weights, of what was taken out of them, and of the updates."""
    about = "A few layers, spread over the model."
    content = grid(part for run in runs for part in _spectra(run, _prefix(run, runs)))
    return Section("spectra", "Spectra of weights and updates", content, about)


def _spectra(run: ReportedRun, prefix: str) -> Iterator[str]:
    if not run.spectra:
        return
    removed = run.words.get("removed", "removed")
    for name, layer in run.spectra.items():
        size = len(layer.base)
        first = 1 if layer.from_start else size - len(layer.removed) + 1
        base, taken = _counted(layer.base.tolist()), _counted(layer.removed.tolist(), first)
        lines = [Line("base weight", base), Line(removed, taken, style=1, crosses=True)]
        title = f"{prefix}{name}: base weight"
        yield chart(title, lines, x_label="index", y_label="singular value", log=True)
    lines = [
        Line(name, _counted(layer.update.tolist()), style=i)
        for i, (name, layer) in enumerate(run.spectra.items())
    ]
    what = run.words.get("update", "s B A")
    title = f"{prefix}Learned update {what}"
    yield chart(title, lines, x_label="index", y_label="singular value", from_zero=True)


def input_spectra(runs: Sequence[ReportedRun]) -> Section:
    """Spectra of W, ASVD and CO-SVD (CorDA, Fig. 3)."""
    content = grid(
        chart(
            f"{_prefix(run, runs)}{name}",
            [
                Line(label, _counted(_shares(values)), style)
                for style, (label, values) in enumerate(layer.spectra.items())
            ],
            x_label="index",
            y_label="share of the largest",
            log=True,
        )
        for run in runs
        for name, layer in run.inputs.items()
    )
    stored = grid(part for run in runs for part in _stored(run, _prefix(run, runs)))
    title, about = "Spectra under the inputs", []
    if content:
        about.append(
            "The weight alone, scaled by the size of each input (ASVD), and multiplied with the "
            "covariance of its inputs (CO-SVD)."
        )
    if stored:
        about.append("All singular values that the run's own decomposition found, of some layers.")
    about.append("The faster a line falls, the fewer components carry what the inputs use.")
    return Section("decomposition", title, content + stored, " ".join(about))


def _stored(run: ReportedRun, prefix: str) -> Iterator[str]:
    """The spectra in decomposition.json, where they are whole and not the adapted part alone."""
    whole = {
        name: layer["singular_values"]
        for name, layer in run.layers.items()
        if isinstance(layer.get("singular_values"), list)
        and "round" in layer
        and all(map(is_number, layer["singular_values"]))
    }
    for kind, of_block in _kinds(whole).items():
        lines = [
            Line(_block(block, name), _counted(_shares(whole[name])), style)
            for style, (block, name) in enumerate(_some(list(of_block.items()), 4))
        ]
        title = f"{prefix}{kind}: the run's decomposition"
        yield chart(title, lines, x_label="index", y_label="share of the largest", log=True)


def covariances(runs: Sequence[ReportedRun]) -> Section:
    """Covariances of the layers' inputs (CorDA, Fig. 1)."""
    content = grid(
        heat(
            f"{_prefix(run, runs)}{name}",
            layer.covariance,
            rows=[],
            columns=[],
            low=0.0,
            high=1.0,
            unit="√(|C| / largest)",
            note=_squares(layer.width, len(layer.covariance)),
            listed=False,
            square=True,
        )
        for run in runs
        for name, layer in run.inputs.items()
    )
    about = "How the inputs of a layer vary together on the calibration samples."
    return Section("covariances", "Covariances of the inputs", content, about)


def _squares(width: int, drawn: int) -> str:
    each = f"Each cell is the largest entry of a square of {-(-width // drawn)}." * (drawn < width)
    return f"{width} x {width} entries. {each}".strip()


def ranks_and_rounds(runs: Sequence[ReportedRun]) -> Section:
    """The ranks and the rounds that CorDA++ chose."""
    about = "The rank that each layer got, and the calibration round whose covariance it kept."
    parts = []
    for run in runs:
        prefix = _prefix(run, runs)
        if len(set(run.ranks.values())) > 1:
            ends = {"low": 0.0, "high": float(max(run.ranks.values())), "unit": "rank"}
            parts.append(_by_module(f"{prefix}Ranks", run.ranks, **ends, written=True))
        rounds = {
            name: float(layer["round"])
            for name, layer in run.layers.items()
            if is_number(layer.get("round"))
        }
        if len(set(rounds.values())) > 1:
            ends = {"low": min(rounds.values()), "high": max(rounds.values()), "unit": "round"}
            parts.append(_by_module(f"{prefix}Chosen rounds", rounds, **ends, written=True))
    return Section("ranks", "Ranks and rounds", grid(parts), about)


def _by_module(title: str, values: Mapping[str, float], **drawn: Any) -> str:
    """A heat map of one value of each layer: modules below one another, blocks side by side."""
    kinds = _kinds(values)
    blocks = sorted({block for of_block in kinds.values() for block in of_block})
    found = [
        [values[of_block[block]] if block in of_block else None for block in blocks]
        for of_block in kinds.values()
    ]
    columns = [str(block) if block >= 0 else "–" for block in blocks]
    return heat(title, found, rows=list(kinds), columns=columns, x_label="block", **drawn)


def _kinds(names: Mapping[str, object]) -> dict[str, dict[int, str]]:
    """By kind of module, the names of the layers of each block. A layer outside the blocks is a
    kind by itself, of block -1.
    """
    kinds: dict[str, dict[int, str]] = {}
    for name in names:
        found = _BLOCK.fullmatch(name)
        block, kind = (int(found[1]), found[2]) if found else (-1, name)
        kinds.setdefault(kind, {})[block] = name
    return {kind: dict(sorted(of_block.items())) for kind, of_block in kinds.items()}


def _block(block: int, name: str) -> str:
    return f"block {block}" if block >= 0 else name


def _counted(values: Sequence[float], first: int = 1) -> list[Point]:
    return [(float(i), value) for i, value in enumerate(values, start=first)]


def _shares(values: Sequence[float]) -> list[float]:
    largest = max(values, default=0.0)
    return [value / largest for value in values] if largest > 0 else []


def _some(names: list[tuple[int, str]], most: int) -> list[tuple[int, str]]:
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _prefix(run: ReportedRun, runs: Sequence[ReportedRun]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""
