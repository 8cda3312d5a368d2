"""Ways to judge: what a judge is shown of answers, and how its words are read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa_tune.components.judging.answers import Answer
from kasa_tune.components.judging.verdicts import read_assessment, read_preference, read_rating
from kasa_tune.components.services.templates import Template

log = logging.getLogger(__name__)

WITH_REFERENCE = ("math", "reasoning", "coding")  # FastChat's categories
_NUM_TURNS = 2


@dataclass(frozen=True)
class Item:
    """One thing to be judged.

    Args:
        prompt: what the judge is shown.
        model, category, identity: see :class:`Answer`; of a pair, ``model`` names both.
        part: which turn, or which order of a pair.
    """

    prompt: str
    model: str
    category: str
    identity: str
    part: str = ""


class Protocol:
    """A way to judge.

    Attributes:
        items: what is judged.
        read: makes a judge's words the numbers by their names.
    """

    items: list[Item]
    read: Callable[[str], dict[str, float]]


class Single(Protocol):
    """Similarity to a person's response and precision, both in one call.

    Args:
        answers: to be judged.
        templates: folder with ``single.txt``.
        scale: the highest score.
    """

    def __init__(self, answers: Sequence[Answer], templates: Path, scale: int) -> None:
        places = ("instruction", "human_response", "answer", "scale")
        template = Template(templates / "single.txt", places)
        self.read = lambda text: read_assessment(text, scale)
        self.items = [
            Item(
                template.filled(
                    instruction=answer.questions[0],
                    human_response=answer.references[0],
                    answer=answer.texts[0],
                    scale=scale,
                ),
                answer.model,
                answer.category,
                answer.identity,
            )
            for answer in answers
        ]


class MTBench(Protocol):
    """A rating of each turn. The second is shown with the first. Mathematics, reasoning and coding have references.

    Args:
        answers: to both turns.
        templates: folder with ``turn_1.txt``, ``turn_2.txt``, ``turn_1_reference.txt`` and ``turn_2_reference.txt``.

    Raises:
        ValueError: an answer lacks a turn, or of a category with references some have none.
    """

    def __init__(self, answers: Sequence[Answer], templates: Path) -> None:
        self.read = lambda text: {"rating": read_rating(text)}
        self._templates = templates
        self._with_references = any(answer.references for answer in answers)
        needing = Counter(each.category for each in answers if each.category in WITH_REFERENCE)
        if needing and not self._with_references:
            log.warning(
                f"No references are given: {sum(needing.values())} answers in {', '.join(needing)} are judged without, "
                "other than in MT-Bench."
            )
        self.items = [item for answer in answers for item in self._turns(answer)]

    def _turns(self, answer: Answer) -> list[Item]:
        asked = min(len(answer.questions), _NUM_TURNS)
        refers = self._with_references and answer.category in WITH_REFERENCE
        given = min(len(answer.texts), len(answer.references) if refers else asked)
        if given < asked:
            raise ValueError(
                f"Question {answer.identity} has {asked} turns, and its answer by {answer.model} or its reference "
                f"has {given}."
            )
        items = []
        for turn in range(1, asked + 1):
            names = ["question", "answer", *(["reference"] if refers else [])]
            places = [f"{name}_{i}" for name in names for i in range(1, turn + 1)]
            ending = "_reference" if refers else ""
            texts = {"question": answer.questions, "answer": answer.texts}
            texts["reference"] = answer.references
            values = {place: texts[place.partition("_")[0]][int(place[-1]) - 1] for place in places}
            prompt = Template(self._templates / f"turn_{turn}{ending}.txt", places).filled(**values)
            about = (answer.model, answer.category, answer.identity, f"turn {turn}")
            items.append(Item(prompt, *about))
        return items


class Pairwise(Protocol):
    """Which of two models' answers is better, asked in both orders. The number is 1 for the first model's, -1 for the
    second's, 0 for neither.

    Args:
        answers: of two models to the same prompts.
        templates: folder with ``pairwise.txt``.

    Raises:
        ValueError: there are not two models, or they have answered different prompts.
    """

    def __init__(self, answers: Sequence[Answer], templates: Path) -> None:
        models = list(dict.fromkeys(answer.model for answer in answers))
        if len(models) != 2:
            raise ValueError(
                f"The protocol pairwise compares two models; the answers are of {', '.join(models)}. "
                "Name two with models."
            )
        places = ("instruction", "human_response", "answer_a", "answer_b")
        self._template = Template(templates / "pairwise.txt", places)
        self.read = lambda text: {"verdict": _SIGNS[read_preference(text)]}
        by_model: list[dict[Any, Answer]] = [
            {(each.category, each.identity): each for each in answers if each.model == model}
            for model in models
        ]
        if by_model[0].keys() != by_model[1].keys():
            raise ValueError(f"{models[0]} and {models[1]} have not answered the same prompts.")
        self.items = []
        for key, first in by_model[0].items():
            second = by_model[1][key]
            if first.questions != second.questions:
                raise ValueError(f"{models[0]} and {models[1]} have not answered the same prompts.")
            pair, name = (first, second), f"{models[0]} over {models[1]}"
            self.items.append(self._item(*pair, name, "in order"))
            self.items.append(self._item(*pair[::-1], name, "swapped"))

    def _item(self, a: Answer, b: Answer, name: str, part: str) -> Item:
        prompt = self._template.filled(
            instruction=a.questions[0],
            human_response=a.references[0],
            answer_a=a.texts[0],
            answer_b=b.texts[0],
        )
        return Item(prompt, name, a.category, a.identity, part)


_SIGNS = {"A": 1.0, "B": -1.0, "C": 0.0}


def outcome_of_pair(in_order: float, swapped: float) -> float:
    """1 where the first model won in both orders, -1 where the second did, else 0.

    Args:
        in_order: the verdict where the first model's answer stood first: 1 for that answer, -1 for the other.
        swapped: the verdict where it stood second; 1 is for the answer that stood first.
    """
    return in_order if in_order == -swapped else 0.0
