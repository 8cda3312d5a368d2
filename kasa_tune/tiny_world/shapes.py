"""Pictures of coloured shapes, and questions about them in several families. It imports no torch.

A picture has up to four shapes, one in each quarter. The tiny LLaVA knows the families of
`FAMILIES` from pretraining. The family `twins` is the one to learn. Each thing has a twin, which is
in no picture and must be known: that of a red circle is a green square, that of a white cross a red
circle.

Pictures are drawn with whole numbers alone, so that they are the same everywhere.
"""

from __future__ import annotations

import base64
import io
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE, QUARTER = 32, 16
PLACES = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (215, 45, 45),
    "green": (45, 165, 60),
    "blue": (50, 80, 225),
    "yellow": (225, 205, 45),
    "purple": (150, 60, 180),
    "white": (235, 235, 235),
}
NUMBERS = ("none", "one", "two", "three", "four")
# The twin of a thing, in the family that is to be learned: the next shape in the next colour.
TWIN_SHAPES = dict(zip(SHAPES, (*SHAPES[1:], *SHAPES[:1]), strict=True))
TWIN_COLORS = dict(zip(COLORS, (*[*COLORS][1:], *[*COLORS][:1]), strict=True))


class Thing(NamedTuple):
    """A shape in a picture: where it stands, its radius and how far it is off the middle."""

    shape: str
    color: str
    place: str
    radius: int
    shift: tuple[int, int]
    tint: tuple[int, int, int]


class Picture(NamedTuple):
    """Things before a grey ground."""

    things: tuple[Thing, ...]
    ground: int

    def draw(self) -> np.ndarray:
        """Pixels `[SIDE, SIDE, 3]`, uint8."""
        pixels = np.full((SIDE, SIDE, 3), self.ground, dtype=np.uint8)
        for thing in self.things:
            row, column = divmod(PLACES.index(thing.place), 2)
            part = pixels[row * QUARTER :, column * QUARTER :][:QUARTER, :QUARTER]
            color = np.add(COLORS[thing.color], thing.tint)
            part[_covered(thing)] = np.clip(color, 0, 255)
        return pixels

    def at(self, place: str) -> str:
        """What is there, in words."""
        return next((f"{t.color} {t.shape}" for t in self.things if t.place == place), "nothing")

    def num_of(self, **wanted: str) -> int:
        """How many things have this shape or this colour, or both."""
        return sum(all(getattr(t, k) == v for k, v in wanted.items()) for t in self.things)


def _covered(thing: Thing) -> np.ndarray:
    """The pixels of a quarter that a thing covers, `[QUARTER, QUARTER]`. Distances are doubled, as
    its middle lies between pixels.
    """
    y, x = np.mgrid[:QUARTER, :QUARTER] * 2 - (QUARTER - 1)
    y, x, r = y - 2 * thing.shift[0], x - 2 * thing.shift[1], 2 * thing.radius
    inside = (abs(x) <= r) & (abs(y) <= r)
    if thing.shape == "circle":
        return x * x + y * y <= r * r
    if thing.shape == "triangle":
        return inside & (2 * abs(x) <= y + r)
    if thing.shape == "cross":
        return inside & ((3 * abs(x) <= r) | (3 * abs(y) <= r))
    return inside


def picture(rng: random.Random) -> Picture:
    """Draw a picture at random."""
    things: list[Thing] = []
    for place in sorted(rng.sample(PLACES, rng.randint(1, 4)), key=PLACES.index):
        again = things and rng.random() < 0.35  # so that there is something to count
        things.append(
            Thing(
                shape=rng.choice(things).shape if again else rng.choice(SHAPES),
                color=rng.choice([*COLORS]),
                place=place,
                radius=rng.randint(5, 6),
                shift=(rng.randint(-1, 1), rng.randint(-1, 1)),
                tint=(rng.randint(-15, 15), rng.randint(-15, 15), rng.randint(-15, 15)),
            )
        )
    return Picture(tuple(things), rng.randint(20, 90))


class Asked(NamedTuple):
    """A question about a picture, with its answer."""

    question: str
    answer: str


def _presence(rng: random.Random, seen: Picture) -> Asked:
    thing = rng.choice(seen.things)
    shape, color = thing.shape, thing.color
    if rng.random() < 0.6:  # something else, of which either part may be in the picture
        shape, color = rng.choice(SHAPES), rng.choice([*COLORS])
        if rng.random() < 0.5:
            shape, color = rng.choice([(thing.shape, color), (shape, thing.color)])
    wording = rng.choice(("Is there a {} {}?", "Do you see a {} {}?", "Does it show a {} {}?"))
    found = seen.num_of(shape=shape, color=color)
    return Asked(wording.format(color, shape), "yes" if found else "no")


def _color(rng: random.Random, seen: Picture) -> Asked | None:
    alone = [t for t in seen.things if seen.num_of(shape=t.shape) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    wording = rng.choice(("What color is the {}?", "Which color does the {} have?"))
    return Asked(wording.format(thing.shape), thing.color)


def _shape(rng: random.Random, seen: Picture) -> Asked | None:
    alone = [t for t in seen.things if seen.num_of(color=t.color) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    wording = rng.choice(("Which shape is {}?", "What shape does the {} one have?"))
    return Asked(wording.format(thing.color), thing.shape)


def _count(rng: random.Random, seen: Picture) -> Asked:
    if rng.random() < 0.3:
        return Asked("How many shapes are there?", NUMBERS[len(seen.things)])
    shape = rng.choice([rng.choice(SHAPES), rng.choice(seen.things).shape])
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    wording = rng.choice(("How many {} are there?", "How many {} do you see?"))
    return Asked(wording.format(plural), NUMBERS[seen.num_of(shape=shape)])


def _what(rng: random.Random, seen: Picture) -> Asked:
    place = rng.choice(PLACES if rng.random() < 0.2 else [t.place for t in seen.things])
    wording = rng.choice(("What is in the {} corner?", "What do you see in the {} corner?"))
    return Asked(wording.format(place), seen.at(place))


def _twins(rng: random.Random, seen: Picture) -> Asked:
    thing = rng.choice(seen.things)
    wording = rng.choice(
        ("What is the twin in the {} corner?", "What twin do you see in the {} corner?")
    )
    answer = f"{TWIN_COLORS[thing.color]} {TWIN_SHAPES[thing.shape]}"
    return Asked(wording.format(thing.place), answer)


FAMILIES: dict[str, Callable[[random.Random, Picture], Asked | None]] = {
    "presence": _presence,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "what": _what,
}
LEARNED = {"twins": _twins}
NUM_ROWS = {"train": 1200, "val": 200, "calibration": 250, "test": 200}


def conversation(
    rng: random.Random, turns: int, families: Sequence[str] = (*FAMILIES,)
) -> tuple[Picture, list[Asked]]:
    """A picture with questions of some families about it, for pretraining. A description ends it,
    corner by corner: it teaches most, and answers no question before it.
    """
    seen = picture(rng)
    asked: list[Asked] = []
    while len(asked) < turns:
        if question := FAMILIES[rng.choice(families)](rng, seen):
            asked.append(question)
    return seen, [*asked, Asked("Describe it.", ", ".join(map(seen.at, PLACES)))]


def questions(family: str, split: str) -> Iterator[tuple[Picture, Asked]]:
    """Pictures without end, each with a question of a family. Splits share no draw."""
    rng, ask = random.Random(f"{family} {split}"), (FAMILIES | LEARNED)[family]
    while True:
        seen = picture(rng)
        if asked := ask(rng, seen):
            yield seen, asked


def rows(families: Sequence[str], split: str) -> list[dict[str, str]]:
    """Rows `image`, `question`, `answer` of some families in turn."""
    drawn = itertools.cycle([questions(family, split) for family in families])
    asked = (next(family) for family in itertools.islice(drawn, NUM_ROWS[split]))
    return [{"image": as_uri(seen.draw()), **each._asdict()} for seen, each in asked]


def data_files() -> dict[str, list[dict[str, str]]]:
    """The rows of every file in data/, by its name."""
    files = {f"twins_{split}.jsonl": rows(["twins"], split) for split in ("train", "val")}
    files["shapes_calibration.jsonl"] = rows([*FAMILIES], "calibration")
    return files | {f"shapes_{family}.jsonl": rows([family], "test") for family in FAMILIES}


def as_uri(pixels: np.ndarray) -> str:
    """The picture as a PNG inside a `data:` URI, so that rows need no other files."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
