"""Adapter linears against the formula they implement, written out in float64 on dense matrices."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchtune.modules import peft

from kasa_tune.components.adapters import AdapterLinear, KaSALinear, LoRALinear
from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_state_dict,
    load_adapter_state_dict,
)
from kasa_tune.components.linalg.low_rank import LowRank
from tests.tolerances import EDIT_DTYPE, FP64, GRADCHECK, MODEL_FP32, assert_rounding_only

ALPHA = 6.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(
    linear: AdapterLinear, dtype: torch.dtype = torch.float32, seed: int = 0
) -> AdapterLinear:
    """The linear as after some training: random weight (and bias) of ``dtype``, its edit made, a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    linear.weight.data = torch.randn(
        linear.weight.shape, generator=generator, dtype=torch.float64
    ).to(dtype)
    if linear.bias is not None:
        linear.bias.data = torch.randn(linear.out_dim, generator=generator, dtype=torch.float64).to(
            dtype
        )
    linear.base = linear.weight.detach().clone().double()  # W0, for the formula
    linear.initialize()
    nn.init.normal_(linear.lora_b.weight)
    return linear


def smallest_part(weight, k):
    """E = Σ σ_i u_i v_iᵀ over the k smallest singular values, from a full float64 SVD."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    first = len(s) - k
    return u[:, first:] * s[first:] @ vt[first:]


def dense_parts(linear):
    """``W0``, ``E`` and ``s B diag(d) A`` in float64, the latter also with absolute values."""
    a, b = linear.lora_a.weight.detach().double(), linear.lora_b.weight.detach().double()
    d = (
        linear.lora_diag.detach().double()
        if isinstance(linear, KaSALinear)
        else torch.ones(len(a)).double()
    )
    s = linear.alpha / linear.rank
    edit = smallest_part(linear.base, linear.edit.rank)
    return linear.base, edit, s * b @ torch.diag(d) @ a, s * b.abs() @ torch.diag(d.abs()) @ a.abs()


def formula(linear, x):
    """``(W0 - E + s B diag(d) A) x + bias`` and its magnitude, for ``x [n, d_in]``."""
    base, edit, update, update_magnitude = dense_parts(linear)
    bias = (
        torch.zeros(linear.out_dim).double()
        if linear.bias is None
        else linear.bias.detach().double()
    )
    x = x.double()
    magnitude = x.abs() @ (base.abs() + edit.abs() + update_magnitude).T + bias.abs()
    return x @ (base - edit + update).T + bias, magnitude


@st.composite
def kasa_cases(draw):
    """Shapes, ranks, storages and leading dimensions of a KaSA linear."""
    d_out, d_in = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    full = min(d_out, d_in)
    options = {
        "rank": draw(st.integers(1, full)),
        "truncation_rank": draw(st.integers(0, full - 1)),
        "use_bias": draw(st.booleans()),
        "edit_storage": draw(st.sampled_from(["auto", "folded", "factored"])),
    }
    leading = draw(st.lists(st.integers(0, 3), max_size=4))
    return d_in, d_out, options, leading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=60, deadline=None)
@given(case=kasa_cases())
def test_kasa_forward_is_the_formula(dtype, case):
    torch.manual_seed(0)
    d_in, d_out, options, leading = case
    linear = trained(KaSALinear(d_in, d_out, alpha=ALPHA, **options), dtype)
    x = torch.randn(*leading, d_in).to(dtype)
    y = linear(x)
    assert y.shape == (*leading, d_out)
    assert y.dtype == dtype
    expected, magnitude = formula(linear, x.reshape(-1, d_in))
    assert_rounding_only(y.reshape(-1, d_out), expected, magnitude, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_bias", [False, True])
def test_lora_forward_is_the_formula(dtype, use_bias):
    linear = trained(LoRALinear(10, 7, rank=3, alpha=ALPHA, use_bias=use_bias), dtype)
    x = torch.randn(4, 5, 10).to(dtype)
    expected, magnitude = formula(linear, x.reshape(-1, 10))
    assert_rounding_only(linear(x).reshape(-1, 7), expected, magnitude, dtype)


def test_lora_is_torchtunes_in_value_and_gradient():
    ours = trained(LoRALinear(12, 9, rank=4, alpha=ALPHA, use_bias=True))
    theirs = peft.LoRALinear(12, 9, rank=4, alpha=ALPHA, use_bias=True)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys
    x_ours, x_theirs = (torch.linspace(-1, 1, 60).view(5, 12).requires_grad_() for _ in range(2))
    y_ours, y_theirs = ours(x_ours), theirs(x_theirs)
    torch.testing.assert_close(y_ours, y_theirs, **MODEL_FP32)
    y_ours.square().sum().backward()
    y_theirs.square().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, **MODEL_FP32)
    for name in ours.adapter_params():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, theirs.get_parameter(name).grad, **MODEL_FP32
        )
    assert ours.weight.grad is None


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("edit_storage", ["folded", "factored"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
def test_gradients_by_finite_differences(edit_storage, use_bias, leading):
    linear = trained(
        KaSALinear(5, 4, 2, ALPHA, use_bias=use_bias, edit_storage=edit_storage)
    ).double()
    names = linear.adapter_params()
    start = [linear.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def forward(x, *values):
        return torch.func.functional_call(linear, dict(zip(names, values)), (x,))

    x = torch.randn(*leading, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, *start), **GRADCHECK)


def test_adapter_gradients_are_float32_on_a_bf16_base():
    linear = trained(KaSALinear(16, 16, 4, ALPHA), torch.bfloat16)
    linear(torch.randn(3, 16, dtype=torch.bfloat16)).float().sum().backward()
    for name in linear.adapter_params():
        gradient = linear.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


# --------------------------------------------------------------------------------- dropout


def test_dropout_masks_the_input_of_the_update_alone():
    linear = trained(
        KaSALinear(20, 6, 3, ALPHA, dropout=0.4, use_bias=True, edit_storage="factored")
    ).train()
    x = torch.randn(50, 20)
    torch.manual_seed(5)
    y = linear(x)
    torch.manual_seed(5)
    masked = F.dropout(x, 0.4, training=True)
    assert (masked == 0).any()
    base, edit, update, _ = dense_parts(linear)
    expected = x.double() @ (base - edit).T + linear.bias.double() + masked.double() @ update.T
    torch.testing.assert_close(y.double(), expected, **MODEL_FP32)


@pytest.mark.parametrize("kind", [KaSALinear, LoRALinear])
def test_dropout_does_nothing_in_evaluation(kind):
    linear = trained(kind(20, 6, 3, ALPHA, dropout=0.4)).eval()
    x = torch.randn(50, 20)
    expected, magnitude = formula(linear, x)
    assert_rounding_only(linear(x), expected, magnitude, torch.float32)


# --------------------------------------------------------------------------------- start and switch off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edit_storage", ["folded", "factored"])
def test_the_start_is_the_truncated_base(edit_storage, dtype):
    linear = trained(KaSALinear(12, 9, 3, ALPHA, edit_storage=edit_storage), dtype)
    linear.reset_update()
    x = torch.randn(6, 12).to(dtype)
    base = linear.base
    truncated = base - smallest_part(base, 3)
    assert torch.linalg.matrix_rank(truncated) == 6
    assert_rounding_only(
        linear(x), x.double() @ truncated.T, x.double().abs() @ (2 * base.abs()).T, dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [KaSALinear, LoRALinear])
def test_without_truncation_the_start_is_the_base_bit_for_bit(kind, dtype):
    linear = trained(
        kind(12, 9, 3, use_bias=True, **({"truncation_rank": 0} if kind is KaSALinear else {})),
        dtype,
    )
    linear.reset_update()
    x = torch.randn(6, 12).to(dtype)
    assert torch.equal(linear(x), F.linear(x, linear.base.to(dtype), linear.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_and_factored_is_the_base_bit_for_bit(dtype):
    linear = trained(KaSALinear(12, 9, 3, edit_storage="factored", use_bias=True), dtype)
    x = torch.randn(6, 12).to(dtype)
    linear.disabled = True
    assert torch.equal(linear(x), F.linear(x, linear.base.to(dtype), linear.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_and_folded_is_the_base_to_rounding(dtype):
    linear = trained(KaSALinear(12, 9, 3, edit_storage="folded"), dtype)
    x = torch.randn(6, 12).to(dtype)
    assert not torch.equal(linear.weight.double(), linear.base)
    linear.disabled = True
    magnitude = x.double().abs() @ (linear.base.abs() + 2 * smallest_part(linear.base, 3).abs()).T
    assert_rounding_only(linear(x), x.double() @ linear.base.T, magnitude, dtype)


# --------------------------------------------------------------------------------- storage of the edit


@pytest.mark.parametrize(
    ("edit_storage", "dtype", "folded"),
    [
        ("auto", torch.float32, True),
        ("auto", torch.float64, True),
        ("auto", torch.bfloat16, False),
        ("folded", torch.bfloat16, True),
        ("factored", torch.float32, False),
    ],
)
def test_storage_by_dtype(edit_storage, dtype, folded):
    linear = trained(KaSALinear(12, 9, 3, edit_storage=edit_storage), dtype)
    assert linear.folded is folded
    assert torch.equal(linear.weight.double(), linear.base) is not folded
    assert linear.weight.dtype == dtype
    assert linear.edit.out.dtype == linear.edit.into.dtype == EDIT_DTYPE


def test_nothing_removed_means_nothing_folded():
    linear = trained(KaSALinear(12, 9, 3, truncation_rank=0, edit_storage="folded"))
    assert not linear.folded
    assert torch.equal(linear.weight.double(), linear.base)


def test_folding_into_bf16_loses_most_of_the_edit_and_factoring_none():
    # The smallest singular values of a square weight lie far below the rounding step of its entries.
    error = {}
    for storage in ("folded", "factored"):
        linear = trained(KaSALinear(256, 256, 4, edit_storage=storage), torch.bfloat16)
        linear.reset_update()
        removed = linear.base - linear.merged_weight().double()
        edit = smallest_part(linear.base, 4)
        error[storage] = ((removed - edit).norm() / edit.norm()).item()
    assert error["folded"] > 0.5
    assert error["factored"] < error["folded"] / 1000


def test_a_second_edit_on_a_folded_weight_is_refused():
    linear = trained(KaSALinear(12, 9, 3, edit_storage="folded"))
    before = linear.weight.clone()
    with pytest.raises(RuntimeError, match="folded in"):
        linear.set_edit(linear.edit)
    with pytest.raises(RuntimeError, match="folded in"):
        linear.initialize()
    assert torch.equal(linear.weight, before)


def test_a_second_edit_on_a_factored_weight_replaces_the_first():
    linear = trained(KaSALinear(12, 9, 3, edit_storage="factored"))
    other = LowRank(torch.randn(9, 2), torch.randn(2, 12))
    linear.set_edit(other)
    assert torch.equal(linear.edit.dense(), other.dense())
    assert torch.equal(linear.weight.double(), linear.base)


def test_folding_leaves_the_tensor_that_the_weight_came_from_alone():
    linear = KaSALinear(12, 9, 3, edit_storage="folded")
    checkpoint = torch.randn(9, 12)
    before = checkpoint.clone()
    linear.load_state_dict({"weight": checkpoint}, strict=False, assign=True)
    linear.initialize()
    assert linear.folded
    assert torch.equal(checkpoint, before)
    assert not linear.weight.requires_grad


def test_an_edit_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(12, 9\).*\(9, 12\)"):
        trained(KaSALinear(12, 9, 3)).set_edit(LowRank(torch.zeros(12, 1), torch.zeros(1, 9)))


def test_initialize_reports_how_the_triplets_were_found():
    linear = KaSALinear(12, 9, 3)
    linear.weight.data = torch.randn(9, 12)
    smallest = torch.linalg.svdvals(linear.weight.double())[-3:].flip(0)
    found = linear.initialize()
    torch.testing.assert_close(found.singular_values, smallest, **FP64)
    lora = LoRALinear(12, 9, 3)
    lora.weight.data = torch.randn(9, 12)
    assert lora.initialize() is None


# --------------------------------------------------------------------------------- merged weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edit_storage", ["folded", "factored"])
def test_merged_kasa_weight_is_the_formula(edit_storage, dtype):
    linear = trained(KaSALinear(12, 9, 3, ALPHA, edit_storage=edit_storage), dtype)
    base, edit, update, update_magnitude = dense_parts(linear)
    merged = linear.merged_weight()
    assert merged.dtype == torch.float32
    stored = dtype if edit_storage == "folded" else torch.float32
    assert_rounding_only(
        merged, base - edit + update, base.abs() + edit.abs() + update_magnitude, stored
    )
    assert not merged.requires_grad


def test_merged_lora_weight_is_the_formula():
    linear = trained(LoRALinear(12, 9, 3, ALPHA))
    base, _, update, update_magnitude = dense_parts(linear)
    assert_rounding_only(
        linear.merged_weight(), base + update, base.abs() + update_magnitude, torch.float32
    )


def test_merging_leaves_the_layer_as_it_is():
    linear = trained(KaSALinear(12, 9, 3, ALPHA, edit_storage="factored"))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    linear.merged_weight().zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in linear.state_dict().items())


# --------------------------------------------------------------------------------- start values


def test_update_starts_as_published():
    torch.manual_seed(0)
    linear = KaSALinear(600, 512, 512, ALPHA, truncation_rank=1)
    a, d = linear.lora_a.weight, linear.lora_diag
    bound = 1 / math.sqrt(600)  # Kaiming-uniform with a = √5: sqrt(6 / ((1 + 5) d_in))
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.99 * bound
    assert abs(a.mean()) < 5 * bound / math.sqrt(3 * a.numel())
    assert torch.count_nonzero(linear.lora_b.weight) == 0
    # five standard errors of mean and standard deviation of 512 normal draws
    assert abs(d.mean()) < 5 / math.sqrt(512)
    assert abs(d.std() - 1) < 5 / math.sqrt(2 * 512)


def test_diagonal_of_ones_starts_as_lora():
    linear = KaSALinear(12, 9, 3, ALPHA, diag_init="ones", truncation_rank=0)
    assert torch.equal(linear.lora_diag, torch.ones(3))
    lora = LoRALinear(12, 9, 3, ALPHA)
    trained(linear), trained(lora)
    lora.load_state_dict(linear.state_dict(), strict=False)
    x = torch.randn(4, 12)
    torch.testing.assert_close(linear(x), lora(x), **MODEL_FP32)


def test_truncation_rank_defaults_to_the_rank_and_published_counts_from_the_inputs():
    assert KaSALinear(12, 9, 3).edit.rank == 3
    assert KaSALinear(12, 9, 3, truncation_rank=1).edit.rank == 1
    assert (
        KaSALinear(12, 9, 3, truncation="published").edit.rank == 0
    )  # keeps min(9, 12 - 3) = 9 of 9
    assert (
        KaSALinear(12, 9, 3, truncation_rank=5, truncation="published").edit.rank == 2
    )  # keeps 7 of 9
    assert KaSALinear(9, 12, 3, truncation="published").edit.rank == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be between 1 and .* = 9; got 0"),
        ({"rank": -1}, "rank must be between .* got -1"),
        ({"rank": 10}, "rank must be between 1 and .* = 9; got 10"),
        ({"rank": 2, "truncation_rank": 9}, "truncation_rank .* below .* 9; got 9"),
        ({"rank": 2, "truncation_rank": -1}, "got -1"),
        ({"rank": 2, "truncation": "papers"}, "Unknown truncation 'papers'.*paper, published"),
        ({"rank": 2, "diag_init": "zeros"}, "Unknown diag_init 'zeros'.*normal, ones"),
        ({"rank": 2, "edit_storage": "nf4"}, "Unknown edit_storage 'nf4'.*auto, folded, factored"),
        ({"rank": 2, "dropout": 1.5}, "dropout"),
        ({"rank": 2, "dropout": -0.1}, "dropout"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KaSALinear(12, 9, **options)


def test_materialize_gives_a_meta_layer_its_storage():
    with torch.device("meta"):
        linear = KaSALinear(12, 9, 3, ALPHA, diag_init="ones")
    linear.materialize("cpu", torch.float64)
    for name in linear.adapter_params():
        assert linear.get_parameter(name).dtype == torch.float64
        assert linear.get_parameter(name).requires_grad
    assert linear.lora_diag.tolist() == [1, 1, 1]
    assert torch.count_nonzero(linear.lora_b.weight) == 0
    assert 0 < linear.lora_a.weight.abs().max() <= 1 / math.sqrt(12)
    assert linear.edit.out.dtype == EDIT_DTYPE
    assert linear.edit.shape == (9, 12)
    assert linear.edit.rank == 3
    assert linear.weight.is_meta  # the checkpoint brings it


# --------------------------------------------------------------------------------- in a model


class TwoLayers(nn.Module):
    """One KaSA and one LoRA linear with a frozen plain one between."""

    def __init__(self, edit_storage="auto", truncation_rank=None, rank=3):
        super().__init__()
        self.first = KaSALinear(
            12, 9, rank, ALPHA, edit_storage=edit_storage, truncation_rank=truncation_rank
        )
        self.middle = nn.Linear(9, 9)
        self.last = LoRALinear(9, 5, rank, ALPHA)
        generator = torch.Generator().manual_seed(3)
        for linear in (self.first, self.last):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator)
        self.middle.weight.data = torch.randn(9, 9, generator=generator)
        self.middle.bias.data = torch.randn(9, generator=generator)

    def forward(self, x):
        return self.last(self.middle(self.first(x)).relu())


NAMES = {
    "first.lora_a.weight",
    "first.lora_b.weight",
    "first.lora_diag",
    "last.lora_a.weight",
    "last.lora_b.weight",
}


def test_torchtunes_adapter_functions_find_the_parameters():
    model = TwoLayers()
    found = peft.get_adapter_params(model)
    assert set(found) == NAMES
    peft.set_trainable_params(model, found)
    assert {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    } == NAMES
    assert set(peft.get_adapter_state_dict(model.state_dict())) >= NAMES


@pytest.mark.parametrize("edit_storage", ["folded", "factored"])
def test_torchtunes_disable_adapter_gives_the_base_and_then_the_adapter_again(edit_storage):
    model, base = TwoLayers(edit_storage), TwoLayers()
    for _, linear in adapter_linears(model):
        linear.initialize()
        nn.init.normal_(linear.lora_b.weight)
    x = torch.randn(4, 12)
    adapted = model(x)
    expected = F.linear(base.middle(F.linear(x, base.first.weight)).relu(), base.last.weight)
    with peft.disable_adapter(model):
        if edit_storage == "factored":
            assert torch.equal(model(x), expected)
        else:
            torch.testing.assert_close(model(x), expected, **MODEL_FP32)
    assert torch.equal(model(x), adapted)
    assert not torch.allclose(adapted, expected)


def test_adapter_linears_are_listed_in_order_by_name():
    assert [(name, type(linear)) for name, linear in adapter_linears(TwoLayers())] == [
        ("first", KaSALinear),
        ("last", LoRALinear),
    ]


@pytest.mark.parametrize("edit_storage", ["folded", "factored"])
def test_adapter_round_trip_is_bit_exact(edit_storage):
    model = TwoLayers(edit_storage)
    for _, linear in adapter_linears(model):
        linear.initialize()
        nn.init.normal_(linear.lora_b.weight)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    assert set(state) == NAMES | {
        f"{layer}.lora_edit_{side}" for layer in ("first", "last") for side in ("out", "in")
    }
    again = TwoLayers(edit_storage)
    load_adapter_state_dict(again, state)
    x = torch.randn(4, 12)
    assert torch.equal(again(x), model(x))
    for name, tensor in adapter_state_dict(again).items():
        assert torch.equal(tensor, state[name])


def test_a_loaded_adapter_does_not_share_memory_with_its_source():
    source = TwoLayers("factored")
    source.first.initialize()
    state = adapter_state_dict(source)
    model = TwoLayers("factored")
    load_adapter_state_dict(model, state)
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    with torch.no_grad():
        for tensor in state.values():
            tensor.add_(1)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(model).items()
    )


def renamed(state):
    return {name.replace("first", "frist"): tensor for name, tensor in state.items()}


def without_diagonal(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("lora_diag")}


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (
            lambda: renamed(adapter_state_dict(TwoLayers())),
            "first.lora_a.weight: model \\(3, 12\\), adapter has none",
        ),
        (
            lambda: without_diagonal(adapter_state_dict(TwoLayers())),
            "in 1 tensors: first.lora_diag",
        ),
        (
            lambda: adapter_state_dict(TwoLayers(rank=2)),
            r"first.lora_a.weight: model \(3, 12\), adapter \(2, 12\)",
        ),
        (
            lambda: adapter_state_dict(TwoLayers(truncation_rank=1)),
            r"lora_edit_in: model \(3, 12\), adapter \(1, 12\)",
        ),
    ],
    ids=["names", "missing", "rank", "truncation"],
)
def test_an_adapter_of_another_model_is_refused_and_changes_nothing(state, named):
    model = TwoLayers("factored")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        load_adapter_state_dict(model, state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_is_not_put_on_a_weight_that_was_edited_already():
    model = TwoLayers("folded")
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    model.first.initialize()
    with pytest.raises(RuntimeError, match="load the base weight again"):
        load_adapter_state_dict(model, state)
