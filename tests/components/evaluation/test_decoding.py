"""Settings that exclude each other, tokens that may not repeat, the nucleus of a distribution."""

import pytest
import torch

from kasa_tune.components.evaluation.decoding import Decoding, forbid_repeats, next_tokens


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer, at least 1; got 0"),
        ({"num_beams": 2.0}, "num_beams must be an integer"),
        ({"top_k": 0, "temperature": 1.0}, "top_k must be an integer, at least 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"temperature": -0.5}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p must be above 0 and at most 1"),
        ({"num_beams": 4, "temperature": 0.7}, "0.7 samples, num_beams 4 searches"),
        ({"top_k": 5}, "belong to sampling"),
        ({"top_p": 0.9}, "belong to sampling"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValueError, match=words):
        Decoding(**settings)


def forbidden(sequence, size, vocab=6):
    logits = forbid_repeats(torch.zeros(1, vocab), [sequence], size)
    return torch.where(logits[0] == -torch.inf)[0].tolist()


def test_what_would_repeat_a_sequence_is_impossible():
    # 1 2 has gone on with 3 and with 4
    assert forbidden([1, 2, 3, 1, 2, 4, 1, 2], 3) == [3, 4]
    assert forbidden([1, 2, 3], 3) == []
    assert forbidden([5, 5], 2) == [5]
    assert forbidden([1, 4, 1], 1) == [1, 4]
    assert forbidden([1, 2], 0) == []
    assert forbidden([], 3) == []
    logits = torch.zeros(1, 6)
    forbid_repeats(logits, [[5, 5]], 2)
    assert not logits.isinf().any()  # what was given is left alone


def possible(probabilities, draws=400, **settings):
    """Which tokens are drawn of a distribution."""
    logits = torch.tensor([probabilities]).log().expand(draws, -1)
    decoding = Decoding(temperature=1.0, **settings)
    return set(next_tokens(logits, decoding, torch.Generator().manual_seed(0)).tolist())


def test_the_nucleus_is_the_fewest_tokens_with_the_share():
    spread = [0.1, 0.4, 0.2, 0.3]
    assert possible(spread) == {0, 1, 2, 3}
    assert possible(spread, top_p=0.65) == {1, 3}
    assert possible(spread, top_p=0.75) == {1, 2, 3}
    assert possible(spread, top_p=0.01) == {1}
    assert possible(spread, top_k=2) == {1, 3}
    assert possible(spread, top_k=3, top_p=0.4) == {1}  # of what is left after top_k, 0.4 / 0.9
    assert possible(spread, top_k=9) == {0, 1, 2, 3}


def test_greedy_takes_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert next_tokens(logits, Decoding(), torch.Generator()).tolist() == [1, 0]
