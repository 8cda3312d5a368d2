"""CorDA's linear and DoRA against dense float64 formulas, torchtune's DoRA, and the base weight at step 0."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchtune.modules import peft

from kasa_tune.components.adapters import CorDALinear, KaSALinear, LoRALinear
from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_state_dict,
    load_adapter_state_dict,
    lora_plus_groups,
)
from kasa_tune.components.linalg.decomposition import co_svd, split_component
from kasa_tune.components.linalg.low_rank import LowRank
from tests.tolerances import EDIT_DTYPE, GRADCHECK, MODEL_FP32, assert_rounding_only
from tests.toy_models import FAMILIES, randomized, tokens

ALPHA = 7.0  # over a rank of 3: a scaling that no float holds exactly


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def started(
    d_in=12,
    d_out=9,
    rank=3,
    *,
    dtype=torch.float32,
    adapter_dtype=torch.float32,
    mode="ipm",
    seed=0,
    **options,
):
    """A linear on a random weight, started from a part of it, with that weight in float64 as ``base``."""
    generator = torch.Generator().manual_seed(seed)
    linear = CorDALinear(d_in, d_out, min(3, d_in, d_out), ALPHA, **options)
    linear.materialize("cpu", adapter_dtype)
    linear.weight.data = torch.randn(d_out, d_in, generator=generator).to(dtype)
    if linear.bias is not None:
        linear.bias.data = torch.randn(d_out, generator=generator).to(dtype)
    linear.base, linear.loaded = linear.weight.detach().double(), linear.weight.detach().clone()
    covariance = (
        torch.randn(d_in, 3 * d_in, generator=generator)
        * torch.arange(1, d_in + 1)[:, None] ** -1.0
    )
    part = co_svd(linear.weight, covariance @ covariance.T, rank, mode)
    linear.start_from(split_component(part, linear.scaling))
    return linear


def base_output(linear, x):
    return F.linear(x, linear.loaded, linear.bias)


# --------------------------------------------------------------------------------- step 0


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(["ipm", "kpm"]),
    st.data(),
)
def test_factored_starts_as_the_base_bit_for_bit(
    dtype, adapter_dtype, d_in, d_out, use_bias, mode, data
):
    torch.manual_seed(0)
    rank = data.draw(st.integers(0, min(d_in, d_out)))
    options = {
        "adapter_dtype": adapter_dtype,
        "use_bias": use_bias,
        "mode": mode,
        "edit_storage": "factored",
    }
    linear = started(d_in, d_out, rank, dtype=dtype, **options)
    x = torch.randn(2, 3, d_in).to(dtype)
    assert torch.equal(linear(x), base_output(linear, x))
    assert torch.equal(linear.weight, linear.loaded)
    linear.disabled = True
    assert torch.equal(linear(x), base_output(linear, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["auto", "folded"])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_folded_starts_as_the_base_to_the_rounding_of_its_dtype(
    mode, storage, adapter_dtype, dtype
):
    linear = started(
        40,
        30,
        5,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        mode=mode,
        edit_storage=storage,
        use_bias=True,
    )
    x = torch.randn(6, 40).to(dtype)
    assert linear.folded
    assert linear.weight.dtype == dtype
    magnitude = (
        x.double().abs() @ (linear.base.abs() + 2 * product_magnitude(linear)).T
        + linear.bias.double().abs()
    )
    expected = x.double() @ linear.base.T + linear.bias.double()
    assert_rounding_only(linear(x), expected, magnitude, dtype)
    assert_rounding_only(
        linear.merged_weight(),
        linear.base,
        linear.base.abs() + 2 * product_magnitude(linear),
        dtype,
    )
    linear.disabled = True
    assert_rounding_only(linear(x), expected, magnitude, dtype)


def product_magnitude(linear):
    """``s |B| |A|``, and the edit's the same at the start."""
    return (
        linear.scaling
        * linear.lora_b.weight.detach().double().abs()
        @ linear.lora_a.weight.detach().double().abs()
    )


def test_the_start_is_a_part_of_the_weight_and_not_nothing():
    for storage in ("folded", "factored"):
        linear = started(edit_storage=storage)
        update = linear.scaling * (linear.lora_b.weight @ linear.lora_a.weight)
        assert torch.linalg.matrix_rank(update) == 3
        torch.testing.assert_close(linear.edit.dense(), update, rtol=1e-5, atol=1e-6)
        if storage == "folded":
            torch.testing.assert_close(linear.weight, linear.loaded - update, rtol=1e-5, atol=1e-5)
            assert torch.linalg.matrix_rank(linear.weight, rtol=1e-5) == 9 - 3  # W - U Uᵀ W


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2"])
@pytest.mark.parametrize("storage", ["folded", "factored"])
def test_a_model_starts_as_its_base(name, storage):
    family = FAMILIES[name]
    base = randomized(family.base(**family.sizes)).eval()
    options = {"rank": 3, "alpha": ALPHA, "edit_storage": storage}
    model = family.corda(["q_proj", "v_proj"], apply_to_mlp=True, **options, **family.sizes).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    for index, (_, linear) in enumerate(adapter_linears(model)):
        part = co_svd(linear.weight, None, 1 + index % 4, "ipm")
        linear.start_from(split_component(part, linear.scaling))
    logits, expected = model(tokens()), base(tokens())
    if storage == "factored":
        assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, **MODEL_FP32)
    for _, linear in adapter_linears(model):
        nn.init.normal_(linear.lora_b.weight)
    assert not torch.allclose(model(tokens()), expected, atol=0.1)
    with peft.disable_adapter(model):
        torch.testing.assert_close(model(tokens()), expected, **MODEL_FP32)


# --------------------------------------------------------------------------------- after some training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["folded", "factored"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_forward_and_merged_weight_are_the_formula(use_bias, storage, dtype):
    linear = started(dtype=dtype, edit_storage=storage, use_bias=use_bias)
    start = (
        linear.scaling
        * linear.lora_b.weight.detach().double()
        @ linear.lora_a.weight.detach().double()
    )
    edit_magnitude = product_magnitude(linear)
    nn.init.normal_(linear.lora_b.weight)
    nn.init.normal_(linear.lora_a.weight)
    update = (
        linear.scaling
        * linear.lora_b.weight.detach().double()
        @ linear.lora_a.weight.detach().double()
    )
    effective = linear.base - start + update
    magnitude = linear.base.abs() + edit_magnitude + product_magnitude(linear)
    x = torch.randn(2, 3, 12).to(dtype)
    bias = linear.bias.detach().double() if use_bias else torch.zeros(9).double()
    expected, scale = x.double() @ effective.T + bias, x.double().abs() @ magnitude.T + bias.abs()
    assert_rounding_only(linear(x), expected, scale, dtype)
    stored = dtype if storage == "folded" else torch.float32
    assert_rounding_only(linear.merged_weight(), effective, magnitude, stored)
    linear.disabled = True
    without = x.double() @ linear.base.T + bias
    if storage == "factored":
        assert torch.equal(linear(x), base_output(linear, x))
    assert_rounding_only(linear(x), without, scale, dtype)


@pytest.mark.parametrize("storage", ["folded", "factored"])
def test_gradients_by_finite_differences(storage):
    linear = started(5, 4, 2, edit_storage=storage, use_bias=True).double()
    nn.init.normal_(linear.lora_b.weight)
    start = [
        linear.get_parameter(name).detach().clone().requires_grad_()
        for name in linear.adapter_params()
    ]

    def forward(x, *values):
        return torch.func.functional_call(linear, dict(zip(linear.adapter_params(), values)), (x,))

    # The factored forward casts s B to float32 and back; at 1e-6 a step of B would be lost in that.
    options = GRADCHECK if storage == "folded" else {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-3}
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, *start), **options)


@pytest.mark.parametrize("storage", ["folded", "factored"])
def test_what_is_frozen_gets_no_gradient_and_both_factors_get_some(storage):
    linear = started(dtype=torch.bfloat16, edit_storage=storage)
    linear(torch.randn(4, 12).bfloat16()).float().square().sum().backward()
    for name in ("lora_a.weight", "lora_b.weight"):
        gradient = linear.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0  # unlike LoRA, A learns from the first step
    assert linear.weight.grad is None
    assert [
        name for name, parameter in linear.named_parameters() if parameter.requires_grad
    ] == linear.adapter_params()


@pytest.mark.parametrize("storage", ["folded", "factored"])
def test_dropout_acts_on_the_update_alone_and_only_in_training(storage):
    linear = started(64, 48, dropout=0.5, edit_storage=storage).eval()
    x = torch.randn(2000, 64)
    evaluated = linear(x)
    torch.testing.assert_close(evaluated, base_output(linear, x), rtol=1e-4, atol=1e-4)
    linear.train()
    dropped = linear(x)
    update = linear.scaling * (linear.lora_b.weight @ linear.lora_a.weight).detach()
    # What is dropped is a part of the update: the difference lies in its column space, ...
    difference = (dropped - evaluated).detach()
    columns = torch.linalg.qr(linear.lora_b.weight.detach()).Q
    torch.testing.assert_close(difference @ columns @ columns.T, difference, rtol=0, atol=1e-3)
    assert difference.abs().max() > 0.1 * (x @ update.T).abs().max()
    # ... and is zero on the average: of 2000 rows the mean is within some standard errors.
    assert difference.mean(dim=0).abs().max() < 5 * difference.std(dim=0).max() / 2000**0.5


# --------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("storage", ["folded", "factored"])
@pytest.mark.parametrize("rank", [0, 1, 3, 9])
def test_the_rank_is_that_of_the_start_at_the_same_scaling(rank, storage):
    linear = started(rank=rank, edit_storage=storage, adapter_dtype=torch.bfloat16)
    assert linear.rank == rank
    assert linear.scaling == ALPHA / 3
    assert linear.alpha == pytest.approx(ALPHA / 3 * rank)
    assert linear.lora_a.weight.shape == (rank, 12)
    assert linear.lora_b.weight.shape == (9, rank)
    assert (linear.lora_a.out_features, linear.lora_b.in_features) == (rank, rank)
    assert linear.lora_a.weight.dtype == linear.lora_b.weight.dtype == torch.bfloat16
    assert linear.edit.rank == rank
    assert linear.edit.out.dtype == linear.edit.into.dtype == EDIT_DTYPE
    assert linear.folded is (storage == "folded" and rank > 0)
    x = torch.randn(4, 12, requires_grad=True)
    linear(x).sum().backward()  # a linear of rank 0 trains along, with nothing to learn
    assert linear.lora_a.weight.grad is None or linear.lora_a.weight.grad.shape == (rank, 12)
    torch.testing.assert_close(
        x.grad, linear.merged_weight().sum(dim=0).expand(4, 12), rtol=1e-4, atol=1e-4
    )


def test_a_new_rank_starts_as_lora_does():
    linear = CorDALinear(12, 9, 3, ALPHA)
    linear.weight.data = torch.randn(9, 12)
    linear.set_rank(5)
    assert not linear.lora_b.weight.any()
    assert linear.lora_a.weight.any()
    x = torch.randn(2, 12)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight), **MODEL_FP32)


def test_the_same_rank_keeps_the_parameters_that_an_optimizer_may_hold():
    linear = CorDALinear(12, 9, 3, ALPHA)
    before = linear.lora_a.weight, linear.lora_b.weight
    linear.set_rank(3)
    assert (linear.lora_a.weight, linear.lora_b.weight) == before


@pytest.mark.parametrize("rank", [-1, 10])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match=f"between 0 and .* 9; got {rank}"):
        CorDALinear(12, 9, 3).set_rank(rank)


@pytest.mark.parametrize(
    ("out", "into"), [((12, 3), (3, 9)), ((1, 3), (3, 12)), ((9, 2), (2, 11))], ids=str
)
def test_a_start_of_another_shape_is_refused_and_changes_nothing(out, into):
    linear = CorDALinear(12, 9, 3, ALPHA)
    linear.weight.data = torch.randn(9, 12)
    before = everything_in(linear)
    with pytest.raises(ValueError, match=r"\(9, 12\)"):
        linear.start_from(LowRank(torch.ones(out), torch.ones(into)))
    assert_unchanged(linear, before)


def test_a_second_start_on_a_folded_weight_is_refused_and_changes_nothing():
    linear = started(edit_storage="folded")
    before = everything_in(linear)
    with pytest.raises(RuntimeError, match="folded in"):
        linear.start_from(LowRank(torch.ones(9, 2), torch.ones(2, 12)))
    assert_unchanged(linear, before)


def test_auto_folds_in_every_dtype_and_an_unknown_storage_is_refused():
    for dtype in (torch.float32, torch.bfloat16):
        assert started(dtype=dtype).folded
    with pytest.raises(ValueError, match="Unknown edit_storage 'nf4'"):
        CorDALinear(12, 9, 3, edit_storage="nf4")


def test_folding_leaves_the_tensor_that_the_weight_came_from_alone():
    linear, checkpoint = CorDALinear(12, 9, 3, ALPHA), torch.randn(9, 12)
    before = checkpoint.clone()
    linear.load_state_dict({"weight": checkpoint}, strict=False, assign=True)
    linear.start_from(split_component(co_svd(linear.weight, None, 3, "ipm"), linear.scaling))
    assert linear.folded
    assert torch.equal(checkpoint, before)


def test_training_does_not_move_what_was_taken_out():
    linear = started(edit_storage="factored")
    edit = linear.edit.dense().clone()
    with torch.no_grad():
        linear.lora_a.weight.add_(1.0)
        linear.lora_b.weight.add_(1.0)
    assert torch.equal(linear.edit.dense(), edit)


# --------------------------------------------------------------------------------- the state of a model


class TwoLayers(nn.Module):
    """A CorDA linear of its own rank, and one of rank 3."""

    def __init__(self, storage="factored", ranks=None):
        super().__init__()
        self.first = CorDALinear(12, 9, 3, ALPHA, edit_storage=storage)
        self.last = CorDALinear(9, 5, 3, ALPHA, edit_storage=storage)
        generator = torch.Generator().manual_seed(3)
        for index, linear in enumerate((self.first, self.last)):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator)
            if ranks:
                part = co_svd(linear.weight, None, ranks[index], "kpm")
                linear.start_from(split_component(part, linear.scaling))
                nn.init.normal_(linear.lora_b.weight) if ranks[index] else None

    def forward(self, x):
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("ranks", [(7, 1), (0, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("storage", ["folded", "factored"])
def test_an_adapter_with_ranks_of_its_own_comes_back_bit_for_bit(storage, ranks):
    model = TwoLayers(storage, ranks)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    again = TwoLayers(storage)
    load_adapter_state_dict(again, state)
    x = torch.randn(4, 12)
    assert torch.equal(again(x), model(x))
    assert [linear.rank for _, linear in adapter_linears(again)] == list(ranks)
    assert [linear.scaling for _, linear in adapter_linears(again)] == [ALPHA / 3] * 2
    for name, tensor in adapter_state_dict(again).items():
        assert torch.equal(tensor, state[name])
    with peft.disable_adapter(model), peft.disable_adapter(again):
        assert torch.equal(again(x), model(x))


def test_an_adapter_that_never_started_comes_back_too():
    model, again = TwoLayers(), TwoLayers()  # method lora on CorDA's linears
    for _, linear in adapter_linears(model):
        linear.initialize()
        nn.init.normal_(linear.lora_b.weight)
    load_adapter_state_dict(again, adapter_state_dict(model))
    x = torch.randn(4, 12)
    assert torch.equal(again(x), model(x))
    assert not any(linear.folded or linear.edit.rank for _, linear in adapter_linears(again))


def everything_in(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.shape == before[name].shape, name
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            lambda s: s.pop("last.lora_b.weight"),
            r"last\.lora_b\.weight: model \(5, \d\), adapter has none",
        ),
        (
            lambda s: s.update({"more.lora_a.weight": torch.zeros(1, 1)}),
            r"more\.lora_a\.weight: model has none",
        ),
        (
            lambda s: s.update({"first.lora_b.weight": torch.zeros(9, 4)}),
            r"first\.lora_b\.weight: .*adapter \(9, 4\)",
        ),
        (
            lambda s: s.update({"first.lora_a.weight": torch.zeros(7, 11)}),
            r"first\.lora_a\.weight: .*\(7, 11\)",
        ),
        (
            lambda s: s.update({"first.lora_edit_out": torch.zeros(9, 4)}),
            r"first\.lora_edit_out: .*\(9, 4\)",
        ),
        (
            lambda s: s.update({"last.lora_a.weight": torch.zeros(2, 9)}),
            r"last\.lora_b\.weight: .*adapter \(5, 1\)",
        ),
        (
            lambda s: s.update(
                {"last.lora_a.weight": torch.zeros(6, 9), "last.lora_b.weight": torch.zeros(5, 6)}
            ),
            r"between 0 and .* 5; got 6",  # not even a linear of its shape could have it
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(spoil, named):
    state = {
        name: tensor.clone() for name, tensor in adapter_state_dict(TwoLayers(ranks=(7, 1))).items()
    }
    spoil(state)
    model = TwoLayers()
    before = everything_in(model)
    with pytest.raises(ValueError, match=named):
        load_adapter_state_dict(model, state)
    assert_unchanged(model, before)


def test_an_adapter_is_not_put_on_folded_weights_and_the_one_there_stays():
    model = TwoLayers("folded", (4, 2))
    before = everything_in(model)
    with pytest.raises(RuntimeError, match="load the base weight again"):
        load_adapter_state_dict(model, adapter_state_dict(TwoLayers("folded", (7, 1))))
    assert_unchanged(model, before)


def test_a_loaded_adapter_does_not_share_memory_with_its_source():
    state = {
        name: tensor.clone() for name, tensor in adapter_state_dict(TwoLayers(ranks=(7, 1))).items()
    }
    model = TwoLayers()
    load_adapter_state_dict(model, state)
    before = everything_in(model)
    for tensor in state.values():
        tensor.add_(1)
    assert_unchanged(model, before)


# --------------------------------------------------------------------------------- LoRA+


def names_of(model, group):
    return {
        name
        for name, parameter in model.named_parameters()
        if any(parameter is p for p in group["params"])
    }


def test_b_learns_faster_by_the_ratio_and_all_else_as_told():
    family = FAMILIES["llama2"]
    for build, more in ((family.corda, {}), (family.kasa, {}), (family.lora, {"use_dora": True})):
        model = build(["q_proj"], apply_to_mlp=["w2"], rank=2, **more, **family.sizes)
        rest, fast = lora_plus_groups(model, 1e-3, 16.0)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names_of(model, fast) == {name for name in trained if name.endswith("lora_b.weight")}
        assert names_of(model, rest) == trained - names_of(model, fast)
        assert len(rest["params"]) + len(fast["params"]) == len(trained)
        assert (rest["lr"], fast["lr"]) == (1e-3, 16e-3)


def test_a_ratio_of_one_is_one_group_in_the_models_order():
    model = FAMILIES["llama2"].corda(["q_proj"], rank=2, **FAMILIES["llama2"].sizes)
    (group,) = lora_plus_groups(model, 1e-3, 1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(a is b for a, b in zip(group["params"], trained, strict=True))
    optimizer = torch.optim.AdamW([group], lr=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimizer_and_a_schedule_keep_the_ratio():
    model = TwoLayers()
    optimizer = torch.optim.SGD(lora_plus_groups(model, 0.1, 8.0), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = everything_in(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    schedule.step()
    optimizer.step()
    for name, lr in (("lora_a", 0.05), ("lora_b", 0.4)):
        moved = before[f"first.{name}.weight"] - model.state_dict()[f"first.{name}.weight"]
        torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------- DoRA


def dora(
    d_in=12,
    d_out=9,
    rank=3,
    *,
    dtype=torch.float32,
    adapter_dtype=torch.float32,
    use_bias=False,
    dropout=0.0,
):
    """A linear on a random weight, started."""
    linear = LoRALinear(d_in, d_out, rank, ALPHA, dropout, use_bias, use_dora=True)
    linear.materialize("cpu", adapter_dtype)
    linear.weight.data = torch.randn(d_out, d_in).to(dtype)
    if use_bias:
        linear.bias.data = torch.randn(d_out).to(dtype)
    linear.initialize()
    return linear


def after_training(linear):
    with torch.no_grad():
        linear.lora_a.weight.normal_()
        linear.lora_b.weight.normal_()
        linear.lora_magnitude.uniform_(0.5, 3.0)
    return linear


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_bias", [False, True])
def test_dora_starts_as_the_base_bit_for_bit(use_bias, dtype, adapter_dtype):
    linear = dora(30, 20, dtype=dtype, adapter_dtype=adapter_dtype, use_bias=use_bias)
    x = torch.randn(2, 5, 30).to(dtype)
    product = F.linear(
        x, linear.weight
    )  # times the quotient of two equal lengths; the bias comes after, in one more sum
    assert torch.equal(linear(x), product + linear.bias if use_bias else product)
    assert (
        linear.lora_magnitude.dtype == torch.float32
    )  # rounded lengths would change the output at once
    assert linear.lora_a.weight.dtype == linear.lora_b.weight.dtype == adapter_dtype


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_dora_is_torchtunes_in_value_and_gradient(d_in, d_out, seed, data):
    torch.manual_seed(seed)
    rank = data.draw(st.integers(1, min(d_in, d_out)))
    ours, theirs = (
        after_training(dora(d_in, d_out, rank)),
        peft.DoRALinear(d_in, d_out, rank, ALPHA),
    )
    state = {
        key: value for key, value in ours.state_dict().items() if not key.startswith("lora_edit")
    }
    state["magnitude"] = state.pop("lora_magnitude")
    theirs.load_state_dict(state)
    x_ours, x_theirs = (
        torch.linspace(-1, 1, 5 * d_in).view(5, d_in).requires_grad_() for _ in range(2)
    )
    y_ours, y_theirs = ours(x_ours), theirs(x_theirs)
    torch.testing.assert_close(y_ours, y_theirs, **MODEL_FP32)
    weights = torch.randn(5, d_out)
    (y_ours * weights).sum().backward()
    (y_theirs * weights).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, **MODEL_FP32)
    for name in ours.adapter_params():
        peer = theirs.get_parameter("magnitude" if name == "lora_magnitude" else name)
        torch.testing.assert_close(ours.get_parameter(name).grad, peer.grad, **MODEL_FP32)
    assert ours.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dora_is_its_equation_and_leaves_the_bias_alone(dtype):
    """``y = m (W + s B A) x / ‖W + s B A‖ + b``; torchtune scales b along, which is no function of the weight."""
    linear = after_training(dora(use_bias=True, dtype=dtype))
    parts = (
        linear.weight,
        linear.lora_b.weight,
        linear.lora_a.weight,
        linear.lora_magnitude,
        linear.bias,
    )
    weight, b, a, m, bias = (tensor.detach().double() for tensor in parts)
    direction = weight + ALPHA / 3 * b @ a
    effective = m[:, None] * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    x = torch.randn(6, 12).to(dtype)
    stretch = (m / torch.linalg.vector_norm(direction, dim=1))[:, None]
    magnitude = stretch * (weight.abs() + ALPHA / 3 * b.abs() @ a.abs())
    expected = x.double() @ effective.T + bias
    assert_rounding_only(linear(x), expected, x.double().abs() @ magnitude.T + bias.abs(), dtype)
    linear.bias.data.zero_()
    assert_rounding_only(linear(x), expected - bias, x.double().abs() @ magnitude.T, dtype)
    # The lengths of bf16 weights' rows are found with a product in bf16.
    assert_rounding_only(linear.merged_weight(), effective, magnitude, dtype)


def test_dora_disabled_is_the_base_bit_for_bit():
    linear = after_training(dora(use_bias=True))
    x = torch.randn(4, 12)
    linear.disabled = True
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_doras_magnitudes_turn_the_length_of_each_output_alone():
    linear = after_training(dora())
    x = torch.randn(4, 12)
    before = linear(x)
    with torch.no_grad():
        linear.lora_magnitude[3] *= 2.0
    after = linear(x)
    torch.testing.assert_close(after[:, 3], 2 * before[:, 3])
    others = torch.arange(9) != 3
    assert torch.equal(after[:, others], before[:, others])


def test_doras_dropout_reaches_the_update_alone():
    linear = after_training(dora(dropout=0.999999))
    x = torch.randn(4, 12)
    linear.train()
    scale = linear.lora_magnitude / torch.linalg.vector_norm(
        linear.weight + linear.scaling * linear.lora_b.weight @ linear.lora_a.weight, dim=1
    )
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight) * scale, **MODEL_FP32)


def test_a_row_of_zeros_stays_finite_and_zero():
    linear = dora()
    with torch.no_grad():
        linear.weight[4] = 0.0  # a padded row of a vocabulary
    linear.initialize()
    x = torch.randn(5, 12)
    y = linear(x)
    assert torch.equal(y[:, 4], torch.zeros(5))
    assert linear.merged_weight().isfinite().all()
    y.sum().backward()
    assert all(linear.get_parameter(name).grad.isfinite().all() for name in linear.adapter_params())


def test_dora_comes_back_bit_for_bit():
    linear = nn.Sequential(after_training(dora()))
    again = nn.Sequential(dora())
    again[0].weight = linear[0].weight
    assert set(adapter_state_dict(linear)) >= {"0.lora_magnitude"}
    load_adapter_state_dict(again, adapter_state_dict(linear))
    x = torch.randn(4, 12)
    assert torch.equal(again(x), linear(x))
    with pytest.raises(ValueError, match="lora_magnitude"):
        load_adapter_state_dict(
            nn.Sequential(LoRALinear(12, 9, 3, ALPHA)), adapter_state_dict(linear)
        )


def test_lora_without_the_option_and_kasa_have_no_magnitudes():
    assert LoRALinear(12, 9, 3).adapter_params() == ["lora_a.weight", "lora_b.weight"]
    for linear in (LoRALinear(12, 9, 3), KaSALinear(12, 9, 3), CorDALinear(12, 9, 3)):
        assert not any("magnitude" in name for name in linear.state_dict())
    assert LoRALinear(12, 9, 3, use_dora=True).adapter_params()[-1] == "lora_magnitude"
