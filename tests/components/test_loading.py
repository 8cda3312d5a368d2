"""From meta to a model with weights: nothing allocated before, the same model as one built the usual way after."""

from functools import partial

import pytest
import torch
from torch import nn

from kasa_tune.components import models
from kasa_tune.components.adapters import adapter_linears
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from tests.toy_models import FAMILIES, SIZES, randomized, tokens

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kasa_on_meta(name, dtype=torch.float32, **options):
    family = FAMILIES[name]
    options = {"rank": 4, "truncation_rank": 0} | family.sizes | options
    return build_on_meta(partial(family.kasa, ["q_proj", "v_proj"], apply_to_mlp=True, **options), dtype=dtype)


def base_weights(name, dtype=torch.float32):
    return {
        key: value.to(dtype)
        for key, value in randomized(FAMILIES[name].base(**FAMILIES[name].sizes)).state_dict().items()
    }


def everything_in(model):
    return [*model.named_parameters(), *model.named_buffers()]


# --------------------------------------------------------------------------------- on meta


def test_a_model_of_any_size_is_built_without_storage():
    assert all(tensor.is_meta for _, tensor in everything_in(kasa_on_meta("llama3")))  # before a large one is tried
    model = build_on_meta(partial(models.kasa_llama3_70b, ["q_proj", "v_proj"], rank=8), dtype=torch.bfloat16)
    assert all(tensor.is_meta for _, tensor in everything_in(model))
    assert model.output.weight.shape == (128_256, 8192)


def test_base_weights_on_meta_have_the_asked_dtype():
    model = kasa_on_meta("qwen2", torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" not in name} == {torch.bfloat16}


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
        (another_size, r"6 of 21 tensors.*layers.0.mlp.w1.weight: the model has \(48, 32\), the checkpoint \(56, 32\)"),
        (without_output, r"1 of 21 tensors.*output.weight: the model has \(40, 32\), the checkpoint none"),
        (lambda: base_weights("qwen2"), r"layers.0.attn.k_proj.bias: the model has none, the checkpoint \(16,\)"),
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
