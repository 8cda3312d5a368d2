"""From meta to a model with weights: nothing allocated before, the same model as one built the usual way after."""

from functools import partial

import pytest
import torch
from torch import nn
from torchtune import modules, training

from kasa_tune.components import models
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.models.loading import (
    build_on_meta,
    load_base_weights,
    needs_dense_mask,
    read_tensor,
    set_tensor,
    weights_loaded,
)
from kasa_tune.components.quantized.base import quantized_linears
from tests.toy_models import FAMILIES, SIZES, randomized, tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kasa_on_meta(name, dtype=torch.float32, **options):
    family = FAMILIES[name]
    options = {"rank": 4, "truncation_rank": 0} | family.sizes | options
    return build_on_meta(
        partial(family.kasa, ["q_proj", "v_proj"], apply_to_mlp=True, **options), dtype=dtype
    )


def base_weights(name, dtype=torch.float32):
    return {
        key: value.to(dtype)
        for key, value in randomized(FAMILIES[name].base(**FAMILIES[name].sizes))
        .state_dict()
        .items()
    }


def everything_in(model):
    return [*model.named_parameters(), *model.named_buffers()]


# --------------------------------------------------------------------------------- on meta


def test_a_model_of_any_size_is_built_without_storage():
    assert all(
        tensor.is_meta for _, tensor in everything_in(kasa_on_meta("llama3"))
    )  # before a large one is tried
    model = build_on_meta(
        partial(models.kasa_llama3_70b, ["q_proj", "v_proj"], rank=8), dtype=torch.bfloat16
    )
    assert all(tensor.is_meta for _, tensor in everything_in(model))
    assert model.output.weight.shape == (128_256, 8192)


def test_base_weights_on_meta_have_the_asked_dtype():
    model = kasa_on_meta("qwen2", torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" not in name} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("fails", [False, True])
def test_default_dtype_and_device_are_as_before(fails):
    def build():
        assert torch.get_default_dtype() == torch.bfloat16
        if fails:
            raise ValueError("no such model")
        return nn.Linear(2, 2)

    if fails:
        with pytest.raises(ValueError, match="no such model"):
            build_on_meta(build, dtype=torch.bfloat16)
    else:
        build_on_meta(build, dtype=torch.bfloat16)
    assert torch.empty(1).dtype == torch.float32
    assert torch.empty(1).device == CPU


# --------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_model_is_the_one_built_the_usual_way(name, dtype):
    family = FAMILIES[name]
    weights = base_weights(name, dtype)
    usual = family.base(**family.sizes)
    usual.load_state_dict(weights)
    usual = usual.to(dtype).eval()
    for module in usual.modules():  # .to() rounded the tables of RoPE as well
        if hasattr(module, "rope_init"):
            module.rope_init()
    model = kasa_on_meta(name, dtype).eval()
    load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32)
    assert not any(tensor.is_meta for _, tensor in everything_in(model))
    assert torch.equal(model(tokens()), usual(tokens()))


def test_llama3_1_scales_its_rope():
    weights, logits = base_weights("llama3"), {}
    for name in ("llama3", "llama3_1"):
        model = kasa_on_meta(name).eval()
        load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32)
        logits[name] = model(tokens())
    assert not torch.allclose(logits["llama3"], logits["llama3_1"])


def test_adapters_start_on_load_in_their_own_dtype():
    model = kasa_on_meta("llama3", torch.bfloat16, truncation_rank=2, diag_init="ones")
    load_base_weights(model, base_weights("llama3"), device=CPU, adapter_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        adapter = ".lora_" in name
        assert parameter.requires_grad is adapter, name
        assert parameter.dtype == (torch.float32 if adapter else torch.bfloat16), name
    for _, linear in adapter_linears(model):
        assert not linear.lora_b.weight.any()
        assert linear.lora_a.weight.any()
        assert (linear.lora_diag == 1).all()
        assert not linear.edit.dense().any()
        assert linear.edit.rank == 2


def test_weights_are_cast_to_the_models_dtype():
    model, weights = kasa_on_meta("llama2", torch.bfloat16), base_weights("llama2")
    load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight.bfloat16())


def test_training_does_not_change_the_checkpoint_that_was_loaded():
    weights = base_weights("llama2")
    before = {name: weight.clone() for name, weight in weights.items()}
    model = kasa_on_meta("llama2", truncation_rank=2)
    load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32)
    for _, linear in adapter_linears(model):
        linear.initialize()
        assert linear.folded
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(tokens()).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_tied_embeddings_stay_tied():
    model = kasa_on_meta("gemma")
    load_base_weights(model, base_weights("gemma"), device=CPU, adapter_dtype=torch.float32)
    assert model.output.tied_module.weight is model.tok_embeddings.weight


# --------------------------------------------------------------------------------- checkpoints of another model


def another_size():
    family = FAMILIES["llama2"]
    return randomized(family.base(**SIZES | {"intermediate_dim": 56})).state_dict()


def without_output():
    weights = base_weights("llama2")
    del weights["output.weight"]
    return weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            another_size,
            r"6 of 21 tensors.*layers.0.mlp.w1.weight: the model has \(48, 32\), the checkpoint \(56, 32\)",
        ),
        (
            without_output,
            r"1 of 21 tensors.*output.weight: the model has \(40, 32\), the checkpoint none",
        ),
        (
            lambda: base_weights("qwen2"),
            r"layers.0.attn.k_proj.bias: the model has none, the checkpoint \(16,\)",
        ),
        (dict, "21 of 21 tensors"),
    ],
    ids=["size", "missing", "extra", "empty"],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(weights, message):
    model = kasa_on_meta("llama2")
    with pytest.raises(ValueError, match=message) as caught:
        load_base_weights(model, weights(), device=CPU, adapter_dtype=torch.float32)
    assert "model._component_" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert all(tensor.is_meta for _, tensor in everything_in(model))


# --------------------------------------------------------------------------------- weights that wait


def waiting_model(name="llama3", dtype=torch.float32, *, checkpointing=False, weights=None):
    """A toy without the weights of its blocks' linears, these linears, and all weights."""
    model = kasa_on_meta(name, dtype)
    linears = quantized_linears(model, 2)
    if checkpointing:
        training.set_activation_checkpointing(model, {modules.TransformerSelfAttentionLayer})
    weights = base_weights(name) if weights is None else weights
    options = {"device": CPU, "adapter_dtype": torch.float32}
    load_base_weights(model, weights, **options, without={f"{path}.weight" for path in linears})
    return model, linears, weights


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2", "phi3"])
def test_what_is_left_out_stays_on_meta_and_the_rest_is_there(name, checkpointing):
    model, linears, weights = waiting_model(name, torch.bfloat16, checkpointing=checkpointing)
    left_out = {f"{path}.weight" for path in linears}
    assert len(left_out) == 2 * 7
    for key, tensor in model.state_dict().items():
        assert tensor.is_meta is (key in left_out), key
        if ".lora_" not in key and key not in left_out:
            assert torch.equal(tensor, weights[key].bfloat16())
    assert not any(tensor.is_meta for key, tensor in model.named_buffers())
    for key in left_out:
        set_tensor(model, key, read_tensor(weights, key, device=CPU, dtype=torch.bfloat16))
    assert not any(tensor.is_meta for _, tensor in everything_in(model))
    whole = kasa_on_meta(name, torch.bfloat16)
    load_base_weights(whole, weights, device=CPU, adapter_dtype=torch.float32)
    assert torch.equal(model.eval()(tokens()), whole.eval()(tokens()))
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in whole.parameters()
    ]


def test_what_is_left_out_must_be_in_the_checkpoint_all_the_same():
    weights = base_weights("llama3")
    del weights["layers.1.mlp.w2.weight"]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.w2\.weight: .* the checkpoint none"):
        waiting_model(weights=weights)


def test_a_tensor_is_read_where_and_as_it_is_needed():
    weights = {"norm.scale": torch.tensor([1.0, 1.0 + 2**-10])}
    assert torch.equal(
        read_tensor(weights, "norm.scale", device=CPU, dtype=torch.float32), weights["norm.scale"]
    )
    assert read_tensor(weights, "norm.scale", device=CPU, dtype=torch.bfloat16).tolist() == [
        1.0,
        1.0,
    ]
    assert (
        read_tensor(weights, "norm.scale", device=torch.device("cpu"), dtype=torch.float64).dtype
        == torch.float64
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_weight_is_named(bad):
    weights = base_weights("llama3")
    weights["layers.1.mlp.w2.weight"][3, 4] = bad
    with pytest.raises(ValueError, match=r"^layers\.1\.mlp\.w2\.weight holds NaN or infinity"):
        read_tensor(weights, "layers.1.mlp.w2.weight", device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^layers\.1\.mlp\.w2\.weight holds NaN or infinity"):
        load_base_weights(kasa_on_meta("llama3"), weights, device=CPU, adapter_dtype=torch.float32)
    read_tensor(weights, "layers.1.mlp.w1.weight", device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1024, 2), (2500, 2), (2500,), (2, 2500), (0, 3)], ids=str)
def test_damage_anywhere_in_a_tall_weight_is_found(shape, dtype):
    weight = torch.ones(shape)
    read_tensor({"weight": weight}, "weight", device=CPU, dtype=dtype)
    for row in (0, shape[0] // 2, shape[0] - 1) if shape[0] else ():
        damaged = weight.clone()
        damaged[row] = float("nan")
        with pytest.raises(ValueError, match=r"^weight holds NaN or infinity"):
            read_tensor({"weight": damaged}, "weight", device=CPU, dtype=dtype)


def test_a_value_that_its_dtype_cannot_hold_is_named():
    weights = {"norm.scale": torch.tensor([1e6])}
    with pytest.raises(ValueError, match=r"^norm\.scale holds NaN or infinity"):
        read_tensor(weights, "norm.scale", device=CPU, dtype=torch.float16)


def test_set_tensors_are_frozen_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    set_tensor(model, "0.weight", torch.ones(2, 2))
    set_tensor(model, "1.running_mean", torch.full((2,), 5.0))
    assert (type(model[0].weight), model[0].weight.requires_grad) == (nn.Parameter, False)
    assert model[0].weight.tolist() == [[1, 1], [1, 1]]
    assert model.state_dict()["1.running_mean"].tolist() == [5, 5]
    assert "1.running_mean" not in dict(model.named_parameters())


def on_meta(linears):
    return {path for path, linear in linears.items() if linear.weight.is_meta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_has_weights_inside_and_none_before_or_after(dtype):
    model, linears, weights = waiting_model(dtype=dtype)
    before = {path: linear.weight for path, linear in linears.items()}
    for prefix in ("layers.1.", "layers.0.", "output", "layers.1."):
        with weights_loaded(linears, weights, prefix, device=CPU):
            inside = {path for path in linears if path.startswith(prefix)}
            assert len(inside) == (0 if prefix == "output" else 7)
            assert on_meta(linears) == linears.keys() - inside
            for path in inside:
                found = model.get_submodule(path).weight
                assert (found.dtype, found.requires_grad) == (dtype, False)
                assert torch.equal(found, weights[f"{path}.weight"].to(dtype))
        assert all(linear.weight is before[path] for path, linear in linears.items())


def test_the_tenth_block_is_not_the_first():
    linears = {
        path: nn.Linear(2, 2, bias=False, device="meta")
        for path in ("layers.1.mlp.w1", "layers.10.mlp.w1")
    }
    weights = {f"{path}.weight": torch.ones(2, 2) for path in linears}
    with weights_loaded(linears, weights, "layers.1.", device=CPU):
        assert on_meta(linears) == {"layers.10.mlp.w1"}


def test_no_weight_is_left_by_an_exception_inside_or_by_a_damaged_one():
    _, linears, weights = waiting_model()
    before = {path: linear.weight for path, linear in linears.items()}
    with (
        pytest.raises(KeyError, match="inside"),
        weights_loaded(linears, weights, "layers.0.", device=CPU),
    ):
        raise KeyError("inside" if len(on_meta(linears)) == 7 else "no block has weights")
    assert all(linear.weight is before[path] for path, linear in linears.items())
    weights["layers.1.mlp.w3.weight"][0, 0] = float("nan")  # the last of its block
    with (
        pytest.raises(ValueError, match=r"^layers\.1\.mlp\.w3\.weight holds NaN"),
        weights_loaded(linears, weights, "layers.1.", device=CPU),
    ):
        pass
    assert all(linear.weight is before[path] for path, linear in linears.items())


# --------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("name", "head_dim", "dense"),
    [("llama3", 8, True), ("llama3", 16, False), ("gemma2", 16, True), ("gemma2", 8, True)],
)
def test_heads_too_small_for_flex_attention_get_dense_masks(name, head_dim, dense):
    sizes = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": 2 * head_dim}
    if name == "gemma2":
        sizes["head_dim"] = head_dim
    model = kasa_on_meta(name, rank=1, **sizes)
    assert needs_dense_mask(model) is dense
