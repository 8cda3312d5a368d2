"""Chunked cross-entropy against torch's on all logits at once."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kasa_tune.components.training.loss import ChunkedCrossEntropy, return_hidden_states
from tests.tolerances import FP64, MODEL_FP32
from tests.toy_models import FAMILIES, randomized, tokens

BATCH, LENGTH, WIDTH, VOCAB = 3, 7, 5, 11


def problem(share_labelled=0.6, dtype=torch.float64):
    """An output projection, hidden states ``[b, s, d]`` and labels ``[b, s]``, some of them ignored."""
    torch.manual_seed(0)
    output = nn.Linear(WIDTH, VOCAB, dtype=dtype)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCAB, (BATCH, LENGTH))
    labels[torch.rand(BATCH, LENGTH) >= share_labelled] = -100
    return output, hidden, labels


def gradients(loss, output, hidden):
    return torch.autograd.grad(loss, [hidden, output.weight, output.bias])


@settings(max_examples=40, deadline=None)
@given(
    chunk_size=st.integers(1, BATCH * LENGTH + 2),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    share_labelled=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
)
def test_any_chunking_is_torchs_cross_entropy_in_value_and_gradient(
    chunk_size, label_smoothing, share_labelled
):
    output, hidden, labels = problem(share_labelled)
    logits = output(hidden).float().flatten(0, 1)
    expected = F.cross_entropy(
        logits, labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )
    loss = ChunkedCrossEntropy(chunk_size, label_smoothing=label_smoothing)(output, hidden, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, **MODEL_FP32)
    for ours, theirs in zip(
        gradients(loss, output, hidden), gradients(expected, output, hidden), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **MODEL_FP32)


def test_value_is_minus_the_log_probability():
    output, hidden, labels = problem()
    probabilities = output(hidden).exp() / output(hidden).exp().sum(-1, keepdim=True)
    expected = -sum(
        probabilities[b, t, labels[b, t]].log()
        for b in range(BATCH)
        for t in range(LENGTH)
        if labels[b, t] != -100
    )
    torch.testing.assert_close(
        ChunkedCrossEntropy()(output, hidden, labels).double(), expected, **MODEL_FP32
    )


def test_label_smoothing_spreads_the_target_over_the_vocabulary():
    output, hidden, labels = problem()
    logp = output(hidden).log_softmax(-1).flatten(0, 1)[labels.flatten() != -100]
    target = F.one_hot(labels.flatten()[labels.flatten() != -100], VOCAB) * 0.8 + 0.2 / VOCAB
    loss = ChunkedCrossEntropy(4, label_smoothing=0.2)(output, hidden, labels)
    torch.testing.assert_close(loss.double(), -(target * logp).sum(), **MODEL_FP32)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_only_labelled_positions_are_projected_a_chunk_at_a_time(chunk_size):
    output, hidden, labels = problem()
    seen = []

    def project(rows):
        seen.append(rows.detach())
        return output(rows)

    with torch.no_grad():
        ChunkedCrossEntropy(chunk_size)(project, hidden, labels)
    assert max(map(len, seen)) <= chunk_size
    assert torch.equal(torch.cat(seen), hidden[labels != -100])
    assert len(torch.cat(seen)) < BATCH * LENGTH


def test_ignored_positions_may_hold_anything():
    output, hidden, labels = problem()
    expected = ChunkedCrossEntropy()(output, hidden, labels).item()
    hidden.data[labels == -100] = float("nan")
    loss = ChunkedCrossEntropy()(output, hidden, labels)
    assert loss.item() == expected
    loss.backward()
    assert output.weight.grad.isfinite().all()
    assert not hidden.grad[labels == -100].any()


def test_another_ignore_index():
    output, hidden, labels = problem(share_labelled=1.0)
    expected = ChunkedCrossEntropy()(output, hidden, labels.where(labels != 4, -100))
    assert (labels == 4).any()
    torch.testing.assert_close(
        ChunkedCrossEntropy(ignore_index=4)(output, hidden, labels), expected, **FP64
    )


@torch.no_grad()
def test_without_gradients_the_value_is_the_same_also_where_nothing_is_labelled():
    for share_labelled in (0.0, 0.6):
        output, hidden, labels = problem(share_labelled)
        with torch.enable_grad():
            expected = ChunkedCrossEntropy(4)(output, hidden, labels)
        found = ChunkedCrossEntropy(4)(output, hidden, labels)
        assert found.item() == expected.item()
        assert not found.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_nothing_labelled_costs_nothing_and_pulls_nowhere(chunk_size):
    output, hidden, labels = problem(share_labelled=0.0)
    loss = ChunkedCrossEntropy(chunk_size)(output, hidden, labels)
    assert loss.item() == 0
    for gradient in gradients(loss, output, hidden):
        assert not gradient.any()


def test_logits_are_compared_in_float32():
    output, hidden, labels = problem(share_labelled=1.0, dtype=torch.bfloat16)
    loss = ChunkedCrossEntropy(4)(output, hidden, labels)
    expected = F.cross_entropy(
        output(hidden).double().flatten(0, 1), labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss.double(), expected, **MODEL_FP32)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("share_labelled", [0.3, 1.0])
def test_logits_are_computed_once_and_one_chunk_is_alive_at_a_time(share_labelled):
    output, hidden, labels = problem(share_labelled, dtype=torch.float32)
    logits = []

    def remember(_, __, result):
        assert (
            sum(ref() is not None for ref in logits) <= 1
        )  # the previous chunk's may die while this one's is made
        logits.append(weakref.ref(result))

    output.register_forward_hook(remember)
    loss = ChunkedCrossEntropy(4)(output, hidden, labels)
    assert all(ref() is None for ref in logits)
    loss.backward()
    assert len(logits) == -(-int((labels != -100).sum()) // 4)


def test_the_gradient_scales_with_the_loss():
    output, hidden, labels = problem()
    whole = gradients(ChunkedCrossEntropy(4)(output, hidden, labels), output, hidden)
    quarter = gradients(ChunkedCrossEntropy(4)(output, hidden, labels) / 4, output, hidden)
    for one, other in zip(whole, quarter, strict=True):
        torch.testing.assert_close(one, 4 * other, **FP64)


def test_a_frozen_output_gets_no_gradient_and_a_frozen_model_can_train_its_output():
    output, hidden, labels = problem()
    output.requires_grad_(False)
    ChunkedCrossEntropy(4)(output, hidden, labels).backward()
    assert output.weight.grad is None
    assert hidden.grad is not None
    output.requires_grad_(True)
    ChunkedCrossEntropy(4)(output, hidden.detach(), labels).backward()
    assert output.weight.grad is not None


def test_training_through_a_function_is_refused():
    output, hidden, labels = problem()
    with pytest.raises(TypeError, match="project must be a module"):
        ChunkedCrossEntropy()(lambda rows: output(rows), hidden, labels)


@pytest.mark.parametrize(
    "options", [{"chunk_size": 0}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}], ids=str
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="chunk_size must be >= 1 and label_smoothing in"):
        ChunkedCrossEntropy(**options)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_projected_afterwards_are_the_models_logits(name):
    family = FAMILIES[name]
    model = randomized(family.base(**family.sizes)).eval()
    logits = model(tokens())
    return_hidden_states(model)
    hidden = model(tokens())
    assert hidden.shape == (*tokens().shape, family.sizes["embed_dim"])
    torch.testing.assert_close(model.output(hidden).float(), logits, **MODEL_FP32)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_models_output_can_be_trained_through(name):
    family = FAMILIES[name]
    model = randomized(family.base(**family.sizes))
    labels = tokens().roll(-1, dims=1)
    expected = F.cross_entropy(
        model(tokens()).float().flatten(0, 1), labels.flatten(), reduction="sum"
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = torch.autograd.grad(expected, parameters)
    return_hidden_states(model)
    loss = ChunkedCrossEntropy(5)(model.output, model(tokens()), labels)
    for gradient, other in zip(torch.autograd.grad(loss, parameters), exact, strict=True):
        error = torch.linalg.vector_norm(gradient - other)
        assert error <= 1e-4 * torch.linalg.vector_norm(other) + 1e-6
