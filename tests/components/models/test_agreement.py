"""A model is the one that config.json describes, or it is refused: value by value."""

import copy
import json
import logging
from functools import cache

import pytest
import torch
import yaml
from torchtune.modules import RMSNorm

from kasa_tune.architectures import architecture_of
from kasa_tune.architectures.comparing import AS_STORED
from kasa_tune.components import models
from kasa_tune.components.models.agreement import (
    base_architecture,
    check_architecture,
    check_base,
    kept_architecture,
)
from kasa_tune.components.models.decoder import Decoder
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.families.table import MODELS as TABLE
from kasa_tune.registry import PACKAGE_ROOT
from tests.toy_checkpoints import MODELS, config_of
from tests.toy_models import FAMILIES

LENGTH = 16  # tokens of the longest sequence of the toys, of at most 64
OURS = "kasa_tune.components.models."


@cache
def built(name, sizes=()):
    return build_on_meta(
        lambda: getattr(models, name)(["q_proj"], rank=2, alpha=1.0, **dict(sizes)),
        dtype=torch.float32,
    )


def written(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ------------------------------------------------------------------------- every value, perturbed

# Keys whose values change nothing that a run computes, and why.
PROVEN_HARMLESS = {
    "architectures": "names the class; one of another family is refused",
    "bos_token_id": "of the tokenizer",
    "eos_token_id": "of the tokenizer",
    "pad_token_id": "of the tokenizer",
    "torch_dtype": "of the files; every run says its own",
    "transformers_version": "who wrote the file",
    "_name_or_path": "where the file lay",
    "use_cache": "of generation in transformers",
    "cache_implementation": "of generation in transformers",
    "initializer_range": "of a training from nothing",
    "attention_dropout": "dropout in the base; a run has that of its adapters alone",
    "embd_pdrop": "dropout in the base",
    "resid_pdrop": "dropout in the base",
    "pretraining_tp": "how transformers cuts products",
    "max_position_embeddings": "no sequence is as long; longer ones have a test below",
}
_NOT_READ = "transformers does not read it in this family"
OF_FAMILY = {
    "mistral": dict.fromkeys(("attention_bias", "mlp_bias"), _NOT_READ),
    "gemma": {"mlp_bias": _NOT_READ},
    "gemma2": {"mlp_bias": _NOT_READ, "hidden_act": "hidden_activation counts before it"},
    "qwen2": {
        "attention_bias": _NOT_READ,
        "mlp_bias": _NOT_READ,
        "sliding_window": "while use_sliding_window is false",
        "max_window_layers": "while use_sliding_window is false",
        "use_sliding_window": "while sliding_window holds the longest sequence",
    },
    "phi3": {
        "attention_bias": _NOT_READ,
        "mlp_bias": _NOT_READ,
        "original_max_position_embeddings": "of longrope, which is not set",
    },
}
# Values that a doubled or flipped one does not tell from.
INSTEAD = {"sliding_window": 8, "hidden_act": "relu", "model_type": "gpt2"}


def perturbed(config):
    """Names and copies of config.json with one value changed each, and with one more."""
    for key, value in config.items():
        if isinstance(value, dict):
            for inner, one in value.items():
                yield f"{key}.{inner}", config | {key: value | {inner: other(one)}}
        else:
            yield key, config | {key: INSTEAD.get(key, other(value))}
    for key, value in {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}.items():
        if key not in config:
            yield key, config | {key: value}
    if config.get("rope_scaling") is None:
        scaling = {"rope_type": "linear", "factor": 4.0}
        yield "rope_scaling", config | {"rope_scaling": scaling}


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1
    if isinstance(value, list):
        return value[:-1]
    return "other" if isinstance(value, str) else 7


def refused_keys(tmp_path, model, config, *, longest, builder, model_type):
    """Which perturbations are refused, and which pass."""
    refused, passed = set(), set()
    for key, changed in perturbed(config):
        if changed == config:
            continue
        try:
            check_architecture(
                model,
                written(tmp_path, changed),
                longest=longest,
                builder=builder,
                model_type=model_type,
            )
        except ValueError:
            refused.add(key)
        else:
            passed.add(key)
    return refused, passed


def check_all_refused(tmp_path, capsys, name, config, model, **options):
    check_architecture(model, written(tmp_path, config), **options)
    refused, passed = refused_keys(tmp_path, model, config, **options)
    unproven = passed - {*PROVEN_HARMLESS, *OF_FAMILY.get(config["model_type"], {})}
    with capsys.disabled():
        print(f"\n{name}: {len(refused)} values refused, {len(passed)} harmless: {sorted(passed)}")
    assert not unproven
    return refused


@pytest.mark.parametrize("name", ["llama3_1_8b", "qwen2_5_7b", "gemma2_2b", "phi3_mini"])
def test_every_value_of_a_published_config_json(name, real_data, tmp_path, capsys):
    row = TABLE[name]
    folder = real_data / "configs" / row.repository.rpartition("/")[2]
    config = json.loads((folder / "config.json").read_text())
    builder = f"kasa_{row.builder or name}"
    refused = check_all_refused(
        tmp_path,
        capsys,
        name,
        config,
        built(builder),
        longest=512,
        builder=OURS + builder,
        model_type=row.family.model_type,
    )
    assert {"rope_theta", "rms_norm_eps", "hidden_size", "vocab_size", "model_type"} <= refused


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_a_toys_config_json(family, tmp_path, capsys):
    sizes = FAMILIES[family].sizes
    kind = MODELS[family].model_type if family in MODELS else "LLAMA3"
    options = {"longest": LENGTH, "builder": f"{OURS}kasa_{family}", "model_type": kind}
    model = built(f"kasa_{family}", tuple(sizes.items()))
    config = config_of(family, sizes)
    if family == "gemma2":
        config["sliding_window"] = 12
        model = built(f"kasa_{family}", (*sizes.items(), ("sliding_window_size", 12)))
    refused = check_all_refused(tmp_path, capsys, family, config, model, **options)
    assert {*config} - {"max_position_embeddings", "rope_scaling"} <= refused


# --------------------------------------------------------------------------------- what is said

LLAMA = config_of("llama3", FAMILIES["llama3"].sizes)
LLAMA_MODEL = ("kasa_llama3", tuple(FAMILIES["llama3"].sizes.items()))


def said(folder, model=LLAMA_MODEL, *, longest=LENGTH, model_type="LLAMA3"):
    name, sizes = model
    with pytest.raises(ValueError, match="describes another model than") as raised:
        check_architecture(
            built(name, sizes),
            folder,
            longest=longest,
            builder=OURS + name,
            model_type=model_type,
        )
    return str(raised.value)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            LLAMA | {"rope_theta": 7e3},
            "rope_theta is 7000, and the model has 500000 (set model.rope_base=7000)",
        ),
        (
            without(LLAMA, "rope_theta") | {"rope_parameters": {"rope_theta": 7e3}},
            "rope_parameters.rope_theta is 7000, and the model has 500000",
        ),
        (
            without(LLAMA, "rope_theta"),
            "rope_theta is 10000 by default, and the model has 500000 (set model.rope_base=10000)",
        ),
        (
            without(LLAMA, "rms_norm_eps"),
            "rms_norm_eps is 1e-06 by default, and the model has 1e-05 (set model.norm_eps=1e-06)",
        ),
        (
            without(LLAMA, "num_key_value_heads"),
            "num_key_value_heads is 4 by default, and the model has 2 (set model.num_kv_heads=4)",
        ),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is True, so biases is w1, w2, w3, and the model has none"),
        (
            LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling.type is linear, and the model has none",
        ),
        (LLAMA | {"num_hidden_layers": 3}, "num_hidden_layers is 3, and the model has 2"),
        (LLAMA | {"model_type": "olmo2"}, "model_type is olmo2, whose norm_before is False"),
        (LLAMA | {"tie_word_embeddings": True}, "tie_word_embeddings is True, and the model has False"),
    ],
)  # fmt: skip
def test_both_values_are_said_with_the_key_that_stands_in_the_file(config, words, tmp_path):
    assert words in said(written(tmp_path, config))


def test_where_no_argument_helps_it_says_which_builder_does(tmp_path):
    text = said(written(tmp_path, LLAMA | {"mlp_bias": True}))
    assert "Set model._component_=kasa_tune.components.models.kasa_from_checkpoint" in text
    text = said(written(tmp_path, LLAMA | {"rope_theta": 7.0}))
    assert "from_checkpoint" not in text


def test_scaling_of_llama3_is_compared_number_by_number(tmp_path):
    sizes = FAMILIES["llama3_1"].sizes
    config = config_of("llama3_1", sizes)
    model = ("kasa_llama3_1", tuple(sizes.items()))
    config["rope_scaling"] |= {"factor": 32.0}
    text = said(written(tmp_path, config), model)
    assert "rope_scaling.factor is 32, and the model has 8 (set model.scale_factor=32)" in text
    config["rope_scaling"] |= {"factor": 8.0, "high_freq_factor": 5.0}
    text = said(written(tmp_path, config), model)
    assert "rope_scaling.high_freq_factor is 5, and the model has 4" in text


def test_gemmas_scale_is_said_as_the_number_that_makes_it(tmp_path):
    sizes = FAMILIES["gemma2"].sizes
    config = config_of("gemma2", sizes) | {"query_pre_attn_scalar": 144}
    text = said(
        written(tmp_path, config), ("kasa_gemma2", tuple(sizes.items())), model_type="GEMMA2"
    )
    assert "query_pre_attn_scalar is 144, so attention_scale is 0.0833" in text
    assert "set model.query_pre_attn_scalar=144" in text


# --------------------------------------------------------------------- windows, lengths, conversion


def fits(folder, model, *, longest, model_type):
    name, sizes = model
    check_architecture(
        built(name, sizes), folder, longest=longest, builder=OURS + name, model_type=model_type
    )


def test_a_window_counts_once_a_sequence_is_longer(tmp_path):
    sizes = FAMILIES["mistral"].sizes
    model = ("kasa_mistral", tuple(sizes.items()))
    folder = written(tmp_path, config_of("mistral", sizes) | {"sliding_window": 20})
    fits(folder, model, longest=20, model_type="MISTRAL")
    text = said(folder, model, longest=21, model_type="MISTRAL")
    assert "sliding_window is 20, and the model has none (set tokenizer.max_seq_len=20)" in text


def test_windows_of_qwen2_count_where_they_are_turned_on(tmp_path):
    sizes = FAMILIES["qwen2"].sizes
    model = ("kasa_qwen2", tuple(sizes.items()))
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    config = config_of("qwen2", sizes) | windows
    fits(written(tmp_path, config), model, longest=LENGTH, model_type="QWEN2")
    folder = written(tmp_path, config | {"max_window_layers": 1})
    assert "sliding_window is 8, and the model has none" in said(folder, model, model_type="QWEN2")


def test_an_absent_window_of_mistral_is_4096(tmp_path):
    sizes = FAMILIES["mistral"].sizes | {"max_seq_len": 8192}
    model = ("kasa_mistral", tuple(sizes.items()))
    folder = written(tmp_path, without(config_of("mistral", sizes), "sliding_window"))
    fits(folder, model, longest=4096, model_type="MISTRAL")
    text = said(folder, model, longest=4097, model_type="MISTRAL")
    assert "sliding_window is 4096 by default" in text


def test_more_tokens_than_positions_are_warned_of(tmp_path, caplog):
    fits(written(tmp_path, LLAMA), LLAMA_MODEL, longest=64, model_type="LLAMA3")
    assert not caplog.records
    fits(tmp_path, LLAMA_MODEL, longest=65, model_type="LLAMA3")
    assert (
        "up to 65 tokens (tokenizer.max_seq_len), and max_position_embeddings is 64" in caplog.text
    )


@pytest.mark.parametrize(("own", "warned"), [(True, False), (False, True)])
def test_the_tokenizer_of_the_folder_cuts_where_the_model_ends(own, warned, tmp_path, caplog):
    folder = written(tmp_path, LLAMA)
    where = {"checkpoint_dir": str(folder)}
    builder, tokenizer = (
        OURS + LLAMA_MODEL[0],
        "kasa_tune.components.data.tokenizer_from_checkpoint",
    )
    hf = {"_component_": "torchtune.training.FullModelHFCheckpointer", "model_type": "LLAMA3"}
    cfg = {"model": {"_component_": builder}, "checkpointer": hf | where}
    elsewhere = {} if own else {"checkpoint_dir": "/another"}
    cfg["tokenizer"] = {"_component_": tokenizer, "max_seq_len": 65} | where | elsewhere
    assert check_base(built(*LLAMA_MODEL), cfg)
    assert ("not made for sequences that long" in caplog.text) == warned
    check_base(built(*LLAMA_MODEL), cfg, longest=70)
    assert "up to 70 tokens (max_new_tokens), and" in caplog.text


def test_more_tokens_than_positions_are_refused_where_the_embedding_changes(tmp_path):
    folder = written(tmp_path, LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    fits(folder, LLAMA_MODEL, longest=64, model_type="LLAMA3")
    with pytest.raises(
        ValueError, match=r"dynamic scaling.*Lower tokenizer.max_seq_len: 64 tokens"
    ):
        fits(folder, LLAMA_MODEL, longest=65, model_type="LLAMA3")


@pytest.mark.parametrize(
    ("family", "model_type", "right"),
    [
        ("llama3", "QWEN2", "LLAMA3"),  # leaves rows where they are
        ("mistral", "PHI3_MINI", "MISTRAL"),
        ("qwen2", "LLAMA3", "QWEN2"),  # reorders them
        ("phi3", "MISTRAL", "PHI3_MINI"),
    ],
)
def test_a_conversion_for_another_rotary_embedding_is_refused(family, model_type, right, tmp_path):
    sizes = FAMILIES[family].sizes
    model = (f"kasa_{family}", tuple(sizes.items()))
    folder = written(tmp_path, config_of(family, sizes))
    fits(folder, model, longest=LENGTH, model_type=right)
    assert f"set checkpointer.model_type={right}" in said(folder, model, model_type=model_type)


@pytest.mark.parametrize("family", ["llama3", "gemma2", "qwen2"])
def test_a_model_of_the_folder_needs_the_folders_reader(family, tmp_path):
    sizes = FAMILIES[family].sizes
    folder = written(tmp_path, config_of(family, sizes))
    native = build_on_meta(
        lambda: Decoder(architecture_of(config_of(family, sizes))), dtype=torch.float32
    )
    options = {"longest": LENGTH, "builder": OURS + "kasa_from_checkpoint"}
    check_architecture(native, folder, model_type="as stored", **options)
    with pytest.raises(ValueError, match=r"set checkpointer\._component_=.*CheckpointFolder"):
        check_architecture(native, folder, model_type="GEMMA2", **options)
    if family != "qwen2":  # whose rows stay where they are
        text = said(folder, (f"kasa_{family}", tuple(sizes.items())), model_type="as stored")
        assert "kasa_from_checkpoint" in text


# ------------------------------------------------------------------------------ what is not known


def test_a_builder_of_ones_own_is_warned_of_what_is_not_known(tmp_path, caplog):
    class OwnNorm(RMSNorm):
        """A norm of one's own."""

    model = copy.deepcopy(built(*LLAMA_MODEL))
    model.norm = OwnNorm(32)
    folder = written(tmp_path, LLAMA | {"rms_norm_eps": 0.5})
    check_architecture(model, folder, longest=LENGTH, builder="my.model", model_type="LLAMA3")
    assert "not known" in caplog.text
    assert "norm_eps (OwnNorm)" in caplog.text
    written(tmp_path, LLAMA | {"rope_theta": 3.0})  # the rest is compared
    with pytest.raises(ValueError, match="rope_theta is 3"):
        check_architecture(model, folder, longest=LENGTH, builder="my.model", model_type="LLAMA3")


def test_a_family_that_is_not_known_is_refused_but_to_ones_own_builder(tmp_path, caplog):
    folder = written(tmp_path, LLAMA | {"model_type": "mine", "architectures": ["MineForCausalLM"]})
    options = {"longest": LENGTH, "model_type": "LLAMA3"}
    with pytest.raises(ValueError, match="models of type 'mine' are not supported"):
        check_architecture(built(*LLAMA_MODEL), folder, builder=f"{OURS}kasa_llama3", **options)
    check_architecture(built(*LLAMA_MODEL), folder, builder="my.model", **options)
    assert "my.model was not compared with" in caplog.text
    assert base_architecture(folder) is None
    assert kept_architecture(folder) == {}


def test_keys_that_are_not_known_make_one_warning(tmp_path, caplog):
    folder = written(tmp_path, LLAMA | {"attention_wobble": 3, "other_thing": "x", "empty": None})
    with caplog.at_level(logging.WARNING):
        fits(folder, LLAMA_MODEL, longest=LENGTH, model_type="LLAMA3")
    (record,) = caplog.records
    assert "attention_wobble, other_thing." in record.message


def test_a_folder_without_config_json_is_left_to_its_reader(tmp_path):
    cfg = {
        "model": {"_component_": f"{OURS}kasa_llama3"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelMetaCheckpointer",
            "checkpoint_dir": str(tmp_path),
        },
    }
    assert not check_base(built(*LLAMA_MODEL), cfg)
    written(tmp_path, LLAMA)  # beside Meta's files: pairs lie otherwise there, the rest is compared
    assert check_base(built(*LLAMA_MODEL), cfg)
    written(tmp_path, LLAMA | {"rms_norm_eps": 0.5})
    with pytest.raises(ValueError, match=r"rms_norm_eps is 0\.5"):
        check_base(built(*LLAMA_MODEL), cfg)


# ---------------------------------------------------------------------------- configs that are shipped


def folder_of(row, real_data):
    if row.folder:
        place = row.folder.replace("kasa_tune:/", str(PACKAGE_ROOT))
        return type(real_data)(place.replace("${oc.env:KASA_TUNE_DATA}", str(real_data)))
    return real_data / "configs" / row.repository.rpartition("/")[2]


@pytest.mark.parametrize(
    "name", [n for n, row in TABLE.items() if "checkpoint_dir" not in row.sizes]
)
def test_shipped_configs_are_the_published_models(name, real_data):
    row = TABLE[name]
    folder = folder_of(row, real_data)
    if not (folder / "config.json").is_file():
        pytest.skip(f"no config.json of {row.repository}")
    builder = f"kasa_{row.builder or name}"
    numbers = {key: value for key, value in row.sizes.items() if key != "train_connector"}
    sizes = {key: float(yaml.safe_load(value)) for key, value in numbers.items()}
    whole = {key: int(value) if value.is_integer() else value for key, value in sizes.items()}
    kind = row.family.model_type or AS_STORED
    fits(folder, (builder, tuple(whole.items())), longest=512, model_type=kind)


def test_builders_without_a_config_are_the_published_models_too(real_data):
    others = {
        "qwen2_5_0_5b": "Qwen2.5-0.5B",
        "qwen2_5_1_5b_base": "Qwen2.5-1.5B",
        "qwen2_5_3b": "Qwen2.5-3B",
        "qwen2_5_7b_base": "Qwen2.5-7B",
        "qwen2_5_32b_base": "Qwen2.5-32B",
        "qwen2_5_72b_base": "Qwen2.5-72B",
        "qwen2_7b": "Qwen2-7B",
        "gemma2_27b": "gemma-2-27b",
        "llama3_1_8b": "Llama-3.1-8B",
    }
    for name, folder in others.items():
        kind = {"q": "QWEN2", "g": "GEMMA2", "l": "LLAMA3"}[name[0]]
        place = real_data / "configs" / folder
        fits(place, (f"kasa_{name}", ()), longest=512, model_type=kind)
