"""Our decoder against transformers, for every family: whole rows, padded, packed, cached, beyond windows."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from kasa_tune.architectures import FAMILIES, Rotary, parts_of, read_architecture
from kasa_tune.architectures.shapes import wrong_shapes
from kasa_tune.components.evaluation.generation import complete
from kasa_tune.components.models.attention import attend, windowed
from kasa_tune.components.models.decoder import Decoder
from tests.parity.decoder_families import (
    CASES,
    LENGTH,
    VOCAB,
    load_ours,
    save_random,
    saved_tensors,
    tokens,
)

TOLERANCE = 1e-4  # of logits that reach from 1 to 100


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory):
    """By the name of a case its folder, transformers' model and ours."""

    @functools.cache
    def pair(case):
        folder = tmp_path_factory.mktemp("family")
        theirs = save_random(case, folder)
        return folder, theirs, load_ours(folder)

    return pair


def test_every_family_has_a_case():
    assert {case.partition(",")[0] for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_files_of_transformers_have_the_shapes_that_config_json_tells(pair_of, case):
    folder, *_ = pair_of(case)
    told, files = read_architecture(folder), list(folder.glob("*.safetensors"))
    assert wrong_shapes(told, files) == []
    wider = replace(told, embed_dim=told.embed_dim + 1, layers=(*told.layers, told.layers[0]))
    wrong = wrong_shapes(wider, files)
    assert len(wrong) > told.num_layers
    assert f"the weights of layer {told.num_layers} are missing" in wrong[-1]


@pytest.mark.parametrize("length", [LENGTH, 8])  # beyond every window and original length, and not
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(pair_of, case, length):
    _, theirs, ours = pair_of(case)
    expected = theirs(tokens(length=length)).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours(tokens(length=length)), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_samples_packed_into_one_row_do_not_see_each_other(pair_of, case):
    _, theirs, ours = pair_of(case)
    samples = [tokens(1, length) for length in (9, 8, 7)]
    if case == "phi3, long":  # transformers too decides by the longest row of the batch
        samples = [tokens(1, length) for length in (9, 8)]
    mask = torch.block_diag(*(torch.ones(s.shape[1], s.shape[1]).tril() for s in samples)).bool()
    positions = torch.cat([torch.arange(s.shape[1]) for s in samples])[None]
    packed = ours(torch.cat(samples, dim=1), mask=mask[None], input_pos=positions)
    expected = torch.cat([theirs(sample).logits for sample in samples], dim=1)
    torch.testing.assert_close(packed, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_greedy_completions_are_those_of_transformers(pair_of, case):
    _, theirs, ours = pair_of(case)
    lengths = (14, 9, 13) if case != "phi3, long" else (14, 14)  # none crosses the original length
    prompts = [tokens(1, length)[0].tolist() for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    expected = theirs.generate(
        ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, width:]
    found = complete(ours, prompts, max_new_tokens=10, stop_tokens=[])
    assert found == expected.tolist()


def changed(architecture):
    """By name, the architecture without one of the values that it has beyond Llama's."""
    values = {
        "norm_eps": 0.03,
        "attention_scale": architecture.attention_scale * 2,
        "embedding_scale": architecture.embedding_scale * 2,
        "residual_scale": architecture.residual_scale * 2,
        "logit_scale": architecture.logit_scale * 2,
        "activation": "gelu_tanh" if architecture.activation == "silu" else "silu",
        "norm_plus_one": not architecture.norm_plus_one,
        "attention_cap": None,
        "logit_cap": None,
        "query_temperature": None,
    }
    if architecture.qk_norm == "head":
        values["qk_norm_after_rotary"] = not architecture.qk_norm_after_rotary
    if architecture.experts:
        experts = architecture.experts
        values["experts"] = replace(experts, normalized=not experts.normalized)
    for name, value in values.items():
        if getattr(architecture, name) != value:
            yield name, replace(architecture, **{name: value})
    of_layers = {
        "window": lambda layer: replace(layer, window=None),
        "rotary": lambda layer: replace(layer, rotary=layer.rotary or Rotary()),
    }
    of_rotary = {
        "base": lambda rotary: replace(rotary, base=rotary.base * 2),
        "interleaved": lambda rotary: replace(rotary, interleaved=not rotary.interleaved),
        "scaling": lambda rotary: replace(rotary, scaling="none", options={}),
    }
    for name, change in of_rotary.items():
        of_layers[name] = lambda layer, change=change: replace(
            layer, rotary=layer.rotary and change(layer.rotary)
        )
    for name, change in of_layers.items():
        layers = tuple(map(change, architecture.layers))
        if layers != architecture.layers:
            yield name, replace(architecture, layers=layers)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_without_any_one_of_its_values_the_logits_are_others(pair_of, case):
    """The comparison above would be worth nothing if a value did not show in these models."""
    _, _, ours = pair_of(case)
    expected, weights, tried = ours(tokens()), ours.state_dict(), []
    for name, other in changed(ours.architecture):
        model = Decoder(other)
        model.load_state_dict(weights)
        assert (model(tokens()) - expected).abs().max() > 10 * TOLERANCE, name
        tried.append(name)
    assert len(tried) >= 6


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_the_checkpoint_has_its_place(pair_of, case):
    folder, _, ours = pair_of(case)
    architecture, saved = read_architecture(folder), saved_tensors(folder)
    named = {part.name for key in saved for part in parts_of(architecture, key)}
    assert named == set(ours.state_dict())


@pytest.mark.parametrize("window", [1, 5, 100])
def test_a_window_is_the_same_in_a_dense_and_in_a_block_mask(window):
    documents = torch.tensor([[0] * 40 + [1] * 24])

    def block_causal(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k])

    q, k, v = torch.randn(3, 1, 4, 64, 16, generator=torch.Generator().manual_seed(0)).unbind()
    k, v = k[:, :2], v[:, :2]
    at = torch.arange(64)
    dense = block_causal(0, 0, at[:, None], at[None])[None]
    blocks = create_block_mask(block_causal, 1, None, 64, 64, device="cpu")
    device = torch.device("cpu")
    for cap in (None, 1.5):
        found = [
            attend(q, k, v, windowed(mask, window, 64, device), scale=0.3, cap=cap)
            for mask in (dense, blocks)
        ]
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    looks_back = windowed(dense, window, 64, device).sum(-1)[0]
    assert looks_back.max() == min(window, 40)


def test_a_window_on_rows_padded_on_the_left_and_in_a_cache():
    """A token's own place is the last that it sees, wherever its row starts."""
    mask = torch.zeros(1, 2, 10, dtype=torch.bool)  # two queries into a cache of ten places
    mask[0, 0, 2:7], mask[0, 1, 2:8] = True, True  # two places of padding in front
    found = windowed(mask, 3, 2, mask.device)
    assert found[0].int().argmax(-1).tolist() == [4, 5]
    assert found[0].sum(-1).tolist() == [3, 3]


def test_vocabulary_covers_all_tokens():
    assert int(tokens(50).max()) < VOCAB
