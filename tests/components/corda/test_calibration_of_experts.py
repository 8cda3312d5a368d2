"""Covariances of mixtures of experts against float64 sums over what each expert got, one row at a time."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kasa_tune.architectures import Architecture, Experts, Layer
from kasa_tune.components.adapters import CorDALinear, attach
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.corda.calibration import covariances, damped_covariances, shared_inputs
from kasa_tune.components.corda.calibration_data import batched
from kasa_tune.components.models.decoder import Decoder
from kasa_tune.components.models.loading import build_on_meta

VOCAB, EXPERTS, ACTIVE = 50, 4, 2
ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    vocab_size=VOCAB,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    embed_dim=16,
    intermediate_dim=24,
    max_seq_len=32,
    layers=(Layer(sparse=True), Layer()),
    qk_norm="head",
    attention_scale=8**-0.5,
    experts=Experts(EXPERTS, ACTIVE, 12, normalized=True),
)
EXPERT = "layers.0.mlp.experts.{}.{}"


class FirstTwo(torch.nn.Module):
    """A router that likes the first two experts whatever it reads."""

    def forward(self, x):
        return torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(len(x), -1)


def build():
    """A model with adapters everywhere, all parameters random, and its groups of shared inputs."""

    def make():
        model = Decoder(ARCHITECTURE)
        return attach(model, CorDALinear, ["q_proj"], apply_to_mlp=True, rank=2)

    model, generator = make().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model, shared_inputs(build_on_meta(make, dtype=torch.float32))


def rows(lengths=(12, 5, 9, 1, 7)):
    generator = np.random.default_rng(0)
    return [{"tokens": generator.integers(1, VOCAB, n)} for n in lengths]


def batches(given):
    device = torch.device("cpu")
    return batched(given, tokenizer=SimpleNamespace(pad_id=0), batch_size=3, device=device)


def inputs_of(model, name, given):
    """What a linear reads when the base runs over one row at a time, ``[t, d]``."""
    seen, linear = [], model.get_submodule(name)
    hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    for _, adapter in adapter_linears(model):
        adapter.disabled = True
    with torch.no_grad():
        for row in given:
            model(torch.tensor(row["tokens"])[None])
    hook.remove()
    for _, adapter in adapter_linears(model):
        adapter.disabled = False
    return torch.cat([one.flatten(0, -2) for one in seen])


def test_gate_and_up_of_an_expert_share_their_input_and_experts_do_not():
    _, groups = build()
    for expert in range(EXPERTS):
        assert (EXPERT.format(expert, "w1"), EXPERT.format(expert, "w3")) in groups
        assert (EXPERT.format(expert, "w2"),) in groups


def test_an_expert_is_calibrated_on_the_tokens_it_gets_without_padding():
    model, groups = build()
    given = rows()
    found = {
        each.layers[0]: each
        for each in covariances(
            model, groups, [batches(given)], wanted=lambda name, round: True, dtype=torch.float64
        )
    }
    for group in groups:
        inputs = inputs_of(model, group[0], given)
        assert found[group[0]].num_tokens == len(inputs)
        torch.testing.assert_close(
            found[group[0]].matrix, inputs.T @ inputs, rtol=2e-5, atol=2e-5 * len(inputs)
        )
    total = sum(found[EXPERT.format(expert, "w1")].num_tokens for expert in range(EXPERTS))
    assert total == ACTIVE * sum(len(row["tokens"]) for row in given)


def test_an_expert_without_tokens_is_decomposed_by_its_weights_and_told(caplog):
    model, groups = build()
    model.layers[0].mlp.router = FirstTwo()
    with caplog.at_level(logging.WARNING):
        found = damped_covariances(
            model,
            groups,
            [batches(rows())],
            wanted=lambda name, round: True,
            damping=0.01,
            damping_search=False,
            normalization="unit_mean_diag",
            progress=lambda steps: steps,
            dtype=torch.float32,
        )
        by_layer = {names[0]: matrix for names, _, matrix in found if names}
    idle = [
        n for n in range(EXPERTS) if (by_layer[EXPERT.format(n, "w2")].diagonal() == 1.01).all()
    ]
    assert len(idle) == EXPERTS - ACTIVE
    for expert in idle:
        matrix = by_layer[EXPERT.format(expert, "w1")]
        torch.testing.assert_close(matrix, 1.01 * torch.eye(len(matrix)))
    assert "Calibration is thin" in caplog.text


def test_every_expert_gets_a_gradient_even_without_tokens():
    """All processes of a distributed run must find gradients of the same parameters."""
    model, _ = build()
    model.layers[0].mlp.router = FirstTwo()
    model(torch.ones(1, 3, dtype=torch.long)).sum().backward()
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert adapters
    assert all(parameter.grad is not None for parameter in adapters)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_mixture_is_the_weighted_sum_of_its_experts(normalized):
    experts = Experts(EXPERTS, ACTIVE, 12, normalized)
    model = Decoder(replace(ARCHITECTURE, experts=experts))
    mixture = model.layers[0].mlp
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(0.0, 0.3)
    x = torch.randn(2, 5, 16)
    probabilities = (x @ mixture.router.weight.T).softmax(-1)
    for b in range(2):
        for s in range(5):
            best = probabilities[b, s].topk(ACTIVE)
            shares = best.values / best.values.sum() if normalized else best.values
            expected = sum(
                share * mixture.experts[int(index)](x[b, s])
                for share, index in zip(shares, best.indices, strict=True)
            )
            torch.testing.assert_close(mixture(x)[b, s], expected)
