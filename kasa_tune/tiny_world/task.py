"""The fine-tuning task: turn a meaning representation of a place to eat into sentences that
describe it.

    name[Silver Anchor], area[bridge], price[low], food[soup], keeper[fisher], tone[warm]
    -> Come to the Silver Anchor, our fisher waits near the bridge. Do try the soup. You will pay little.

The text follows from the representation alone, so that exact match is well defined. The tone
chooses the wording. The slots come in any order, and the text mentions them in a fixed order. In
pretraining the model sees the values, but not this format, these wordings or the names.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable

SEED = 11
NUM_TRAIN = 1600
NUM_VAL = 200
TASK_PROMPT = ("Data: ", "Text: ")  # see world.FACT_PROMPT

NAME_ADJECTIVES = (
    "Silver Golden Crooked Merry Amber Humble Royal Wandering Iron Copper Lucky Sleepy Ancient "
    "Velvet Hidden Jolly Dusty Broken Singing Northern"
).split()
NAME_NOUNS = (
    "Anchor Lantern Barrel Saddle Feather Hammer Cauldron Pheasant Stag Crown Thistle Compass "
    "Ladle Rooster Willow Chimney Badger Acorn Plough Mermaid"
).split()
SLOTS = {
    "keeper": (
        "miller baker weaver tailor smith potter fisher hunter mason brewer farmer sailor painter "
        "barber"
    ).split(),
    "food": (
        "plums cheese bread soup stew eggs beans apples nuts fish honey pears onions ham pancakes "
        "berries"
    ).split(),
    "area": (
        "river forest hill bridge garden mill market church road field lake tower village harbour"
    ).split(),
    "price": ["low", "fair", "high"],
    "rating": ["poor", "good", "best"],
}
SEPARATORS = {"plain": ". ", "warm": ". ", "brief": ", "}  # between the phrases of a text, by tone
WORDINGS = {
    "plain": {
        "keeper": "The {name} is run by a {keeper}",
        "area": ", close to the {area}",
        "food": "The menu offers {food}",
        "price": {"low": "Prices are low", "fair": "Prices are fair", "high": "Prices are high"},
        "rating": {
            "poor": "Guests complain",
            "good": "Guests are content",
            "best": "Guests praise it",
        },
    },
    "warm": {
        "keeper": "Come to the {name}, our {keeper} waits",
        "area": " near the {area}",
        "food": "Do try the {food}",
        "price": {
            "low": "You will pay little",
            "fair": "It is worth the money",
            "high": "Treat yourself",
        },
        "rating": {
            "poor": "We shall do better",
            "good": "Our visitors smile",
            "best": "Everybody adores us",
        },
    },
    "brief": {
        "keeper": "{name}: {keeper}",
        "area": " at {area}",
        "food": "{food} served",
        "price": {"low": "cheap", "fair": "average cost", "high": "expensive"},
        "rating": {"poor": "one star", "good": "three stars", "best": "five stars"},
    },
}


def rows(split: str, seed: int = SEED) -> list[dict[str, str]]:
    """Return the rows of a split, each with `input` (meaning representation) and `output` (text).

    Args:
        split: "train" or "val". No name of val occurs in train.
        seed: seed of the draws.

    Raises:
        ValueError: `split` is neither.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; use 'train' or 'val'")
    names = place_names(split, seed)
    rng = random.Random(f"task {split} {seed}")
    made: dict[str, str] = {}
    while len(made) < (NUM_TRAIN if split == "train" else NUM_VAL):
        slots = draw_slots(rng, names)
        made[write_representation(slots)] = describe(slots)
    return [{"input": representation, "output": text} for representation, text in made.items()]


def place_names(split: str, seed: int = SEED) -> list[str]:
    """Return the names of places of a split, "train" or "val"."""
    names = [f"{adjective} {noun}" for adjective in NAME_ADJECTIVES for noun in NAME_NOUNS]
    random.Random(f"task names {seed}").shuffle(names)
    return names[60:] if split == "train" else names[:60]


def draw_slots(rng: random.Random, names: list[str]) -> dict[str, str]:
    """Draw slots in the order in which they are written: the name, two to four others in any order,
    and the tone.
    """
    optional = rng.sample(["food", "area", "price", "rating"], rng.choice((1, 2, 3, 3)))
    between = ["keeper", *optional]
    rng.shuffle(between)
    drawn = {slot: rng.choice(SLOTS[slot]) for slot in between}
    return {"name": rng.choice(names), **drawn, "tone": rng.choice(tuple(SEPARATORS))}


def write_representation(slots: dict[str, str]) -> str:
    return ", ".join(f"{slot}[{value}]" for slot, value in slots.items())


def read_representation(text: str) -> dict[str, str]:
    """Read the slots from a representation. It is the inverse of `write_representation`."""
    return dict(re.findall(r"(\w+)\[([^\]]*)\]", text))


def describe(slots: dict[str, str]) -> str:
    """Return the text of a meaning representation. It mentions name, keeper, area, food, price and
    rating in this order.
    """
    phrases = slot_phrases(slots)
    told = [
        phrases["keeper"] + phrases.get("area", ""),
        *(phrases[s] for s in ("food", "price", "rating") if s in phrases),
    ]
    return SEPARATORS[slots["tone"]].join(told) + "."


def slot_phrases(slots: dict[str, str]) -> dict[str, str]:
    """Return the words that express each slot except the tone. The words of the keeper contain the
    name as well.
    """
    phrases = {"name": slots["name"]}
    for slot, wording in WORDINGS[slots["tone"]].items():
        if slot in slots:
            phrases[slot] = (
                wording[slots[slot]] if isinstance(wording, dict) else wording.format(**slots)
            )
    return phrases


def task_prompt(representation: str) -> str:
    """Return the prompt of a representation, which the model continues with the text. `TASK_PROMPT`
    is put around it.
    """
    return f"{TASK_PROMPT[0]}{representation} {TASK_PROMPT[1]}".rstrip(" ")


def score(
    generate: Callable[[list[str]], list[str]], rows: Iterable[dict[str, str]]
) -> dict[str, float]:
    """Compute `exact_match`, the share of texts that are equal, and `slot_accuracy`, the share of
    slots whose words are in the text.

    Args:
        generate: maps prompts to their completions up to the end of sequence, without the prompt.
        rows: mappings with `input` and `output`, as in task_val.jsonl.
    """
    rows = list(rows)
    completions = [text.strip() for text in generate([task_prompt(row["input"]) for row in rows])]
    exact = [text == row["output"] for text, row in zip(completions, rows, strict=True)]
    told = [
        phrase in text
        for text, row in zip(completions, rows, strict=True)
        for phrase in slot_phrases(read_representation(row["input"])).values()
    ]
    return {"exact_match": sum(exact) / len(exact), "slot_accuracy": sum(told) / len(told)}
