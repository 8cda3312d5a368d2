"""Many adapters on one base: each as exact as alone, the base untouched by all of them."""

import functools
import json
import re
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torchtune.training import set_activation_checkpointing

from kasa_tune.components import models
from kasa_tune.components.adapters import CorDALinear
from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_state_dict,
    adapter_update,
    load_adapter_state_dict,
)
from kasa_tune.components.checkpoints import CheckpointError, save_checkpoint
from kasa_tune.components.evaluation.generation import complete
from kasa_tune.components.exchange.adapter_set import AdapterSet, SwitchedLinear
from kasa_tune.components.exchange.native import write_adapter
from kasa_tune.components.linalg.decomposition import co_svd, split_component
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize, quantize, to_parts
from kasa_tune.components.models.base_weights import weights_fingerprint
from kasa_tune.components.models.loading import block_linears, put_weight
from kasa_tune.components.quantized.base import FOLDER, keep_quantized
from kasa_tune.components.quantized.start import quantized_start
from kasa_tune.methods import METHODS as TABLE
from tests.tolerances import FP64, MODEL_FP32, assert_rounding_only, assert_same_bits
from tests.toy_models import FAMILIES, randomized, tokens

METHODS = ("kasa", "lora", "pissa", "milora", "corda", "corda++")
PLACES = {  # of each method others: the sets differ, and overlap
    "kasa": {"attn_modules": ["q_proj", "v_proj"], "rank": 3, "alpha": 6.0, "truncation_rank": 2},
    "lora": {"attn_modules": [], "apply_to_mlp": ["w1", "w3"], "rank": 5, "alpha": 1.0},
    "pissa": {
        "attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "rank": 4,
        "alpha": 4.0,
    },
    "milora": {"attn_modules": ["output_proj"], "apply_to_mlp": ["w2"], "rank": 2, "alpha": 5.0},
    "corda": {"attn_modules": ["k_proj"], "apply_to_mlp": True, "rank": 3, "alpha": 3.0},
    "corda++": {
        "attn_modules": ["q_proj", "v_proj"],
        "apply_to_mlp": True,
        "rank": 6,
        "alpha": 9.0,
    },
}
IN_NF4 = {"block_size": 16, "scaler_block_size": 4}


def base_of(family="llama3", dtype=torch.float32, seed=0) -> nn.Module:
    """The plain model with its base weights."""
    return (
        randomized(FAMILIES[family].base(**FAMILIES[family].sizes), seed)
        .to(dtype)
        .requires_grad_(False)
        .eval()
    )


def model_section(family: str, method: str, **options) -> dict:
    """The section ``model`` of a run's config."""
    kind = "kasa" if "kasa" in method else "lora" if method in ("lora", "qlora") else "corda"
    builder = getattr(FAMILIES[family], kind)
    node = {"_component_": f"kasa_tune.components.models.{builder.__name__}"} | FAMILIES[
        family
    ].sizes
    return node | PLACES.get(method, {}) | options


def built(section: dict) -> nn.Module:
    options = {key: value for key, value in section.items() if key != "_component_"}
    return getattr(models, section["_component_"].rpartition(".")[2])(**options).eval()


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 7) -> None:
    """Some training: every trained value moves, by much more than rounding."""
    generator = torch.Generator().manual_seed(seed)
    for _, linear in adapter_linears(model):
        for name in linear.adapter_params():
            parameter = linear.get_parameter(name)
            parameter.add_(
                torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            )


def trained(family: str, method: str, **options) -> tuple[dict, nn.Module]:
    """A model section and the model that a run with it ends with."""
    section = model_section(family, method, **options)
    torch.manual_seed(1)
    model = built(section)
    model.load_state_dict(base_of(family).state_dict(), strict=False)
    for i, (_, linear) in enumerate(adapter_linears(model)):
        if isinstance(linear, CorDALinear):
            sample = torch.randn(3 * linear.in_dim, linear.in_dim)
            covariance = sample.T @ sample if method.startswith("corda") else None
            rank = 1 + i % 5 if method == "corda++" else linear.rank
            component = co_svd(
                linear.weight, covariance, rank, "kpm" if method == "milora" else "ipm"
            )
            linear.start_from(split_component(component, linear.scaling, "balanced"))
        else:
            linear.initialize()
    perturb(model)
    return section, model


def run_state(section: dict, base: str, **more) -> dict:
    return {"step": 3, "base": base, "data": "", "config": {"model": section}, **more}


@functools.cache
def trained_once(family: str, method: str) -> tuple[dict, nn.Module]:
    return trained(family, method)


def saved(
    folder,
    family: str,
    method: str,
    *,
    base: str | None = None,
    state: Mapping | None = None,
    **more,
):
    """A run's output_dir with the checkpoint of a trained model."""
    section, model = trained_once(family, method)
    base = base or weights_fingerprint(base_of(family).state_dict())
    adapter = adapter_state_dict(model) if state is None else dict(state)
    save_checkpoint(
        folder / "checkpoints", 3, {"adapter": adapter, "run": run_state(section, base, **more)}
    )
    return folder


def loaded(adapters: AdapterSet, folder, family: str = "llama3", methods=METHODS) -> AdapterSet:
    for method in methods:
        adapters.add(method, saved(folder / method, family, method))
    return adapters


@torch.no_grad()
def written_out(family: str, method: str) -> nn.Module:
    """The plain float64 model whose weights are ``W0 - E + s B diag(d) A``, formed as dense matrices."""
    section, model = trained_once(family, method)
    state = {name: tensor.double() for name, tensor in adapter_state_dict(model).items()}
    plain = base_of(family).double()
    for name, _ in adapter_linears(model):
        a, b, edit_out, edit_in = (
            state[f"{name}.{key}"]
            for key in ("lora_a.weight", "lora_b.weight", "lora_edit_out", "lora_edit_in")
        )
        d = torch.diag(state.get(f"{name}.lora_diag", torch.ones(len(a)).double()))
        scaling = section["alpha"] / section["rank"]  # also of layers that have another rank
        plain.get_submodule(name).weight += scaling * b @ d @ a - edit_out @ edit_in
    return plain


def bits(model: nn.Module) -> dict:
    """Copies of all that the model's state dict holds; of NF4 its parts, since it cannot be cloned as it is."""
    found = {}
    for name, tensor in model.state_dict().items():
        _, parts, _ = to_parts(tensor) or ("plain", {"": tensor}, [])
        found |= {f"{name} {part}": value.clone() for part, value in parts.items()}
    return found


def assert_untouched(model: nn.Module, before: dict) -> None:
    after = bits(model)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor)


# --------------------------------------------------------------------------------- what a model computes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_beside_all_others_is_the_formula(family, tmp_path):
    model, x = base_of(family), tokens()
    before, base_logits = bits(model), model(x)
    adapters = loaded(AdapterSet(model), tmp_path, family)
    assert_untouched(model, before)
    for method in METHODS:
        with adapters.use(method):
            logits = model(x)
            assert_untouched(model, before)
        expected = written_out(family, method)(x)
        torch.testing.assert_close(logits.double(), expected.double(), **MODEL_FP32)
        assert not torch.allclose(logits, base_logits, rtol=1e-2, atol=1e-2)
        assert torch.equal(model(x), base_logits)
    assert_untouched(model, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_in_float64_it_is_the_formula_to_the_last_digits(family, method, tmp_path):
    model, x = base_of(family, torch.float64), tokens()
    fingerprint = weights_fingerprint(base_of(family).state_dict())
    adapters = AdapterSet(model, base=fingerprint, dtype=torch.float64)
    adapters.add(method, saved(tmp_path, family, method))
    peer, hidden = written_out(family, method), []
    for each in (model, peer):  # the logits are rounded to float32
        each.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    with adapters.use(method):
        model(x)
    peer(x)
    torch.testing.assert_close(*hidden, **FP64)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_batch_has_its_own_adapter(family, tmp_path):
    model, x = base_of(family), tokens(batch=8)
    base_logits = model(x)
    adapters = loaded(AdapterSet(model), tmp_path, family)
    which = ["corda", None, "lora", "corda", "kasa", "pissa", "corda++", "milora"]
    with adapters.use(which):
        logits = model(x)
    for row, method in enumerate(which):
        with adapters.use(method):
            torch.testing.assert_close(logits[row], model(x)[row], **MODEL_FP32)
    assert torch.equal(logits[1], base_logits[1])
    assert torch.equal(model(x), base_logits)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_model_that_the_adapter_was_loaded_into(method, tmp_path):
    section, source = trained_once("llama3", method)
    peer = built(section)
    peer.load_state_dict(base_of().state_dict(), strict=False)
    load_adapter_state_dict(peer, adapter_state_dict(source))
    model, x = base_of(), tokens()
    adapters = AdapterSet(model)
    adapters.add("it", saved(tmp_path, "llama3", method))
    prompts = [[3, 4, 5], [6], [7, 8]]
    options = {"max_new_tokens": 8, "stop_tokens": []}
    base_text = complete(model, prompts, **options)
    with adapters.use("it"):
        torch.testing.assert_close(model(x), peer(x), **MODEL_FP32)
        assert complete(model, prompts, **options) == complete(peer, prompts, **options)
    assert complete(model, prompts, **options) == base_text


def test_in_bfloat16_no_large_terms_cancel(tmp_path):
    """An edit 1000 times the size of the weight that the update nearly puts back."""
    section, model = trained("llama3", "pissa")
    generator = torch.Generator().manual_seed(2)
    state = adapter_state_dict(model)
    for name, linear in adapter_linears(model):
        large = 1000 * torch.randn(linear.out_dim, 4, generator=generator)
        state |= {f"{name}.lora_edit_out": large, f"{name}.lora_b.weight": large / linear.scaling}
        into = torch.randn(4, linear.in_dim, generator=generator)
        moved = into + 1e-4 * torch.randn(into.shape, generator=generator)
        state |= {f"{name}.lora_edit_in": into, f"{name}.lora_a.weight": moved}
    plain = base_of(dtype=torch.bfloat16)
    adapters = AdapterSet(plain)
    fingerprint = weights_fingerprint(plain.state_dict())
    run = run_state(section, fingerprint)
    adapters.add("it", save_checkpoint(tmp_path, 3, {"adapter": state, "run": run}))
    for name, trained_linear in adapter_linears(model):
        linear = plain.get_submodule(name)
        x = torch.randn(64, linear.in_features, generator=generator).bfloat16()
        with adapters.use("it"):
            y = linear(x)
        assert y.dtype == torch.bfloat16
        update = adapter_update(state, name, trained_linear.scaling)
        change = update.dense()
        u, s, vt = torch.linalg.svd(change)
        weight, x = linear.weight.double(), x.double()
        magnitude = (
            x.abs() @ weight.abs().T + (x.abs() @ (s[:4, None] * vt[:4]).abs().T) @ u[:, :4].abs().T
        )
        assert_rounding_only(y, x @ (weight + change).T, magnitude, torch.bfloat16)
        in_bf16 = LowRank(
            update.out.bfloat16().double(), update.into.bfloat16().double()
        )  # its terms as they are
        with pytest.raises(AssertionError, match="rounding error"):
            assert_rounding_only(
                x @ (weight + in_bf16.dense()).T, x @ (weight + change).T, magnitude, torch.bfloat16
            )


def test_an_untrained_lora_changes_no_bit_and_no_linear(tmp_path):
    _, source = trained_once("llama3", "lora")
    state = {n: t * ("lora_b" not in n) for n, t in adapter_state_dict(source).items()}
    model, x = base_of(), tokens()
    expected = model(x)
    adapters = AdapterSet(model)
    adapters.add("start", saved(tmp_path, "llama3", "lora", state=state))
    with adapters.use("start"):
        assert torch.equal(model(x), expected)
    assert not any(isinstance(module, SwitchedLinear) for module in model.modules())


@pytest.mark.parametrize("leading", [(), (3,), (2, 0), (2, 2)], ids=str)
def test_inputs_of_any_shape_with_a_bias(leading, tmp_path):
    model = base_of("qwen2")
    adapters = AdapterSet(model)
    adapters.add("it", saved(tmp_path, "qwen2", "kasa"))
    linear, expected = (
        model.layers[1].attn.q_proj,
        written_out("qwen2", "kasa").layers[1].attn.q_proj,
    )
    assert linear.bias is not None
    x = torch.randn(*leading, 32)
    with adapters.use("it"):
        torch.testing.assert_close(linear(x).double(), expected(x.double()), **MODEL_FP32)


# --------------------------------------------------------------------------------- switching


def test_blocks_nest_and_end_on_errors(tmp_path):
    model, x = base_of(), tokens(batch=2)
    adapters = loaded(AdapterSet(model), tmp_path, methods=("kasa", "lora"))
    base_logits, logits = model(x), {}
    for name in adapters.names:
        with adapters.use(name):
            logits[name] = model(x)
    with adapters.use("kasa"):
        with adapters.use(None):
            assert torch.equal(model(x), base_logits)
            with adapters.use(["lora", None]):
                torch.testing.assert_close(model(x)[0], logits["lora"][0], **MODEL_FP32)
            assert torch.equal(model(x), base_logits)
        assert torch.equal(model(x), logits["kasa"])
        with pytest.raises(KeyError), adapters.use("lora"):
            raise KeyError
        assert torch.equal(model(x), logits["kasa"])
        with pytest.raises(ValueError, match="No adapter"), adapters.use("loora"):
            pass
        assert torch.equal(model(x), logits["kasa"])
    assert torch.equal(model(x), base_logits)


def test_a_removed_adapter_leaves_nothing(tmp_path):
    model, x = base_of(), tokens()
    kinds = [type(module) for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    adapters = loaded(AdapterSet(model), tmp_path, methods=("kasa", "corda++"))
    with adapters.use("corda++"):
        expected = model(x)
    adapters.remove("kasa")
    assert adapters.names == ["corda++"]
    with adapters.use("corda++"):
        assert torch.equal(model(x), expected)
    adapters.remove("corda++")
    assert [type(module) for module in model.modules()] == kinds
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    adapters.add("kasa", tmp_path / "corda++")  # the name is free again
    with adapters.use("kasa"):
        assert torch.equal(model(x), expected)


def test_an_adapter_in_use_is_not_removed(tmp_path):
    adapters = loaded(AdapterSet(base_of()), tmp_path, methods=("kasa", "lora"))
    with adapters.use([None, "kasa"]), adapters.use("lora"), adapters.use(None):
        for name in ("kasa", "lora"):
            with pytest.raises(ValueError, match=f"'{name}' is in use"):
                adapters.remove(name)
    adapters.remove("kasa")
    adapters.remove("lora")


def test_names_are_checked(tmp_path):
    adapters = loaded(AdapterSet(base_of()), tmp_path, methods=("kasa", "lora"))
    with pytest.raises(ValueError, match=r"No adapter is named 'kassa'. Did you mean kasa\?"):
        adapters.remove("kassa")
    with (
        pytest.raises(ValueError, match=r"No adapter is named 'e2e'. Loaded: kasa, lora."),
        adapters.use([None, "e2e"]),
    ):
        pass
    with pytest.raises(ValueError, match="'kasa' is loaded already"):
        adapters.add("kasa", tmp_path / "lora")
    with pytest.raises(ValueError, match=r"No adapter is named 'a'. Loaded: none."):
        AdapterSet(base_of()).remove("a")


@pytest.mark.parametrize("names", [[], ["kasa"], ["kasa", None, None]], ids=str)
def test_a_name_for_each_row(names, tmp_path):
    model = base_of()
    adapters = loaded(AdapterSet(model), tmp_path, methods=("kasa",))
    with (
        adapters.use(names),
        pytest.raises(ValueError, match=f"given {len(names)} names.*the batch has 2 rows"),
    ):
        model(tokens(batch=2))


# --------------------------------------------------------------------------------- where the model has been and goes


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "by layer"])
def test_a_compiled_model_sees_every_switch(how, tmp_path):
    torch.compiler.reset()
    plain, compiled, x = base_of(), base_of(), tokens(batch=2)
    base_logits = plain(x)
    folders = {method: saved(tmp_path / method, "llama3", method) for method in ("kasa", "pissa")}
    if how == "whole":
        called = torch.compile(compiled, backend="eager")
    else:
        called = compiled
        for layer in compiled.layers:
            layer.compile(backend="eager")
    torch.testing.assert_close(
        called(x), base_logits, **MODEL_FP32
    )  # compiled before there is any adapter
    peers = AdapterSet(plain), AdapterSet(called)
    for adapters in peers:
        for name, folder in folders.items():
            adapters.add(name, folder)
    for which in ("kasa", None, "pissa", ["pissa", None], ["kasa", "pissa"], "kasa"):
        with peers[0].use(which), peers[1].use(which):
            torch.testing.assert_close(called(x), plain(x), **MODEL_FP32)
    for adapters in peers:
        adapters.remove("kasa")
        adapters.add("kasa", folders["pissa"])
    for which in ("pissa", "kasa", None):
        with peers[0].use(which), peers[1].use(which):
            torch.testing.assert_close(called(x), plain(x), **MODEL_FP32)


def test_checkpointed_activations(tmp_path):
    model, x = base_of(), tokens()
    set_activation_checkpointing(model, auto_wrap_policy={type(model.layers[0])})
    adapters = AdapterSet(model)
    adapters.add("it", saved(tmp_path, "llama3", "corda"))
    with adapters.use("it"):
        torch.testing.assert_close(
            model(x).double(), written_out("llama3", "corda")(x).double(), **MODEL_FP32
        )


def test_factors_follow_the_weights_device_and_keep_their_dtype(tmp_path):
    model = base_of()
    adapters = AdapterSet(model)
    adapters.add("it", saved(tmp_path, "llama3", "kasa"))
    update = model.layers[0].attn.q_proj.updates["it"]
    assert update.out.dtype == torch.float32
    model.to(torch.bfloat16)
    assert_same_bits(model.layers[0].attn.q_proj.updates["it"].out, update.out)
    with adapters.use("it"):
        assert model.layers[0].attn.q_proj(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16
    model.to("meta")
    moved = model.layers[0].attn.q_proj.updates["it"]
    assert (moved.out.device.type, moved.into.device.type, moved.out.dtype) == (
        "meta",
        "meta",
        torch.float32,
    )


def test_factors_are_kept_in_another_dtype(tmp_path):
    model = base_of()
    adapters = AdapterSet(model, dtype=torch.bfloat16)
    adapters.add("it", saved(tmp_path, "llama3", "kasa"))
    update = model.layers[0].attn.q_proj.updates["it"]
    assert (update.out.dtype, update.into.dtype, update.rank) == (
        torch.bfloat16,
        torch.bfloat16,
        3 + 2,
    )


def test_hooks_and_gradients_go_on(tmp_path):
    model = base_of()
    seen = []
    model.layers[0].attn.q_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    adapters = AdapterSet(model)
    adapters.add("it", saved(tmp_path, "llama3", "kasa"))
    x = torch.randn(2, 5, 32, requires_grad=True)
    plain = written_out("llama3", "kasa").layers[0].attn.q_proj
    for which in ("it", ["it", "it"]):
        with adapters.use(which):
            y = model.layers[0].attn.q_proj(x)
        assert seen[-1] is y
        (gradient,) = torch.autograd.grad(y.sum(), x)
        expected = plain.weight.sum(dim=0).expand(2, 5, 32)
        torch.testing.assert_close(gradient.double(), expected, **MODEL_FP32)


# --------------------------------------------------------------------------------- which adapters belong


def test_a_run_its_checkpoint_and_an_adapter_by_itself(tmp_path):
    model, x = base_of(), tokens()
    run = saved(tmp_path / "run", "llama3", "corda++")
    section, source = trained_once("llama3", "corda++")
    fingerprint = weights_fingerprint(base_of().state_dict())
    (tmp_path / "native").mkdir()
    write_adapter(tmp_path / "native", adapter_state_dict(source), run_state(section, fingerprint))
    adapters = AdapterSet(model)
    for name, path in {
        "run": run,
        "step": str(run / "checkpoints" / "step_00000003"),
        "native": tmp_path / "native",
    }.items():
        adapters.add(name, path)
    logits = []
    for name in adapters.names:
        with adapters.use(name):
            logits.append(model(x))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_base_is_known_in_any_dtype_that_keeps_its_values(stored, tmp_path):
    in_files = {name: tensor.to(stored) for name, tensor in base_of().state_dict().items()}
    run = saved(tmp_path, "llama3", "kasa", base=weights_fingerprint(in_files))
    for dtype in {stored, torch.float32, torch.float64}:
        model = base_of().to(stored).to(dtype)
        AdapterSet(model).add("it", run)
    if stored != torch.float32:
        with pytest.raises(CheckpointError, match="belongs to other base weights"):
            AdapterSet(base_of()).add("it", run)  # would be the base only after rounding


def test_another_base_is_refused(tmp_path):
    run = saved(tmp_path, "llama3", "kasa")
    other = weights_fingerprint(base_of(seed=1).state_dict())
    model = base_of()
    model.layers[0].mlp.w1.weight[0, 0] += 1
    rounded = base_of(dtype=torch.bfloat16)
    for wrong in (AdapterSet(model), AdapterSet(rounded), AdapterSet(base_of(), base=other)):
        with pytest.raises(
            CheckpointError, match=r"belongs to other base weights .*AdapterSet\(model, base="
        ):
            wrong.add("it", run)
        assert wrong.names == []
    AdapterSet(rounded, base=weights_fingerprint(base_of().state_dict())).add("it", run)
    assert type(rounded.layers[0].attn.q_proj) is SwitchedLinear


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"num_layers": 1},
            r"does not fit the model in 2 linears: layers.1.attn.q_proj: the model has no such linear; ",
        ),
        (
            {"num_kv_heads": 1},
            r"in 2 linears: layers.0.attn.v_proj: the model's is 8 x 32, the adapter's 16 x 32; ",
        ),
    ],
)
def test_a_model_that_lacks_a_linear_is_refused_and_stays(sizes, message, tmp_path):
    run = saved(tmp_path, "llama3", "kasa")
    model = FAMILIES["llama3"].base(**FAMILIES["llama3"].sizes | sizes)
    adapters = AdapterSet(model)
    with pytest.raises(ValueError, match=message):
        adapters.add("it", run)
    assert adapters.names == []
    assert not any(isinstance(module, SwitchedLinear) for module in model.modules())


def test_models_that_are_not_plain_are_refused(tmp_path):
    run = saved(tmp_path, "llama3", "kasa")
    _, adapted = trained_once("llama3", "lora")
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.w1 has an adapter already.*torchtune.models.llama3"
    ):
        AdapterSet(adapted)
    model = base_of()
    first, second = AdapterSet(model), AdapterSet(model)
    first.add("it", run)
    with pytest.raises(
        ValueError, match=r"layers.0.attn.q_proj: the model's is of another AdapterSet"
    ):
        second.add("it", run)

    class FrozenLinear(nn.Linear):
        pass

    model = base_of()
    odd = FrozenLinear(32, 32, bias=False)
    odd.weight = model.layers[0].attn.q_proj.weight
    model.layers[0].attn.q_proj = odd
    with pytest.raises(
        ValueError,
        match=r"in 1 linears: layers.0.attn.q_proj: the model's is a FrozenLinear, not a plain",
    ):
        AdapterSet(model).add("it", run)


def test_dora_is_refused(tmp_path):
    section, model = trained("llama3", "lora", use_dora=True)
    run = run_state(section, weights_fingerprint(base_of().state_dict()))
    path = save_checkpoint(tmp_path, 3, {"adapter": adapter_state_dict(model), "run": run})
    with pytest.raises(CheckpointError, match=r"DoRA.*cannot be added.*merged_export"):
        AdapterSet(base_of()).add("it", path)


def test_damaged_adapters_are_refused(tmp_path):
    _, source = trained_once("llama3", "kasa")
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(source).items()}
    state["layers.1.attn.v_proj.lora_diag"][1] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.attn.v_proj.lora_diag holds NaN"):
        AdapterSet(base_of()).add("it", saved(tmp_path / "nan", "llama3", "kasa", state=state))
    del state["layers.1.attn.v_proj.lora_diag"]
    with pytest.raises(
        ValueError, match=r"does not fit the model in 1 tensors: layers.1.attn.v_proj.lora_diag"
    ):
        AdapterSet(base_of()).add("it", saved(tmp_path / "missing", "llama3", "kasa", state=state))
    run = saved(tmp_path / "cut", "llama3", "kasa")
    (run / "checkpoints" / "step_00000003" / "adapter.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="damaged"):
        AdapterSet(base_of()).add("it", run)
    with pytest.raises(CheckpointError, match="is not a folder"):
        AdapterSet(base_of()).add("it", tmp_path / "nowhere")


# --------------------------------------------------------------------------------- a base in four bits


def in_nf4(family="llama3", seed=0) -> nn.Module:
    """The plain model, its blocks' linears quantized."""
    model = base_of(family, seed=seed)
    for linear in block_linears(model).values():
        put_weight(linear, quantize(linear.weight, **IN_NF4))
    return model


def saved_quantized(folder, method: str, seed: int = 0):
    """A run on an NF4 base and the model that it ended with."""
    options = {"attn_modules": ["q_proj", "v_proj"], "apply_to_mlp": True, "rank": 2, "alpha": 3.0}
    section = model_section("llama3", method, **options)
    torch.manual_seed(1)
    model = built(section)
    model.load_state_dict(base_of(seed=seed).state_dict(), strict=False)
    adapted = dict(adapter_linears(model))
    for name, linear in block_linears(model).items():
        component = (
            co_svd(linear.weight, None, 2, "ipm")
            if method == "qcorda" and name in adapted
            else None
        )
        start = quantized_start(
            linear.weight,
            adapted.get(name),
            TABLE[method],
            quantize=functools.partial(quantize, **IN_NF4),
            component=component,
        )
        start.put_into(linear)
    perturb(model)
    checksum = keep_quantized(
        folder / FOLDER, {name: linear.weight for name, linear in block_linears(model).items()}
    )
    run = run_state(
        section, weights_fingerprint(base_of(seed=seed).state_dict()), quantized_base=checksum
    )
    save_checkpoint(folder / "checkpoints", 3, {"adapter": adapter_state_dict(model), "run": run})
    return folder, model


def test_adapters_share_a_quantized_base(tmp_path):
    model, x = in_nf4(), tokens()
    before, base_logits = bits(model), model(x)
    adapters = AdapterSet(model)
    peers = {}
    for method in ("qlora", "qkasa"):
        run, peers[method] = saved_quantized(tmp_path / method, method)
        adapters.add(method, run)
    for method, peer in peers.items():
        with adapters.use(method):
            torch.testing.assert_close(model(x), peer(x), **MODEL_FP32)
            for name, linear in adapter_linears(peer):  # and the formula, dense
                dense = (
                    dequantize(linear.weight).double()
                    + adapter_update(adapter_state_dict(peer), name, linear.scaling).dense()
                )
                inputs = torch.randn(3, linear.in_dim)
                y = model.get_submodule(name)(inputs)
                torch.testing.assert_close(y.double(), inputs.double() @ dense.T, **MODEL_FP32)
        assert torch.equal(model(x), base_logits)
    with adapters.use(["qkasa", None]):
        assert torch.equal(model(x)[1], base_logits[1])
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["qcorda", "qpissa", "loftq"])
def test_adapters_with_a_quantized_base_of_their_own_are_refused(method, tmp_path):
    run, _ = saved_quantized(tmp_path, method)
    with pytest.raises(
        CheckpointError, match=r"taken out of the weights before they were quantized.*merged_export"
    ):
        AdapterSet(in_nf4()).add("it", run)


def test_another_quantized_base_is_refused(tmp_path):
    run, _ = saved_quantized(tmp_path / "one", "qlora")
    with pytest.raises(
        CheckpointError,
        match=re.escape("belongs to another quantized base than the model's: layers.0."),
    ):
        AdapterSet(in_nf4(seed=1)).add("it", run)
    with pytest.raises(
        CheckpointError, match="trained on weights in NF4, the model has unquantized weights"
    ):
        AdapterSet(base_of()).add("it", run)
    plain = saved(tmp_path / "plain", "llama3", "lora")
    with pytest.raises(
        CheckpointError, match="trained on unquantized weights, the model has weights in NF4"
    ):
        AdapterSet(in_nf4()).add("it", plain)


def test_a_known_quantized_base_is_not_read_again(tmp_path):
    adapters = AdapterSet(in_nf4())
    first, _ = saved_quantized(tmp_path / "first", "qlora")
    second, _ = saved_quantized(tmp_path / "second", "qkasa")
    adapters.add("first", first)
    for file in (second / FOLDER).rglob("*.safetensors"):
        file.unlink()
    adapters.add("second", second)
    with pytest.raises(CheckpointError):
        AdapterSet(in_nf4()).add("second", second)
