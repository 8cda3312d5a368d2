"""The sections of a report's page: what of a run is drawn, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kasa_tune.components.reports import svg
from kasa_tune.components.reports.layer_sections import (
    covariances,
    diagonals,
    input_spectra,
    ranks_and_rounds,
    spectra,
)
from kasa_tune.components.reports.page import (
    Section,
    chart,
    facts,
    figure,
    grid,
    labelled,
    page,
    table,
)
from kasa_tune.components.reports.run_files import ReportedRun, is_number
from kasa_tune.components.reports.svg import Line, Point
from kasa_tune.components.reports.text import duration, number, shown

# What runs log, in the order in which it is drawn: title, name of the axis. Whatever else a run
# logs is drawn after these, under its own name.
CURVES = {
    "lr": ("Learning rate", "learning rate"),
    "l2": ("Regularizer L2, the size of d", "L2"),
    "l3": ("Regularizer L3, how far A and B are from orthogonal", "L3"),
    "grad_norm": ("Norm of the gradient", "norm"),
    "tokens_per_second": ("Speed", "tokens a second"),
    "seconds": ("Time of a step", "seconds"),
    "peak_memory_gib": ("Largest memory so far", "GiB"),
}
_ELSEWHERE = {"step", "loss", "val_loss", "val_loss_base", "num_tokens"}
MOST_SAMPLES, MOST_OF_A_PROMPT = 24, 4
_PROMPTS = ("prompt", "question", "input", "instruction")


def run_page(runs: Sequence[ReportedRun], *, title: str, about: str, footer: str) -> str:
    """Return the page of one run, or of several side by side.

    Args:
        runs: at least one.
        title: of the page.
        about: a line beneath it.
        footer: a last line.
    """
    sections = [
        Section("summary", "What was run", _summary(runs)),
        Section("losses", "Losses", grid(_losses(runs))),
        Section("evaluation", "Learned and forgotten", _evaluations(runs)),
        Section("training", "Training", grid(_curves(runs))),
        diagonals(runs),
        spectra(runs),
        input_spectra(runs),
        covariances(runs),
        ranks_and_rounds(runs),
        Section("samples", "What it wrote", _samples(runs)),
        Section("time", "Time", grid(_phases(run, len(runs) > 1) for run in runs)),
    ]
    tiles = _tiles(runs[0]) if len(runs) == 1 else []
    return page(title=title, about=about, tiles=tiles, sections=sections, footer=footer)


def smoothed(points: Sequence[Point], decay: float = 0.9) -> list[Point]:
    """Compute the exponential running mean of the values, corrected for its start at zero."""
    mean, weight, found = 0.0, 0.0, []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        found.append((step, mean / weight))
    return found


def _tiles(run: ReportedRun) -> list[tuple[str, str]]:
    """What is to be seen first of a single run."""
    tiles = []
    validation, base = run.values("val_loss"), run.values("val_loss_base")
    if validation:
        before = f", {number(base[0][1])} before" if base else ""
        tiles.append((number(validation[-1][1]), f"validation loss{before}"))
    elif run.values("loss"):
        tiles.append((number(smoothed(run.values("loss"))[-1][1]), "training loss, running mean"))
    for key in ("method", "trained parameters"):
        if key in run.about:
            tiles.append((run.about[key], key))
    if run.phases:
        tiles.append((duration(sum(run.phases.values())), "from start to end"))
    elif steps := run.values("loss"):
        tiles.append((number(steps[-1][0]), "steps"))
    return tiles


def _summary(runs: Sequence[ReportedRun]) -> str:
    if len(runs) == 1:
        return facts({**runs[0].about, **_ends(runs[0])})
    rows: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for key, value in {**run.about, **_ends(run)}.items():
            rows.setdefault(key, ["–"] * len(runs))[i] = value
    return table(["", *(run.name for run in runs)], [[key, *row] for key, row in rows.items()])


def _ends(run: ReportedRun) -> dict[str, str]:
    """What a run's log says of its end."""
    found = {}
    if train := run.values("loss"):
        found["steps"] = number(train[-1][0])
        found["training loss, running mean"] = number(smoothed(train)[-1][1])
    if base := run.values("val_loss_base"):
        found["validation loss, base"] = number(base[0][1])
    if validation := run.values("val_loss"):
        best = min(validation, key=lambda point: point[1])
        found["validation loss, last"] = number(validation[-1][1])
        found["validation loss, lowest"] = f"{number(best[1])}, step {number(best[0])}"
    if speed := run.values("tokens_per_second"):
        found["tokens a second, median"] = number(sorted(y for _, y in speed)[len(speed) // 2])
    if memory := run.values("peak_memory_gib"):
        found["largest memory"] = f"{number(max(y for _, y in memory))} GiB"
    if run.phases:
        found["time"] = duration(sum(run.phases.values()))
    return found


def _losses(runs: Sequence[ReportedRun]) -> Iterator[str]:
    training, validation = [], []
    for i, run in enumerate(runs):
        points, label = run.values("loss"), run.name if len(runs) > 1 else "running mean"
        if len(runs) == 1:
            training.append(Line("each step", points, faint=True))
        training.append(Line(label, smoothed(points), style=i))
        label = run.name if len(runs) > 1 else "fine-tuned"
        validation.append(Line(label, run.values("val_loss"), style=i, marked=True))
    note = "The running mean weights the last ten steps most."
    yield chart("Training loss", training, y_label="loss per token", note=note, log=_wide(training))
    base = next((run.values("val_loss_base") for run in runs if run.values("val_loss_base")), [])
    last = max((line.points[-1][0] for line in validation if line.points), default=0.0)
    if base and last:
        level = [(base[0][0], base[0][1]), (last, base[0][1])]
        validation.append(Line("the base", level, style=svg.STYLES - 1))
    title = "Validation loss"
    yield chart(title, validation, y_label="loss per token", log=_wide(validation))


def _curves(runs: Sequence[ReportedRun]) -> Iterator[str]:
    logged = dict.fromkeys(key for run in runs for line in run.metrics for key in line)
    others = [key for key in logged if key not in CURVES and key not in _ELSEWHERE]
    for key in [*CURVES, *others]:
        title, axis = CURVES.get(key, (key, key))
        lines = [Line(run.name, run.values(key), style=i) for i, run in enumerate(runs)]
        few = all(len(line.points) < 40 for line in lines)
        lines = [Line(line.label, line.points, line.style, marked=few) for line in lines]
        log = key != "lr" and _wide(lines)
        more: dict[str, Any] = {"from_zero": key == "lr", "named": len(runs) > 1}
        yield chart(title, lines, y_label=axis, log=log, **more)


def _wide(lines: Iterable[Line]) -> bool:
    """Tell whether a logarithmic axis shows the lines better: all above zero, over more than
    a decade and a half.
    """
    values = [y for line in lines for _, y in line.points]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 30


def _evaluations(runs: Sequence[ReportedRun]) -> str:
    found = [(run, file, content) for run in runs for file, content in run.evaluations.items()]
    parts = []
    for run, file, content in found:
        name = f"{run.name}: {file}" if len(found) > 1 else file
        models, rows = _evaluation_rows(content)
        if rows:
            head = ["task", "measures", "metric", *models]
            parts.append(f'<div class="card"><h3>{shown(name)}</h3>{table(head, rows)}</div>')
    note = (
        "<p class='soft'>Each number stands with its confidence interval. What a task measures is "
        "what was to be learned, or what the base knew and was to be kept.</p>"
    )
    return note + "".join(parts) if parts else ""


def _evaluation_rows(content: Mapping) -> tuple[list[str], list[list[str]]]:
    """The models of an evaluation, and a row of their numbers for each metric of each task."""
    tasks = {str(k): task for k, task in content["tasks"].items() if isinstance(task, Mapping)}
    results = {
        name: {str(m): r for m, r in task["results"].items() if isinstance(r, Mapping)}
        for name, task in tasks.items()
        if isinstance(task.get("results"), Mapping)
    }
    models = list(dict.fromkeys(model for of_task in results.values() for model in of_task))
    rows = []
    for name, of_task in results.items():
        metrics = dict.fromkeys(str(metric) for found in of_task.values() for metric in found)
        for metric in metrics:
            cells = [_estimate(of_task.get(model, {}).get(metric)) for model in models]
            rows.append([name, str(tasks[name].get("measures") or "other"), metric, *cells])
    return models, rows


def _estimate(found: object) -> str:
    if not isinstance(found, Mapping) or not is_number(found.get("value")):
        return "–"
    low, high = found.get("low"), found.get("high")
    interval = f" [{number(low)}, {number(high)}]" if is_number(low) and is_number(high) else ""
    return number(found["value"]) + interval


def _samples(runs: Sequence[ReportedRun]) -> str:
    cards, left_out = [], 0
    for run in runs:
        by_prompt: dict[str, list[Mapping]] = {}
        for record in run.samples:
            by_prompt.setdefault(_prompt_of(record), []).append(record)
        for prompt, records in list(by_prompt.items())[: MOST_SAMPLES // MOST_OF_A_PROMPT]:
            chosen = _spread(records, MOST_OF_A_PROMPT)
            left_out += len(records) - len(chosen)
            texts = {"prompt": prompt} if prompt else {}
            same = _same_in_all(chosen)
            texts |= _texts_of(same, None)
            for number_of, answer in enumerate(chosen):
                others = {key: answer[key] for key in answer if key not in same}
                texts |= _texts_of(others, number_of if len(chosen) > 1 else None)
            heading = f"<h3>{shown(run.name)}</h3>" if len(runs) > 1 else ""
            cards.append(f'<div class="card samples">{heading}{labelled(texts)}</div>')
        rest = list(by_prompt.values())[MOST_SAMPLES // MOST_OF_A_PROMPT :]
        left_out += sum(map(len, rest))
    note = f"<p class='soft'>{left_out:,} more are in the run's folder.</p>" if left_out else ""
    return grid(cards) + note if cards else ""


def _same_in_all(records: Sequence[Mapping]) -> dict:
    """What several records have in common, such as the reference of a prompt."""
    first, *others = records
    return {k: v for k, v in first.items() if others and all(r.get(k) == v for r in others)}


def _prompt_of(record: Mapping) -> str:
    return next((str(record[key]) for key in _PROMPTS if record.get(key) is not None), "")


def _texts_of(record: Mapping, number_of: int | None) -> dict[str, str]:
    """What a record holds besides its prompt, each under its name and its step."""
    step = record.get("step")
    when = f", step {step}" if step is not None else ""
    when = when or (f" {number_of + 1}" if number_of is not None else "")
    return {
        f"{key}{when}": str(value)
        for key, value in record.items()
        if key not in _PROMPTS and key != "step" and value is not None
    }


def _spread(records: Sequence[Mapping], most: int) -> list[Mapping]:
    """The first, the last, and some between them."""
    if len(records) <= most:
        return list(records)
    return [records[round(i * (len(records) - 1) / (most - 1))] for i in range(most)]


def _phases(run: ReportedRun, several: bool) -> str:
    if not run.phases:
        return ""
    rows = [(name[:24], seconds, duration(seconds)) for name, seconds in run.phases.items()]
    title = f"{run.name}: time of each phase" if several else "Time of each phase"
    total = math.fsum(run.phases.values())
    return figure(title, svg.bars(rows, title=title), note=f"In all {duration(total)}.")
