"""The picture that opens the README: what methods learned and what they kept, of five seeds on the tiny world.

    python benchmarks/readme_picture.py

It reads the table in docs/benchmarks/learning_and_forgetting.md, whose command stands above it there, and writes
docs/images/learned_and_kept.svg. The picture follows the reader's light or dark setting.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "benchmarks" / "learning_and_forgetting.md"
PICTURE = ROOT / "docs" / "images" / "learned_and_kept.svg"

# Rows of the table, what each is called in the picture, and where its name stands beside its point.
SHOWN = {
    "**CorDA KPM**": ("CorDA KPM", "start"),
    "LoRA": ("LoRA", "end"),
    "MiLoRA": ("MiLoRA", "start"),
    "KaSA, k = 1, d = 1": ("KaSA", "start"),
    "CorDA++ KPM": ("CorDA++ KPM", "start"),
    "**CorDA IPM**": ("CorDA IPM", "end"),
    "PiSSA": ("PiSSA", "after"),
    "LoRA+ (ratio 4)": ("LoRA+", "after"),
}
OURS = ("CorDA KPM", "CorDA++ KPM", "CorDA IPM", "KaSA")
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 44, 78, 58
LOSSES, KEPT = (0.20, 0.40), (0.0, 1.0)

STYLE = """
text{font:14px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:#39424e}
.title{font-size:18px;font-weight:650;fill:#14181d}.axis{font-size:13px;fill:#55606d}
.grid{stroke:#e3e7ec}.card{fill:#fff}.other{fill:#7a828c;stroke:#7a828c}
.ours{fill:#0072b2;stroke:#0072b2}.name{font-weight:600}text.name{stroke:none}
.spread{stroke-width:1.6;opacity:.55}
@media (prefers-color-scheme:dark){text{fill:#c8d0d9}.title{fill:#f0f3f6}.axis{fill:#9ba7b4}
.grid{stroke:#2b323b}.card{fill:#0d1117}.other{fill:#9aa3ad;stroke:#9aa3ad}
.ours{fill:#56b4e9;stroke:#56b4e9}}
"""

Figures = dict[str, tuple[float, float, float, float]]


def read_table(text: str) -> Figures:
    """Validation loss, its spread, facts kept and their spread of each method in the first table of the page."""
    found: Figures = {}
    rows = re.findall(r"^\| (.+?) \|(.+)\|$", text.partition("\n| column |")[0], re.MULTILINE)
    for name, cells in rows:
        columns = [re.findall(r"[\d.]+", cell) for cell in cells.split("|")]
        if "±" in cells:
            (loss, loss_spread), (kept, kept_spread) = columns[2], columns[4]
            found[name] = (float(loss), float(loss_spread), float(kept), float(kept_spread))
    return found


def x_of(loss: float) -> float:
    """Where a loss lies; smaller is further to the right."""
    low, high = LOSSES
    return round(LEFT + (WIDTH - LEFT - RIGHT) * (high - loss) / (high - low), 1)


def y_of(kept: float) -> float:
    """Where a share of facts lies."""
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * kept, 1)


def draw(figures: Figures) -> str:
    """The picture as SVG."""
    said = "; ".join(
        f"{SHOWN[row][0]} keeps {figures[row][2]:.0%} of the facts at a validation loss of {figures[row][0]}"
        for row in SHOWN
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">',
        f'<style>{STYLE}</style><rect class="card" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
        f'<text class="title" x="{LEFT - 46}" y="34">Learn the new task, keep the old knowledge</text>',
    ]
    for kept in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="grid" d="M{LEFT} {y_of(kept)}H{WIDTH - RIGHT}"/>')
        place = f'x="{LEFT - 8}" y="{y_of(kept) + 5}" text-anchor="end"'
        parts.append(f'<text class="axis" {place}>{kept:.0%}</text>')
    for loss in (0.40, 0.35, 0.30, 0.25, 0.20):
        place = f'x="{x_of(loss)}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle"'
        parts.append(f'<text class="axis" {place}>{loss:.2f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">'
        "validation loss on the new task (better to the right)</text>"
    )
    parts.append(
        f'<text class="axis" x="{LEFT - 46}" y="54">known facts still answered '
        "(five seeds, bars are standard deviations)</text>"
    )
    parts += [_point(*SHOWN[row], *figures[row]) for row in SHOWN]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _point(
    name: str, side: str, loss: float, loss_spread: float, kept: float, kept_spread: float
) -> str:
    x, y, kind = x_of(loss), y_of(kept), "ours" if name in OURS else "other"
    bars = (
        f"M{x_of(loss - loss_spread)} {y}H{x_of(loss + loss_spread)}"
        f"M{x} {y_of(kept - kept_spread)}V{y_of(kept + kept_spread)}"
    )
    if side == "after":  # its spread
        place = f'x="{x_of(loss - loss_spread) + 8:.1f}" y="{y + 5}" text-anchor="start"'
    else:
        place = f'x="{x + (12 if side == "start" else -12)}" y="{y - 8}" text-anchor="{side}"'
    return (
        f'<path class="spread {kind}" d="{bars}"/><circle class="{kind}" cx="{x}" cy="{y}" r="5.5"/>'
        f'<text class="name {kind}" {place}>{name}</text>'
    )


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=PICTURE)
    output = parser.parse_args().output
    output.write_text(draw(read_table(TABLE.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"Picture: {output}")


if __name__ == "__main__":
    main()
