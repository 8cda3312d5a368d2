"""Encoders as data: published sizes, buckets of positions, and strict reading of config.json."""

from functools import partial

import pytest
import torch

from kasa_tune.architectures.encoder import encoder_of
from kasa_tune.components import models
from kasa_tune.components.models.disentangled import log_bucket
from kasa_tune.components.models.loading import build_on_meta


def deberta(layers, d):
    """The sum of the shapes of DeBERTaV3's tensors. The published table counts 22 M, 44 M, 86 M and 304 M without those
    of the vocabulary.
    """
    layer = 4 * (d * d + d) + 2 * (4 * d * d) + 4 * d + d + 2 * 2 * d
    return 128_100 * d + 2 * d + layers * layer + 512 * d + 2 * d + (d * d + d) + (2 * d + 2)


# All parameters of the published models with a head of two labels.
PARAMETERS = {
    "roberta_base": 124_647_170,
    "roberta_large": 355_361_794,
    "bert_base_uncased": 109_483_778,
    "deberta_v3_xsmall": deberta(12, 384),
    "deberta_v3_small": deberta(6, 768),
    "deberta_v3_base": 184_423_682,
    "deberta_v3_large": deberta(24, 1024),
}
BACKBONES = {
    "xsmall": (12, 384, 22),
    "small": (6, 768, 44),
    "base": (12, 768, 86),
    "large": (24, 1024, 304),
}


def test_backbones_have_the_published_millions():
    assert deberta(12, 768) == PARAMETERS["deberta_v3_base"]
    for layers, width, millions in BACKBONES.values():
        assert (deberta(layers, width) - 128_100 * width) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_published_ones(name):
    build = partial(getattr(models, f"lora_{name}"), attn_modules=["q_proj", "v_proj"], rank=8)
    model = build_on_meta(build, dtype=torch.float32)
    own = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    assert own == PARAMETERS[name]
    layers, width = model.architecture.num_layers, model.architecture.embed_dim
    adapters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert adapters == 2 * layers * 2 * 8 * width


def test_buckets_of_distances():
    """Values of the published code for 256 buckets and 512 positions."""
    expected = {127: 127, 128: 128, 129: 129, 200: 169, 256: 192, 400: 233, 511: 255, 600: 270}
    distances = torch.tensor([*expected, *(-d for d in expected), 0])
    buckets = [*expected.values(), *(-b for b in expected.values()), 0]
    assert log_bucket(distances, 256, 512).tolist() == buckets


DEBERTA = {
    "model_type": "deberta-v2", "relative_attention": True, "share_att_key": True,
    "position_biased_input": False, "pos_att_type": "p2c|c2p", "position_buckets": 256,
    "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
}  # fmt: skip


def test_the_hubs_deberta_is_read():
    a, unknown = encoder_of(DEBERTA)
    assert (a.relative.buckets, a.relative.longest, a.norm_eps, a.pad_id) == (256, 512, 1e-7, 0)
    assert unknown == []
    assert encoder_of(DEBERTA | {"pos_att_type": ["c2p", "p2c"]})[0] == a


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "no supported encoder. Supported are roberta, bert, deberta-v2"),
        ({"model_type": "roberta", "hidden_size": 770}, "num_attention_heads"),
        ({"model_type": "roberta", "hidden_act": "relu"}, "hidden_act"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder"),
        ({"model_type": "roberta", "quantization_config": {}}, "quantized"),
        ({"model_type": "roberta", "hidden_dropout_prob": 1.5}, "hidden_dropout_prob"),
        ({"model_type": "roberta", "pad_token_id": "1"}, "pad_token_id"),
        (DEBERTA | {"share_att_key": False}, "share_att_key"),
        (DEBERTA | {"pos_att_type": "c2p"}, "pos_att_type"),
        (DEBERTA | {"position_biased_input": True}, "position_biased_input"),
        (DEBERTA | {"conv_kernel_size": 3}, "conv_kernel_size"),
        (DEBERTA | {"type_vocab_size": 2}, "type_vocab_size"),
        (DEBERTA | {"norm_rel_ebd": "rms"}, "norm_rel_ebd"),
    ],
)
def test_what_is_computed_otherwise_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        encoder_of(config)


def test_unknown_keys_are_named():
    assert encoder_of({"model_type": "roberta", "new_norm": "x", "use_cache": True})[1] == [
        "new_norm"
    ]
