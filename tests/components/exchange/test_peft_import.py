"""Adapters that a live PEFT saved, on toy Hugging Face checkpoints: ours computes what PEFT does, bad ones are refused.

No tensor here was written by us: PEFT's own model is the oracle, or the formula in float64 on its files.
"""

import contextlib
import json
import shutil
import time
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune.config import instantiate

from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_update,
    load_adapter_state_dict,
)
from kasa_tune.components.exchange import patterns
from kasa_tune.components.exchange.checksums import write_checksums
from kasa_tune.components.exchange.peft_config import targets_of
from kasa_tune.components.exchange.peft_files import PeftAdapter
from kasa_tune.components.exchange.peft_import import open_peft
from kasa_tune.components.models.base_weights import (
    StreamedWeights,
    read_base_weights,
    weights_digest,
)
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from tests.fuzzing import bounded
from tests.parity.hf_families import FAMILIES, random_hf_model, tokens
from tests.toy_checkpoints import checkpointer

peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
pytestmark = pytest.mark.parity

RANK, ALPHA = 4, 6
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
# The logits' relative difference: float32, in which PEFT also decomposes and writes what is left of the weights. A row
# in a wrong place, or an edit left out, makes it 0.05 and more.
SAME = 5e-5
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
norm = torch.linalg.vector_norm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["llama3", "qwen2", "phi3"])
def base(request, tmp_path_factory):
    """A family's name and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    random_hf_model(FAMILIES[request.param]).save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The checkpoint of the family most tests are content with."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    random_hf_model(FAMILIES["llama3"]).save_pretrained(folder)
    return "llama3", folder


def lora_config(name, **options):
    targets = PHI if name == "phi3" else LLAMA
    return peft.LoraConfig(
        **{"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "task_type": "CAUSAL_LM"}
        | options
    )


def logits_of(model):
    with torch.no_grad():
        return model(tokens()).logits


@torch.no_grad()
def trained(model):
    """Every parameter of the adapter moved as far as the large ones of a training are."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(name, folder, *, prepare=lambda model, config: None, initial=None, **options):
    """PEFT's adapter as after a training, saved in ``folder`` (before it in ``initial``); its logits."""
    model, config = random_hf_model(FAMILIES[name]), lora_config(name, **options)
    prepare(model, config)
    model = peft.get_peft_model(model, config).eval()
    if initial:
        model.save_pretrained(initial)
    trained(model).save_pretrained(folder)
    return logits_of(model)


def section(name):
    """A section ``model`` of a config for a family's base, which adapts something else."""
    family = FAMILIES[name]
    path = f"kasa_tune.components.models.lora_{family.builder}"
    return {"_component_": path, "attn_modules": ["v_proj"], "rank": 2, "alpha": 1} | family.sizes


def weights_of(base):
    name, folder = base
    return read_base_weights(checkpointer(folder, ["model.safetensors"], FAMILIES[name].model_type))


def opened(base, folder, initial=None, **model):
    return open_peft(folder, weights_of(base), section(base[0]) | model, initial_folder=initial)


def state_of(imported):
    state = imported.left_alone()
    for module in imported.peft.layers:
        state |= imported.tensors(module, **CPU)
    return state


def ours(base, imported):
    """Our model with the imported adapter."""
    model = build_on_meta(
        partial(instantiate, OmegaConf.create(imported.model)), dtype=torch.float32
    )
    load_base_weights(
        model, weights_of(base), device=torch.device("cpu"), adapter_dtype=torch.float32
    )
    load_adapter_state_dict(model, state_of(imported))
    return model.eval()


def assert_same(base, imported, expected):
    """Ours computes PEFT's logits, and they are not the base's."""
    with torch.no_grad():
        got = ours(base, imported)(tokens()).float()
    untouched = logits_of(random_hf_model(FAMILIES[base[0]]))
    assert norm(expected - untouched) > 0.05 * norm(untouched)
    assert norm(got - expected) < SAME * norm(expected)


# ------------------------------------------------------------------------------------------ nothing is taken out

PLAIN = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_a_lora_computes_what_it_does_in_peft(base, tmp_path, options):
    expected = saved(base[0], tmp_path / "a", **options)
    imported = opened(base, tmp_path / "a")
    assert imported.method == "lora"
    assert (
        imported.model["dropout"] == 0.1
        if "lora_dropout" in options
        else "dropout" not in imported.model
    )
    assert_same(base, imported, expected)


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in ("llama3", "qwen2", "phi3")]
)
def test_every_family(tmp_path, family):
    """Tied embeddings, heads wider than the embedding, soft caps: nothing of it is import's business."""
    random_hf_model(FAMILIES[family]).save_pretrained(tmp_path / "hf")
    expected = saved(family, tmp_path / "a")
    base = family, tmp_path / "hf"
    assert_same(base, opened(base, tmp_path / "a"), expected)


def test_parts_of_a_model(llama, tmp_path):
    """Attention alone, MLP alone, the output projection: the section says so."""
    for number, (targets, attention, mlp, output) in enumerate(
        [
            (["v_proj", "q_proj"], ["q_proj", "v_proj"], False, False),
            (["gate_proj", "down_proj"], [], ["w1", "w2"], False),
            (["o_proj", "lm_head"], ["output_proj"], False, True),
        ]
    ):
        folder = tmp_path / str(number)
        expected = saved("llama3", folder, target_modules=targets)
        imported = opened(llama, folder, apply_to_output=False)
        found = [imported.model[key] for key in ("attn_modules", "apply_to_mlp", "apply_to_output")]
        assert found == [attention, mlp, output]
        assert_same(llama, imported, expected)


UNLIKE = {
    "ranks": {"rank_pattern": {"q_proj": 6, "layers.1.mlp.down_proj": 2}},
    "alphas": {"alpha_pattern": {"v_proj": 20}},
    "both": {"rank_pattern": {"o_proj": 8}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True},
    "one layer": {"layers_to_transform": [1]},
    "a regex": {"target_modules": r".*layers\.0\..*(k_proj|up_proj)"},
}


@pytest.mark.parametrize("options", UNLIKE.values(), ids=UNLIKE)
def test_layers_that_are_not_alike(llama, tmp_path, options):
    """Ranks stay each layer's own, one scaling is left to all, layers without an adapter have rank 0."""
    expected = saved("llama3", tmp_path / "a", **options)
    imported = opened(llama, tmp_path / "a")
    assert imported.method == "corda"
    assert_same(llama, imported, expected)
    ranks = {name: linear.rank for name, linear in adapter_linears(ours(llama, imported))}
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    theirs = sorted(len(value) for key, value in state.items() if key.endswith("lora_A.weight"))
    assert sorted(rank for rank in ranks.values() if rank) == theirs


# ------------------------------------------------------------------------------------------- something is taken out


def calibrated(model, config):
    """PEFT's CorDA before `get_peft_model`."""
    corda = pytest.importorskip("peft.tuners.lora.corda", reason="needs attrs")

    def run():
        with torch.no_grad():
            for row in torch.randint(96, (16, 24)):
                model(row[None])

    corda.preprocess_corda(model, config, run_model=run)


def corda_options():
    return {
        "init_lora_weights": "corda",
        "corda_config": peft.tuners.lora.config.CordaConfig(corda_method="ipm"),
    }


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_pissa_and_olora_as_they_are_saved(base, tmp_path, start):
    expected = saved(base[0], tmp_path / "a", init_lora_weights=start)
    imported = opened(base, tmp_path / "a")
    assert imported.method == "corda"
    assert_same(base, imported, expected)


def with_gradients(model, config):
    """PEFT's LoRA-GA before `get_peft_model`."""
    loraga = pytest.importorskip("peft.tuners.lora.loraga", reason="needs a peft with LoRA-GA")
    loraga.preprocess_loraga(
        model, config, lambda: model(tokens(), labels=tokens()).loss.backward()
    )
    model.zero_grad()


def lora_ga_options():
    return {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": peft.tuners.lora.config.LoraGAConfig(),
    }


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_with_the_adapter_saved_before_training(base, tmp_path, start):
    options = {"init_lora_weights": start}
    if start == "corda":
        options = corda_options() | {"prepare": calibrated}
    elif start == "lora_ga":
        options = lora_ga_options() | {"prepare": with_gradients}
    expected = saved(base[0], tmp_path / "a", initial=tmp_path / "initial", **options)
    assert_same(base, opened(base, tmp_path / "a", tmp_path / "initial"), expected)


@pytest.mark.parametrize("start", ["pissa", "corda"])
def test_converted_by_peft(base, tmp_path, start):
    """Twice the rank, on the base as it is."""
    options = corda_options() if start == "corda" else {"init_lora_weights": "pissa"}
    config = lora_config(base[0], **options)
    model = random_hf_model(FAMILIES[base[0]])
    if start == "corda":
        calibrated(model, config)
    model = peft.get_peft_model(model, config).eval()
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = start
    expected = logits_of(trained(model))
    model.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    imported = opened(base, tmp_path / "a")
    assert (imported.method, imported.model["rank"]) == ("lora", 2 * RANK)
    assert_same(base, imported, expected)


def test_kasa(base, tmp_path):
    expected = saved(base[0], tmp_path / "a", kasa_config=peft.KasaConfig())
    imported = opened(base, tmp_path / "a", truncation_rank=1)
    assert imported.method == "kasa"
    assert_same(base, imported, expected)


def test_what_pissa_takes_out_is_the_first_triplets_of_the_weight(llama, tmp_path):
    """In float64, of one weight under its own name: the imported update less the first triplets is what was learned."""
    saved("llama3", tmp_path / "a", init_lora_weights="pissa", target_modules=["q_proj"])
    imported = opened(llama, tmp_path / "a")
    peft_state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    base, state = weights_of(llama), state_of(imported)
    theirs = "model.layers.1.self_attn.q_proj"
    u, s, vt = torch.linalg.svd(base.read(f"{theirs}.weight").double())
    a, b = (peft_state[f"base_model.model.{theirs}.lora_{part}.weight"].double() for part in "AB")
    expected = ALPHA / RANK * b @ a - u[:, :RANK] * s[:RANK] @ vt[:RANK]
    update = adapter_update(state, "layers.1.attn.q_proj", ALPHA / RANK).dense()
    place = base.location("layers.1.attn.q_proj.weight")
    assert place.key == f"{theirs}.weight"
    assert norm(update - expected[place.rows]) < 1e-6 * norm(expected)


# -------------------------------------------------------------------------------------------------- the new section


def test_the_section_keeps_what_the_base_is_and_drops_what_the_method_does_not_take(
    llama, tmp_path
):
    saved("llama3", tmp_path / "a", use_rslora=True)
    given = {
        "_component_": "kasa_tune.components.models.kasa_llama3",
        "truncation_rank": 1,
        "diag_init": "ones",
    }
    model = opened(llama, tmp_path / "a", **given).model
    sizes = FAMILIES["llama3"].sizes
    assert model == sizes | {
        "_component_": "kasa_tune.components.models.lora_llama3",
        "attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_to_mlp": True,
        "rank": RANK,
        "alpha": ALPHA * RANK**0.5,  # alpha / sqrt(r) = this / r
    }


def test_a_torchtune_builder_will_do(llama, tmp_path):
    saved("llama3", tmp_path / "a")
    imported = opened(llama, tmp_path / "a", _component_="torchtune.models.llama3.llama3")
    assert imported.model["_component_"] == "kasa_tune.components.models.lora_llama3"


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def adapter(llama, tmp_path):
    """A good adapter's folder, to be spoilt."""
    saved("llama3", tmp_path / "a")
    return tmp_path / "a"


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_weight_of_the_base_in_the_file_must_be_the_bases(llama, tmp_path):
    """PEFT saves an adapted output projection with its adapter."""
    saved("llama3", tmp_path / "a", target_modules=["lm_head"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    assert "base_model.model.lm_head.base_layer.weight" in load_file(path)
    change_tensors(
        tmp_path / "a",
        lambda state: state["base_model.model.lm_head.base_layer.weight"][0, 0].add_(1),
    )
    with pytest.raises(ValueError, match=r"holds a weight of lm_head that is not the base's"):
        opened(llama, tmp_path / "a")


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


UNSUPPORTED = {
    "other method": ({"peft_type": "LOHA"}, "has peft_type LOHA; only LORA"),
    "biases of B": ({"lora_bias": True}, "lora_bias is True: its B have biases"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "the head of another classifier": (
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
        r"modules_to_save is \['score'\]: it trained whole modules besides\. Only",
    ),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is"),
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, "aLoRA"),
    "transposed": ({"fan_in_fan_out": True}, "as GPT-2's"),
    "both": ({"kasa_config": {"beta": 1e-4}, "use_dora": True}, "KaSA and DoRA at once"),
    "no target": (
        {"target_modules": r".*\.query"},
        r"target_modules '\.\*\\\\\.query' matches no linear",
    ),
    "other targets": (
        {"target_modules": ["q_proj"]},
        "has tensors of .* which target_modules .* does not name",
    ),
    "other rank": ({"r": 5}, r"is \(4, \d+\), but on a \d+ x \d+ weight and with rank 5"),
    "no diagonal": ({"kasa_config": {"beta": 1e-4}}, "its config wants lora_A, lora_B, lora_diag"),
    "corda": ({"init_lora_weights": "corda"}, "started as corda, .* Set initial_adapter"),
    "approximate pissa": (
        {"init_lora_weights": "pissa_niter_16"},
        "approximated vectors, .* Set initial_adapter",
    ),
    "loftq": ({"init_lora_weights": "loftq"}, "started as loftq, .* Set initial_adapter"),
    "a rank that is none": ({"r": "x"}, r"gives model\.layers\.0\.\S+ rank 'x' and alpha"),
    "an alpha of zero": ({"lora_alpha": 0}, r"rank \d+ and alpha 0; both must be above 0"),
    "a pattern that is none": (
        {"rank_pattern": {"(": 4}},
        r"'.*' in rank_pattern is no pattern",
    ),
    "a start yet to be invented": ({"init_lora_weights": "zeta"}, "started as zeta"),
}


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_cannot_be_imported_is_refused(llama, adapter, changes, message):
    change_config(adapter, **changes)
    with pytest.raises(ValueError, match=message):
        opened(llama, adapter)


def drop(part, state):
    for key in [key for key in state if part in key]:
        del state[key]


def add(key, state):
    state[key] = torch.zeros(2, 2)


def fill(value, state):
    next(iter(state.values())).fill_(value)


def reshape(state):
    for key in [key for key in state if "layers.0.mlp.down_proj" in key]:
        state[key] = state[key].T.contiguous()


PREFIX = "base_model.model"
SPOILT = {
    "missing module": (
        partial(drop, "layers.1.mlp.up_proj"),
        "has no tensors of model.layers.1.mlp.up_proj",
    ),
    "missing B": (
        partial(drop, "layers.1.mlp.up_proj.lora_B"),
        "has lora_A of model.layers.1.mlp.up_proj; its config",
    ),
    "embeddings": (
        partial(add, f"{PREFIX}.model.embed_tokens.lora_embedding_A"),
        "holds .*lora_embedding_A, which",
    ),
    "trained module": (
        partial(add, f"{PREFIX}.lm_head.weight"),
        "holds .*lm_head.weight, which is no part",
    ),
    "another prefix": (
        partial(add, "transformer.h.0.lora_A.weight"),
        "holds transformer.h.0.lora_A.weight",
    ),
    "another model": (partial(drop, "lora_"), "holds no tensors"),
    "other shapes": (
        reshape,
        r"layers.0.mlp.down_proj.lora_A is \(112, 4\), but on a 64 x 112 weight",
    ),
}


@pytest.mark.parametrize(("change", "message"), SPOILT.values(), ids=SPOILT)
def test_a_file_that_is_not_what_its_config_says_is_refused(llama, adapter, change, message):
    change_tensors(adapter, change)
    with pytest.raises(ValueError, match=message):
        opened(llama, adapter)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(llama, adapter, value):
    change_tensors(adapter, partial(fill, value))
    with pytest.raises(ValueError, match=r"lora_A.weight holds NaN or infinity"):
        state_of(opened(llama, adapter))


TOO_SLOW = {
    "target_modules": r"(.*)*(.*)*x(.*)*y$",
    "exclude_modules": r"((\w|\.)+)+!",
    "rank_pattern": {r"((\w|\.)+)+!": 4},
    "alpha_pattern": {r"(([a-z._]|[^!])+)+!": 4},
}


@pytest.mark.parametrize("key", TOO_SLOW)
def test_a_pattern_that_never_ends_is_refused_in_seconds(llama, adapter, key, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    change_config(adapter, **{key: TOO_SLOW[key]})
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"{key} is a pattern that takes more than 1 seconds"):
        opened(llama, adapter)
    assert time.monotonic() - started < 10


def test_a_layers_pattern_that_never_ends_is_refused_too(llama, adapter, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    change_config(adapter, layers_to_transform=[0], layers_pattern=[r"((\w|\.)+)+!"])
    with pytest.raises(ValueError, match=r"layers_pattern is a pattern that takes more than 1"):
        opened(llama, adapter)


def test_patterns_that_peft_its_guides_and_unsloth_write(llama, tmp_path):
    """A long list of names, alternatives, lazy repeats: each means what it means in PEFT."""
    targets = [
        r".*\.layers\.(0|1)\..*(q_proj|v_proj)$",
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|mlp).*?(?:q_proj|v_proj))"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:(?:q_proj|v_proj)))",
        r"model\.layers\.\d+\.self_attn\.(?!k_proj|o_proj)\w+",
    ]
    for number, pattern in enumerate(targets):
        folder = tmp_path / str(number)
        expected = saved("llama3", folder, target_modules=pattern)
        imported = opened(llama, folder)
        assert imported.model["attn_modules"] == ["q_proj", "v_proj"]
        assert_same(llama, imported, expected)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_judged_by_the_tensors_in_the_file(llama, tmp_path, bias):
    """Llama has none, whatever the config says; of Qwen 2 those that were left alone are the base's."""
    expected = saved("llama3", tmp_path / "llama", bias=bias)
    assert_same(llama, opened(llama, tmp_path / "llama"), expected)
    random_hf_model(FAMILIES["qwen2"]).save_pretrained(tmp_path / "hf")
    base = "qwen2", tmp_path / "hf"
    expected = saved("qwen2", tmp_path / "qwen", bias=bias)
    path = tmp_path / "qwen" / "adapter_model.safetensors"
    biases = [key for key in load_file(path) if key.endswith(".bias")]
    assert len(biases) == 2 * 3  # of q, k and v
    assert_same(base, opened(base, tmp_path / "qwen"), expected)
    change_tensors(tmp_path / "qwen", lambda state: state[biases[-1]].add_(0.1))
    with pytest.raises(ValueError, match=rf"bias is '{bias}', .* a bias of .* not the base's"):
        opened(base, tmp_path / "qwen")


def test_a_bias_of_a_module_that_has_none_is_refused(llama, adapter):
    change_config(adapter, bias="lora_only")
    change_tensors(adapter, partial(add, f"{PREFIX}.model.layers.0.mlp.up_proj.bias"))
    with pytest.raises(ValueError, match=r"a bias of model\.layers\.0\.mlp\.up_proj that is not"):
        opened(llama, adapter)


WRONG_TYPES = {
    "target_modules": [{"a": 1}, [1], 7, [["q_proj"]]],
    "exclude_modules": [3, {"a": 1}],
    "layers_pattern": [5, [None]],
    "layers_to_transform": ["1", [1.5], {"a": 1}, ["0"]],
    "rank_pattern": [[], "x", ["q_proj"], {"q_proj": "8"}, {"q_proj": None}, {"q_proj": 2.0}],
    "alpha_pattern": ["x", 3, {"q_proj": [1]}, {"q_proj": float("inf")}, {"q_proj": 10**400}],
    "r": [True, 2.0, [4], -1, 10**30],
    "lora_alpha": [float("inf"), float("nan"), -1, "6", True, [6], 10**400],
    "lora_dropout": ["0.1", -0.1, 1.0, float("nan"), {"_component_": "subprocess.getoutput"}],
    "use_rslora": ["yes", 1, []],
    "use_dora": ["yes", {"a": 1}],
    "init_lora_weights": [3, ["pissa"], {"a": 1}],
    "kasa_config": ["x", [1], 5],
    "bias": [3, ["none"]],
    "base_model_name_or_path": [3, ["a"]],
    "peft_type": [["LORA"], {"a": 1}, 7, "x" * 10**5],
    "modules_to_save": ["x" * 10**5],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values]
)
def test_values_of_wrong_types_are_sentences_that_name_the_key(llama, adapter, key, value):
    change_config(adapter, **{key: value})
    words = {"r": "rank", "rank_pattern": "rank", "lora_alpha": "alpha", "alpha_pattern": "alpha"}
    with pytest.raises(ValueError, match=words.get(key, key)) as error:
        opened(llama, adapter)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 10**5])
def test_a_config_that_is_no_object_is_damaged(llama, adapter, content):
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        opened(llama, adapter)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = [*WRONG_TYPES, "corda_config", "lora_bias", "use_qalora", "fan_in_fan_out"]


@pytest.mark.fuzz
@bounded("folders", quick=60)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_any_config_is_imported_or_refused_in_a_sentence(llama, adapter, changes):
    text = (adapter / "adapter_config.json").read_text()
    try:
        change_config(adapter, **changes)
        with contextlib.suppress(ValueError, FileNotFoundError):
            state_of(opened(llama, adapter))
    finally:
        (adapter / "adapter_config.json").write_text(text)


def test_missing_and_damaged_files_are_named(llama, adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged"):
        opened(llama, adapter)
    weights.unlink()
    (adapter / "adapter_model.bin").touch()
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model.bin is not read: .* safe_serialization=True"
    ):
        opened(llama, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged"):
        opened(llama, adapter)
    shutil.rmtree(adapter)
    with pytest.raises(
        FileNotFoundError, match=r"is no PEFT adapter: it has no adapter_config.json"
    ):
        opened(llama, adapter)


def test_files_are_compared_with_the_sums_beside_them(llama, adapter):
    files = ["adapter_config.json", "adapter_model.safetensors"]
    write_checksums(adapter, files, base_digest="a" * 64)
    assert opened(llama, adapter).peft.base_digest == "a" * 64
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    for position in (-1, len(content) // 2, 20):
        content[position] ^= 4
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"adapter_model\.safetensors is not the file that was"
        ):
            opened(llama, adapter)
        content[position] ^= 4
    path.write_bytes(content)
    opened(llama, adapter)
    change_config(adapter, lora_alpha=ALPHA + 1)
    with pytest.raises(ValueError, match=r"adapter_config\.json is not .* remove checksums\.json"):
        opened(llama, adapter)


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"../x": {}}}', "{}"])
def test_damaged_sums_are_named(llama, adapter, text):
    (adapter / "checksums.json").write_text(text)
    with pytest.raises(ValueError, match=r"checksums\.json is damaged"):
        opened(llama, adapter)


def test_another_base_than_the_exports_is_warned_of(llama, adapter, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = weights_digest(weights_of(llama))
    write_checksums(adapter, [], base_digest=digest)
    assert opened(llama, adapter).check_base() == digest
    assert "was exported for a base" not in caplog.text
    write_checksums(adapter, [], base_digest="b" * 64)
    assert opened(llama, adapter).check_base() == digest
    assert f"was exported for a base whose digest is {'b' * 64}" in caplog.text


def test_another_base_is_refused(llama, adapter, tmp_path):
    """One with other names (Phi fuses its projections), and a section that is not the base's."""
    random_hf_model(FAMILIES["phi3"]).save_pretrained(tmp_path / "phi")
    with pytest.raises(
        ValueError,
        match=r"adapts model.layers.0.mlp.gate_proj \(\d+ modules in all\), which the base",
    ):
        opened(("phi3", tmp_path / "phi"), adapter)
    with pytest.raises(ValueError, match="num_key_value_heads is 2, and the model has 4"):
        opened(llama, adapter, num_kv_heads=4)
    with pytest.raises(
        ValueError, match=r"must be a builder of kasa_tune.components.models, .* no lora_llama9"
    ):
        opened(llama, adapter, _component_="kasa_tune.components.models.kasa_llama9")
    with pytest.raises(ValueError, match=r"must be a Hugging Face checkpoint in safetensors"):
        open_peft(adapter, {}, section("llama3"))


def test_a_rank_that_a_layer_cannot_have_names_the_layer(llama, tmp_path):
    saved("llama3", tmp_path / "a", r=40)
    with pytest.raises(
        ValueError,
        match=r"layers.0.attn.k_proj \(32 x 64\): rank must be between 1 and .* 32; got 40",
    ):
        opened(llama, tmp_path / "a")


def test_an_adapter_on_the_embedding_is_refused(llama, tmp_path):
    """Its tensors have names of their own; PEFT also saves the embedding."""
    saved("llama3", tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens.*, which is no part of a linear's LoRA"):
        opened(llama, tmp_path / "a")


def test_kasa_and_dora_need_layers_that_are_alike(llama, tmp_path):
    for name, options in {
        "KaSA": {"kasa_config": peft.KasaConfig()},
        "DoRA": {"use_dora": True},
    }.items():
        saved("llama3", tmp_path / name, rank_pattern={"q_proj": 2}, **options)
        with pytest.raises(
            ValueError, match=f"different ranks or scalings, .* which {name} does not do here"
        ):
            opened(llama, tmp_path / name)


def test_the_untrained_adapter_must_be_the_same_one(llama, adapter, tmp_path):
    with pytest.raises(
        ValueError, match=r"initial_adapter is peft_adapter itself: give .*a as it was before"
    ):
        opened(llama, adapter, tmp_path / "." / "a")
    saved("llama3", tmp_path / "other", r=2)
    with pytest.raises(ValueError, match=r"other is not .*a before its training: they differ"):
        opened(llama, adapter, tmp_path / "other")
    untrained = shutil.copytree(adapter, tmp_path / "untrained")
    change_config(adapter, use_dora=True)
    change_tensors(adapter, with_magnitudes)
    with pytest.raises(ValueError, match=r"is DoRA that started as a part of its base"):
        opened(llama, adapter, untrained)


def with_magnitudes(state):
    for key in [key for key in state if "lora_B" in key]:
        state[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(state[key]))


def test_kasa_takes_no_untrained_adapter(llama, tmp_path):
    saved("llama3", tmp_path / "a", kasa_config=peft.KasaConfig())
    shutil.copytree(tmp_path / "a", tmp_path / "untrained")
    with pytest.raises(ValueError, match=r"is KaSA: .* Leave initial_adapter out"):
        opened(llama, tmp_path / "a", tmp_path / "untrained")


def test_loftq_comes_with_a_warning(llama, adapter, caplog):
    """W + s (B A - B0 A0) here, where PEFT has another W; with itself as the untrained one, W."""
    untrained = shutil.copytree(adapter, adapter.with_name("untrained"))
    change_config(adapter, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    imported = opened(llama, adapter, untrained)
    assert "was trained on a base that PEFT had quantized" in caplog.text
    untouched = logits_of(random_hf_model(FAMILIES["llama3"]))
    with torch.no_grad():
        got = ours(llama, imported)(tokens())
    assert norm(got - untouched) < SAME * norm(untouched)


def test_opening_reads_headers_alone(llama, adapter, monkeypatch):
    """Whatever the size, refusing costs nothing: no tensor of base or adapter is read before the first module."""
    reads = []
    for kind in (PeftAdapter, StreamedWeights):
        original = kind.read
        monkeypatch.setattr(
            kind, "read", lambda *args, original=original: reads.append(args[1]) or original(*args)
        )
    imported = opened(llama, adapter)
    assert not reads
    imported.tensors("model.layers.0.mlp.up_proj", **CPU)
    assert set(reads) == {"model.layers.0.mlp.up_proj"}


def test_targets_are_matched_as_peft_does():
    """Against PEFT's own function, on names and configs that differ in every rule."""
    match = peft.tuners.tuners_utils.check_target_module_exists
    names = [
        f"model.layers.{i}.{leaf}"
        for i in range(12)
        for leaf in ("self_attn.q_proj", "mlp.up_proj", "mlp.xup_proj")
    ]
    names += ["lm_head", "model.blocks.3.sub.7.q_proj", "q_proj"]
    for options in (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model.layers.3.mlp.up_proj", "lm_head"]},
        {"target_modules": r".*layers\.1\d*\..*(q_proj|up_proj)"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.2.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
        {
            "target_modules": ["q_proj", "lm_head"],
            "layers_to_transform": 3,
            "layers_pattern": "layers",
        },
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [3, 7],
            "layers_pattern": ["blocks", "layers"],
        },
    ):
        found = {name: match(peft.LoraConfig(**options), name) for name in names}
        theirs = {
            name for name in names if found[name] and "Excluded" not in type(found[name]).__name__
        }
        assert targets_of(options, names) == theirs, options
