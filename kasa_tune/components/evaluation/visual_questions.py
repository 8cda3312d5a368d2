"""Questions about images, for models that see: short answers in words, and letters of options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kasa_tune.components.data.images import AspectRatio, check_image
from kasa_tune.components.data.visual import (
    Turn,
    VisualPrompts,
    render,
    sources_of,
    with_placeholders,
)
from kasa_tune.components.evaluation.answers import NORMALIZATIONS, exact_match
from kasa_tune.components.evaluation.bootstrap import mean
from kasa_tune.components.evaluation.choices import number_of
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress, Prompt
from kasa_tune.components.evaluation.rows import Row, RowError, filled, texts_of
from kasa_tune.components.evaluation.tasks import CompletionTask, Sample, Scores, scored_records
from kasa_tune.components.evaluation.visual_answers import (
    ENOUGH,
    chosen_letter,
    vqa_accuracy,
    vqa_normalized,
)

_NORMALIZATIONS = {"vqa": vqa_normalized, **NORMALIZATIONS}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class VisualTask(CompletionTask):
    """A task whose prompts have images, or none, in the words that ``visual_dataset`` trains on.

    Args:
        name, data_file, limit, measures, prompt, max_new_tokens, stop, decoding: see :class:`CompletionTask`. The
            prompt is the question. It gets ``<image>`` at its beginning for each image if it has none itself.
        image: column of the images: a path, ``data:image/png;base64,...``, a list of these, or null.
        image_dir: where relative paths begin; default the folder of the data file.
        image_aspect_ratio: ``pad`` or ``crop``: how an image becomes a square, best as in training.
        system: a sentence before the question.
    """

    def __init__(
        self,
        name: str,
        data_file: str,
        limit: int | None,
        measures: str | None,
        *,
        prompt: str,
        max_new_tokens: int,
        stop: list[str],
        decoding: Mapping[str, Any] | None,
        image: str,
        image_dir: str | None,
        image_aspect_ratio: AspectRatio,
        system: str | None,
    ) -> None:
        if image_aspect_ratio not in ("pad", "crop"):
            raise ValueError(
                f"Task {name}: image_aspect_ratio is {image_aspect_ratio!r}; it must be pad or crop."
            )
        self.image, self.system, self.image_aspect_ratio = image, system, image_aspect_ratio
        self.folder = Path(image_dir).expanduser() if image_dir else Path(data_file).parent
        super().__init__(
            name, data_file, limit, measures, prompt=prompt, chat=False,
            max_new_tokens=max_new_tokens, stop=stop, decoding=decoding,
        )  # fmt: skip

    def prompt_of(self, row: Row) -> Prompt:
        try:
            sources = sources_of(row, self.image, self.folder)
            for source in sources:
                check_image(source)
            question = with_placeholders(filled(self.template, row).strip(), len(sources))
        except ValueError as error:
            raise RowError(str(error)) from None
        text, _ = render([Turn(question, None)], "", self.system)
        return Prompt(text, images=(*sources,), image_aspect_ratio=self.image_aspect_ratio)

    def check_prompts(self, tokenizer: Any, max_seq_len: int) -> None:
        try:
            prompts = VisualPrompts(tokenizer)
        except ValueError as error:
            raise ValueError(f"Task {self.name}: {error}.") from None
        room = max_seq_len - self.decoding.max_new_tokens
        for number, sample in enumerate(self.samples):
            length = len(prompts.encode(sample.prompt.text)[0])
            if length > room:
                reason = (
                    f"its prompt has {length} tokens, those of images included, and the model has room "
                    f"for {room} beside max_new_tokens = {self.decoding.max_new_tokens}."
                )
                raise self.refusal(number, ValueError(reason))


class VisualQuestions(VisualTask):
    """VQA accuracy and exact match of short answers about images.

    Args:
        name: of the task.
        data_file: rows with a question, an image and answers.
        answer: column of the references: a text, a list of texts, or VQA's list of ``{"answer": ...}``.
        scoring: ``vqa``: by how many people gave an answer, for rows with those of four people or more; ``exact``: any
            reference counts in full.
        normalization: how answers are compared for the exact match: ``vqa``, ``squad``, ``triviaqa`` or ``none``.
        prompt: the question. LLaVA-1.5 was trained with the line ``Answer the question using a single word or phrase.``
            after it.
        max_new_tokens, stop, decoding, limit, measures, image, image_dir, image_aspect_ratio, system: see
            :class:`VisualTask`.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        prompt: str = "{question}",
        answer: str = "answer",
        scoring: Literal["vqa", "exact"] = "exact",
        normalization: Literal["vqa", "squad", "triviaqa", "none"] = "vqa",
        max_new_tokens: int = 16,
        stop: list[str] = ["\n"],  # noqa: B006 (nobody changes it)
        decoding: Mapping[str, Any] | None = None,
        image: str = "image",
        image_dir: str | None = None,
        image_aspect_ratio: AspectRatio = "pad",
        system: str | None = None,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        if scoring not in ("vqa", "exact"):
            raise ValueError(f"Task {name}: scoring must be vqa or exact; got {scoring!r}.")
        if normalization not in _NORMALIZATIONS:
            known = ", ".join(_NORMALIZATIONS)
            raise ValueError(f"Task {name}: normalization must be {known}; got {normalization!r}.")
        self.answer, self.scoring = answer, scoring
        self._normalize = _NORMALIZATIONS[normalization]
        super().__init__(
            name, data_file, limit, measures, prompt=prompt, max_new_tokens=max_new_tokens,
            stop=stop, decoding=decoding, image=image, image_dir=image_dir,
            image_aspect_ratio=image_aspect_ratio, system=system,
        )  # fmt: skip

    def sample(self, row: Row) -> Sample:
        given = row.get(self.answer)
        if isinstance(given, list) and all(map(_is_of_vqa, given)):
            row = {**row, self.answer: [one["answer"] for one in given]}
        if self.scoring == "exact":
            return Sample(self.prompt_of(row), texts_of(row, self.answer))
        people = row.get(self.answer)
        if not isinstance(people, list) or len(people) <= ENOUGH:
            raise RowError(
                f"{self.answer!r} must hold the answers of at least {ENOUGH + 1} people for the VQA "
                f"accuracy, got {people!r:.60}. Set scoring to exact for rows with one answer."
            )
        texts_of(row, self.answer)  # each is a text
        return Sample(self.prompt_of(row), people)

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        answers = self.ask(model, progress)
        pairs = list(zip(answers, (sample.references for sample in self.samples), strict=True))
        scores = {"vqa_accuracy": [vqa_accuracy(*pair) for pair in pairs]}
        scores = scores if self.scoring == "vqa" else {}
        scores["exact_match"] = [exact_match(*pair, self._normalize) for pair in pairs]
        metrics = {metric: mean(values) for metric, values in scores.items()}
        return Scores(scored_records(self.samples, answers, scores), metrics)


def _is_of_vqa(answer: Any) -> bool:
    """Whether an answer is as in the files of VQA."""
    return isinstance(answer, Mapping) and "answer" in answer


class VisualChoices(VisualTask):
    """Accuracy of the option that a completed answer names, and how many answers name one.

    Args:
        name: of the task.
        data_file: rows with a question, an image, the options and the right one.
        choices: column of the options: a list of texts.
        answer: column of the right one: its number from 0, its text, or its letter.
        prompt: the question, with ``{options}`` for the lines ``A. ...``, ``B. ...``.
        max_new_tokens, stop, decoding, limit, measures, image, image_dir, image_aspect_ratio, system: see
            :class:`VisualTask`.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        prompt: str = "{question}\n{options}\n"
        "Answer with the option's letter from the given choices directly.",
        choices: str = "choices",
        answer: str = "answer",
        max_new_tokens: int = 8,
        stop: list[str] = ["\n"],  # noqa: B006 (nobody changes it)
        decoding: Mapping[str, Any] | None = None,
        image: str = "image",
        image_dir: str | None = None,
        image_aspect_ratio: AspectRatio = "pad",
        system: str | None = None,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        self.choices, self.answer = choices, answer
        super().__init__(
            name, data_file, limit, measures, prompt=prompt, max_new_tokens=max_new_tokens,
            stop=stop, decoding=decoding, image=image, image_dir=image_dir,
            image_aspect_ratio=image_aspect_ratio, system=system,
        )  # fmt: skip

    def sample(self, row: Row) -> Sample:
        texts = texts_of(row, self.choices)
        if not 2 <= len(texts) <= len(_LETTERS):
            raise RowError(f"{self.choices!r} must hold 2 to {len(_LETTERS)} different texts.")
        letters = [*_LETTERS[: len(texts)]]
        right = number_of(row, self.answer, texts, letters)
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts))
        prompt = self.prompt_of({**row, "options": options})
        return Sample(prompt, {"choices": texts, "right": right})

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        answers = self.ask(model, progress)
        wanted = [sample.references for sample in self.samples]
        chosen = [chosen_letter(answer, one["choices"]) for answer, one in zip(answers, wanted)]
        correct = [float(number == one["right"]) for number, one in zip(chosen, wanted)]
        records = scored_records(self.samples, answers, {"chosen": chosen, "accuracy": correct})
        answered = mean([number is not None for number in chosen])
        return Scores(records, {"accuracy": mean(correct), "answered": answered})
