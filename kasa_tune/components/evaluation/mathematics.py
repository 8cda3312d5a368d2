"""Word problems whose solutions end in an answer: GSM8K and MATH."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from kasa_tune.components.evaluation.bootstrap import mean
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress
from kasa_tune.components.evaluation.math_answers import (
    boxed_expression,
    final_expression,
    last_number,
    marked_number,
    same_expression,
)
from kasa_tune.components.evaluation.rows import Row, RowError, text_of
from kasa_tune.components.evaluation.tasks import CompletionTask, Sample, Scores, scored_records

_COLUMNS = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}


class MathProblems(CompletionTask):
    r"""Accuracy of the final answers of completed solutions.

    Args:
        name: of the task.
        data_file: rows of GSM8K (``question``, ``answer`` with its number after ``####``) or MATH (``problem``,
            ``solution`` with a ``\boxed{}`` expression).
        answers: ``gsm8k`` compares the last number of the solution; ``math`` compares its last boxed expression, or
            what follows its last "answer is".
        prompt, chat, max_new_tokens, stop, decoding, limit, measures: see :class:`CompletionTask`. A prompt of None is
            ``Question: ...``, ``Answer:`` on two lines with the set's own column.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        answers: Literal["gsm8k", "math"] = "gsm8k",
        prompt: str | None = None,
        chat: bool = False,
        max_new_tokens: int = 512,
        stop: list[str] = ["\nQuestion:", "\n\nQuestion"],  # noqa: B006 (nobody changes it)
        decoding: Mapping[str, Any] | None = None,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        if answers not in _COLUMNS:
            raise ValueError(f"Task {name}: answers must be gsm8k or math; got {answers!r}.")
        self.answers = answers
        question = _COLUMNS[answers][0]
        super().__init__(
            name,
            data_file,
            limit,
            measures,
            prompt=f"Question: {{{question}}}\nAnswer:" if prompt is None else prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            stop=stop,
            decoding=decoding,
        )

    def sample(self, row: Row) -> Sample:
        solution = text_of(row, _COLUMNS[self.answers][1])
        if self.answers == "gsm8k":
            number = marked_number(solution)
            if number is None:
                raise RowError(f"the answer has no number after ####: {solution[-60:]!r}.")
            return Sample(self.prompt_of(row), f"{number.normalize():f}")
        expression = boxed_expression(solution)
        if expression is None:
            raise RowError(f"the solution has no \\boxed{{}} expression: {solution[-60:]!r}.")
        return Sample(self.prompt_of(row), expression)

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        answers = self.ask(model, progress)
        found = [self._final(answer) for answer in answers]
        correct = [
            float(given is not None and self._same(given, sample.references))
            for given, sample in zip(found, self.samples, strict=True)
        ]
        records = scored_records(self.samples, answers, {"found": found, "accuracy": correct})
        answered = mean([given is not None for given in found])
        return Scores(records, {"accuracy": mean(correct), "answered": answered})

    def _final(self, answer: str) -> str | None:
        if self.answers == "math":
            return final_expression(answer)
        number = last_number(answer)
        return None if number is None else f"{number.normalize():f}"

    def _same(self, given: str, wanted: str) -> bool:
        return given == wanted if self.answers == "gsm8k" else same_expression(given, wanted)
