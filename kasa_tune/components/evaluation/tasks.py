"""What all tasks have in common: rows of a file become samples, a model answers them, answers become numbers.

A kind of task is a class with two methods: ``sample(row)`` reads what it needs from a row, and ``run(model, progress)``
asks the model and scores its answers. Everything that can be wrong with the data is found when a task is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kasa_tune.components.evaluation.bootstrap import Metric
from kasa_tune.components.evaluation.decoding import Decoding
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress, Prompt
from kasa_tune.components.evaluation.rows import Row, RowError, columns_in, filled, read_rows

MEASURES = ("learned", "kept", None)


@dataclass(frozen=True)
class Scores:
    """How a model did on a task.

    Args:
        records: for each sample what was asked and answered, and its own numbers; JSON values.
        metrics: the numbers by name, the main one first; empty for a task whose answers others judge.
        notes: what a reader of the numbers has to know besides.
    """

    records: list[dict[str, Any]]
    metrics: dict[str, Metric]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What a task asks, and with what it compares the answer.

    Args:
        prompt: what the model goes on from.
        references: right answers, or what the task has in their place.
    """

    prompt: Prompt
    references: Any


class Task:
    """A set of samples and how they are scored.

    Args:
        name: of the task, in results and names of files.
        data_file: path of its rows.
        limit: only take so many rows.
        measures: ``learned``, what the model was fine-tuned for; ``kept``, what it should not forget; or None.

    Attributes:
        samples: what is asked, in the order of the rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row cannot be used; task, row and column are named.
    """

    def __init__(self, name: str, data_file: str, limit: int | None, measures: str | None) -> None:
        if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(
                f"A task's name is part of names of files: letters, digits, - _ and . only, got {name!r}."
            )
        if name.startswith(".") or len(name) > 80:
            raise ValueError(
                f"A task's name has at most 80 letters and begins with no dot: {name!r}."
            )
        if measures not in MEASURES:
            raise ValueError(f"{name}: measures must be learned, kept or null, got {measures!r}.")
        self.name, self.data_file, self.measures = name, Path(data_file), measures
        try:
            rows = read_rows(data_file, limit=limit)
        except (FileNotFoundError, RowError) as error:
            raise type(error)(f"Task {name}: {error}") from None
        self.samples: list[Any] = self.samples_of(rows)

    def samples_of(self, rows: Sequence[Row]) -> list[Any]:
        """A sample of each row, for kinds that need no other rows to make one."""
        samples = []
        for number, row in enumerate(rows):
            try:
                samples.append(self.sample(row))
            except RowError as error:
                raise self.refusal(number, error) from None
        return samples

    def sample(self, row: Row) -> Any:
        """What the task needs of a row.

        Raises:
            RowError: the row cannot be used.
        """
        raise NotImplementedError

    def refusal(self, number: int, error: Exception) -> ValueError:
        """The error that a row with this number, from 0, is at fault."""
        return ValueError(f"Task {self.name}, row {number} of {self.data_file}: {error}")

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        """Ask a model and score its answers.

        Args:
            model: who is asked.
            progress: called with numbers of steps that are done; there are :attr:`num_steps` in all.
        """
        raise NotImplementedError

    def check_length(self, max_seq_len: int) -> None:
        """See that a model of this length has room for the answers.

        Raises:
            ValueError: it has not.
        """

    def check_prompts(self, tokenizer: Any, max_seq_len: int) -> None:
        """See that a model with this tokenizer and this length can read the prompts, where not every one can.

        Raises:
            ValueError: it cannot.
        """

    @property
    def num_steps(self) -> int | None:
        """How many steps ``progress`` is told of; None where that is not known beforehand."""
        return len(self.samples)


class CompletionTask(Task):
    """A task whose answers are completions of prompts.

    Args:
        name, data_file, limit, measures: see :class:`Task`.
        prompt: the text that is completed, with columns in braces.
        chat: put prompts into the tokenizer's form of a user's message.
        max_new_tokens: the most tokens of an answer.
        stop: texts before which an answer ends.
        decoding: further settings of :class:`Decoding`.
    """

    def __init__(
        self,
        name: str,
        data_file: str,
        limit: int | None,
        measures: str | None,
        *,
        prompt: str,
        chat: bool,
        max_new_tokens: int,
        stop: Sequence[str],
        decoding: Mapping[str, Any] | None,
    ) -> None:
        self.template, self.chat, self.stop = prompt, chat, list(stop)
        self.decoding = decoding_of(name, decoding, max_new_tokens)
        if not prompt.strip():
            raise ValueError(f"Task {name}: prompt is empty.")
        if not columns_in(prompt):
            raise ValueError(
                f"Task {name}: prompt {prompt!r:.60} names no column, so that all prompts would be "
                "equal. Put columns in braces, such as {question}."
            )
        if not all(self.stop):
            raise ValueError(f"Task {name}: stop holds an empty text.")
        super().__init__(name, data_file, limit, measures)

    def prompt_of(self, row: Row) -> Prompt:
        """The row's prompt."""
        return Prompt(filled(self.template, row), self.chat)

    def check_length(self, max_seq_len: int) -> None:
        check_room(self.name, self.decoding.max_new_tokens, max_seq_len)

    def ask(self, model: LanguageModel, progress: Progress | None) -> list[str]:
        """The answer to each sample."""
        prompts = [sample.prompt for sample in self.samples]
        return model.complete(prompts, self.decoding, stop=self.stop, progress=progress)


def decoding_of(name: str, given: Mapping[str, Any] | None, max_new_tokens: int) -> Decoding:
    """The decoding of a task.

    Raises:
        ValueError: a setting is unknown or out of its range.
    """
    known = {each.name for each in fields(Decoding)} - {"max_new_tokens"}
    settings = dict(given or {})
    if unknown := sorted(settings.keys() - known):
        raise ValueError(
            f"Task {name}: decoding has no setting {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known))}."
        )
    try:
        return Decoding(max_new_tokens=max_new_tokens, **settings)
    except ValueError as error:
        raise ValueError(f"Task {name}: {error}") from None


def check_room(name: str, max_new_tokens: int, max_seq_len: int) -> None:
    """Refuse answers that leave no room for a prompt."""
    if max_new_tokens >= max_seq_len:
        raise ValueError(
            f"Task {name}: max_new_tokens {max_new_tokens} leaves no room for a prompt, as the model takes "
            f"{max_seq_len} tokens in all. Set it to at most {max_seq_len - 1}."
        )


def scored_records(
    samples: Sequence[Sample], answers: Sequence[str], scores: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """A record for each sample: prompt, references, answer and its own numbers."""
    records = []
    for i, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        record = {"prompt": sample.prompt.text, "references": sample.references, "answer": answer}
        records.append(record | {name: values[i] for name, values in scores.items()})
    return records
