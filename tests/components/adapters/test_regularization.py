"""KaSA's regularizers against the equations, matrix by matrix in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kasa_tune.components.adapters import KaSALinear, LoRALinear
from kasa_tune.components.adapters.regularization import kasa_regularization, orthogonality_defect
from tests.tolerances import MODEL_FP32, SCALAR_FP32


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def layer(d_in, d_out, rank, start=nn.init.normal_):
    linear = KaSALinear(d_in, d_out, rank, truncation_rank=0)
    for parameter in (linear.lora_a.weight, linear.lora_b.weight):
        start(parameter)
    return linear


def orthonormal_layer(d_in, d_out, rank):
    linear = layer(d_in, d_out, rank, start=nn.init.zeros_)
    with torch.no_grad():  # unit vectors: orthonormal to the last bit
        linear.lora_a.weight.copy_(torch.eye(rank, d_in))
        linear.lora_b.weight.copy_(torch.eye(d_out, rank))
    return linear


def naive(layers, gram, reduction):
    """The two terms in float64, layer by layer, the Gram matrices formed in full; and their gradients by parameter."""
    l2 = l3 = torch.zeros((), dtype=torch.float64)
    leaves = []
    for linear in layers:
        a, b, d = (
            value.detach().double().requires_grad_()
            for value in (linear.lora_a.weight, linear.lora_b.weight, linear.lora_diag)
        )
        leaves += [a, b, d]
        l2 = l2 + sum(d[i] ** 2 for i in range(len(d)))
        for left, right in ((a, a.T), (b.T, b)) if gram == "thin" else ((a.T, a), (b, b.T)):
            product = left @ right
            l3 = l3 + ((product - torch.eye(len(product)).double()) ** 2).sum().sqrt()
    if reduction == "mean":
        l2, l3 = l2 / len(layers), l3 / len(layers)
    gradients = torch.autograd.grad(l2 + l3, leaves)
    return l2, l3, gradients


SHAPES = st.lists(
    st.tuples(st.integers(1, 7), st.integers(1, 7)).flatmap(
        lambda shape: st.tuples(*map(st.just, shape), st.integers(1, min(shape)))
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("gram", ["thin", "full"])
@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES)
def test_values_and_gradients_are_the_equations(gram, reduction, shapes):
    torch.manual_seed(0)
    layers = [layer(*shape) for shape in shapes]
    l2, l3 = kasa_regularization(layers, orthogonal_gram=gram, reduction=reduction)
    expected_l2, expected_l3, gradients = naive(layers, gram, reduction)
    torch.testing.assert_close(l2.double(), expected_l2, **SCALAR_FP32)
    torch.testing.assert_close(l3.double(), expected_l3, **SCALAR_FP32)
    assert l2.dtype == l3.dtype == torch.float32
    (l2 + l3).backward()
    trained = [
        p
        for linear in layers
        for p in (linear.lora_a.weight, linear.lora_b.weight, linear.lora_diag)
    ]
    for parameter, expected in zip(trained, gradients, strict=True):
        torch.testing.assert_close(parameter.grad.double(), expected, **MODEL_FP32)


def test_defaults_are_thin_and_mean():
    layers = [layer(6, 5, 3), layer(4, 5, 2)]
    assert kasa_regularization(layers) == kasa_regularization(
        layers, orthogonal_gram="thin", reduction="mean"
    )
    assert kasa_regularization(layers) != kasa_regularization(
        layers, orthogonal_gram="full", reduction="mean"
    )
    assert kasa_regularization(layers) != kasa_regularization(
        layers, orthogonal_gram="thin", reduction="sum"
    )


def test_squares_of_the_diagonal():
    linear = layer(6, 5, 4)
    linear.lora_diag.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert kasa_regularization([linear])[0].item() == 30
    assert kasa_regularization([linear, linear], reduction="sum")[0].item() == 60
    assert kasa_regularization([linear, linear], reduction="mean")[0].item() == 30


def test_orthonormal_factors_cost_nothing_and_pull_nowhere():
    linear = orthonormal_layer(7, 6, 3)
    _, l3 = kasa_regularization([linear])
    assert l3.item() == 0
    l3.backward()
    assert not linear.lora_a.weight.grad.any()
    assert not linear.lora_b.weight.grad.any()


def test_full_gram_of_orthonormal_factors_is_what_they_leave_out():
    linear = orthonormal_layer(7, 6, 3)
    _, l3 = kasa_regularization([linear], orthogonal_gram="full")
    assert l3.item() == pytest.approx(math.sqrt(7 - 3) + math.sqrt(6 - 3))
    l3.backward()
    assert not linear.lora_a.weight.grad.any()
    assert not linear.lora_b.weight.grad.any()


@pytest.mark.parametrize("gram", ["thin", "full"])
def test_square_factors_are_the_same_in_both_grams(gram):
    linear = orthonormal_layer(4, 4, 4)
    _, l3 = kasa_regularization([linear], orthogonal_gram=gram)
    assert l3.item() == 0
    l3.backward()
    assert linear.lora_a.weight.grad.isfinite().all()


@pytest.mark.parametrize(("gram", "expected"), [("thin", math.sqrt(3)), ("full", math.sqrt(50))])
def test_at_the_start_b_costs_a_constant_and_gets_no_gradient(gram, expected):
    linear = orthonormal_layer(20, 50, 3)
    nn.init.zeros_(linear.lora_b.weight)
    of_a = math.sqrt(20 - 3) if gram == "full" else 0.0
    _, l3 = kasa_regularization([linear], orthogonal_gram=gram)
    assert l3.item() == pytest.approx(expected + of_a)
    l3.backward()
    assert not linear.lora_b.weight.grad.any()
    assert linear.lora_a.weight.grad.isfinite().all()


def test_half_precision_factors_are_measured_in_float32():
    linear = layer(64, 48, 8).bfloat16()
    l2, l3 = kasa_regularization([linear])
    expected_l2, expected_l3, _ = naive([linear], "thin", "mean")
    torch.testing.assert_close(l2.double(), expected_l2, **SCALAR_FP32)
    torch.testing.assert_close(l3.double(), expected_l3, **SCALAR_FP32)


def test_shapes_are_grouped_and_none_is_lost():
    factors = [torch.randn(2, n) for n in (5, 3, 5, 5, 3)]
    expected = [(f.double() @ f.double().T - torch.eye(2).double()).norm() for f in factors]
    found = orthogonality_defect(factors, full=False)
    torch.testing.assert_close(
        found.double().sort().values, torch.stack(expected).sort().values, **SCALAR_FP32
    )


def test_only_kasa_layers_count():
    kasa = layer(6, 5, 3)
    model = nn.ModuleList([kasa, LoRALinear(6, 5, 3), nn.Linear(6, 5)])
    assert kasa_regularization(model.modules()) == kasa_regularization([kasa])
    assert [term.item() for term in kasa_regularization([LoRALinear(6, 5, 3)])] == [0, 0]


@pytest.mark.parametrize("options", [{"orthogonal_gram": "fat"}, {"reduction": "median"}], ids=str)
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=r"thin.*full.*mean.*sum.*got"):
        kasa_regularization([layer(6, 5, 3)], **options)
