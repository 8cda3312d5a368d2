"""Questions with short answers in words: NQ-open, TriviaQA, WebQuestions, SQuAD, and facts of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from kasa_tune.components.evaluation.answers import NORMALIZATIONS, exact_match, f1
from kasa_tune.components.evaluation.bootstrap import mean
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress
from kasa_tune.components.evaluation.rows import Row, texts_of
from kasa_tune.components.evaluation.tasks import CompletionTask, Sample, Scores, scored_records


class QuestionAnswering(CompletionTask):
    """Exact match and F1 of completed answers against one or more references.

    Args:
        name: of the task.
        data_file: rows with a question and an answer.
        answer: column of the references: a text, a list of texts, SQuAD's or TriviaQA's mapping of them.
        normalization: how answers are compared: ``squad`` (also NQ-open, WebQuestions), ``triviaqa``, or ``none``.
        prompt, chat, max_new_tokens, stop, decoding, limit, measures: see :class:`CompletionTask`.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        prompt: str = "Q: {question}\nA:",
        chat: bool = False,
        answer: str = "answer",
        normalization: Literal["squad", "triviaqa", "none"] = "squad",
        max_new_tokens: int = 32,
        stop: list[str] = ["\n"],  # noqa: B006 (nobody changes it)
        decoding: Mapping[str, Any] | None = None,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"Task {name}: normalization must be {', '.join(NORMALIZATIONS)}; got {normalization!r}."
            )
        self.answer, self._normalize = answer, NORMALIZATIONS[normalization]
        super().__init__(
            name,
            data_file,
            limit,
            measures,
            prompt=prompt,
            chat=chat,
            max_new_tokens=max_new_tokens,
            stop=stop,
            decoding=decoding,
        )

    def sample(self, row: Row) -> Sample:
        return Sample(self.prompt_of(row), texts_of(row, self.answer))

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        answers = self.ask(model, progress)
        pairs = list(zip(answers, (sample.references for sample in self.samples), strict=True))
        scores = {
            "exact_match": [exact_match(*pair, self._normalize) for pair in pairs],
            "f1": [f1(*pair, self._normalize) for pair in pairs],
        }
        metrics = {metric: mean(values) for metric, values in scores.items()}
        return Scores(scored_records(self.samples, answers, scores), metrics)
