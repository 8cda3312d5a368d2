"""Adapters in torchtune's models: where they sit, what they leave alone, and what is refused."""

import importlib
import inspect
import math
from functools import partial

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import modules, training
from torchtune.modules.model_fusion import DeepFusionModel, FusionLayer

from kasa_tune.components import models
from kasa_tune.components.adapters import CorDALinear, KaSALinear, LoRALinear
from kasa_tune.components.adapters.attach import ATTN_MODULES, attach
from kasa_tune.components.adapters.state import adapter_linears, adapter_state_dict
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.models.loading import build_on_meta
from tests.tolerances import MODEL_FP32
from tests.toy_models import FAMILIES, LENGTH, SIZES, randomized, tokens

ALL_ATTENTION = list(ATTN_MODULES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def llama(**options):
    return FAMILIES["llama2"].base(**SIZES)


# --------------------------------------------------------------------------------- every family


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if name != "gemma2"]
)  # ours is not torchtune's
@pytest.mark.parametrize(
    ("attention", "mlp"), [(["q_proj", "v_proj"], False), (ALL_ATTENTION, True)], ids=["qv", "all"]
)
def test_lora_is_torchtunes_model_in_names_and_logits(name, attention, mlp):
    family = FAMILIES[name]
    ours = randomized(
        family.lora(attention, apply_to_mlp=mlp, rank=4, alpha=6.0, **family.sizes)
    ).eval()
    theirs = family.lora_peer(attention, mlp, lora_rank=4, lora_alpha=6.0, **family.sizes).eval()
    state = {key: value for key, value in ours.state_dict().items() if ".lora_edit_" not in key}
    theirs.load_state_dict(state, strict=True)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), **MODEL_FP32)


@pytest.mark.parametrize("name", FAMILIES)
def test_kasa_without_truncation_starts_as_the_base_bit_for_bit_and_trains_nothing_else(name):
    family = FAMILIES[name]
    base = randomized(family.base(**family.sizes)).eval()
    adapted = family.kasa(
        ALL_ATTENTION, apply_to_mlp=True, rank=4, truncation_rank=0, **family.sizes
    ).eval()
    missing = adapted.load_state_dict(base.state_dict(), strict=False)
    assert not missing.unexpected_keys
    for _, linear in adapter_linears(adapted):
        linear.initialize()
    assert torch.equal(adapted(tokens()), base(tokens()))
    expected = {
        f"layers.{layer}.{place}.{leaf}"
        for layer in range(2)
        for place in [*(f"attn.{m}" for m in ALL_ATTENTION), "mlp.w1", "mlp.w2", "mlp.w3"]
        for leaf in ("lora_a.weight", "lora_b.weight", "lora_diag")
    }
    assert {
        key for key, parameter in adapted.named_parameters() if parameter.requires_grad
    } == expected
    assert all(isinstance(linear, KaSALinear) for _, linear in adapter_linears(adapted))


@pytest.mark.parametrize("name", FAMILIES)
def test_corda_starts_as_the_base_bit_for_bit_and_trains_nothing_else(name):
    family = FAMILIES[name]
    base = randomized(family.base(**family.sizes)).eval()
    options = {"rank": 4, "alpha": 4.0, "edit_storage": "factored"}
    adapted = family.corda(ALL_ATTENTION, apply_to_mlp=True, **options, **family.sizes).eval()
    assert not adapted.load_state_dict(base.state_dict(), strict=False).unexpected_keys
    for _, linear in adapter_linears(adapted):
        assert isinstance(linear, CorDALinear)
        linear.start_from(LowRank(torch.randn(linear.out_dim, 3), torch.randn(3, linear.in_dim)))
    assert torch.equal(adapted(tokens()), base(tokens()))
    expected = {
        f"layers.{layer}.{place}.{leaf}.weight"
        for layer in range(2)
        for place in [*(f"attn.{m}" for m in ALL_ATTENTION), "mlp.w1", "mlp.w2", "mlp.w3"]
        for leaf in ("lora_a", "lora_b")
    }
    assert {
        key for key, parameter in adapted.named_parameters() if parameter.requires_grad
    } == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_dora_starts_as_the_base_and_trains_magnitudes_besides(name):
    family = FAMILIES[name]
    base = randomized(family.base(**family.sizes)).eval()
    adapted = family.lora(
        ["q_proj"], apply_to_mlp=["w2"], rank=4, use_dora=True, **family.sizes
    ).eval()
    adapted.load_state_dict(base.state_dict(), strict=False)
    for _, linear in adapter_linears(adapted):
        linear.initialize()
    torch.testing.assert_close(adapted(tokens()), base(tokens()), **MODEL_FP32)
    trained = {
        key.split(".lora_")[1]
        for key, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert trained == {"a.weight", "b.weight", "magnitude"}


@pytest.mark.parametrize("name", FAMILIES)
def test_kasa_removes_what_it_says_from_every_weight(name):
    family = FAMILIES[name]
    model = randomized(
        family.kasa(["k_proj"], apply_to_mlp=["w2"], rank=4, truncation_rank=3, **family.sizes)
    )
    for _, linear in adapter_linears(model):
        smaller = min(linear.weight.shape)
        assert torch.linalg.matrix_rank(linear.weight) == smaller
        linear.initialize()
        assert torch.linalg.matrix_rank(linear.weight, rtol=1e-5) == smaller - 3


@pytest.mark.parametrize("name", FAMILIES)
def test_output_takes_an_adapter_unless_it_is_tied(name):
    family = FAMILIES[name]
    build = partial(family.lora, [], apply_to_output=True, rank=4, **family.sizes)
    if family.tied:
        with pytest.raises(ValueError, match="tied to its embedding"):
            build()
    else:
        assert [place for place, _ in adapter_linears(build())] == ["output"]


@pytest.mark.parametrize("name", ["qwen2", "llama3_2"])
def test_tying_is_decided_by_the_model_not_the_family(name):
    family = FAMILIES[name]
    options = {"rank": 4, "tie_word_embeddings": not family.tied, **family.sizes}
    if family.tied:
        assert [
            place for place, _ in adapter_linears(family.lora([], apply_to_output=True, **options))
        ] == ["output"]
    else:
        with pytest.raises(ValueError, match="tied"):
            family.lora([], apply_to_output=True, **options)


def test_qwens_biases_stay():
    family = FAMILIES["qwen2"]
    base = randomized(family.base(**family.sizes))
    biases = {key: value for key, value in base.named_parameters() if key.endswith(".bias")}
    assert {key.split(".")[-2] for key in biases} == {"q_proj", "k_proj", "v_proj"}
    adapted = attach(base, KaSALinear, ALL_ATTENTION, rank=4)
    for key, bias in biases.items():
        assert adapted.get_parameter(key) is bias
    assert adapted.get_submodule("layers.0.attn.output_proj").bias is None


# --------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("mlp", "leaves"),
    [
        (False, []),
        (True, ["w1", "w2", "w3"]),
        (["w3", "w2"], ["w2", "w3"]),
        (["w1"], ["w1"]),
        ([], []),
    ],
    ids=str,
)
def test_which_mlp_linears(mlp, leaves):
    model = attach(llama(), LoRALinear, ["q_proj"], mlp, rank=4)
    expected = [
        f"layers.{i}.{place}"
        for i in range(2)
        for place in ["attn.q_proj", *(f"mlp.{w}" for w in leaves)]
    ]
    assert sorted(name for name, _ in adapter_linears(model)) == sorted(expected)


def test_lists_of_a_config_are_lists():
    cfg = OmegaConf.create({"attn_modules": ["q_proj"], "apply_to_mlp": ["w3"]})
    model = attach(llama(), LoRALinear, **cfg, rank=4)
    assert {name.split(".")[-1] for name, _ in adapter_linears(model)} == {"q_proj", "w3"}


def test_weights_are_taken_over_not_copied():
    model = llama()
    before = dict(model.named_parameters())
    adapted = attach(model, KaSALinear, ["q_proj"], rank=4)
    assert adapted is model
    assert all(adapted.get_parameter(name) is parameter for name, parameter in before.items())


def test_adapters_go_where_the_model_is():
    with torch.device("meta"):
        model = llama()
    assert all(
        tensor.is_meta
        for tensor in attach(model, KaSALinear, ["q_proj"], rank=4).state_dict().values()
    )


@pytest.mark.parametrize("mode", [True, False])
def test_adapters_follow_the_models_mode(mode):
    model = attach(llama().train(mode), KaSALinear, ["q_proj"], rank=4, dropout=0.5)
    assert all(module.training is mode for module in model.modules())


def test_options_reach_every_linear():
    options = {
        "rank": 4,
        "alpha": 3.0,
        "dropout": 0.2,
        "diag_init": "ones",
        "edit_storage": "factored",
    }
    model = attach(llama(), KaSALinear, ["q_proj"], **options)
    for _, linear in adapter_linears(model):
        assert (linear.rank, linear.alpha, linear.scaling) == (4, 3.0, 0.75)
        assert (linear.dropout.p, linear.diag_init, linear.edit_storage) == (
            0.2,
            "ones",
            "factored",
        )


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"attn_modules": ["q_proj", "o_proj"]},
            "attn_modules .*q_proj, k_proj, v_proj, output_proj; got.*o_proj",
        ),
        ({"attn_modules": "q_proj"}, "attn_modules must be a list"),
        (
            {"attn_modules": ["q_proj"], "apply_to_mlp": ["gate_proj"]},
            "apply_to_mlp .*w1, w2, w3; got.*gate_proj",
        ),
        ({"attn_modules": ["q_proj"], "apply_to_mlp": "w2"}, "apply_to_mlp must be a list"),
        ({"attn_modules": []}, "Nothing to adapt"),
        ({"attn_modules": ["w1"]}, "got .*w1"),
    ],
    ids=str,
)
def test_names_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(llama(), LoRALinear, rank=4, **arguments)


def test_a_rank_above_a_layers_smaller_dimension_names_the_layer():
    with pytest.raises(
        ValueError, match=r"layers\.0\.attn\.k_proj \(16 x 32\): rank must be .* = 16; got 17"
    ):
        attach(llama(), KaSALinear, ["q_proj", "k_proj"], rank=17)


def test_a_truncation_that_leaves_nothing_names_the_layer():
    with pytest.raises(
        ValueError, match=r"layers\.0\.attn\.v_proj \(16 x 32\): truncation_rank .* 16; got 16"
    ):
        attach(llama(), KaSALinear, ["v_proj"], rank=4, truncation_rank=16)


# --------------------------------------------------------------------------------- builders


def published_builders():
    """Decoder builders that torchtune's model packages export, by name."""
    families = "llama2 code_llama2 llama3 llama3_1 llama3_2 llama3_3 mistral gemma gemma2 qwen2 qwen2_5 phi3 phi4"
    for family in families.split():
        package = importlib.import_module(f"torchtune.models.{family}")
        for name in package.__all__:
            other = any(
                part in name
                for part in ("lora", "tokenizer", "classifier", "reward", "plan", "_hf")
            )
            if inspect.isfunction(getattr(package, name)) and not other:
                yield name, getattr(package, name)


def test_every_decoder_of_torchtune_has_its_three_builders():
    names = [name for name, _ in published_builders()]
    assert len(names) > 30
    for name in names:
        assert {f"kasa_{name}", f"lora_{name}", f"corda_{name}"} <= set(vars(models))


@pytest.mark.parametrize(("name", "base"), list(published_builders()))
def test_builders_show_all_their_arguments(name, base):
    of_base = inspect.signature(base).parameters
    for method, linear in (("kasa", KaSALinear), ("lora", LoRALinear), ("corda", CorDALinear)):
        build = getattr(models, f"{method}_{name}")
        shown = inspect.signature(build).parameters
        options = {
            p
            for p in inspect.signature(linear).parameters
            if p not in ("in_dim", "out_dim", "use_bias")
        }
        assert set(shown) == {"attn_modules", "apply_to_mlp", "apply_to_output"} | options | set(
            of_base
        )
        assert {p: shown[p].default for p in of_base} == {p: of_base[p].default for p in of_base}
        assert shown["rank"].default == 8
        assert build.__name__ == f"{method}_{base.__name__}"
        assert base.__name__ in build.__doc__


def test_builders_have_the_options_of_their_method_and_no_other():
    options = {"truncation_rank", "truncation", "diag_init", "edit_storage", "use_dora"}
    expected = {"kasa": options - {"use_dora"}, "lora": {"use_dora"}, "corda": {"edit_storage"}}
    for method, own in expected.items():
        assert (
            options & inspect.signature(getattr(models, f"{method}_llama3_8b")).parameters.keys()
            == own
        )


def test_llama3_8b_on_q_and_v_trains_the_published_number_of_parameters():
    assert build_on_meta(
        llama, dtype=torch.bfloat16
    ).output.weight.is_meta  # before a large one is tried
    model = build_on_meta(
        partial(models.kasa_llama3_8b, ["q_proj", "v_proj"], rank=8, alpha=16), dtype=torch.bfloat16
    )
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    matrices = 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    assert matrices == 3_407_872  # 3.41 M in the paper's table
    assert sum(trained.values()) == matrices + 2 * 32 * 8
    assert sum(size for name, size in trained.items() if name.endswith("lora_diag")) == 512


def test_llama2_7b_at_rank_128_trains_as_many_parameters_as_cordas_paper_says():
    """320 M: in each of 32 layers four linears of 4096 x 4096 and three of 4096 x 11008."""
    build = partial(models.corda_llama2_7b, ALL_ATTENTION, apply_to_mlp=True, rank=128, alpha=128)
    model = build_on_meta(build, dtype=torch.bfloat16)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11_008))
    assert round(trained / 1e6) == 320


# --------------------------------------------------------------------------------- other wrappings


def test_activation_checkpointing_keeps_names_and_values():
    plain, wrapped = (
        randomized(FAMILIES["llama3"].kasa(["q_proj"], apply_to_mlp=["w2"], rank=4, **SIZES))
        for _ in range(2)
    )
    training.set_activation_checkpointing(wrapped, {modules.TransformerSelfAttentionLayer})
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_modules())
    assert [name for name, _ in adapter_linears(wrapped)] == [
        name for name, _ in adapter_linears(plain)
    ]
    assert adapter_state_dict(wrapped).keys() == adapter_state_dict(plain).keys()
    for model in (plain, wrapped):
        model(tokens()).square().sum().backward()
    for (name, one), (_, other) in zip(
        plain.named_parameters(), wrapped.named_parameters(), strict=True
    ):
        if one.requires_grad:
            assert torch.equal(one.grad, other.grad), name


class ToyEncoder(nn.Module):
    """An encoder with an attention of its own."""

    def __init__(self, dim):
        super().__init__()
        self.attn = self_attention(dim)

    def forward(self, embeddings):
        return self.attn(embeddings, embeddings)


def self_attention(dim):
    projections = {
        f"{part}_proj": nn.Linear(dim, dim, bias=False) for part in ("q", "k", "v", "output")
    }
    return modules.MultiHeadAttention(
        embed_dim=dim,
        num_heads=4,
        num_kv_heads=4,
        head_dim=dim // 4,
        is_causal=False,
        **projections,
    )


def deep_fusion():
    """A Llama whose second layer also attends to an encoder's output, as in Llama 3.2 Vision."""
    dim = SIZES["embed_dim"]
    decoder = FAMILIES["llama3"].base(**SIZES)
    cross_attention = modules.TransformerCrossAttentionLayer(
        attn=self_attention(dim),
        mlp=modules.FeedForward(gate_proj=nn.Linear(dim, dim), down_proj=nn.Linear(dim, dim)),
        ca_norm=modules.RMSNorm(dim),
        mlp_norm=modules.RMSNorm(dim),
    )
    decoder.layers[1] = FusionLayer(decoder.layers[1], cross_attention)
    return randomized(DeepFusionModel(decoder, ToyEncoder(dim)))


def test_a_fusion_model_gets_its_adapters_and_keeps_its_numbers():
    inputs = {
        "tokens": tokens(),
        "encoder_input": {"embeddings": torch.randn(2, 5, SIZES["embed_dim"])},
    }
    inputs["encoder_mask"] = torch.ones(2, LENGTH, 5, dtype=torch.bool)
    model = deep_fusion().eval()
    expected = model(**inputs)
    attach(model, KaSALinear, ["q_proj"], ["w1"], apply_to_output=True, rank=4, truncation_rank=0)
    assert [name for name, _ in adapter_linears(model)] == [
        "decoder.layers.0.attn.q_proj",
        "decoder.layers.0.mlp.w1",
        "decoder.layers.1.layer.attn.q_proj",
        "decoder.layers.1.layer.mlp.w1",
        "decoder.layers.1.fusion_layer.attn.q_proj",
        "decoder.layers.1.fusion_layer.mlp.w1",
        "decoder.output",
        "encoder.attn.q_proj",
    ]
    assert all(
        "lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad
    )
    assert torch.equal(model(**inputs), expected)
    for _, linear in adapter_linears(model):
        nn.init.normal_(linear.lora_b.weight)
    loss = model(**inputs).square().mean()
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(
        p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad
    )
