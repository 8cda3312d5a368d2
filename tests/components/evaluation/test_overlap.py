"""BLEU, NIST, ROUGE-L and CIDEr against numbers worked out by hand, sacrebleu, and the invariances that they have."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest

from kasa_tune.components.evaluation import overlap

TEXTS = ["the cat sat on the mat", "a dog ran", "the blue bird sings in the old tree today"]
REFERENCES = [
    ["the cat is on the mat", "there is a cat on the mat"],
    ["a dog ran fast", "the dog ran", "a dog ran home at once"],
    ["a blue bird sings in the old tree today", "today the blue bird sings"],
]


def split(texts):
    return [text.split() for text in texts]


GIVEN, WANTED = split(TEXTS), [split(references) for references in REFERENCES]


def test_bleu_by_hand():
    """Of 6 words 5 are in one of two references (`the` twice), of 5 bigrams `the cat`, `on the`, `the mat`."""
    pytest.importorskip("sacrebleu")
    metric = overlap.bleu(TEXTS[:1], REFERENCES[:1])
    assert metric.sums[0].tolist() == [5, 3, 1, 0, 6, 5, 4, 3, 6, 6]
    assert metric.value == 0  # no 4-gram is there
    exact = overlap.bleu(["one two three four"], [["one two three four five"]])
    assert exact.value == pytest.approx(math.exp(1 - 5 / 4))  # all n-grams, one word short


def test_bleu_is_sacrebleus_for_the_whole_set():
    metrics = pytest.importorskip("sacrebleu.metrics")
    texts = [*TEXTS, "The Mill, near the river, isn't cheap; it's good."]
    references = [*REFERENCES, ["the Mill near the river isn't cheap, it's good.", "No."]]
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    expected = metrics.BLEU(lowercase=True, tokenize="13a").corpus_score(texts, streams).score
    assert overlap.bleu(texts, references).value * 100 == pytest.approx(expected, rel=1e-12)


def test_nist_by_hand():
    """Reference a b a c: `b`, `c` carry log2(4/1) bits, `a` one; `a b` log2(2/1), `b a` 0; the rest too."""
    metric = overlap.nist([["a", "b"]], [[["a", "b", "a", "c"]]])
    # (1 + 2) / 2 unigrams, 1 / 1 bigram; half as long as the reference
    brevity = math.exp(-math.log(2) / math.log(1.5) ** 2 * math.log(0.5) ** 2)
    assert metric.value == pytest.approx((1.5 + 1.0) * brevity)
    assert metric.sums[0].tolist() == [3, 1, 0, 0, 0, 2, 1, 0, 0, 0, 2, 4]


def test_nist_counts_an_n_gram_as_often_as_one_reference_has_it():
    metric = overlap.nist([["a", "a", "a"]], [[["a", "a"], ["a", "b"]]])
    assert metric.sums[0, 0] == pytest.approx(2 * math.log2(4 / 3))
    assert metric.sums[0, -1] == 2


def test_rouge_l_by_hand():
    """`the cat on the mat` is common: 5 of 6 words of the text, 5 of 6 of the first reference."""
    assert overlap.rouge_l(GIVEN[:1], WANTED[:1]).value == pytest.approx(5 / 6)
    # a b | a x b y: all of the text, half of the reference, beta 1.2
    f = 2.44 * 1 * 0.5 / (0.5 + 1.44 * 1)
    assert overlap.rouge_l([["a", "b"]], [[["a", "x", "b", "y"]]]).value == pytest.approx(f)
    assert overlap.rouge_l([["a"], []], [[["b"]], [["b"]]]).value == 0


def test_cider_of_a_copy_is_ten_for_the_orders_it_has():
    """Each n-gram that not all sets have: a copy has cosine 1 in each order it is long enough for."""
    texts = [["a", "b", "c", "d", "e"], ["f", "g"]]
    assert overlap.cider(texts, [[text] for text in texts]).sums[:, 0] == pytest.approx([10, 5])


def test_cider_by_hand():
    """Unigrams a, b of weight log 2 each against a alone: cosine 1/sqrt 2, no bigram, one bigram apart."""
    value = overlap.cider([["a", "b"], ["z"]], [[["a"]], [["z"]]]).sums[0, 0]
    assert value == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(2) / 4)


@pytest.mark.parametrize("metric", [overlap.nist, overlap.rouge_l, overlap.cider])
def test_order_of_samples_and_references_does_not_matter(metric):
    other = metric(GIVEN[::-1], [wanted[::-1] for wanted in WANTED[::-1]])
    assert other.value == pytest.approx(metric(GIVEN, WANTED).value)
    assert 0 < other.value < metric([w[0] for w in WANTED], WANTED).value


@pytest.mark.parametrize("metric", [overlap.nist, overlap.rouge_l, overlap.cider])
def test_empty_texts_score_nothing(metric):
    assert metric([[] for _ in GIVEN], WANTED).value == 0


def test_values_of_many_sums_at_once():
    metric = overlap.nist(GIVEN, WANTED)
    both = metric.value_of(np.stack([metric.sums.sum(0), 2 * metric.sums.sum(0)]))
    assert both == pytest.approx([metric.value] * 2)


def test_tokens_of_the_treebank():
    text = "It's near the river; they don't open before 7-8 p.m., O'Brien said (twice)."
    words = "it 's near the river they do n't open before 7-8 p.m o brien said twice".split()
    assert overlap.ptb_like_tokens(text) == words
    assert overlap.ptb_like_tokens("£20-25 family-friendly") == ["£", "20-25", "family-friendly"]


def test_real_texts_score_as_the_official_formulas_say(real_data):
    """547 sets of references; copies of the last one are scored against the others.

    The bounds are sanity bounds: people score 0.4 to 0.7 against each other.
    """
    groups = defaultdict(list)
    with open(real_data / "datasets" / "e2e" / "dev.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            groups[row["mr"]].append(overlap.ptb_like_tokens(row["ref"]))
    sets = [group for group in groups.values() if len(group) > 1][:150]
    texts, references = [group[-1] for group in sets], [group[:-1] for group in sets]
    assert 0.4 < overlap.rouge_l(texts, references).value < 0.7
    assert 0.8 < overlap.cider(texts, references).value < 3
    assert 5 < overlap.nist(texts, references).value < 9
