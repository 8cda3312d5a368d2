"""Adapter linears on NF4 weights against the same linears on the dequantized ones, and their state."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune import modules, training
from torchtune.modules.peft import disable_adapter

from kasa_tune.components.adapters import CorDALinear, KaSALinear, LoRALinear
from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_state_dict,
    load_adapter_state_dict,
)
from kasa_tune.components.linalg.decomposition import co_svd, smallest_triplets, split_component
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize, from_parts, is_quantized, quantize, to_parts
from kasa_tune.components.models.loading import put_weight
from kasa_tune.components.quantized.base import quantized_linears
from kasa_tune.components.quantized.start import quantized_start
from kasa_tune.methods import METHODS
from tests.tolerances import assert_rounding_only, assert_same_bits
from tests.toy_models import FAMILIES, randomized, tokens

D_IN, D_OUT, RANK, ALPHA, BLOCK = 24, 16, 3, 7.0, 8
KINDS = ("lora", "kasa", "corda", "corda, folded", "corda, factored")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def nf4(weight, dtype=torch.float32):
    return quantize(weight, block_size=BLOCK, dtype=dtype)


def start(linear, full, dtype=torch.float32):
    """Give a linear the NF4 copy of a full weight and start its adapter, as the recipe does."""
    method = "qkasa" if isinstance(linear, KaSALinear) else "qlora"
    in_nf4 = partial(nf4, dtype=dtype)
    quantized_start(full, linear, METHODS[method], quantize=in_nf4).put_into(linear)


def quantized(kind, *, dtype=torch.float32, use_bias=False, trained=True):
    """A linear of a kind on an NF4 weight, as the recipe makes it, with the full weight as ``full``."""
    torch.manual_seed(0)
    options = {"rank": RANK, "alpha": ALPHA, "use_bias": use_bias}
    if kind == "corda, factored":
        options["edit_storage"] = "factored"
    linear = {"lora": LoRALinear, "kasa": KaSALinear}.get(kind, CorDALinear)(D_IN, D_OUT, **options)
    linear.full = torch.randn(D_OUT, D_IN)
    if use_bias:
        linear.bias.data = torch.randn(D_OUT).to(dtype)
    if kind == "corda, folded":
        put_weight(linear, linear.full)
        linear.start_from(split_component(co_svd(linear.full, None, 5, "ipm"), linear.scaling))
        put_weight(linear, nf4(linear.weight, dtype))
    elif kind == "corda, factored":
        put_weight(linear, nf4(linear.full, dtype))
        linear.start_from(split_component(co_svd(linear.full, None, 5, "ipm"), linear.scaling))
    else:
        start(linear, linear.full, dtype)
    if trained:
        for name in linear.adapter_params():
            linear.get_parameter(name).data.normal_()
    return linear


def formula(linear, *, disabled=False):
    """The matrix that the linear multiplies by and that of the magnitudes it adds, float64."""
    weight = dequantize(linear.weight, linear.weight.dtype).double()
    edit, edit_size = (
        linear.edit.dense().double(),
        linear.edit.out.double().abs() @ linear.edit.into.double().abs(),
    )
    scale = (
        linear.scaling * linear.lora_diag.detach().double()
        if hasattr(linear, "lora_diag")
        else linear.scaling
    )
    a, b = (factor.weight.detach().double() for factor in (linear.lora_a, linear.lora_b))
    update, update_size = (b * scale) @ a, (b * scale).abs() @ a.abs()
    if disabled:
        return weight + edit * linear.folded, weight.abs() + edit_size * linear.folded
    return weight + update - edit * (not linear.folded), weight.abs() + update_size + edit_size * (
        not linear.folded
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_on_the_dequantized_weight(kind, use_bias, dtype):
    linear = quantized(kind, dtype=dtype, use_bias=use_bias)
    assert is_quantized(linear.weight)
    bias = linear.bias.detach().double() if use_bias else torch.zeros(D_OUT).double()
    for shape in ((4, D_IN), (2, 3, D_IN)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = linear(x)
        upstream = torch.randn(y.shape).to(dtype)
        y.backward(upstream)
        matrix, size = formula(linear)
        assert y.dtype == dtype
        inputs = x.detach().double()
        assert_rounding_only(
            y.detach(), inputs @ matrix.T + bias, inputs.abs() @ size.T + bias.abs(), dtype
        )
        assert_rounding_only(
            x.grad, upstream.double() @ matrix, upstream.double().abs() @ size, dtype
        )
        linear.disabled = True
        matrix, size = formula(linear, disabled=True)
        assert_rounding_only(
            linear(x).detach(), inputs @ matrix.T + bias, inputs.abs() @ size.T + bias.abs(), dtype
        )
        linear.disabled = False
    assert linear.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_update_are_those_on_the_dequantized_weight(kind):
    linear, plain = quantized(kind), quantized(kind)
    put_weight(plain, dequantize(linear.weight))
    x = torch.randn(5, D_IN)
    for each in (linear, plain):
        each(x).square().sum().backward()
    for name in linear.adapter_params():
        gradient = linear.get_parameter(name).grad
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_is_what_the_forward_multiplies_by(kind, dtype):
    linear = quantized(kind, dtype=dtype)
    matrix, size = formula(linear)
    merged = linear.merged_weight()
    assert merged.dtype == torch.float32
    assert not is_quantized(merged)
    assert_rounding_only(merged, matrix, size, torch.float32)


def test_corda_starts_as_the_quantized_rest_and_the_whole_of_what_was_taken_out():
    linear = quantized("corda, folded", trained=False)
    assert linear.folded
    part = co_svd(linear.full, None, 5, "ipm")
    taken = part.vectors.double() @ part.projection.double()
    rest = dequantize(nf4(linear.full - taken.float())).double()
    x = torch.randn(6, D_IN)
    expected, size = (
        x.double() @ (rest + taken).T,
        x.double().abs() @ (rest.abs() + 2 * taken.abs()).T,
    )
    assert_rounding_only(linear(x).detach(), expected, size, torch.float32)
    linear.disabled = True
    assert_rounding_only(linear(x).detach(), expected, size, torch.float32)
    # What is kept in full is not subject to rounding to 4 bits: the start is closer to the weight than NF4 of it all.
    assert (linear.merged_weight() - linear.full).norm() < (
        dequantize(nf4(linear.full)) - linear.full
    ).norm()


def test_without_its_adapter_a_trained_corda_linear_is_as_it_started():
    linear = quantized("corda, folded", trained=False)
    x = torch.randn(6, D_IN)
    started = linear(x)
    for name in linear.adapter_params():
        linear.get_parameter(name).data.normal_()
    assert not torch.allclose(linear(x), started, atol=0.1)
    linear.disabled = True
    torch.testing.assert_close(linear(x), started, rtol=1e-5, atol=1e-4)


def test_kasa_takes_the_triplets_of_the_full_weight_beside_the_quantized_one():
    linear = quantized("kasa", trained=False)
    exact, _ = smallest_triplets(linear.full, RANK)
    assert (linear.folded, linear.edit.rank) == (False, RANK)
    assert_same_bits(linear.weight, nf4(linear.full))
    torch.testing.assert_close(linear.edit.dense(), exact.dense(), rtol=1e-5, atol=1e-6)
    of_the_quantized, _ = smallest_triplets(dequantize(linear.weight), RANK)
    assert not torch.allclose(linear.edit.dense(), of_the_quantized.dense(), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_factored_start_is_the_quantized_weight_bit_for_bit(dtype):
    linear = quantized("corda, factored", dtype=dtype, use_bias=True, trained=False)
    x = torch.randn(4, D_IN).to(dtype)
    assert linear.edit.rank == 5
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("storage", ["auto", "factored"])
def test_kasa_is_undone_bit_for_bit_without_its_adapter(storage):
    linear = KaSALinear(D_IN, D_OUT, RANK, edit_storage=storage)
    full = torch.randn(D_OUT, D_IN)
    start(linear, full)
    linear.disabled = True
    x = torch.randn(4, D_IN)
    assert torch.equal(linear(x), F.linear(x, linear.weight))
    assert linear.edit.rank


@pytest.mark.parametrize("make", [KaSALinear, CorDALinear])
def test_folding_into_a_quantized_weight_is_refused_and_changes_nothing(make):
    linear = make(D_IN, D_OUT, RANK, edit_storage="folded")
    put_weight(linear, nf4(torch.randn(D_OUT, D_IN)))
    before = {
        name: tensor.clone() for name, tensor in linear.state_dict().items() if name != "weight"
    }
    weight = nf4(dequantize(linear.weight))
    edit = LowRank(torch.randn(D_OUT, 2), torch.randn(2, D_IN))
    with pytest.raises(RuntimeError, match="quantized: take the edit out of it before"):
        linear.set_edit(edit)
    assert not linear.folded
    assert linear.weight.shape == weight.shape
    assert is_quantized(linear.weight)
    for name, tensor in before.items():
        assert torch.equal(linear.state_dict()[name], tensor), name


def test_an_edit_that_has_been_taken_out_is_noted_and_nothing_else():
    linear = CorDALinear(D_IN, D_OUT, RANK)
    weight = nf4(torch.randn(D_OUT, D_IN))
    put_weight(linear, weight)
    edit = LowRank(torch.randn(D_OUT, 2), torch.randn(2, D_IN))
    linear.set_edit(edit, taken_out=True)
    assert linear.folded
    assert_same_bits(linear.weight, weight)
    x = torch.randn(4, D_IN)
    assert torch.equal(linear(x), F.linear(x, weight))  # B is zero
    linear.disabled = True
    torch.testing.assert_close(
        linear(x), F.linear(x, weight) + x @ edit.dense().T, rtol=1e-5, atol=1e-4
    )
    with pytest.raises(RuntimeError, match="folded in"):
        linear.set_edit(edit, taken_out=True)


@pytest.mark.parametrize("make", [KaSALinear, CorDALinear])
def test_an_edit_can_be_taken_out_of_a_plain_weight_elsewhere_too(make):
    linear = make(D_IN, D_OUT, RANK)
    weight = torch.randn(D_OUT, D_IN)
    put_weight(linear, weight)
    linear.set_edit(LowRank(torch.randn(D_OUT, 2), torch.randn(2, D_IN)), taken_out=True)
    assert linear.folded
    assert torch.equal(linear.weight, weight)


# --------------------------------------------------------------------------------- state


def model(kind, name="llama3", *, started=True, storage=None):
    """A toy whose block linears are NF4, and their weights."""
    family = FAMILIES[name]
    options = {"rank": RANK, "alpha": ALPHA} | ({"edit_storage": storage} if storage else {})
    made = getattr(family, kind)(
        ["q_proj", "v_proj"], apply_to_mlp=True, **options, **family.sizes
    ).eval()
    made.load_state_dict(randomized(family.base(**family.sizes)).state_dict(), strict=False)
    linears = quantized_linears(made, BLOCK)
    for index, (path, linear) in enumerate(linears.items()):
        full = linear.weight.detach().clone()
        adapted = hasattr(linear, "lora_a")
        if adapted and kind == "corda" and started:
            linear.start_from(
                split_component(co_svd(full, None, 1 + index % 4, "ipm"), linear.scaling)
            )
        if adapted and started and kind != "corda":
            start(linear, full)
        else:
            put_weight(linear, nf4(linear.weight))
        assert is_quantized(made.get_submodule(path).weight)
    return made, linears


def weights_of(linears):
    return {path: linear.weight for path, linear in linears.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2"])
@pytest.mark.parametrize("kind", ["lora", "kasa", "corda"])
def test_an_adapter_comes_back_onto_the_same_quantized_base_bit_for_bit(kind, name, checkpointing):
    trained, linears = model(kind, name)
    for _, linear in adapter_linears(trained):
        for parameter in linear.adapter_params():
            nn.init.normal_(linear.get_parameter(parameter), std=0.3)
    state = {key: tensor.clone() for key, tensor in adapter_state_dict(trained).items()}
    again, others = model(kind, name, started=False)
    for path, linear in others.items():
        put_weight(linear, linears[path].weight)
    if checkpointing:
        training.set_activation_checkpointing(again, {modules.TransformerSelfAttentionLayer})
    load_adapter_state_dict(again, state)
    x = tokens()
    assert torch.equal(again(x), trained(x))
    with disable_adapter(again), disable_adapter(trained):
        assert torch.equal(again(x), trained(x))
    for (_, linear), (_, expected) in zip(
        adapter_linears(again), adapter_linears(trained), strict=True
    ):
        assert linear.folded is expected.folded is (kind == "corda")
        assert (linear.rank, linear.scaling) == (expected.rank, expected.scaling)
        assert torch.equal(linear.merged_weight(), expected.merged_weight())
    for key, tensor in adapter_state_dict(again).items():
        assert torch.equal(tensor, state[key])


def test_a_factored_edit_on_a_quantized_base_stays_in_the_forward():
    trained, linears = model("kasa", storage="factored")
    state = adapter_state_dict(trained)
    again, others = model("kasa", storage="factored", started=False)
    for path, linear in others.items():
        put_weight(linear, linears[path].weight)
    load_adapter_state_dict(again, state)
    assert not any(linear.folded for _, linear in adapter_linears(again))
    assert all(linear.edit.dense().any() for _, linear in adapter_linears(again))
    assert torch.equal(again(tokens()), trained(tokens()))


def test_a_plain_lora_of_corda_linears_comes_back_too():
    """QLoRA with a builder of CorDA's linears: nothing was taken out."""
    trained, linears = model("corda", started=False)
    for _, linear in adapter_linears(trained):
        nn.init.normal_(linear.lora_b.weight)
    again, others = model("corda", started=False)
    for path, linear in others.items():
        put_weight(linear, linears[path].weight)
    load_adapter_state_dict(again, adapter_state_dict(trained))
    assert not any(linear.folded for _, linear in adapter_linears(again))
    assert torch.equal(again(tokens()), trained(tokens()))
    with disable_adapter(again), disable_adapter(trained):
        assert torch.equal(again(tokens()), trained(tokens()))


def test_a_plain_base_under_a_saved_corda_adapter_is_folded_as_ever():
    family, options = FAMILIES["llama3"], {"rank": RANK, "alpha": ALPHA}
    weights = randomized(family.base(**family.sizes)).state_dict()
    models = [family.corda(["q_proj"], **options, **family.sizes).eval() for _ in range(2)]
    for each in models:
        each.load_state_dict(weights, strict=False)
    for _, linear in adapter_linears(models[0]):
        linear.start_from(split_component(co_svd(linear.weight, None, 2, "ipm"), linear.scaling))
    load_adapter_state_dict(models[1], adapter_state_dict(models[0]))
    for (name, linear), (_, expected) in zip(
        adapter_linears(models[1]), adapter_linears(models[0]), strict=True
    ):
        assert not torch.equal(linear.weight, weights[f"{name}.weight"])
        assert torch.equal(linear.weight, expected.weight)


@pytest.mark.parametrize("kind", ["lora", "kasa", "corda"])
def test_moving_and_reading_the_state_keep_the_codes(kind):
    made, linears = model(kind)
    before = weights_of(linears)
    moved = made.to(device="cpu")
    state = moved.state_dict()
    for path, weight in before.items():
        assert_same_bits(moved.get_submodule(path).weight, weight)
        assert_same_bits(state[f"{path}.weight"], weight)
    other, _ = model(kind)
    other.load_state_dict(state, assign=True)
    for path, weight in before.items():
        assert_same_bits(other.get_submodule(path).weight, weight)


def test_a_copy_by_parts_has_the_same_codes_and_its_own_storage():
    weight = nf4(torch.randn(D_OUT, D_IN))
    kind, parts, numbers = to_parts(weight)
    copied = from_parts(kind, {name: part.clone() for name, part in parts.items()}, numbers)
    assert_same_bits(copied, weight)
    before = dequantize(weight)
    to_parts(copied)[1]["quantized_data"].fill_(0)
    assert torch.equal(dequantize(weight), before)
