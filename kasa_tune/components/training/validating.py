"""What a model is asked at every validation besides its loss, and which validation was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig
from torchtune.modules import TransformerDecoder

from kasa_tune.components.data import build_tokenizer
from kasa_tune.components.evaluation import Decoding, LanguageModel, Prompt, build_tasks
from kasa_tune.components.evaluation.tasks import check_room
from kasa_tune.components.training.loss import logits_returned

LOSS = "val_loss"


@dataclass
class Asked:
    """What a model answered.

    Args:
        metrics: ``val_<task>_<metric>`` to its value.
        lower_is_better: which of them are better when they are lower.
        samples: prompts and answers, as JSON values.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    lower_is_better: set[str] = field(default_factory=set)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Validation:
    """The tasks and prompts of the section ``validation``.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        model: the model that will be asked. It may be on the meta device.

    Raises:
        ValueError: two tasks have one name, a row is bad, or an answer has no room in the model.
        FileNotFoundError: a task's file is missing.
    """

    def __init__(self, cfg: DictConfig, model: TransformerDecoder) -> None:
        self._cfg, self._seed = cfg.validation, cfg.seed
        self.tasks = build_tasks(self._cfg.tasks, limit=self._cfg.limit)
        tokenizer = build_tokenizer(cfg.tokenizer) if self.tasks else None
        for task in self.tasks:
            task.check_length(model.max_seq_len)
            task.check_prompts(tokenizer, model.max_seq_len)
        self._prompts = [Prompt(text, chat=True) for text in self._cfg.prompts]
        self._decoding = Decoding(max_new_tokens=self._cfg.max_new_tokens)
        if self._prompts:
            check_room("validation", self._decoding.max_new_tokens, model.max_seq_len)

    def ask(self, model: TransformerDecoder, tokenizer: Any) -> Asked:
        """Let a model that is being trained do the tasks and complete the prompts, greedily.

        Args:
            model: a model of ``build_training_model``. It is left as it was, in training mode.
            tokenizer: that of its data.
        """
        asked = Asked()
        if not self.tasks and not self._prompts:
            return asked
        with logits_returned(model):
            answering = LanguageModel(model, tokenizer, self._cfg.batch_size, self._seed)
            for task in self.tasks:
                scores = task.run(answering)
                for name, metric in scores.metrics.items():
                    asked.metrics[f"val_{task.name}_{name}"] = metric.value
                    if metric.lower_is_better:
                        asked.lower_is_better.add(f"val_{task.name}_{name}")
                shown = scores.records[: self._cfg.num_samples]
                asked.samples += [{"task": task.name, **record} for record in shown]
            answers = answering.complete(self._prompts, self._decoding) if self._prompts else []
        for prompt, answer in zip(self._prompts, answers, strict=True):
            asked.samples.append({"prompt": prompt.text, "answer": answer})
        return asked


@dataclass
class Best:
    """The best value so far of one validation metric.

    Args:
        metric: its name. None follows no metric.
        min_delta: by how much a value must be better than the best one to count as better.

    Attributes:
        value: the best value. None before the first one.
        step: the step it was measured after.
        validations_since: number of validations after it.
    """

    metric: str | None
    min_delta: float = 0.0
    value: float | None = None
    step: int | None = None
    validations_since: int = 0

    def update(self, step: int, values: Mapping[str, float], lower_is_better: set[str]) -> None:
        """Compare the values of a validation with the best one. NaN is never better."""
        if self.metric is None:
            return
        new = values[self.metric]
        better_by = math.inf if self.value is None else self.value - new
        if self.value is not None and self.metric not in lower_is_better:
            better_by = -better_by
        if better_by > self.min_delta and not math.isnan(new):
            self.value, self.step, self.validations_since = new, step, 0
        else:
            self.validations_since += 1

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it."""
        if self.metric is None:
            return None
        names = ("metric", "value", "step", "validations_since")
        return {name: getattr(self, name) for name in names}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from the state in a checkpoint, if it is of the same metric."""
        if saved and saved["metric"] == self.metric:
            self.value, self.step = saved["value"], saved["step"]
            self.validations_since = saved["validations_since"]
