"""What a quantized linear starts as, by each method: against the same written down with a full SVD in float64."""

from functools import partial

import pytest
import torch
from torch import nn

from kasa_tune.components.adapters import CorDALinear, KaSALinear, LoRALinear
from kasa_tune.components.linalg.decomposition import co_svd, split_component
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize, quantize
from kasa_tune.components.quantized.start import QuantizedStart, quantized_start
from kasa_tune.methods import METHODS
from tests.tolerances import MODEL_FP32, assert_same_bits

QUANTIZED = [name for name, method in METHODS.items() if method.quantized]
D_OUT, D_IN, RANK, ALPHA = 24, 16, 3, 6.0
SCALING = ALPHA / RANK
in_nf4 = partial(quantize, block_size=8, scaler_block_size=4)


@pytest.fixture
def weight():
    return torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0))


def linear_for(method="qcorda"):
    if method == "qkasa":
        return KaSALinear(D_IN, D_OUT, RANK, ALPHA, truncation_rank=2)
    return (LoRALinear if method == "qlora" else CorDALinear)(D_IN, D_OUT, RANK, ALPHA)


def component_of(weight, rank=RANK):
    x = torch.randn(50, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return co_svd(weight, x.T @ x, rank, "ipm")


def start_of(method, weight, **options):
    if method == "qcorda":
        options = {"component": component_of(weight)} | options
    return quantized_start(weight, linear_for(method), METHODS[method], quantize=in_nf4, **options)


def first_triplets(matrix):
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :RANK] * s[:RANK]) @ v[:RANK]


def value_of(update):
    """``s B A`` in float64."""
    return SCALING * update.out.double() @ update.into.double()


def without(weight, component):
    return (weight.double() - component).float()


def assert_same_codes(actual, expected):
    """Codes and scales are equal, what the scales are multiples of up to a float32 rounding of the weight."""
    for name in ("quantized_data", "quantized_scalers"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    torch.testing.assert_close(dequantize(actual), dequantize(expected), **MODEL_FP32)


# --------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_linear_without_an_adapter_is_quantized_as_it_is(weight, method):
    start = quantized_start(weight, None, METHODS[method], quantize=in_nf4)
    assert (start.update, start.edit, start.component) == (None, None, None)
    assert_same_bits(start.weight, in_nf4(weight))


def test_qlora_takes_nothing_out(weight):
    start = start_of("qlora", weight)
    assert (start.update, start.edit, start.component) == (None, None, None)
    assert_same_bits(start.weight, in_nf4(weight))


def test_qkasa_quantizes_the_whole_weight_and_keeps_its_smallest_triplets_beside(weight):
    start = start_of("qkasa", weight)
    assert (start.update, start.component) == (None, None)
    assert_same_bits(start.weight, in_nf4(weight))
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(
        start.edit.dense().double(), (u[:, -2:] * s[-2:]) @ v[-2:], **MODEL_FP32
    )


@pytest.mark.parametrize("iterations", [None, 1, 2, 4])
def test_qpissa_is_the_first_triplets_of_the_weight_then_of_what_quantizing_loses(
    weight, iterations
):
    """Arxiv 2404.02948, section 4; a single iteration is what PiSSA takes out."""
    component = first_triplets(weight)
    for _ in range((iterations or 1) - 1):
        component = first_triplets(weight - dequantize(in_nf4(without(weight, component))))
    start = start_of("qpissa", weight, iterations=iterations)
    assert start.edit is None
    torch.testing.assert_close(value_of(start.update), component, **MODEL_FP32)
    assert_same_codes(start.weight, in_nf4(without(weight, value_of(start.update))))


@pytest.mark.parametrize("iterations", [None, 1, 2, 5])
def test_loftq_is_the_first_triplets_of_what_quantizing_loses_and_the_last_quantized_weight(
    weight, iterations
):
    """Arxiv 2310.08659, algorithm 1."""
    component = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for _ in range(iterations or 5):
        quantized = in_nf4(without(weight, component))
        component = first_triplets(weight - dequantize(quantized))
    start = start_of("loftq", weight, iterations=iterations)
    assert start.edit is None
    torch.testing.assert_close(value_of(start.update), component, **MODEL_FP32)
    assert_same_codes(start.weight, quantized)


def test_iterations_are_the_published_ones():
    iterations = {name: METHODS[name].quantization_iterations for name in QUANTIZED}
    assert {name: n for name, n in iterations.items() if n} == {"qpissa": 1, "loftq": 5}


@pytest.mark.parametrize("iterations", [None, 2])
def test_qcorda_takes_its_component_out_or_what_is_fitted_from_it(weight, iterations):
    given = component_of(weight)
    component = given.vectors.double() @ given.projection.double()
    for _ in range(iterations or 0):
        component = first_triplets(weight - dequantize(in_nf4(without(weight, component))))
    start = start_of("qcorda", weight, iterations=iterations)
    torch.testing.assert_close(value_of(start.update), component, **MODEL_FP32)
    assert_same_codes(start.weight, in_nf4(without(weight, value_of(start.update))))
    if iterations is None:
        assert torch.equal(start.component.vectors, given.vectors)
        assert torch.equal(start.component.singular_values, given.singular_values)


def test_the_rank_is_that_of_the_component(weight):
    start = start_of("qcorda", weight, component=component_of(weight, rank=5))
    assert start.update.rank == 5  # dynamic ranks differ from the linear's


@pytest.mark.parametrize("method", ["qcorda", "qpissa", "loftq"])
def test_the_update_is_the_split_of_the_component_told(weight, method):
    for split in ("balanced", "paper"):
        start = start_of(method, weight, split=split)
        expected = split_component(start.component, SCALING, split)
        assert torch.equal(start.update.out, expected.out)
        assert torch.equal(start.update.into, expected.into)
    balanced, paper = (
        start_of("qcorda", weight, split=split).update for split in ("balanced", "paper")
    )
    assert not torch.allclose(balanced.out, paper.out)


@pytest.mark.parametrize("method", ["qcorda", "qpissa"])
def test_what_is_taken_out_is_what_a_half_precision_update_holds(weight, method):
    start = start_of(method, weight, adapter_dtype=torch.bfloat16)
    assert start.update.out.dtype == start.update.into.dtype == torch.bfloat16
    assert_same_codes(start.weight, in_nf4(without(weight, value_of(start.update))))
    exact = start_of(method, weight)
    assert not torch.equal(dequantize(start.weight), dequantize(exact.weight))


@pytest.mark.parametrize("method", QUANTIZED)
def test_the_given_weight_stays(weight, method):
    before = weight.clone()
    start_of(method, weight)
    assert torch.equal(weight, before)
    assert not weight.requires_grad


@pytest.mark.parametrize("method", ["qkasa", "qpissa", "loftq"])
def test_a_damaged_weight_is_refused(weight, method):
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        start_of(method, weight)


# --------------------------------------------------------------------------------- into a linear


def used(method):
    """A linear that has been something else before."""
    linear = linear_for(method)
    for parameter in linear.parameters():
        nn.init.ones_(parameter)
    return linear


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_linear_computes_what_it_was_given(weight, method):
    start, linear = start_of(method, weight), used(method)
    start.put_into(linear)
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(2))
    assert_same_bits(linear.weight, start.weight)
    assert not linear.weight.requires_grad
    effective = dequantize(start.weight).double()
    if start.update:
        effective = effective + value_of(start.update)
        assert torch.equal(linear.lora_a.weight, start.update.into)
        assert torch.equal(linear.lora_b.weight, start.update.out)
    else:
        assert not linear.lora_b.weight.any()
        assert linear.lora_a.weight.std() > 0
    if start.edit:
        effective = effective - start.edit.dense().double()
    torch.testing.assert_close(linear(x).double(), x.double() @ effective.T, **MODEL_FP32)


@pytest.mark.parametrize("method", ["qcorda", "qpissa", "loftq"])
def test_what_was_taken_out_is_known_as_such(weight, method):
    start, linear = start_of(method, weight), linear_for(method)
    start.put_into(linear)
    assert linear.folded
    torch.testing.assert_close(linear.edit.dense().double(), value_of(start.update), **MODEL_FP32)
    with pytest.raises(RuntimeError, match="already has an edit folded in"):
        linear.start_from(start.update)


def test_without_its_adapter_qkasa_is_the_quantized_weight(weight):
    start, linear = start_of("qkasa", weight), linear_for("qkasa")
    start.put_into(linear)
    linear.disabled = True
    assert not linear.folded
    assert torch.equal(linear(torch.eye(D_IN)).T, dequantize(start.weight))


def test_a_linear_without_an_adapter_takes_the_weight(weight):
    linear = nn.Linear(D_IN, D_OUT, bias=False)
    QuantizedStart(in_nf4(weight)).put_into(linear)
    assert_same_bits(linear.weight, in_nf4(weight))


# --------------------------------------------------------------------------------- on a device


@pytest.mark.parametrize("method", QUANTIZED)
def test_on_the_same_device_it_is_the_same(weight, method):
    start = start_of(method, weight)
    moved = start.to("cpu")
    assert_same_bits(moved.weight, start.weight)
    for part in ("update", "edit"):
        one, other = getattr(start, part), getattr(moved, part)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.dense(), other.dense())
    assert (start.component is None) == (moved.component is None)


def test_all_parts_move(weight):
    low_rank = LowRank(torch.ones(D_OUT, 1), torch.ones(1, D_IN))
    moved = QuantizedStart(
        weight, update=low_rank, edit=low_rank, component=component_of(weight)
    ).to("meta")
    tensors = (moved.weight, moved.update.out, moved.update.into, moved.edit.out, moved.edit.into)
    assert all(
        tensor.is_meta for tensor in (*tensors, moved.component.vectors, moved.component.projection)
    )
