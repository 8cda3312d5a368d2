"""config.json that lies, that leaves keys out, or that holds what no model has."""

import json
import os
import re

import pytest

from kasa_tune.architectures import (
    FAMILIES,
    UnsupportedArchitectureError,
    architecture_of,
    differences,
    files,
    read_architecture,
    unknown_keys,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def of(kind, **more):
    """A small config.json of a family."""
    return {**LLAMA, "architectures": None, "model_type": kind, **more}


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("mistral", lambda a: a.layers[0].window, None),  # 4096 holds the longest sequence
        ("qwen3", lambda a: a.head_dim, 128),
        ("granite", lambda a: a.attention_scale, 1.0),
        ("smollm3", lambda a: a.layers[0].rotary.base, 2e6),
        ("smollm3", lambda a: a.tied, True),
        ("glm", lambda a: a.layers[0].rotary.fraction, 0.5),
        ("glm", lambda a: a.biases, {"q_proj", "k_proj", "v_proj"}),
        ("stablelm", lambda a: a.layers[0].rotary.fraction, 0.25),
        ("nemotron", lambda a: a.layers[0].rotary.fraction, 0.5),
        ("gemma2", lambda a: (a.attention_cap, a.logit_cap), (50.0, 30.0)),
        ("gemma2", lambda a: a.attention_scale, 256**-0.5),
        ("gemma3_text", lambda a: [one.rotary.base for one in a.layers[:2]], [1e4, 1e4]),
        ("cohere", lambda a: a.logit_scale, 0.0625),
        ("cohere", lambda a: a.layers[0].rotary.base, 5e5),
        ("mixtral", lambda a: a.layers[0].rotary.base, 1e6),
        ("ernie4_5", lambda a: a.layers[0].rotary.base, 5e5),
        ("olmo3", lambda a: a.layers[0].rotary.base, 5e5),
        ("llama", lambda a: a.layers[0].rotary.base, 1e4),
        ("qwen3_moe", lambda a: a.experts.normalized, False),
    ],
)
def test_an_absent_key_means_what_transformers_takes_it_for(kind, value, expected):
    config = of(kind)
    del config["rms_norm_eps"]
    if kind in ("stablelm", "nemotron", "cohere"):
        config.pop("num_key_value_heads")
        config["num_key_value_heads"] = 8
    assert value(architecture_of(config)) == expected


def test_without_key_value_heads_there_are_as_many_as_heads():
    config = of("llama", num_key_value_heads=None)
    assert architecture_of(config).num_kv_heads == 8


def test_an_absent_window_of_mistral_is_4096():
    long = architecture_of(of("mistral", max_position_embeddings=8192))
    assert {layer.window for layer in long.layers} == {4096}
    none = architecture_of(of("mistral", max_position_embeddings=8192, sliding_window=None))
    assert {layer.window for layer in none.layers} == {None}


def test_qwen2_slides_only_if_told_so():
    keys = {"max_position_embeddings": 8192, "sliding_window": 100, "max_window_layers": 2}
    assert {layer.window for layer in architecture_of(of("qwen2", **keys)).layers} == {None}
    slides = architecture_of(of("qwen2", use_sliding_window=True, **keys))
    assert [layer.window for layer in slides.layers] == [None, None, 100, 100]


def test_old_and_new_rotary_keys_say_the_same():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    old = of("llama", rope_theta=5e5, rope_scaling=scaling)
    new = of("llama", rope_parameters={**scaling, "rope_theta": 5e5})
    assert architecture_of(old) == architecture_of(new)
    assert architecture_of({**old, **new}) == architecture_of(new)
    typed = {**scaling, "type": scaling["rope_type"]}
    del typed["rope_type"]
    assert architecture_of(of("llama", rope_theta=5e5, rope_scaling=typed)) == architecture_of(new)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_theta is 10000.0, and rope_parameters says 500000.0",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            "rope_scaling is",
        ),
        ({"model_type": "qwen2"}, "architectures says LlamaForCausalLM, and model_type says qwen2"),
        ({"model_type": "gpt_oss"}, "models of type 'gpt_oss' are not supported"),
        ({"model_type": None}, "models of type None are not supported"),
        ({"model_type": ["llama"]}, "are not supported"),
        ({"architectures": "LlamaForCausalLM"}, "it must be a list of names"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already ('awq')"),
        ({"hidden_size": None}, "hidden_size is None; it must be a whole number"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 60}, "num_attention_heads is 8; it must be a divisor of hidden_size, 60"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must be a divisor"),
        ({"num_hidden_layers": 10**9}, "a whole number from 1 to 1000"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; it must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]; it must be an object"),
        ({"rope_scaling": {"type": "spiral"}}, "of type 'spiral'; supported are default"),
        ({"rope_scaling": {"type": "linear"}}, "factor of the rotary embedding's scaling"),
        ({"rope_scaling": {"type": "longrope", "long_factor": 1}}, "short_factor"),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1], "short_factor": [1]}},
            "a list of 4 numbers",
        ),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; it must be silu"),
        ({"partial_rotary_factor": 0.5}, "1, because this family rotates whole heads"),
        ({"rope_theta": 1}, "rope_theta is 1; it must be above 1"),
        ({"rope_theta": 10**400}, "it must be a number above 0"),
        ({"rope_theta": 1e300}, "rope_theta is 1e+300; it must be a number from 1e-30 to 1e+30"),
        ({"vocab_size": 2**31 - 1}, "vocab_size is 2147483647; it must be a whole number"),
        ({"head_dim": 2**30}, "head_dim is 1073741824; it must be a whole number"),
        ({"rope_scaling": {"type": {}}}, "of type {}; supported are default"),
        ({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, "heeds it in Hunyuan alone"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "the same for all layers"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1e300}}, "beta_fast"),
        (
            {
                "original_max_position_embeddings": 64,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            },
            "original_max_position_embeddings is 64; it must be 128",
        ),
        ({"architectures": ["A\n# \0"]}, r"'A\n# \x00' is not supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_its_key(tmp_path, changes, words):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_architecture(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (of("gemma2", hidden_activation="gelu"), "hidden_activation is 'gelu'"),
        (of("gemma2", hidden_act="silu"), "hidden_act is 'silu'"),
        (of("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
        (of("gemma3_text", _sliding_window_pattern=3), "_sliding_window_pattern is 3"),
        (of("gemma3_text", rope_parameters={"rope_theta": 5e5}), "by kind of layer"),
        (of("olmo3", rope_scaling={"type": "linear", "factor": 2.0}), "with rope_type"),
        (
            of("olmo3", rope_scaling={"rope_type": "yarn", "factor": 2.0, "truncate": False}),
            "truncate is False",
        ),
        (of("mixtral", num_local_experts=4, num_experts=8), "num_local_experts is 4; it must be 8"),
        (of("qwen3_moe", **EXPERTS | {"num_experts_per_tok": 5}), "the number of experts, 4"),
        (of("qwen3_moe", mlp_only_layers=3, **EXPERTS), "mlp_only_layers is 3"),
        (
            of("qwen3_moe", num_experts=10**4, num_hidden_layers=1000),
            "10000 experts in each of 1000 layers",
        ),
        (
            of("phi3", original_max_position_embeddings=1, rope_scaling={"type": "longrope"}),
            "it must be at least 2",
        ),
        (of("granite", logits_scaling=5e-324), "logits_scaling is 5e-324"),
        (
            of("hunyuan_v1_dense", rope_scaling={"type": "dynamic", "alpha": 1e300}),
            "alpha is 1e+300",
        ),
        ({"model_type": "mistral3", "text_config": of("mistral", architectures=5)}, "is 5"),
        (
            {
                "model_type": "gemma3",
                "quantization_config": {"quant_method": "fp8"},
                "text_config": of("gemma3_text"),
            },
            "quantized already ('fp8')",
        ),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral3"}}, "not supported"),
    ],
)
def test_what_a_family_computes_otherwise_or_not_at_all_is_refused(config, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        architecture_of(config)


@pytest.mark.parametrize("outer", [True, False, None])
def test_what_stands_outside_the_text_part_ties_the_output_projection(outer):
    """Transformers writes the other value inside."""
    text = of("mistral", tie_word_embeddings=not outer)
    config = {"model_type": "mistral3", "tie_word_embeddings": outer, "text_config": text}
    assert architecture_of(config).tied is (outer is not False)


def test_of_mistral_layer_types_say_which_layers_slide():
    types = ["full_attention", "sliding_attention"] * 2
    found = architecture_of(of("mistral", sliding_window=100, layer_types=types))
    assert [layer.window for layer in found.layers] == [None, 100, None, 100]


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "ernie4_5", "internlm3", "smollm3"])
def test_null_key_value_heads_are_as_many_as_heads(kind):
    assert architecture_of(of(kind, num_key_value_heads=None)).num_kv_heads == 8


@pytest.mark.parametrize(("kind", "given", "width"), [("ernie4_5", None, 8), ("internlm3", 0, 128)])
def test_a_null_width_of_heads_is_the_usual_one(kind, given, width):
    config = of(kind, head_dim=given)
    if given == 0:  # absent
        del config["head_dim"]
    assert architecture_of(config).head_dim == width


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="is no file"):
        read_architecture(tmp_path)


def test_of_an_endless_file_no_more_is_read_than_a_config_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LONGEST_JSON", 1000)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA) + " " * 1000)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 5000, '"llama"'])
def test_what_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_architecture(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_architecture(tmp_path)


def test_the_message_on_an_unknown_model_lists_the_supported_ones():
    with pytest.raises(UnsupportedArchitectureError) as error:
        architecture_of({"model_type": "mamba"})
    assert all(row.title in str(error.value) for row in FAMILIES.values())


def test_a_key_that_might_change_the_result_is_unknown(tmp_path):
    harmless = {"bos_token_id": 1, "torch_dtype": "bfloat16", "attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA, **harmless, "alibi": True, "soft_cap": None})
    )
    assert unknown_keys(tmp_path) == ["alibi"]


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("rope_theta", 5e5, "layers.0.rotary.base"),
        ("rms_norm_eps", 1e-6, "norm_eps"),
        ("tie_word_embeddings", True, "tied"),
        ("attention_bias", True, "biases"),
        ("num_hidden_layers", 5, "num_layers"),
        ("head_dim", 16, "head_dim"),
    ],
)
def test_a_difference_is_named_once_for_all_layers(key, value, name):
    found = differences(architecture_of(LLAMA), architecture_of({**LLAMA, key: value}))
    assert name in [one.name for one in found]
    assert len([one for one in found if one.name.startswith("layers.")]) <= 1
