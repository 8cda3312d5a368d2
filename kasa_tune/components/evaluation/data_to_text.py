"""Texts about data with several references each: E2E and the five metrics of its challenge."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from kasa_tune.components.evaluation import overlap
from kasa_tune.components.evaluation.bootstrap import Metric
from kasa_tune.components.evaluation.language_model import LanguageModel, Progress
from kasa_tune.components.evaluation.rows import Row, RowError, filled, texts_of
from kasa_tune.components.evaluation.tasks import CompletionTask, Sample, Scores, scored_records

MetricName = Literal["bleu", "nist", "meteor", "rouge_l", "cider"]
METRICS: tuple[MetricName, ...] = ("bleu", "nist", "meteor", "rouge_l", "cider")
_ALL: list[MetricName] = list(METRICS)
_INSTALL = "pip install 'kasa_tune[evaluate]'"


class DataToText(CompletionTask):
    """BLEU, NIST, METEOR, ROUGE-L and CIDEr, as the official script of the E2E challenge computes them.

    Rows with an equal prompt are one sample with several references. All numbers are shares of 1 but NIST and CIDEr,
    which papers print as they are.

    METEOR, and the tokens of ROUGE-L and CIDEr with ``tokenization: java``, come from the jars in the package
    pycocoevalcap and need ``java``. With ``python``, tokens are nearly the same.

    Args:
        name: of the task.
        data_file: rows with data and a reference.
        references: column of the references: a text or a list of them.
        metrics: which of the five to compute.
        tokenization: ``java``, the official tokens; or ``python``.
        prompt, chat, max_new_tokens, stop, decoding, limit, measures: see :class:`CompletionTask`; ``limit`` counts
            rows, and cuts off references of the last sample where it falls between them.

    Raises:
        ValueError: a metric is unknown, or a package or ``java`` is missing.
    """

    def __init__(
        self,
        *,
        name: str,
        data_file: str,
        prompt: str = "{mr}\n",
        chat: bool = True,
        references: str = "ref",
        metrics: list[Literal["bleu", "nist", "meteor", "rouge_l", "cider"]] = _ALL,
        tokenization: Literal["java", "python"] = "java",
        max_new_tokens: int = 64,
        stop: list[str] = ["\n"],  # noqa: B006 (nobody changes it)
        decoding: Mapping[str, Any] | None = None,
        limit: int | None = None,
        measures: Literal["learned", "kept"] | None = None,
    ) -> None:
        self.references, self.tokenization = references, tokenization
        self.metrics = list(metrics)
        if not self.metrics or set(self.metrics) - set(METRICS):
            raise ValueError(f"Task {name}: metrics must be some of {', '.join(METRICS)}.")
        if tokenization not in ("java", "python"):
            raise ValueError(f"Task {name}: tokenization must be java or python.")
        _require_packages(name, self.metrics, tokenization)
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

    def samples_of(self, rows: Sequence[Row]) -> list[Sample]:
        """One sample for each prompt, with the references of all its rows."""
        found: dict[str, Sample] = {}
        for number, row in enumerate(rows):
            try:
                text, references = filled(self.template, row), texts_of(row, self.references)
                if not all(reference.strip() for reference in references):
                    raise RowError(f"{self.references!r} holds an empty text.")
            except RowError as error:
                raise self.refusal(number, error) from None
            sample = found.setdefault(text, Sample(self.prompt_of(row), []))
            sample.references.extend(references)
        return list(found.values())

    def run(self, model: LanguageModel, progress: Progress | None = None) -> Scores:
        answers = [" ".join(answer.split()) for answer in self.ask(model, progress)]
        metrics = self.score(answers)
        per_sample = {
            name: metric.sums[:, 0].tolist()
            for name, metric in metrics.items()
            if name in ("rouge_l", "cider")
        }
        notes = {"tokenization": self.tokenization}
        return Scores(scored_records(self.samples, answers, per_sample), metrics, notes)

    def score(self, answers: Sequence[str]) -> dict[str, Metric]:
        """The metrics of one text for each sample."""
        references = [sample.references for sample in self.samples]
        metrics: dict[str, Metric] = {}
        if "bleu" in self.metrics:
            metrics["bleu"] = overlap.bleu(answers, references)
        if "nist" in self.metrics:
            metrics["nist"] = overlap.nist(*_each(overlap.mteval_tokens, answers, references))
        if set(self.metrics) & {"meteor", "rouge_l", "cider"}:
            by_java = self.tokenization == "java" or "meteor" in self.metrics
            tokens = _tokens_of_java(answers, references) if by_java else None
            if "meteor" in self.metrics and tokens:
                metrics["meteor"] = _meteor(*tokens)
            if self.tokenization == "java" and tokens:
                split = _each(str.split, *tokens)
            else:
                split = _each(overlap.ptb_like_tokens, answers, references)
            for name, metric in (("rouge_l", overlap.rouge_l), ("cider", overlap.cider)):
                if name in self.metrics:
                    metrics[name] = metric(*split)
        return {name: metrics[name] for name in METRICS if name in metrics}


def _require_packages(name: str, metrics: Sequence[str], tokenization: str) -> None:
    """Refuse what this machine cannot compute, before any work."""
    needed = ["sacrebleu"] if {"bleu", "nist"} & set(metrics) else []
    with_java = [metric for metric in ("meteor", "rouge_l", "cider") if metric in metrics]
    if "meteor" in metrics or (tokenization == "java" and with_java):
        needed.append("pycocoevalcap")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    instead = "Or set tokenization: python, and metrics without meteor."
    if missing:
        hint = f" {instead}" if "pycocoevalcap" in missing else ""
        raise ValueError(
            f"Task {name} needs {' and '.join(missing)}, not installed here: {_INSTALL}.{hint}"
        )
    if "pycocoevalcap" in needed and shutil.which("java") is None:
        raise ValueError(
            f"Task {name} needs java for {', '.join(with_java)}, which is not installed here (Debian: apt-get install "
            f"default-jre-headless). {instead}"
        )


def _each(split: Any, answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple:
    """The tokens of answers and references."""
    return [split(text) for text in answers], [[split(text) for text in row] for row in references]


def _tokens_of_java(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Texts by Stanford's PTB tokenizer, lower-cased, without punctuation, tokens with spaces between them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = {i: [{"caption": _line(text)} for text in row] for i, row in enumerate(references)}
    given = {i: [{"caption": _line(text)}] for i, text in enumerate(answers)}
    wanted, found = PTBTokenizer().tokenize(texts), PTBTokenizer().tokenize(given)
    return [found[i][0] for i in given], [wanted[i] for i in texts]


def _line(text: str) -> str:
    """The text in one line. The tokenizer counts lines, so an empty one gets a sign that it leaves out again."""
    return " ".join(text.split()) or "."


def _meteor(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """METEOR 1.5 of all texts together. It does not follow from those of single texts, so it has no interval."""
    from pycocoevalcap.meteor.meteor import Meteor

    value, _ = Meteor().compute_score(
        dict(enumerate(references)), {i: [text] for i, text in enumerate(answers)}
    )
    sums = np.full((len(answers), 1), value / len(answers))
    return Metric(sums, lambda total: total[..., 0], has_interval=False)
