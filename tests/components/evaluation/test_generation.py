"""Completions in batches with a cache against one prompt at a time without any."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torchtune.models.llama2 import llama2
from torchtune.training import FullModelHFCheckpointer

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.evaluation.generation import complete
from kasa_tune.components.evaluation.language_model import LanguageModel
from tests.toy_models import FAMILIES, SIZES, VOCAB, randomized, tokens

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [31, 32], [8, 8, 8, 8], [7, 1], list(range(12))]


@torch.no_grad()
def greedy(model, prompt, count):
    """``count`` most likely tokens after a prompt, the whole sequence computed anew for each."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(model(torch.tensor([sequence]))[0, -1].argmax().item())
    return sequence[len(prompt) :]


def toy(name="llama3", seed=0):
    return randomized(FAMILIES[name].base(**FAMILIES[name].sizes), seed).eval()


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_batches_are_the_prompts_one_by_one(batch_size):
    model = toy()
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert (
        complete(model, PROMPTS, max_new_tokens=6, stop_tokens=[], batch_size=batch_size)
        == expected
    )
    assert len({tuple(row) for row in expected}) > 3  # or order and content could not be told


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    model = toy(name)
    expected = [greedy(model, prompt, 3) for prompt in PROMPTS]
    assert complete(model, PROMPTS, max_new_tokens=3, stop_tokens=[]) == expected


def adapted(dtype):
    model = randomized(FAMILIES["llama3"].kasa(["q_proj"], True, rank=4, **SIZES)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    for _, linear in adapter_linears(model):
        linear.initialize()
        nn.init.normal_(linear.lora_b.weight, std=0.3)
    return model


def test_with_adapters():
    model = adapted(torch.float32)
    expected = [greedy(model, prompt, 5) for prompt in PROMPTS]
    assert complete(model, PROMPTS, max_new_tokens=5, stop_tokens=[]) == expected


def test_with_adapters_on_a_half_precision_base():
    """Cached and uncached bf16 logits differ by rounding, so a chosen token may fall short of the best by as much."""
    model = adapted(torch.bfloat16)
    for prompt, completion in zip(
        PROMPTS, complete(model, PROMPTS, max_new_tokens=4, stop_tokens=[]), strict=True
    ):
        logits = model(torch.tensor([prompt + completion]))[
            0, len(prompt) - 1 : -1
        ].float()  # [new, vocab]
        chosen = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
        best, spread = logits.max(1).values, logits.std(1)
        assert len(completion) == 4
        assert (best - chosen < 16 * torch.finfo(torch.bfloat16).eps * spread).all()


def test_completions_end_before_a_stop_token():
    model = toy()
    whole = [greedy(model, prompt, 10) for prompt in PROMPTS]
    stop = [whole[0][3], whole[1][0]]
    expected = [
        row[: next((i for i, token in enumerate(row) if token in stop), 10)] for row in whole
    ]
    assert len(expected[1]) == 0
    assert 0 < len(expected[0]) < 10
    assert complete(model, PROMPTS, max_new_tokens=10, stop_tokens=stop) == expected


@pytest.mark.parametrize("free", [1, 0])
def test_padding_is_no_token_of_the_prompts_whatever_they_hold(free):
    model = toy()
    prompts = [list(range(VOCAB - free)), [0], [0, 0, 0], [VOCAB - 2, 0]]
    expected = [greedy(model, prompt, 5) for prompt in prompts]
    assert complete(model, prompts, max_new_tokens=5, stop_tokens=[]) == expected


def test_progress_counts_every_prompt_once():
    done = []
    complete(toy(), PROMPTS, max_new_tokens=2, stop_tokens=[], batch_size=4, progress=done.append)
    assert done == [4, 2]


def test_nothing_to_complete():
    assert complete(toy(), [], max_new_tokens=2, stop_tokens=[]) == []


# --------------------------------------------------------------------------------- lengths


def test_a_completion_may_fill_the_model_to_its_length():
    model, room = toy(), SIZES["max_seq_len"]
    prompt = [i % (VOCAB // 2) for i in range(room - 3)]
    assert complete(model, [prompt, [1]], max_new_tokens=3, stop_tokens=[]) == [
        greedy(model, prompt, 3),
        greedy(model, [1], 3),
    ]


@pytest.mark.parametrize(("length", "new"), [(62, 3), (65, 1), (0, 3), (2, 63)])
def test_prompts_without_room_or_content_are_refused(length, new):
    with pytest.raises(ValueError, match=f"1 to {64 - new} tokens .*max_new_tokens = {new}"):
        complete(toy(), [[1, 2], [1] * length], max_new_tokens=new, stop_tokens=[])


@pytest.mark.parametrize("new", [64, 600])
@pytest.mark.parametrize("prompts", [[], [[1]]])
def test_more_new_tokens_than_the_model_takes(new, prompts):
    with pytest.raises(
        ValueError,
        match=f"max_new_tokens = {new} exceeds the model's length: it takes 64 .*most 63",
    ):
        complete(toy(), prompts, max_new_tokens=new, stop_tokens=[])


# --------------------------------------------------------------------------------- sampling


def sampled(seed, **options):
    options = {"temperature": 1.0, "max_new_tokens": 8, "stop_tokens": []} | options
    return complete(toy(), PROMPTS, seed=seed, **options)


def test_sampling_is_decided_by_the_seed():
    torch.manual_seed(1)
    one = sampled(5)
    torch.manual_seed(2)
    assert sampled(5) == one
    assert sampled(6) != one
    assert one != complete(toy(), PROMPTS, max_new_tokens=8, stop_tokens=[])


def test_the_most_likely_of_one_is_greedy():
    assert sampled(5, top_k=1) == complete(toy(), PROMPTS, max_new_tokens=8, stop_tokens=[])


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (2.0, None), (0.5, None), (2.0, 3)]
)
def test_samples_are_distributed_as_the_model_says(temperature, top_k):
    model, draws = toy(), 4000
    logits = model(torch.tensor([[3, 1, 4]]))[0, -1].detach().double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    found = complete(
        model,
        [[3, 1, 4]] * draws,
        max_new_tokens=1,
        stop_tokens=[],
        temperature=temperature,
        top_k=top_k,
        batch_size=draws,
    )
    frequencies = torch.bincount(torch.tensor(found).flatten(), minlength=VOCAB) / draws
    # Total variation of 4000 draws over 40 values is about sqrt(40 / (2 pi 4000)) = 0.04 at most.
    assert (frequencies - logits.softmax(-1)).abs().sum() / 2 < 0.06


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_completing_leaves_the_global_generators_alone(temperature):
    model = toy()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    complete(model, PROMPTS, max_new_tokens=3, stop_tokens=[], temperature=temperature)
    assert (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    ) == before


# --------------------------------------------------------------------------------- afterwards


def training_gradients(model):
    model.train()
    model(tokens(4, 20)).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_the_model_trains_afterwards_as_if_nothing_had_been(name):
    untouched, used = toy(name), toy(name)
    complete(used, PROMPTS, max_new_tokens=5, stop_tokens=[], batch_size=4)
    assert not used.training
    assert not used.caches_are_setup()
    assert all(map(torch.equal, training_gradients(untouched), training_gradients(used)))
    used.eval()
    assert complete(used, PROMPTS[:3], max_new_tokens=4, stop_tokens=[]) == [
        greedy(used, p, 4) for p in PROMPTS[:3]
    ]


def test_caches_go_even_when_generating_fails():
    model = toy()
    with pytest.raises(IndexError):
        complete(model, [[VOCAB + 1]], max_new_tokens=2, stop_tokens=[])
    assert not model.caches_are_setup()
    assert complete(model, [[1]], max_new_tokens=2, stop_tokens=[]) == [greedy(model, [1], 2)]


# --------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def story_model(real_data, tmp_path_factory):
    """stories260K, a trained Llama of 260 thousand parameters."""
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(real_data / "models" / "stories260K" / "hf"),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA2",
        output_dir=str(tmp_path_factory.mktemp("checkpointer")),
    )
    model = llama2(
        vocab_size=512,
        num_layers=5,
        num_heads=8,
        num_kv_heads=4,
        embed_dim=64,
        max_seq_len=512,
        intermediate_dim=172,
        norm_eps=1e-5,
    )
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model.eval()


def test_a_story_goes_on_as_its_author_saw_it(story_model, story_tokenizer):
    texts = [
        "Once upon a time, there was",
        "Once upon a time, there was a little",
        "Lily",
        "One day, a dog and a cat",
    ]
    prompts = [story_tokenizer.encode(text, add_bos=True, add_eos=False) for text in texts]
    completions = complete(
        story_model, prompts, max_new_tokens=40, stop_tokens=story_tokenizer.stop_tokens
    )
    told = story_tokenizer.decode(prompts[0] + completions[0])
    assert told.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion[:20] == greedy(story_model, prompt, 20)


def test_stories_are_predicted_as_well_as_their_source_says(
    real_data, story_model, story_tokenizer
):
    """A mean loss of 1.424 on the last 60 stories cut to 512 tokens, by the data's README."""
    lines = (real_data / "datasets" / "tinystories" / "sample_2MiB.jsonl").open().readlines()
    rows = [story_tokenizer.encode(json.loads(line)["text"], add_eos=False) for line in lines[-60:]]
    texts = [story_tokenizer.decode(row[:512]) for row in rows]
    found = LanguageModel(story_model, story_tokenizer).rolling_log_likelihoods(texts)
    loss = -sum(score.value for score in found) / sum(score.num_tokens for score in found)
    assert loss == pytest.approx(1.424, abs=0.01)
