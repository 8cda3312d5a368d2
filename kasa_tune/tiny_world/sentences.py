"""Tasks of the synthetic world for encoders, in the shapes of GLUE's. It imports no torch.

- `order`: a sentence, and whether its words are in order (as CoLA). Metric: Matthews correlation.
- `same`: two statements of a fact about a person, and whether they agree (as MRPC).

Names of people, and sentences, of the validation rows are in no training row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from kasa_tune.tiny_world import world

NUM_TRAIN, NUM_VAL = 1200, 200
Row = dict[str, Any]


def rows(task: str, split: str, seed: int = world.SEED) -> list[Row]:
    """Return the rows of a task.

    Args:
        task: a key of TASKS.
        split: ``train`` or ``val``.
        seed: of the world.
    """
    rng = random.Random(f"{task} {split} {seed}")
    names = [facts[0].person for facts in world.people(seed)]
    # Every fifth person is kept for validation.
    own = [name for i, name in enumerate(names) if (i % 5 == 0) == (split == "val")]
    count, make = NUM_TRAIN if split == "train" else NUM_VAL, TASKS[task]
    found: dict[tuple, Row] = {}
    for row in make(rng, own):
        found.setdefault(tuple(row.values()), row)
        if len(found) == count:
            break
    return list(found.values())


def _order(rng: random.Random, names: list[str]) -> Iterator[Row]:
    while True:
        relation = rng.choice(world.RELATIONS)
        statement = rng.choice(relation.statements)
        text = statement.format(n=rng.choice(names), v=rng.choice(relation.values))
        words, label = text.removesuffix(".").split(), rng.randrange(2)
        if not label:
            first = rng.randrange(len(words) - 1)
            words[first], words[first + 1] = words[first + 1], words[first]
        yield {"sentence": f"{' '.join(words)}.", "label": label}


def _same(rng: random.Random, names: list[str]) -> Iterator[Row]:
    while True:
        relation, name, label = rng.choice(world.RELATIONS), rng.choice(names), rng.randrange(2)
        first, second = rng.sample(relation.statements, 2)
        value, other = rng.sample(relation.values, 2)
        yield {
            "sentence1": first.format(n=name, v=value),
            "sentence2": second.format(n=name, v=value if label else other),
            "label": label,
        }


TASKS: dict[str, Callable[[random.Random, list[str]], Iterator[Row]]] = {
    "order": _order,
    "same": _same,
}
