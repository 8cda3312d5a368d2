"""Answers to MT-Bench's questions of two turns, written as FastChat's judge reads them."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from kasa_tune.components.evaluation.decoding import Decoding
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress, Prompt
from kasa_tune.components.evaluation.rows import Row, RowError, text_of
from kasa_tune.components.evaluation.tasks import Scores, Task, check_room, decoding_of

# FastChat's temperatures by category; all others have 0.7.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}
_OTHER_TEMPERATURE = 0.7


class MTBenchAnswers(Task):
    """Answers to both turns of each question. A judge scores them later, so there are no metrics here.

    Questions are put in the tokenizer's chat form. Turns are sampled at the temperature of the question's category.

    Args:
        name: of the task.
        data_file: FastChat's ``question.jsonl``: ``question_id``, ``category``, ``turns``.
        max_new_tokens: the most tokens of an answer.
        limit, measures: see :class:`Task`.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        max_new_tokens: int = 1024,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        decoding_of(name, None, max_new_tokens)
        super().__init__(name, data_file, limit, measures)

    def sample(self, row: Row) -> dict[str, Any]:
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
            raise RowError("'turns' must hold a list of texts.")
        if not isinstance(row.get("question_id"), int | str):
            raise RowError("has no 'question_id'.")
        category = text_of(row, "category")
        return {"question_id": row["question_id"], "category": category, "turns": turns}

    def check_length(self, max_seq_len: int) -> None:
        check_room(self.name, self.max_new_tokens, max_seq_len)

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        answers: list[list[str]] = [[] for _ in self.samples]
        for turn in range(max(len(sample["turns"]) for sample in self.samples)):
            for temperature in sorted(set(map(self._temperature, self.samples))):
                asked = [
                    i
                    for i, sample in enumerate(self.samples)
                    if self._temperature(sample) == temperature and turn < len(sample["turns"])
                ]
                prompts = [self._prompt(self.samples[i], answers[i]) for i in asked]
                decoding = Decoding(max_new_tokens=self.max_new_tokens, temperature=temperature)
                for i, text in zip(asked, model.complete(prompts, decoding, progress=progress)):
                    answers[i].append(text.strip())
        return Scores([self._record(*pair) for pair in zip(self.samples, answers)], {})

    @property
    def num_steps(self) -> int:
        """The number of turns of all questions."""
        return sum(len(sample["turns"]) for sample in self.samples)

    @staticmethod
    def _temperature(sample: dict[str, Any]) -> float:
        return TEMPERATURES.get(sample["category"], _OTHER_TEMPERATURE)

    @staticmethod
    def _prompt(sample: dict[str, Any], answers: list[str]) -> Prompt:
        turns = sample["turns"]
        return Prompt(turns[len(answers)], chat=True, earlier=tuple(zip(turns, answers)))

    @staticmethod
    def _record(sample: dict[str, Any], answers: list[str]) -> dict[str, Any]:
        """A line of FastChat's model_answer files; the recipe puts the model's name and the time into it."""
        identity = hashlib.sha256("\0".join(map(str, (sample["question_id"], *answers))).encode())
        return {
            "question_id": sample["question_id"],
            "answer_id": identity.hexdigest()[:22],
            "choices": [{"index": 0, "turns": answers}],
        }
