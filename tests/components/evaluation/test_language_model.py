"""Log-probabilities against a softmax by hand, windows of long texts, prompts and where answers end."""

import math

import pytest
import torch

from kasa_tune.components.evaluation.decoding import Decoding
from kasa_tune.components.evaluation.language_model import (
    LanguageModel,
    Prompt,
    before,
    rolling_windows,
)
from tests.toy_models import FAMILIES, SIZES, VOCAB, randomized


class Letters:
    """A tokenizer with a token for each letter; 0 begins a sequence, 1 ends it, 2 is a space."""

    bos_id, eos_id, stop_tokens, max_seq_len = 0, 1, [1], None

    def encode(self, text, add_bos=True, add_eos=False):
        ids = [2 if letter == " " else 3 + (ord(letter) - 97) % 30 for letter in text]
        return [0] * add_bos + ids + [1] * add_eos

    def decode(self, tokens):
        return "".join(" " if token == 2 else chr(97 + token - 3) for token in tokens if token > 1)

    def __call__(self, sample, inference=False):
        tokens = [0]
        for message in sample["messages"]:
            mark = [33] if message.role == "user" else [34]
            tokens += mark + self.encode(message.text_content, add_bos=False)
        return {"tokens": [*tokens, 1]}


def toy(batch_size=16, **sizes):
    sizes = SIZES | sizes
    model = randomized(FAMILIES["llama3"].base(**sizes)).eval()
    return LanguageModel(model, Letters(), batch_size=batch_size)


@torch.no_grad()
def by_hand(model, tokens, start):
    """The sum of log-probabilities of the tokens from a place on, one at a time, in float64."""
    total = 0.0
    for i in range(start, len(tokens)):
        logits = model(torch.tensor([tokens[:i]]))[0, -1].double()
        total += (logits[tokens[i]] - logits.logsumexp(0)).item()
    return total


PAIRS = [("once upon", " a time"), ("b", " c"), ("the quick brown fox", " jumps"), ("", "abc")]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_log_likelihoods_are_sums_of_log_softmax(batch_size):
    asked = toy(batch_size)
    found = asked.log_likelihoods(PAIRS)
    for (context, text), score in zip(PAIRS, found, strict=True):
        tokens = asked.tokenizer.encode(context + text)
        expected = by_hand(asked.model, tokens, 1 + len(context))
        assert score.value == pytest.approx(expected, abs=1e-4)
        assert score.num_tokens == len(text)


def test_spaces_between_belong_to_the_second_text():
    asked = toy()
    one, other = asked.log_likelihoods([("ab ", "cd"), ("ab", " cd")])
    assert one == other
    assert one.num_tokens == 3


def test_the_likeliest_text_is_greedy():
    asked = toy()
    (answer,) = asked.complete([Prompt("ab")], Decoding(max_new_tokens=4))
    tokens = asked.tokenizer.encode("ab")
    with torch.no_grad():
        best = asked.model(torch.tensor([tokens]))[0, -1].argmax().item()
    # Only letters can be asked for; the toy's likeliest token is one
    assert best > 2
    letter = asked.tokenizer.decode([best])
    assert answer.startswith(letter)
    good, bad = asked.log_likelihoods([("ab", letter), ("ab", chr(ord(letter) - 1))])
    assert good.is_greedy
    assert not bad.is_greedy
    assert good.value > bad.value


def test_a_text_that_is_too_long_loses_its_beginning():
    asked = toy(max_seq_len=8)
    (score,) = asked.log_likelihoods([("abcdefghij", "kl")])
    tokens = asked.tokenizer.encode("abcdefghijkl")[-9:]
    assert score.value == pytest.approx(by_hand(asked.model, tokens, 7), abs=1e-4)
    assert asked.num_cut == 1


# --------------------------------------------------------------------------------- whole texts


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17, 30])
def test_windows_predict_each_token_once(count):
    tokens = list(range(100, 100 + count + 1))
    rows = rolling_windows(tokens, 8)
    predicted = [token for row, start in rows for token in row[start:]]
    assert predicted == tokens[1:]
    assert all(2 <= len(row) <= 9 for row, _ in rows)
    assert all(start >= 1 for _, start in rows)
    if count > 8:  # the last one looks back as far as it can
        assert len(rows[-1][0]) == 9


def test_rolling_log_likelihoods():
    asked = toy(max_seq_len=6)
    texts = ["abcdefghijklmnop", "xyz", "q"]
    found = asked.rolling_log_likelihoods(texts)
    for text, score in zip(texts, found, strict=True):
        tokens = asked.tokenizer.encode(text)
        rows = rolling_windows(tokens, 6)
        expected = sum(by_hand(asked.model, row, start) for row, start in rows)
        assert score.value == pytest.approx(expected, abs=1e-4)
        assert score.num_tokens == len(text)


class NoBeginning(Letters):
    """A tokenizer without a beginning-of-sequence token, as Qwen's."""

    def encode(self, text, add_bos=True, add_eos=False):
        return super().encode(text, add_bos=False, add_eos=add_eos)


def test_a_tokenizer_without_a_beginning_token_has_its_end_token_there():
    asked = LanguageModel(toy().model, NoBeginning())
    (whole,) = asked.rolling_log_likelihoods(["abc"])
    alone, after = asked.log_likelihoods([("", "abc"), ("ab", "c")])
    tokens = [1, 3, 4, 5]
    assert whole.value == pytest.approx(by_hand(asked.model, tokens, 1), abs=1e-4)
    assert alone.value == pytest.approx(whole.value, abs=1e-4)
    assert whole.num_tokens == alone.num_tokens == 3
    assert after.value == pytest.approx(by_hand(asked.model, tokens[1:], 2), abs=1e-4)


def test_a_uniform_model_is_as_surprised_by_every_token():
    asked = toy()
    with torch.no_grad():
        asked.model.output.weight.zero_()
    (score,) = asked.rolling_log_likelihoods(["abcde"])
    assert score.value == pytest.approx(-5 * math.log(VOCAB))


# --------------------------------------------------------------------------------- completions


def test_answers_end_before_a_stop_text():
    asked = toy()
    prompts = [Prompt("ab"), Prompt("xyz"), Prompt("hello")]
    whole = asked.complete(prompts, Decoding(max_new_tokens=12))
    stop = [whole[0][5:7], whole[1][3]]
    done = []
    cut = asked.complete(prompts, Decoding(max_new_tokens=12), stop=stop, progress=done.append)
    assert cut == [before(text, stop) for text in whole]
    assert len(cut[1]) <= 3 < len(whole[1])
    assert sum(done) == 3


def test_the_text_before_the_first_of_several():
    assert before("one two three", ["three", "two"]) == "one "
    assert before("one", ["two"]) == "one"
    assert before("one", []) == "one"


def test_a_prompt_that_is_too_long_loses_its_beginning():
    asked = toy(max_seq_len=10)
    long, short = asked.complete([Prompt("abcdefghijkl"), Prompt("hi")], Decoding(max_new_tokens=4))
    assert asked.num_cut == 1
    tokens = asked.tokenizer.encode("abcdefghijkl")[-6:]
    with torch.no_grad():
        best = asked.model(torch.tensor([tokens]))[0, -1].argmax().item()
    assert long.startswith(asked.tokenizer.decode([best]))
    assert short


def test_chat_prompts_are_in_the_tokenizers_form():
    asked = toy()
    assert asked.encode(Prompt("ab")) == [0, 3, 4]
    assert asked.encode(Prompt("ab", chat=True)) == [0, 33, 3, 4, 34]
    conversation = Prompt("c", chat=True, earlier=(("ab", "d"),))
    assert asked.encode(conversation) == [0, 33, 3, 4, 34, 6, 33, 5, 34]
