"""Small drawings for a page, as SVG text: lines, heat maps and bars.

Colours are classes that the page's style sheet gives a value in light and in dark. So a drawing is
right in both, and lines are also told apart by their dashes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kasa_tune.components.reports.text import number, plain

WIDTH = 400  # units of a drawing; a page shows it at 330 to 560 pixels
HEIGHT = 235
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 38
MOST_POINTS = 400  # of a line; a longer one is drawn by the lowest and the highest of each group
LEVELS = 10  # shades of a heat map
STYLES = 8  # lines that the style sheet tells apart

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        label: its name in the legend.
        points: ``(x, y)``, in the order of x. All are finite.
        style: number of its colour and dashes, below STYLES.
        faint: drawn lightly behind the others.
        marked: a dot at each point, for lines of few points.
        crosses: a cross at each point and no line.
    """

    label: str
    points: Sequence[Point]
    style: int = 0
    faint: bool = False
    marked: bool = False
    crosses: bool = False


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most ``most`` of the points. Of each group of neighbours the lowest and the highest
    stay, so that no peak is lost.
    """
    if len(points) <= most:
        return list(points)
    groups, kept = most // 2, []
    for i in range(groups):
        group = points[i * len(points) // groups : (i + 1) * len(points) // groups]
        low, high = (choose(group, key=lambda point: point[1]) for choose in (min, max))
        kept += sorted({low, high})
    return kept


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most ``most + 1`` round numbers from ``low`` to ``high``."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most six powers of ten from ``low`` to ``high``. Over less than two decades, 2 and
    5 times these as well.
    """
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high) + 1e-9)
    factors = (1, 2, 5) if high / low < 100 else (1,)
    every = (last - first) // 6 + 1
    found = [factor * 10.0**i for i in range(first, last + 1, every) for factor in factors]
    return [tick for tick in found if low <= tick * (1 + 1e-9) and tick <= high] or [low]


@dataclass(frozen=True)
class Axis:
    """One axis: the numbers at its ends, and where a number lies on it."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, in units of the drawing."""
        low, high = (math.log10(v) if self.log else v for v in (self.low, self.high))
        place = math.log10(max(value, self.low)) if self.log else value
        share = (place - low) / (high - low) if high > low else 0.5
        return round(self.start + (self.end - self.start) * share, 1)

    @property
    def ticks(self) -> list[float]:
        """The numbers that are written beside it."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log: bool = False,
    log_x: bool = False,
    from_zero: bool = False,
) -> str:
    """Draw lines over one another.

    Args:
        lines: at least one point in all. With ``log``, points that are not above zero are left out.
        title: what the drawing says of itself to those who cannot see it, before its lines.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        log: the vertical axis is logarithmic.
        log_x: the horizontal axis is logarithmic. All x are above zero.
        from_zero: the vertical axis starts at zero.
    """
    kept = [(line, [(x, y) for x, y in thinned(line.points) if y > 0 or not log]) for line in lines]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return ""
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    x = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=log_x)
    y = _vertical(ys, log, from_zero)
    parts = [_frame(x, y, x_label, y_label)]
    for line, points in sorted(kept, key=lambda found: not found[0].faint):
        parts.append(_drawn(line, [(x.at(px), y.at(py)) for px, py in points]))
    said = "; ".join(_in_words(line) for line, _ in kept if not line.faint or len(kept) == 1)
    return _svg(WIDTH, HEIGHT, f"{title}. {said}.", "".join(parts))


def _vertical(ys: Sequence[float], log: bool, from_zero: bool) -> Axis:
    low, high = min(ys), max(ys)
    if log:
        room = (high / low) ** 0.04 if high > low else 3.0
        return Axis(low / room, high * room, HEIGHT - BOTTOM, TOP, log=True)
    low = min(0.0, low) if from_zero else low
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero else low - room, high + room, HEIGHT - BOTTOM, TOP)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y.at(tick)}H{right}"/>')
        parts.append(_text(LEFT - 6, y.at(tick) + 4, _tick(tick), "end"))
    for tick in x.ticks:
        anchor = "end" if x.at(tick) > right - 12 else "middle"
        parts.append(_text(x.at(tick), bottom + 16, _tick(tick), anchor))
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 5, x_label, "middle", "label"))
    middle = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 11 {middle})"'
    parts.append(_text(11, middle, y_label, "middle", "label", turned))
    return "".join(parts)


def _drawn(line: Line, places: Sequence[Point]) -> str:
    style = f"s{line.style % STYLES}"
    if line.crosses:
        marks = "".join(f"M{x - 3} {y - 3}l6 6m0-6l-6 6" for x, y in places)
        return f'<path class="line {style} solid" d="{marks}"/>'
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    drawn = f'<path class="line {style}{" faint" if line.faint else ""}" d="{path}"/>'
    if line.marked or len(places) == 1:
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="3.2"/>' for x, y in places)
        drawn += f'<g class="dot {style}">{dots}</g>'
    return drawn


def _in_words(line: Line) -> str:
    (x0, first), (x1, last) = line.points[0], line.points[-1]
    if len(line.points) == 1:
        return f"{line.label}: {number(first)} at {number(x0)}"
    return (
        f"{line.label}: from {number(first)} at {number(x0)} to {number(last)} at {number(x1)}, "
        f"lowest {number(min(y for _, y in line.points))}, "
        f"highest {number(max(y for _, y in line.points))}"
    )


def heat_map(
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    x_label: str = "",
    written: bool = False,
    square: bool = False,
) -> str:
    """Draw a matrix in shades. A missing value is left empty.

    Args:
        values: rows of columns.
        title: what it says of itself to those who cannot see it.
        rows: names of the rows; an empty sequence leaves no room for them.
        columns: names of the columns.
        low: value of the first shade.
        high: value of the last shade.
        x_label: what the columns are.
        written: write each value into its cell, where there is room.
        square: cells are as high as wide.
    """
    left = 12 + 7 * max((len(name) for name in rows), default=0)
    cell = (WIDTH - left - RIGHT) / max(1, len(values[0]))
    cell = min(cell, 44.0)
    height = cell if square else max(5.0, min(22.0, 520 / len(values)))
    gap = 1.0 if cell > 6 and height > 6 else 0.0
    cells: dict[int, list[str]] = {}
    texts = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is None or not math.isfinite(value):
                continue
            shade = level(value, low, high)
            x, y = left + j * cell, TOP + i * height
            w, h = cell - gap, height - gap
            cells.setdefault(shade, []).append(f"M{x:.1f} {y:.1f}h{w:.1f}v{h:.1f}h-{w:.1f}z")
            if written and cell >= 20 and height >= 13:
                x, y = x + w / 2, y + h / 2 + 4
                texts.append(_text(x, y, number(value), "middle", f"n{shade}"))
    parts = [f'<path class="h{shade}" d="{"".join(paths)}"/>' for shade, paths in cells.items()]
    parts += texts
    bottom = TOP + len(values) * height
    for i in _some(len(rows), int(bottom / 15)):
        parts.append(_text(left - 6, TOP + (i + 0.5) * height + 4, rows[i], "end"))
    longest = max((len(name) for name in columns), default=0)
    for j in _some(len(columns), int((WIDTH - left) / (7.5 * longest + 8))):
        parts.append(_text(left + (j + 0.5) * cell, bottom + 15, columns[j], "middle"))
    bottom += 16 if columns else 0
    if x_label:
        bottom += 18
        parts.append(_text((left + WIDTH) / 2, bottom, x_label, "middle", "label"))
    return _svg(WIDTH, math.ceil(bottom) + 6, title, "".join(parts))


def level(value: float, low: float, high: float) -> int:
    """Return the shade of a value, from 0 for ``low`` to ``LEVELS - 1`` for ``high``."""
    share = (value - low) / (high - low) if high > low else 0.5
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def bars(rows: Sequence[tuple[str, float, str]], *, title: str) -> str:
    """Draw a horizontal bar for each ``(name, value, value in words)``. No value is below zero."""
    left = 12 + 7 * max(len(name) for name, _, _ in rows)
    room = WIDTH - left - 12 - 7 * max(len(words) for _, _, words in rows)
    largest = max(value for _, value, _ in rows) or 1.0
    parts = []
    for i, (name, value, words) in enumerate(rows):
        y, width = TOP + 26 * i, max(1.0, room * value / largest)
        parts.append(_text(left - 6, y + 14, name, "end"))
        parts.append(f'<rect class="bar" x="{left}" y="{y}" width="{width:.1f}" height="18"/>')
        parts.append(_text(left + width + 6, y + 14, words, "start", "label"))
    said = "; ".join(f"{name} {words}" for name, _, words in rows)
    return _svg(WIDTH, TOP + 26 * len(rows) + 4, f"{title}: {said}.", "".join(parts))


def key(style: int, *, faint: bool = False, crosses: bool = False) -> str:
    """Draw the sample of a line for a legend."""
    shape = "M10 1l8 8m0-8l-8 8" if crosses else "M1 5H27"
    classes = f"line s{style % STYLES}{' faint' if faint else ''}{' solid' if crosses else ''}"
    return (
        '<svg class="key" viewBox="0 0 28 10" aria-hidden="true">'
        f'<path class="{classes}" d="{shape}"/></svg>'
    )


def scale() -> str:
    """Draw all shades in a row, for the legend of a heat map."""
    cells = "".join(f'<rect class="h{i}" x="{12 * i}" width="12" height="10"/>' for i in range(10))
    return f'<svg class="scale" viewBox="0 0 120 10" aria-hidden="true">{cells}</svg>'


def _some(count: int, most: int) -> range:
    """Numbers of at most ``most`` of ``count`` labels, evenly spread."""
    return range(0, count, max(1, math.ceil(count / max(1, most))))


def _tick(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.6g}"


def _text(x: float, y: float, text: str, anchor: str, classes: str = "tick", more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{classes}" {place} {more}>{plain(text, 60)}</text>'


def _svg(width: int, height: int, said: str, content: str) -> str:
    label = plain(said, 1000)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{content}</svg>'
