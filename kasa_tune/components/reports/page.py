"""A page of HTML made of sections, figures and tables. It needs no other file and no script.

Whoever calls these functions passes plain text, which is escaped here. Only arguments named ``html``
or ``content`` are HTML already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kasa_tune.components.reports import svg
from kasa_tune.components.reports.style import STYLE, policy
from kasa_tune.components.reports.svg import Line
from kasa_tune.components.reports.text import number, shown

MOST_ROWS = 40  # of a table of numbers beneath a chart


@dataclass(frozen=True)
class Section:
    """One heading of a page and what stands under it.

    Args:
        name: its anchor, letters and dashes.
        title: its heading.
        content: HTML. A section without content is left out.
        about: a sentence beneath the heading.
    """

    name: str
    title: str
    content: str
    about: str = ""

    @property
    def html(self) -> str:
        """The section as HTML."""
        about = f"<p class='soft'>{shown(self.about)}</p>" if self.about else ""
        return (
            f'<section id="{self.name}"><h2>{shown(self.title)}</h2>{about}{self.content}</section>'
        )


def page(
    *,
    title: str,
    about: str,
    tiles: Sequence[tuple[str, str]],
    sections: Iterable[Section],
    footer: str,
) -> str:
    """Return a whole page.

    Args:
        title: of the page and of its first heading.
        about: a line beneath it.
        tiles: what is to be seen first, each a value and what it is.
        sections: in their order.
        footer: a last line.
    """
    kept = [section for section in sections if section.content]
    links = "".join(f'<li><a href="#{s.name}">{shown(s.title)}</a></li>' for s in kept)
    shown_tiles = "".join(
        f"<li><b>{shown(v, 60)}</b><span>{shown(k)}</span></li>" for v, k in tiles
    )
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy()}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{shown(title, 120)}</title><style>{STYLE}</style></head>\n<body>",
            f'<header><h1>{shown(title)}</h1><div class="about">{shown(about)}</div>',
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
            f'<ul class="tiles">{shown_tiles}</ul>' if tiles else "",
            "</header>\n<main>\n",
            "\n".join(section.html for section in kept),
            f"\n</main><footer>{shown(footer)}</footer></body></html>\n",
        ]
    )


def grid(parts: Iterable[str]) -> str:
    """Return figures side by side, as many as there is room for. Empty ones are left out."""
    content = "".join(part for part in parts if part)
    return f'<div class="grid">{content}</div>' if content else ""


def figure(title: str, drawing: str, *, legend: str = "", note: str = "", table: str = "") -> str:
    """Return a drawing with its title, its legend, a note and its numbers in a table.

    Args:
        title: plain text.
        drawing: SVG. Without one there is no figure.
        legend: HTML.
        note: plain text.
        table: HTML, which is folded away.
    """
    if not drawing:
        return ""
    folded = f"<details><summary>Numbers</summary>{table}</details>" if table else ""
    caption = f"<figcaption>{shown(note)}</figcaption>" if note else ""
    return f"<figure><h3>{shown(title)}</h3>{legend}{drawing}{caption}{folded}</figure>"


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    y_label: str = "",
    note: str = "",
    log: bool = False,
    from_zero: bool = False,
    named: bool = False,
) -> str:
    """Return a figure of lines. A single line has a legend only if it is ``named``."""
    lines = [line for line in lines if line.points]
    drawing = svg.line_chart(
        lines, title=title, x_label=x_label, y_label=y_label, log=log, from_zero=from_zero
    )
    if any(len(line.points) > svg.MOST_POINTS for line in lines):
        longest = max(len(line.points) for line in lines)
        note = f"{note} {longest:,} points are drawn as {svg.MOST_POINTS // 2} groups, each by its "
        note = (note + "lowest and its highest.").strip()
    items = [
        f"{svg.key(line.style, faint=line.faint, crosses=line.crosses)}{shown(line.label, 80)}"
        for line in lines
    ]
    legend = legend_of(items) if named or len(lines) > 1 else ""
    table = numbers_of(lines, x_label)
    return figure(title, drawing, legend=legend, note=note, table=table)


def legend_of(items: Iterable[str]) -> str:
    """Return a legend of entries in HTML."""
    return f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def numbers_of(lines: Sequence[Line], x_label: str) -> str:
    """Return the points of lines as a table with a row for each x, or for some of them."""
    by_x: dict[float, dict[int, float]] = {}
    for i, line in enumerate(lines):
        for x, y in line.points:
            by_x.setdefault(x, {})[i] = y
    xs = sorted(by_x)
    every = -(-len(xs) // MOST_ROWS) if xs else 1
    chosen = sorted({*xs[::every], *xs[-1:]})
    rows = [[number(x), *(number(by_x[x].get(i)) for i in range(len(lines)))] for x in chosen]
    about = f"<p>Each {every}th of {len(xs):,} rows.</p>" if every > 1 else ""
    return about + table([x_label, *(line.label for line in lines)], rows, numeric=True)


def heat(
    title: str,
    values: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    unit: str,
    note: str = "",
    listed: bool = True,
    **drawn: Any,
) -> str:
    """Return a figure of a matrix in shades, with its scale.

    Args:
        title: plain text.
        values: rows of columns. None is left empty.
        rows: names of the rows.
        columns: names of the columns.
        low: value of the first shade.
        high: value of the last shade.
        unit: what the shades mean.
        note: plain text.
        listed: whether a table has the numbers.
        drawn: further arguments of :func:`~kasa_tune.components.reports.svg.heat_map`.
    """
    said = f"{title}: {unit} from {number(low)} to {number(high)}"
    names: dict[str, Any] = {"rows": rows, "columns": columns, "low": low, "high": high}
    drawing = svg.heat_map(values, title=said, **names, **drawn)
    legend = legend_of([f"{shown(unit)} {number(low)}{svg.scale()}{number(high)}"])
    numbers = ""
    if listed:
        cells = [[name, *map(number, row)] for name, row in zip(rows, values, strict=True)]
        numbers = table(["", *columns], cells, numeric=True)
    return figure(title, drawing, legend=legend, note=note, table=numbers)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: bool = False) -> str:
    """Return a table that scrolls by itself where it is too wide.

    Args:
        head: names of the columns.
        rows: plain text or numbers.
        numeric: all columns but the first are numbers.
    """
    classes = ["", *(' class="num"' if numeric else "" for _ in head[1:])]
    top = "".join(
        f'<th scope="col"{kind}>{shown(name, 120)}</th>' for name, kind in zip(head, classes)
    )
    body = "".join(
        "<tr>" + "".join(_cell(value, kind) for value, kind in zip(row, classes)) + "</tr>"
        for row in rows
    )
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Mapping[str, str]) -> str:
    """Return names and values in as many columns as there is room for."""
    rows = (f"<div><dt>{shown(k)}</dt><dd>{shown(v, 400)}</dd></div>" for k, v in pairs.items())
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _cell(value: object, kind: str) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    kind = kind or (' class="long"' if len(text) > 40 else "")
    return f"<td{kind}>{shown(text, 400)}</td>"


def labelled(pairs: Mapping[str, str]) -> str:
    """Return texts each under its name, as they are, line ends included."""
    return "".join(
        f"<h4>{shown(name, 80)}</h4><pre>{shown(text)}</pre>" for name, text in pairs.items()
    )
