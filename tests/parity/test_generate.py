"""Greedy decoding, sampling and beam search against transformers' `generate`, on random models of three families."""

import pytest
import torch
import transformers

from kasa_tune.components.evaluation import Decoding, generate
from tests.parity.hf_families import FAMILIES, VOCAB, random_hf_model
from tests.parity.test_hf_logits import our_model

pytestmark = pytest.mark.parity

STOPS = [2, 11, 29, 53]
PROMPTS = [[1, 17, 40, 3, 40, 3, 8], [1, 90], [1, 5, 5, 5, 60, 33], [1, 70, 71, 72, 70, 71]]
NEW = 14
BEAMS = {
    "papers, medium": {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4},
    "papers, large": {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
    "plain": {"num_beams": 4},
    "two": {"num_beams": 2, "no_repeat_ngram_size": 2},
    "long": {"num_beams": 3, "length_penalty": 2.0},
    "short": {"num_beams": 3, "length_penalty": -1.0},
    "sum": {"num_beams": 5, "length_penalty": 0.0},
    "early": {"num_beams": 4, "early_stopping": True},
    "early, long": {"num_beams": 3, "early_stopping": True, "length_penalty": 1.5},
}


@pytest.fixture(scope="module", params=["llama2", "gemma2", "qwen2"])
def pair(request, tmp_path_factory):
    """One model on both roads."""
    family = FAMILIES[request.param]
    theirs = random_hf_model(family)
    folder = tmp_path_factory.mktemp("model") / "hf"
    theirs.save_pretrained(folder)
    return theirs.eval(), our_model(folder, family)


def by_transformers(model, prompts, **options):
    """New tokens of each prompt before a stop token; prompts are padded on the left and masked."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW, eos_token_id=STOPS, pad_token_id=0, bos_token_id=1, **options
    )
    with torch.no_grad():
        found = model.generate(ids, attention_mask=mask, generation_config=settings)
    cut = []
    for row in found[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in STOPS), len(row))
        cut.append(row[:end])
    return cut


def ours(model, prompts, batch_size=16, seed=0, **options):
    decoding = Decoding(max_new_tokens=NEW, **options)
    return generate(model, prompts, decoding, stop_tokens=STOPS, batch_size=batch_size, seed=seed)


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_greedy(pair, size):
    theirs, model = pair
    expected = [
        by_transformers(theirs, [prompt], do_sample=False, no_repeat_ngram_size=size)[0]
        for prompt in PROMPTS
    ]
    assert ours(model, PROMPTS, no_repeat_ngram_size=size) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


@pytest.mark.parametrize("name", BEAMS)
def test_beam_search(pair, name):
    theirs, model = pair
    expected = [
        by_transformers(theirs, [prompt], do_sample=False, **BEAMS[name])[0] for prompt in PROMPTS
    ]
    assert ours(model, PROMPTS, **BEAMS[name]) == expected
    assert ours(model, PROMPTS, batch_size=2, **BEAMS[name]) == expected


def test_beam_search_of_a_padded_batch(pair):
    theirs, model = pair
    expected = by_transformers(theirs, PROMPTS, do_sample=False, num_beams=3, length_penalty=0.7)
    assert ours(model, PROMPTS, num_beams=3, length_penalty=0.7) == expected


def test_beams_are_no_greedy_decoding_and_end_at_different_lengths(pair):
    """Or the tests above would show little."""
    model = pair[1]
    found = {
        name: ours(model, PROMPTS, **options) for name, options in {"greedy": {}, **BEAMS}.items()
    }
    assert len({str(rows) for rows in found.values()}) > 4
    lengths = {len(row) for rows in found.values() for row in rows}
    assert min(lengths) < NEW


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "no_repeat_ngram_size": 2},
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampling_draws_the_same_numbers(pair, options, seed):
    """On prompts of one length, which are one batch on both sides."""
    theirs, model = pair
    prompts = [[1, 17, 40], [1, 90, 4], [1, 5, 60]]
    top_k = options.get("top_k", 0)  # transformers' own default is 50
    torch.manual_seed(seed)
    expected = by_transformers(theirs, prompts, do_sample=True, **options | {"top_k": top_k})
    assert ours(model, prompts, seed=seed, **options) == expected
    assert all(0 <= token < VOCAB for row in expected for token in row)
