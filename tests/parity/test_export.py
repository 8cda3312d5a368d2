"""What is exported against those who read it: our logits, those of transformers with PEFT, those of transformers."""

import json
import re
import warnings
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.exchange.merged import write_merged
from kasa_tune.components.exchange.peft_lora import write_peft
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.linalg.nf4 import dequantize, is_quantized
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.components.models.loading import put_weight
from tests.parity.hf_families import FAMILIES, random_hf_model, tokens, transformers
from tests.toy_checkpoints import checkpointer, to_hf
from tests.trained_runs import (
    EVERYWHERE,
    IN_PLACES,
    METHODS,
    QUANTIZED,
    effective_weight,
    trained_run,
    update_of,
)

peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
pytestmark = pytest.mark.parity

# Logits of a standard deviation of 2 behind two layers in float32, the same sums in another order: less than half of
# this was measured, and the smallest change that an adapter makes here is 0.3.
LOGITS = {"rtol": 1e-4, "atol": 1e-4}

# Weights of a standard deviation of 0.25: float32 rounds the factors, the product and the sum.
WEIGHTS = {"rtol": 1e-5, "atol": 1e-6}

# vLLM's LoRA loader: the largest max_lora_rank, and the inits of which only PEFT itself knows what they make of a base.
VLLM_MAX_RANK = 512
FILES = ["model.safetensors"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a family's base model, written once."""
    folder = tmp_path_factory.mktemp("bases")

    @cache
    def written(name):
        random_hf_model(FAMILIES[name]).save_pretrained(folder / name)
        return folder / name

    return written


def run_on(folder, tmp_path, name, method, **options):
    """A run of a family on the base in ``folder``; it and the run as opened for export."""
    family = FAMILIES[name]
    where = (tmp_path / "run", folder, FILES, family.model_type, family.builder, family.sizes)
    run = trained_run(*where, method, **options)
    return run, open_run(run.path)


def as_peft(opened, folder, **options):
    folder.mkdir()
    return write_peft(opened, folder, base_model="the base", **options)


def as_merged(opened, folder, **options):
    folder.mkdir()
    return write_merged(opened, folder, **options)


def from_files(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def with_peft(base_folder, folder):
    """The base with the adapter, of which PEFT found every tensor, and a place for each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(from_files(base_folder), folder)
    assert not [str(warning.message) for warning in caught if "adapter" in str(warning.message)]
    return model.eval()


@torch.no_grad()
def logits(model):
    out = model(tokens())
    return getattr(out, "logits", out).float()


@cache
def base_logits(folder):
    return logits(from_files(folder))


def base_weights(folder, name):
    return read_base_weights(checkpointer(folder, FILES, FAMILIES[name].model_type))


@torch.no_grad()
def put_on_full_precision(model, weights):
    """Give an adapter that was trained on NF4 weights those that they were quantized from, its edit taken out."""
    for path, module in model.named_modules():
        if is_quantized(getattr(module, "weight", torch.empty(0))):
            edit = getattr(module, "edit", None)
            taken = edit.out.double() @ edit.into.double() if edit else 0.0
            put_weight(module, (weights[f"{path}.weight"].double() - taken).float())
            module.folded = True


def assert_one_model(folder, tmp_path, name, method, **options):
    """Ours, transformers' with PEFT's, and transformers' alone; an adapter that NF4 was trained under stands on what
    was quantized.
    """
    run, opened = run_on(folder, tmp_path, name, method, **options)
    errors = as_peft(opened, tmp_path / "peft"), as_merged(opened, tmp_path / "merged")
    ours = logits(run.model)
    torch.testing.assert_close(logits(from_files(tmp_path / "merged")), ours, **LOGITS)
    if method in QUANTIZED:
        put_on_full_precision(run.model, base_weights(folder, name))
        assert (logits(run.model) - ours).abs().max() > 100 * LOGITS["atol"]
        ours = logits(run.model)
    else:
        assert max(error.of_weight for error in errors[0].values()) < 1e-6
    assert (base_logits(folder) - ours).abs().max() > 0.2
    torch.testing.assert_close(logits(with_peft(folder, tmp_path / "peft")), ours, **LOGITS)
    assert not any(error.of_weight for error in errors[1].values())


# --------------------------------------------------------------------------------- one model, three ways


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_on_every_family(name, method, base, tmp_path):
    assert_one_model(base(name), tmp_path, name, method)


@pytest.mark.parametrize("method", ["kasa", "corda_mixed", "dora", "qlora"])
@pytest.mark.parametrize("name", ["llama2", "qwen2", "phi3"])
def test_with_an_adapter_on_the_output(name, method, base, tmp_path):
    where = EVERYWHERE | {"apply_to_output": True}
    assert_one_model(base(name), tmp_path, name, method, where=where)
    assert not FAMILIES[name].tied
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.lora_B.weight" in tensors


@pytest.mark.parametrize("method", ["kasa", "dora", "qcorda"])
@pytest.mark.parametrize("name", ["llama2", "gemma2", "phi3"])
def test_where_some_linears_have_none(name, method, base, tmp_path):
    """Of Phi's fused weights a part is adapted, and the rest of their rows stays as it is."""
    assert_one_model(base(name), tmp_path, name, method, where=IN_PLACES)


@pytest.mark.parametrize("name", ["llama2", "qwen2_tied", "phi3"])
def test_a_rank_for_each_layer(name, base, tmp_path):
    run, opened = run_on(base(name), tmp_path, name, "corda_mixed")
    as_peft(opened, tmp_path / "peft", rank_pattern=True)
    model = with_peft(base(name), tmp_path / "peft")
    torch.testing.assert_close(logits(model), logits(run.model), **LOGITS)
    ranks = {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert len(ranks) > 2
    scalings = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scalings == {max(ranks) / rank for rank in ranks}


def test_a_rank_that_was_asked_for(base, tmp_path):
    run, opened = run_on(base("gemma"), tmp_path, "gemma", "pissa")
    as_peft(opened, tmp_path / "peft", rank=24)
    torch.testing.assert_close(
        logits(with_peft(base("gemma"), tmp_path / "peft")), logits(run.model), **LOGITS
    )


def test_adapters_are_added_up_by_cat_and_not_by_linear(base, tmp_path):
    """Of two exports with unlike ranks filled up to one: PEFT's `cat` is the sum of both updates."""
    folder, state = base("llama2"), {}
    for name, method in (("one", "kasa"), ("two", "corda_ipm")):
        (tmp_path / name).mkdir()
        _, opened = run_on(folder, tmp_path / name, "llama2", method)
        as_peft(opened, tmp_path / name / "peft", rank=16)
        weights = peft_weights(tmp_path / name / "peft", folder)
        original = load_file(folder / "model.safetensors")
        for key, value in original.items():
            state[key] = state.get(key, value.double()) + weights[key] - value.double()
    expected = from_files(folder)
    expected.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    model = peft.PeftModel.from_pretrained(from_files(folder), tmp_path / "one" / "peft", "one")
    model.load_adapter(tmp_path / "two" / "peft", "two")
    found = {}
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], kind, combination_type=kind)
        model.set_adapter(kind)
        found[kind] = logits(model.eval())
    torch.testing.assert_close(found["cat"], logits(expected), **LOGITS)
    assert (found["linear"] - logits(expected)).abs().max() > 100 * LOGITS["atol"]


def test_a_filled_rank_learns_when_peft_trains_on(base, tmp_path):
    """The columns of B that are zero get a gradient: of both factors at zero they would get none."""
    _, opened = run_on(base("llama2"), tmp_path, "llama2", "kasa")
    as_peft(opened, tmp_path / "peft", rank=16)
    model = peft.PeftModel.from_pretrained(
        from_files(base("llama2")), tmp_path / "peft", is_trainable=True
    )
    model(tokens(), labels=tokens()).loss.backward()
    for module in (module for module in model.modules() if hasattr(module, "lora_A")):
        weight = module.lora_B["default"].weight
        filled = ~weight.any(dim=0)
        assert 0 < filled.sum() < 16
        assert (weight.grad[:, filled].norm(dim=0) > 0).all()


@pytest.mark.parametrize("name", ["llama3", "phi3"])
def test_a_base_in_bfloat16(name, base, tmp_path):
    """It is read as bfloat16 and exported on that: transformers does the float32 sums."""
    random_hf_model(FAMILIES[name]).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    run, opened = run_on(tmp_path / "base", tmp_path, name, "kasa")
    as_peft(opened, tmp_path / "peft")
    expected = logits(run.model)
    torch.testing.assert_close(
        logits(with_peft(tmp_path / "base", tmp_path / "peft")), expected, **LOGITS
    )
    as_merged(opened, tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(from_files(tmp_path / "merged")), expected, **LOGITS)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    as_merged(opened, tmp_path / "rounded")
    model = from_files(tmp_path / "rounded", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    weights = to_hf(
        effective_state(run.model, base_weights(tmp_path / "base", name)), *layout(name)
    )
    for key, value in load_file(tmp_path / "rounded" / "model.safetensors").items():
        torch.testing.assert_close(value.float(), weights[key].float(), rtol=2**-8, atol=1e-6)


# --------------------------------------------------------------------------------- weights, and what is said of them


def layout(name):
    return FAMILIES[name].model_type, FAMILIES[name].sizes


@torch.no_grad()
def effective_state(model, weights, on=None):
    """What the model multiplies with, float64 under torchtune's names; with ``on``, its adapters on these weights."""
    state = {key: value.double() for key, value in weights.items()}
    adapted = dict(adapter_linears(model))
    for path, module in model.named_modules():
        key = f"{path}.weight"
        if path in adapted:
            state[key] = effective_weight(module, on[key] if on else None)
        elif is_quantized(getattr(module, "weight", torch.empty(0))) and not on:
            state[key] = dequantize(module.weight).double()
    return state


def peft_weights(folder, base_folder):
    """The base's tensors with the adapter's products added in float64, from its files by the rule of PEFT's names."""
    state = {
        key: value.double() for key, value in load_file(base_folder / "model.safetensors").items()
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            scaling = config["alpha_pattern"].get(module, config["lora_alpha"]) / len(a)
            state[f"{module}.weight"] += scaling * b.double() @ a.double()
            if config["use_dora"]:
                magnitude = tensors[name.replace("lora_A.weight", "lora_magnitude_vector")].double()
                weight = state[f"{module}.weight"]
                weight *= (magnitude / weight.norm(dim=1))[:, None]
    return state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_every_weight_is_the_trained_one(name, method, base, tmp_path):
    run, opened = run_on(base(name), tmp_path, name, method)
    as_peft(opened, tmp_path / "peft"), as_merged(opened, tmp_path / "merged")
    weights = base_weights(base(name), name)
    trained = to_hf(effective_state(run.model, weights), *layout(name))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == load_file(base(name) / "model.safetensors").keys()
    for key, value in merged.items():
        torch.testing.assert_close(value.double(), trained[key], **WEIGHTS)
    expected = trained
    if method in QUANTIZED:
        expected = to_hf(effective_state(run.model, weights, on=weights), *layout(name))
    for key, value in peft_weights(tmp_path / "peft", base(name)).items():
        torch.testing.assert_close(value, expected[key], **WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["kasa", "dora", *QUANTIZED])
@pytest.mark.parametrize("name", ["llama3", "phi3"])
def test_the_errors_told_are_those_of_the_weights(name, method, dtype, base, tmp_path):
    run, opened = run_on(base(name), tmp_path, name, method)
    errors = as_peft(opened, tmp_path / "peft", dtype=dtype)
    weights = base_weights(base(name), name)
    trained = to_hf(effective_state(run.model, weights), *layout(name))
    updates = {f"{path}.weight": update_of(linear) for path, linear in adapter_linears(run.model)}
    updates = to_hf(
        {key: torch.zeros_like(value) for key, value in weights.items()} | updates, *layout(name)
    )
    exported = peft_weights(tmp_path / "peft", base(name))
    assert errors.keys() == {
        key.removesuffix(".weight") for key in exported if "_proj" in key and "bias" not in key
    }
    for module, error in errors.items():
        key = f"{module}.weight"
        wrong = (exported[key] - trained[key]).norm()
        if method not in QUANTIZED and dtype == torch.float32:
            assert error.of_weight < 1e-6
            assert wrong < 1e-6 * trained[key].norm()
        else:
            assert error.of_weight == pytest.approx((wrong / trained[key].norm()).item(), rel=1e-3)
            assert error.of_update == pytest.approx((wrong / updates[key].norm()).item(), rel=1e-3)


# --------------------------------------------------------------------------------- what vLLM's loader asks for


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kasa", {}),
        ("qcorda", {"dtype": torch.bfloat16}),
        ("corda_mixed", {}),
        ("corda_mixed", {"rank_pattern": True}),
    ],
)
@pytest.mark.parametrize("name", ["llama3_2", "qwen2", "gemma2", "phi3"])
def test_the_adapter_is_one_that_vllm_loads(name, method, options, base, tmp_path):
    """Names that end in lora_A.weight or lora_B.weight, of linears of the model; the rank that the config says, for
    each as it looks it up; and none of what it refuses.
    """
    where = EVERYWHERE | {"apply_to_output": not FAMILIES[name].tied}
    _, opened = run_on(base(name), tmp_path, name, method, where=where)
    as_peft(opened, tmp_path / "peft", **options)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert type(config["r"]) is int
    assert 0 < config["r"] <= VLLM_MAX_RANK
    assert config["lora_alpha"] == config["r"]
    assert config["init_lora_weights"] is True
    assert config["bias"] == "none"
    refused = {"modules_to_save", "use_dora", "use_rslora", "lora_bias", "layer_replication"}
    refused |= {"alora_invocation_tokens", "use_qalora", "use_bdlora"}
    assert not any(config.get(key) for key in refused)
    assert all(
        0 < rank <= VLLM_MAX_RANK and type(rank) is int for rank in config["rank_pattern"].values()
    )
    assert config["alpha_pattern"] == {}
    model = from_files(base(name))
    linears = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    modules = set()
    for tensor_name, tensor in tensors.items():
        path, factor, leaf = tensor_name.removeprefix("base_model.model.").rsplit(".", 2)
        modules.add(path)
        meant = (
            rank
            for key, rank in config["rank_pattern"].items()
            if re.fullmatch(rf"(.*\.)?{key}", path)
        )
        rank, linear = next(meant, config["r"]), linears[path]
        shapes = {"lora_A": (rank, linear.in_features), "lora_B": (linear.out_features, rank)}
        assert tensor_name.startswith("base_model.model.")
        assert (tuple(tensor.shape), leaf) == (shapes[factor], "weight")
        assert tensor.is_floating_point()
        assert tensor.dtype == options.get("dtype", torch.float32)
    assert len(tensors) == 2 * len(modules)
    if "rank_pattern" not in options:
        assert modules == linears.keys() - ({"lm_head"} if FAMILIES[name].tied else set())
        assert set(config["target_modules"]) == {path.rpartition(".")[2] for path in modules}


# --------------------------------------------------------------------------------- transformers reads the merged files


@pytest.mark.parametrize("name", ["llama3_2", "qwen2", "phi3"])
def test_shards(name, base, tmp_path):
    run, opened = run_on(base(name), tmp_path, name, "kasa")
    as_merged(opened, tmp_path / "merged", max_shard_size="100KB")
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(logits(from_files(tmp_path / "merged")), logits(run.model), **LOGITS)


def with_stored_output(source, folder):
    """A tied model's checkpoint that holds its output projection all the same, as some do."""
    random = random_hf_model(FAMILIES[source])
    random.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_tied_output_that_is_stored_all_the_same(tmp_path):
    folder = with_stored_output("qwen2_tied", tmp_path / "base")
    assert_one_model(folder, tmp_path, "qwen2_tied", "corda_ipm")
    before, after = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged")
    )
    assert before.keys() == after.keys()
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].tied])
def test_a_tied_output_stays_tied(name, base, tmp_path):
    _, opened = run_on(base(name), tmp_path, name, "kasa")
    as_merged(opened, tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    model = from_files(tmp_path / "merged")
    assert model.lm_head.weight is model.model.embed_tokens.weight
