"""The answers that `evaluate_model` left in its folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa_tune.json_text import read_json_lines


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Args:
        model: its name in the evaluation.
        category: under which it is counted: the task, or the category of its question.
        identity: of prompt and sample, the same for all models.
        questions: the prompt, or those of all turns.
        texts: the answers to them.
        references: a right answer to each; empty where there is none.
    """

    model: str
    category: str
    identity: str
    questions: tuple[str, ...]
    texts: tuple[str, ...]
    references: tuple[str, ...] = ()


def read_answers(
    evaluations: Sequence[str],
    task: str,
    models: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Answer]:
    """The answers to a task with one prompt each, which have a reference.

    Args:
        evaluations: output folders of ``evaluate_model``. Each gives another answer to every prompt.
        task: its name there.
        models: whose answers are wanted; None: of all.
        limit: the first so many of each model and folder.

    Raises:
        FileNotFoundError: an evaluation has no answers of the task or a model.
        ValueError: a row lacks a prompt, an answer or a reference.
    """
    answers = []
    for number, evaluation in enumerate(evaluations):
        for path in _files(Path(evaluation) / "samples" / task, models):
            for row in read_json_lines(path, limit):
                references = row.get("references")
                first = references[0] if isinstance(references, list) and references else references
                texts = [row.get("prompt"), row.get("answer"), first]
                prompt, text, reference = (
                    (each,) if isinstance(each, str) else () for each in texts
                )
                if not (prompt and text and reference):
                    raise ValueError(
                        f"{path}, row {row.get('index')} has no texts as prompt, answer and reference: the protocols "
                        "single and pairwise judge answers of tasks whose references are texts."
                    )
                identity = f"{number}.{row.get('index')}"
                answers.append(Answer(path.stem, task, identity, prompt, text, reference))
    return answers


def read_turns(
    evaluations: Sequence[str],
    task: str,
    questions: str,
    references: str | None = None,
    models: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Answer]:
    """The answers to both turns of MT-Bench's questions.

    Args:
        evaluations: output folders of ``evaluate_model``.
        task: its name there.
        questions: FastChat's ``question.jsonl``.
        references: reference answers in its layout; None: there are none.
        models: whose answers are wanted; None: of all.
        limit: the first so many of each model and folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row is not in FastChat's layout, or an answer is to no question of the file.
    """
    asked = {row.get("question_id"): row for row in read_json_lines(questions)}
    known = {} if references is None else _turns_by_question(Path(references))
    answers = []
    for number, evaluation in enumerate(evaluations):
        for path in _files(Path(evaluation) / "judge" / task / "model_answer", models):
            for identity, turns in list(_turns_by_question(path).items())[:limit]:
                row = asked.get(identity)
                if row is None or not _are_texts(row.get("turns")):
                    raise ValueError(
                        f"{questions} has no question {identity}, which {path} answers."
                    )
                of_question = (tuple(row["turns"]), turns, known.get(identity, ()))
                category = str(row.get("category", ""))
                answers.append(Answer(path.stem, category, f"{number}.{identity}", *of_question))
    return answers


def _files(folder: Path, models: Sequence[str] | None) -> list[Path]:
    found = sorted(folder.glob("*.jsonl"))
    if models is not None:
        found = [folder / f"{model}.jsonl" for model in models]
    if not found:
        raise FileNotFoundError(f"There are no answers in {folder}. Run evaluate_model first.")
    return found


def _turns_by_question(path: Path) -> dict[Any, tuple[str, ...]]:
    turns = {}
    for row in read_json_lines(path):
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else {}
        given: Any = first.get("turns") if isinstance(first, dict) else None
        if not _are_texts(given) or not isinstance(row.get("question_id"), int | str):
            raise ValueError(f"{path}: a row is not in FastChat's layout of answers.")
        turns[row["question_id"]] = tuple(given)
    return turns


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
