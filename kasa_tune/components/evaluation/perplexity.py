"""How well a model predicts texts."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from kasa_tune.components.evaluation.bootstrap import Metric, exponential
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress
from kasa_tune.components.evaluation.rows import Row, RowError, text_of
from kasa_tune.components.evaluation.tasks import Scores, Task


class Perplexity(Task):
    """Perplexity per token, per word and per byte, and bits per byte, of whole texts.

    A text that is longer than the model's length is predicted in windows. Words are what white space separates. Only
    numbers per word and per byte can be compared between models with other tokenizers.

    Args:
        name: of the task.
        data_file: rows with a text, or a ``.txt`` file, which is one text.
        column: of the text.
        limit, measures: see :class:`Task`.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        column: str = "text",
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        self.column = column
        super().__init__(name, data_file, limit, measures)

    def sample(self, row: Row) -> str:
        text = text_of(row, self.column)
        if not text.strip():
            raise RowError(f"{self.column!r} is empty.")
        return text

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        found = model.rolling_log_likelihoods(self.samples, progress=progress)
        losses = np.array([-score.value for score in found])
        counts = {
            "perplexity": np.array([score.num_tokens for score in found]),
            "word_perplexity": np.array([len(text.split()) for text in self.samples]),
            "byte_perplexity": np.array([len(text.encode("utf-8")) for text in self.samples]),
        }
        metrics = {name: exponential(losses, count) for name, count in counts.items()}
        metrics["bits_per_byte"] = _bits(losses, counts["byte_perplexity"])
        records = [
            {"text": text, "log_likelihood": score.value, "num_tokens": score.num_tokens}
            for text, score in zip(self.samples, found, strict=True)
        ]
        return Scores(records, metrics)

    @property
    def num_steps(self) -> None:
        """Not known: steps are windows of the model's length."""


def _bits(losses: np.ndarray, sizes: np.ndarray) -> Metric:
    """Loss in bits per byte."""
    sums = np.stack([losses / math.log(2), sizes], axis=1)
    return Metric(sums, lambda total: total[..., 0] / total[..., 1], lower_is_better=True)
