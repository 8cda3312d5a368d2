"""Questions with given choices, of which the model finds one the likeliest: as lm-eval scores multiple choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kasa_tune.components.evaluation.bootstrap import mean
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress
from kasa_tune.components.evaluation.rows import Row, RowError, columns_in, filled, texts_of
from kasa_tune.components.evaluation.tasks import Scores, Task


@dataclass(frozen=True)
class Choice:
    """A question whose right answer is one of some texts.

    Args:
        contexts: what comes before each text; mostly the same for all.
        texts: the choices.
        answer: number of the right one, from 0.
    """

    contexts: list[str]
    texts: list[str]
    answer: int


class ChoiceTask(Task):
    """A task of :class:`Choice` samples.

    ``accuracy`` counts where the right text has the highest log-probability, ``accuracy_norm`` where it has the highest
    one per character. lm-eval calls them ``acc`` and ``acc_norm``.
    """

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        pairs = [
            (context, f" {text}")
            for sample in self.samples
            for context, text in zip(sample.contexts, sample.texts, strict=True)
        ]
        scores = iter(model.log_likelihoods(pairs, progress=progress))
        records = []
        for sample in self.samples:
            likelihoods = [next(scores).value for _ in sample.texts]
            lengths = [len(text) for text in sample.texts]
            chosen = int(np.argmax(likelihoods))
            by_length = int(np.argmax(np.divide(likelihoods, lengths)))
            records.append(
                {
                    "prompt": sample.contexts[0],
                    "choices": sample.texts,
                    "log_likelihoods": likelihoods,
                    "right": sample.answer,
                    "chosen": chosen,
                    "accuracy": float(chosen == sample.answer),
                    "accuracy_norm": float(by_length == sample.answer),
                }
            )
        names = ("accuracy", "accuracy_norm")
        return Scores(records, {name: mean([row[name] for row in records]) for name in names})

    @property
    def num_steps(self) -> int:
        """The number of choices of all samples."""
        return sum(len(sample.texts) for sample in self.samples)


class MultipleChoice(ChoiceTask):
    """Rows with a question, its choices and the right one.

    Args:
        name: of the task.
        data_file: rows with the columns that the prompt, ``choices`` and ``answer`` name.
        prompt: what comes before a choice and a space, with columns in braces.
        choices: column of the texts: a list of them, or ARC's ``{"text": [...], "label": [...]}``.
        answer: column of the right one: its number from 0, its text, or its label.
        limit, measures: see :class:`Task`.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        prompt: str = "Question: {question}\nAnswer:",
        choices: str = "choices",
        answer: str = "answer",
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        if not columns_in(prompt):
            raise ValueError(f"Task {name}: prompt {prompt!r:.60} names no column in braces.")
        self.prompt, self.choices, self.answer = prompt, choices, answer
        super().__init__(name, data_file, limit, measures)

    def sample(self, row: Row) -> Choice:
        texts = texts_of(row, self.choices)
        if len(texts) < 2 or not all(text.strip() for text in texts):
            raise RowError(f"{self.choices!r} must hold two texts or more, none empty.")
        context = filled(self.prompt, row)
        listed = row[self.choices]
        labels = listed.get("label") if isinstance(listed, Mapping) else None
        return Choice([context] * len(texts), texts, number_of(row, self.answer, texts, labels))


def number_of(row: Row, column: str, texts: Sequence[str], labels: Sequence[str] | None) -> int:
    """Which choice is right, from 0.

    Args:
        row: with the number, the text or the label of a choice.
        column: that holds it.
        texts: the choices.
        labels: what they are called, if they are.

    Raises:
        RowError: the column is missing, or names no choice.
    """
    if column not in row:
        raise RowError(f"has no column {column!r}.")
    given = row[column]
    if type(given) is int and 0 <= given < len(texts):
        return given
    for names in (texts, labels):
        if isinstance(names, list) and given in names:
            return names.index(given)
    raise RowError(
        f"{column!r} is {given!r:.60}, which is neither the number (from 0), the text nor "
        f"the label of one of {len(texts)} choices."
    )
