"""What is read from a model's modules is what its builder was told, for every builder of ours."""

import pytest
import torch
from torch import nn
from torchtune.models.gemma2 import gemma2 as torchtune_gemma2
from torchtune.modules import RMSNorm

from kasa_tune.architectures import architecture_of, differences
from kasa_tune.architectures.comparing import on_files, unlike
from kasa_tune.architectures.torchtune_builders import BUILDERS, built_by
from kasa_tune.components import models
from kasa_tune.components.models.decoder import Decoder
from kasa_tune.components.models.inspecting import architecture_of_model
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.config import signatures
from tests.toy_checkpoints import MODELS, config_of
from tests.toy_models import FAMILIES, SIZES, WIDE_HEADS

# Arguments that are nowhere the defaults, of the builders that take them.
UNUSUAL = {
    "norm_eps": 3e-4,
    "rope_base": 12_345,
    "scale_factor": 5,
    "tie_word_embeddings": True,
    "hidden_capping_value": 7.0,
    "final_capping_value": 11.0,
    "sliding_window_size": 5,
    "query_pre_attn_scalar": 24,
}


DECODERS = [
    name
    for name in vars(models)
    if name.startswith("kasa_") and not any(kind in name for kind in ("bert", "encoder"))
]
SIZES_OF_GPT2 = {"vocab_size": 31, "num_layers": 3, "num_heads": 2, "embed_dim": 24}
SIZES_OF_GPT2 |= {"max_seq_len": 40}


def on_meta(builder, **sizes):
    return build_on_meta(lambda: builder(**sizes), dtype=torch.float32)


def unusual(family):
    """Sizes of a toy with every other argument set."""
    taken = signatures.static(f"torchtune.models.{family}.{family}").parameters
    return FAMILIES[family].sizes | {key: UNUSUAL[key] for key in UNUSUAL if key in taken}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("values", ["defaults", "unusual"])
def test_a_model_computes_what_its_config_json_says(family, values):
    """config.json is written from the arguments, by Hugging Face's names."""
    sizes = FAMILIES[family].sizes if values == "defaults" else unusual(family)
    found = architecture_of_model(on_meta(FAMILIES[family].base, **sizes))
    assert not found.unknown
    kind = MODELS[family].model_type if family in MODELS else "LLAMA3"
    expected = architecture_of(config_of(family, sizes))
    assert unlike(expected, on_files(found.architecture, kind), longest=sizes["max_seq_len"]) == []
    assert found.architecture.max_seq_len == sizes["max_seq_len"]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_checkpointing_change_nothing(family):
    sizes, kind = FAMILIES[family].sizes, FAMILIES[family]
    adapted = on_meta(
        lambda **sizes: kind.kasa(["q_proj"], apply_to_mlp=True, rank=2, alpha=1.0, **sizes),
        **sizes,
    )
    assert architecture_of_model(adapted) == architecture_of_model(on_meta(kind.base, **sizes))


@pytest.mark.parametrize("name", DECODERS)
def test_builders_are_known_without_torch(name):
    """What the arguments tell is what the built model's modules tell."""
    if name == "kasa_from_checkpoint" or name.startswith("kasa_llava"):
        return  # config.json tells; a LLaVA is compared with it once it is built
    base, values = signatures.built_from(f"kasa_tune.components.models.{name}")
    assert base in BUILDERS
    sizes = {}
    if base == "gpt2":
        sizes = SIZES_OF_GPT2 if name == "kasa_gpt2" else {}
    elif name.removeprefix("kasa_") in BUILDERS:
        sizes = unusual(base)
    elif "tie_word_embeddings" in signatures.static(f"torchtune.models.{base}.{base}").parameters:
        assert values["tie_word_embeddings"] in (True, False)
    built = on_meta(getattr(models, name), attn_modules=["q_proj"], rank=2, alpha=1.0, **sizes)
    told = built_by(base, values | sizes)
    assert differences(architecture_of_model(built).architecture, told) == []


@pytest.mark.parametrize(
    "change",
    [{}, {"num_heads": "4"}, {"num_layers": None}, {"embed_dim": 0, "num_heads": 0}],
    ids=str,
)
def test_values_that_no_builder_takes_tell_nothing(change):
    values = {"rope_base": 1e4, "norm_eps": 1e-5} | SIZES | change
    assert (built_by("llama3", values) is None) == bool(change)
    assert built_by("clip", values) is None


def test_a_model_that_carries_its_architecture_is_believed():
    architecture = architecture_of(config_of("mistral", SIZES))
    model = build_on_meta(lambda: Decoder(architecture), dtype=torch.float32)
    assert architecture_of_model(model) == (architecture, {})


class OwnNorm(RMSNorm):
    """A norm of one's own."""


def with_other_norms(model):
    for layer in model.layers:
        layer.sa_norm = OwnNorm(32)


def with_other_activation(model):
    model.layers[1].mlp.activation = nn.ReLU()


def with_other_rotary(model):
    rope = nn.Module()
    rope.dim, rope.base = 8, 1e4
    for layer in model.layers:
        layer.attn.pos_embeddings = rope


def with_other_output(model):
    model.output = nn.Sequential(model.output)


def with_epsilons_that_differ(model):
    model.layers[0].sa_norm.eps = 0.5


@pytest.mark.parametrize(
    ("change", "unknown"),
    [
        (with_other_norms, {"norm", "norm_eps", "norm_plus_one", "norm_bias"}),
        (with_other_activation, {"activation"}),
        (with_other_rotary, {"layers.rotary"}),
        (with_other_output, {"tied", "logit_scale", "logit_cap"}),
        (with_epsilons_that_differ, {"norm_eps"}),
    ],
)
def test_what_unknown_modules_do_is_unknown_and_the_rest_known(change, unknown):
    model = on_meta(FAMILIES["llama3"].base, **SIZES)
    expected = architecture_of_model(model).architecture
    change(model)
    found = architecture_of_model(model)
    assert set(found.unknown) == unknown
    assert unlike(expected, found.architecture, longest=64, unknown=found.unknown) == []


def test_torchtunes_gemma2_caps_another_place_than_is_known():
    found = architecture_of_model(on_meta(torchtune_gemma2, **WIDE_HEADS))
    assert found.unknown == {"logit_cap": "TanhSoftCapping"}


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()], ids=["linear", "sequence"])
def test_what_is_no_decoder_is_refused(model):
    with pytest.raises(ValueError, match="is no decoder of torchtune's kind"):
        architecture_of_model(model)
