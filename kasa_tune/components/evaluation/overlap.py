"""The overlap metrics of the E2E challenge between texts and several references each: BLEU, NIST, ROUGE-L, CIDEr.

The formulas are those behind the official script (tuetschek/e2e-metrics). Texts come as lists of tokens. A hypothesis
has one or more references; ``references[i]`` are those of ``hypotheses[i]``.
"""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from kasa_tune.components.evaluation.bootstrap import Metric, mean

Tokens = Sequence[str]
NGram = tuple[str, ...]

_NIST_ORDER, _BLEU_ORDER, _CIDER_ORDER = 5, 4, 4
_NIST_BETA = math.log(2) / math.log(1.5) ** 2  # a length of two thirds is worth one half
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
_CONTRACTIONS = re.compile(r"(?i)(n't|'(?:s|m|d|re|ve|ll))\b")
_PTB_WORD = re.compile(r"\w+(?:[-.]\w+)*|\S")
_PUNCTUATION = set("'`.?!;:,()[]{}\"-…«»“”‘’") | {"``", "''", "--", "..."}


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """BLEU-4 of texts (Papineni 2002), 0 to 1, lower-cased with mteval's tokens, by the library sacrebleu.

    The sums are the matched and the possible n-grams of each order and both lengths, of which sacrebleu's own number
    for the whole set follows.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    scorer = importlib.import_module("sacrebleu.metrics").BLEU(
        lowercase=True, tokenize="13a", smooth_method="none"
    )
    rows = []
    for text, wanted in zip(hypotheses, references, strict=True):
        found = scorer.corpus_score([text], [[reference] for reference in wanted])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return Metric(np.asarray(rows, dtype=np.float64), _bleu_of)


def _bleu_of(sums: np.ndarray) -> np.ndarray:
    matched, possible = sums[..., :_BLEU_ORDER], sums[..., _BLEU_ORDER : 2 * _BLEU_ORDER]
    given, wanted = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.mean(np.log(matched / possible), axis=-1))
        brevity = np.exp(np.minimum(0.0, 1.0 - wanted / given))
    return np.where(matched.min(axis=-1) > 0, precision * brevity, 0.0)


def nist(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Metric:
    """NIST-5 (Doddington 2002): matched n-grams weighted by how rare they are in the references.

    The weights come from all references and stay the same in resamples.
    """
    counts = Counter(
        gram
        for wanted in references
        for tokens in wanted
        for order in range(1, _NIST_ORDER + 1)
        for gram in _ngrams(tokens, order)
    )
    total = sum(len(tokens) for wanted in references for tokens in wanted)
    rows = []
    for tokens, wanted in zip(hypotheses, references, strict=True):
        row = []
        for order in range(1, _NIST_ORDER + 1):
            most = _largest_counts(wanted, order)
            matched = Counter(_ngrams(tokens, order)) & most
            row.append(sum(n * _information(gram, counts, total) for gram, n in matched.items()))
        lengths = [len(tokens), sum(map(len, wanted)) / len(wanted)]
        possible = [max(0, len(tokens) - order) for order in range(_NIST_ORDER)]
        rows.append([*row, *possible, *lengths])
    return Metric(np.asarray(rows, dtype=np.float64), _nist_of)


def _information(gram: NGram, counts: Counter[NGram], total: int) -> float:
    return math.log2((counts[gram[:-1]] if len(gram) > 1 else total) / counts[gram])


def _nist_of(sums: np.ndarray) -> np.ndarray:
    information = sums[..., :_NIST_ORDER]
    possible = sums[..., _NIST_ORDER : 2 * _NIST_ORDER]
    with np.errstate(divide="ignore"):
        shortness = np.log(np.minimum(1.0, sums[..., -2] / sums[..., -1]))
    score = np.sum(information / np.maximum(possible, 1), axis=-1)
    return score * np.exp(-_NIST_BETA * shortness**2)


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Metric:
    """ROUGE-L as of COCO: F with beta 1.2 of the longest common subsequence, 0 to 1, mean over texts.

    Precision and recall are each of the reference where they are largest.
    """
    return mean([_rouge_l(text, wanted) for text, wanted in zip(hypotheses, references)])


def _rouge_l(text: Tokens, references: Sequence[Tokens]) -> float:
    common = [(_common_length(text, wanted), len(wanted)) for wanted in references]
    precision = max(shared for shared, _ in common) / max(len(text), 1)
    recall = max(shared / max(length, 1) for shared, length in common)
    if not precision or not recall:
        return 0.0
    weight = _ROUGE_BETA**2
    return (1 + weight) * precision * recall / (recall + weight * precision)


def _common_length(left: Tokens, right: Tokens) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for i, other in enumerate(right, 1):
            diagonal, row[i] = row[i], diagonal + 1 if token == other else max(row[i], row[i - 1])
    return row[-1]


def cider(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Metric:
    """CIDEr-D (Vedantam 2015): ten times the clipped cosine of tf-idf vectors of n-grams, mean over texts.

    In how many reference sets an n-gram occurs is counted once, over all samples.
    """
    frequency = Counter(
        gram
        for wanted in references
        for gram in {
            gram
            for tokens in wanted
            for order in range(1, _CIDER_ORDER + 1)
            for gram in _ngrams(tokens, order)
        }
    )
    vector = partial(_weighted, frequency=frequency, log_size=math.log(len(references)))
    return mean(
        [
            sum(_cider(vector(text), vector(reference)) for reference in wanted) / len(wanted)
            for text, wanted in zip(hypotheses, references, strict=True)
        ]
    )


def _weighted(
    tokens: Tokens, *, frequency: Counter[NGram], log_size: float
) -> tuple[list[dict[NGram, float]], int]:
    """The tf-idf vector of each order, and the number of bigrams."""
    vectors = [
        {
            gram: count * (log_size - math.log(max(1, frequency[gram])))
            for gram, count in Counter(_ngrams(tokens, order)).items()
        }
        for order in range(1, _CIDER_ORDER + 1)
    ]
    return vectors, max(0, len(tokens) - 1)


def _cider(
    text: tuple[list[dict[NGram, float]], int], reference: tuple[list[dict[NGram, float]], int]
) -> float:
    (given, length), (wanted, other) = text, reference
    closeness = math.exp(-((length - other) ** 2) / (2 * _CIDER_SIGMA**2))
    similar = 0.0
    for h, r in zip(given, wanted, strict=True):
        product = sum(
            min(weight, r.get(gram, 0.0)) * r.get(gram, 0.0) for gram, weight in h.items()
        )
        norms = math.hypot(*h.values()) * math.hypot(*r.values())
        similar += product / norms if norms else 0.0
    return 10 * closeness * similar / _CIDER_ORDER


def mteval_tokens(text: str) -> list[str]:
    """Lower-case tokens of mteval-v13a, by sacrebleu.

    Raises:
        ImportError: sacrebleu is not installed.
    """
    tokenizer = importlib.import_module("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    return tokenizer(text.lower()).split()


def ptb_like_tokens(text: str) -> list[str]:
    """Lower-case words as the Penn Treebank splits them, without punctuation, in plain Python.

    Contractions are split (do n't, it 's). It is close to Stanford's tokenizer, which the official script runs in
    Java, and not equal to it.
    """
    spaced = _CONTRACTIONS.sub(r" \1 ", text.replace("’", "'"))
    tokens: list[str] = []
    for word in spaced.lower().split():
        tokens += [word] if _CONTRACTIONS.fullmatch(word) else _PTB_WORD.findall(word)
    return [token for token in tokens if token not in _PUNCTUATION]


def _largest_counts(references: Iterable[Tokens], order: int) -> Counter[NGram]:
    most: Counter[NGram] = Counter()
    for tokens in references:
        most |= Counter(_ngrams(tokens, order))
    return most


def _ngrams(tokens: Tokens, order: int) -> list[NGram]:
    return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
