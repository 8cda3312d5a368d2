"""The eight commonsense sets in LLM-Adapters' files: BoolQ, PIQA, Social IQa, HellaSwag, WinoGrande, ARC, OpenBookQA.

Each row has an ``instruction`` that states the question, its choices and the form of the answer, and the ``answer``:
``true``, ``solution2``, ``option1``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torchtune.data import AlpacaToMessages

from kasa_tune.components.data import LLMAdaptersToMessages
from kasa_tune.components.evaluation.bootstrap import mean
from kasa_tune.components.evaluation.choices import Choice, ChoiceTask
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress, Prompt
from kasa_tune.components.evaluation.rows import Row, RowError, text_of
from kasa_tune.components.evaluation.tasks import CompletionTask, Sample, Scores, scored_records

_FORMAT = re.compile(r"\s*Answer format: (\S+)\s*$")
_QUESTION = re.compile(r"question: |sentence: ")
# How lm-eval puts a question, by the kind of the answer.
_CONTEXTS = {
    "solution": "Question: {}\nAnswer:",
    "true": "Question: {}\nAnswer:",
    "ending": "{}",
}
_CONTEXTS_OF_TASKS = {"social_i_qa": "Q: {}\nA:", "openbookqa": "{}"}
_CONTEXT = "Question: {}\nAnswer:"


class CommonsenseAnswers(CompletionTask):
    """Accuracy of generated answers, as LLM-Adapters counts them: the first answer word in the completion.

    Args:
        name: of the task.
        data_file: rows of one of the eight sets, or of several.
        published_layout: prompts in the layout of LLM-Adapters' script, indentation and stray comment included, in
            place of Alpaca's; set it as in training.
        chat, max_new_tokens, stop, decoding, limit, measures: see :class:`CompletionTask`. The published script
            searches with 4 beams.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        published_layout: bool = False,
        chat: bool = True,
        max_new_tokens: int = 32,
        stop: list[str] = [],  # noqa: B006 (nobody changes it)
        decoding: Mapping[str, Any] | None = None,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        kind = LLMAdaptersToMessages if published_layout else AlpacaToMessages
        self._layout = kind().template
        super().__init__(
            name,
            data_file,
            limit,
            measures,
            prompt="{instruction}",
            chat=chat,
            max_new_tokens=max_new_tokens,
            stop=stop,
            decoding=decoding,
        )

    def sample(self, row: Row) -> Sample:
        words, answer = answer_words(row), text_of(row, "answer")
        if answer not in words:
            raise RowError(f"'answer' is {answer!r:.40}, but the instruction asks for {words}.")
        layout = self._layout["prompt_input" if row.get("input") else "prompt_no_input"]
        text = layout.format(instruction=text_of(row, "instruction"), input=row.get("input", ""))
        return Sample(Prompt(text, self.chat), {"answer": answer, "among": words})

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        answers = self.ask(model, progress)
        wanted = [sample.references for sample in self.samples]
        found = [first_word(text, each["among"]) for text, each in zip(answers, wanted)]
        correct = [float(word == each["answer"]) for word, each in zip(found, wanted, strict=True)]
        records = scored_records(self.samples, answers, {"found": found, "accuracy": correct})
        answered = mean([word is not None for word in found])
        return Scores(records, {"accuracy": mean(correct), "answered": answered})


class CommonsenseChoices(ChoiceTask):
    """Accuracy by likelihood, the questions put as lm-eval's tasks put them.

    Two things differ from lm-eval, as LLM-Adapters' files leave them out: BoolQ has no passage, and HellaSwag's second
    sentence keeps its small first letter.

    Args:
        name: of the task.
        data_file: rows of one of the eight sets, or of several.
        limit, measures: see :class:`Task`.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        super().__init__(name, data_file, limit, measures)

    def sample(self, row: Row) -> Choice:
        words, answer = answer_words(row), text_of(row, "answer")
        if answer not in words:
            raise RowError(f"'answer' is {answer!r:.40}, but the instruction asks for {words}.")
        question, texts = question_and_choices(text_of(row, "instruction"), words)
        kind = re.sub(r"\d+$", "", words[0])
        if kind == "option":
            before, blank, after = question.partition("_")
            if not blank:
                raise RowError("the sentence has no blank _.")
            # The choices differ in what comes before; what follows is the same for all.
            contexts = [before + text for text in texts]
            return Choice(contexts, [after.strip()] * len(texts), words.index(answer))
        if kind == "ending":
            question, *texts = map(_without_headings, [question, *texts])
        form = _CONTEXTS_OF_TASKS.get(str(row.get("task"))) or _CONTEXTS.get(kind, _CONTEXT)
        return Choice([form.format(question)] * len(texts), texts, words.index(answer))


def _without_headings(text: str) -> str:
    """A text of HellaSwag without WikiHow's marks, as lm-eval shows it."""
    return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ").strip()


def answer_words(row: Row) -> list[str]:
    """The words of which one is the answer: ``["true", "false"]``, ``["answer1", "answer2", "answer3"]``.

    Raises:
        RowError: the instruction does not end in its answer format.
    """
    found = _FORMAT.search(text_of(row, "instruction"))
    words = found[1].split("/") if found else []
    if len(words) < 2 or not all(words):
        raise RowError("'instruction' must end in 'Answer format: true/false' or the like.")
    return words


def first_word(text: str, words: list[str]) -> str | None:
    """The first of the words that is in a text; None where none is."""
    found = re.search("|".join(map(re.escape, words)), text.strip())
    return found[0] if found else None


def question_and_choices(instruction: str, words: list[str]) -> tuple[str, list[str]]:
    """The question of an instruction, and the texts of its choices; ``yes`` and ``no`` for ``true`` and ``false``.

    Raises:
        RowError: they are not where LLM-Adapters puts them.
    """
    text = _FORMAT.sub("", instruction)
    start = _QUESTION.search(text)
    if not start:
        raise RowError("'instruction' has no 'question: ' or 'sentence: ' before the question.")
    text = text[start.end() :]
    if words[0] in ("true", "false"):
        return text.strip(), ["yes" if word == "true" else "no" for word in words]
    question, *texts = re.split(
        "".join(rf"\s*\b{word.capitalize()}: (.*?)" for word in words) + r"\s*$",
        text,
        maxsplit=1,
        flags=re.DOTALL,
    )[: len(words) + 1]
    if len(texts) != len(words) or not all(choice.strip() for choice in texts):
        raise RowError(f"'instruction' does not list the choices {', '.join(words)}.")
    return question.strip(), [choice.strip() for choice in texts]
