"""Every key of a config.json, changed one at a time: our logits are those of transformers, or the file is refused."""

import hashlib
import inspect
import json
import re

import pytest
import torch

from kasa_tune.architectures import FAMILIES
from kasa_tune.architectures.reading import _HARMLESS, read_with_settings
from kasa_tune.components.models import CheckpointFolder
from kasa_tune.components.models.decoder import Decoder
from kasa_tune.components.models.loading import check_shapes
from tests.parity.decoder_families import settings_of, tokens, transformers

TOLERANCE = 1e-4  # of logits that reach from 1 to 100
# Not changed: what a model of this size needs, and what only transformers' own classes read.
_KEPT = {"model_type", "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"}
_KEPT |= {"rope_parameters", "to_dict", "n_embd", "n_layer", "n_positions"}
_ROTARY = ("head_dim", "partial_rotary_factor", "rope_theta", "original_max_position_embeddings")
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SCALINGS = (
    {"rope_type": "default", "rope_theta": 777.0},
    {"rope_type": "linear", "factor": 4.0, "attention_factor": 0.7},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 1.0, "alpha": 100.0},
    _YARN | {"attention_factor": 0.7},
    _YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
    _YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
    _LLAMA3,
    {"rope_type": "spiral", "factor": 2.0},
)
_VALUES = {
    "hidden_act": ["silu", "gelu", "gelu_pytorch_tanh", "relu2"],
    "activation_function": ["gelu", "gelu_new", "gelu_fast", "relu", "silu", "tanh", "quick_gelu"],
    "hidden_activation": ["silu", "gelu", "gelu_pytorch_tanh"],
    "layer_types": [
        ["sliding_attention"] * 4,
        ["full_attention", "sliding_attention"] * 2,
        ["chunked_attention"] * 4,
    ],
    "no_rope_layers": [[1, 0, 1, 1]],
    "mlp_only_layers": [[0, 2], [-1]],
    "sliding_window": [3, None, 0],
    "sliding_window_pattern": [2, 3],
    "head_dim": [8, 32, None],
    "num_key_value_heads": [1, 4, None],
    "partial_rotary_factor": [0.5],
    "rope_scaling": _SCALINGS,
}


def values_of(key, before):
    """Other values of a key than the one before."""
    if key in _VALUES:
        return _VALUES[key]
    if isinstance(before, bool):
        return [not before]
    if isinstance(before, int):
        return [before + 1, before * 2]
    if isinstance(before, float):
        return [before * 3 + 0.1]
    return [True, 3, 0.5] if before is None else []


def keys_of(config):
    """The keys that the sources of a family mention, and those of the rotary embeddings."""
    kind = type(config)
    model = inspect.getsource(inspect.getmodule(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind]))
    names = re.findall(r"config\.([a-z_0-9]+)|config, \"([a-z_0-9]+)\"", model)
    own = re.findall(r"self\.([a-z_0-9]+)", inspect.getsource(inspect.getmodule(kind)))
    return {name for pair in names for name in pair if name} | {*own, *_ROTARY, "rope_scaling"}


def changes_of(settings, config, asked):
    """What the settings become, by the key and its new value."""
    defaults = config.to_dict()
    for key in sorted((keys_of(config) | asked) - _KEPT):
        for value in values_of(key, settings.get(key, defaults.get(key))):
            yield f"{key}={value}", {**settings, key: value}
        if key in settings:
            rest = {name: value for name, value in settings.items() if name != key}
            yield f"{key} absent", rest
    plain = {name: value for name, value in settings.items() if name != "rope_scaling"}
    for scaling in _SCALINGS:
        yield f"rope_parameters={scaling}", {**plain, "rope_parameters": scaling}


def theirs_of(folder, settings):
    """Transformers' model of a config.json. Its weights depend on their names and shapes alone."""
    (folder / "config.json").write_text(json.dumps(settings))
    config = transformers.AutoConfig.from_pretrained(folder)
    build = transformers.AutoModelForCausalLM.from_config
    model = build(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = int(hashlib.md5(name.encode()).hexdigest()[:8], 16)
            parameter.normal_(0.0, 0.25, generator=torch.Generator().manual_seed(seed))
    return model


def ours_of(folder, settings, theirs):
    """Our decoder with the same weights."""
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    model = Decoder(read_with_settings(folder)[0])
    weights = CheckpointFolder(folder).open()
    check_shapes(model, weights)
    model.load_state_dict(dict(weights))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_a_changed_key_changes_ours_as_it_changes_theirs_or_is_refused(tmp_path, kind):
    settings = settings_of(kind)
    base = theirs_of(tmp_path, settings)
    before = base(tokens()).logits
    architecture, read = read_with_settings(tmp_path)
    torch.testing.assert_close(
        ours_of(tmp_path, settings, base)(tokens()), before, atol=TOLERANCE, rtol=0
    )
    wrong, compared = [], 0
    for change, changed in changes_of(settings, base.config, read.asked):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            found, read = read_with_settings(tmp_path)
        except ValueError:
            continue
        if {*changed} - {*settings} - read.asked - _HARMLESS:
            continue  # a warning names it
        try:
            theirs = theirs_of(tmp_path, changed)
            expected = theirs(tokens()).logits
        except Exception:  # what transformers cannot build is no model of anybody
            continue
        if found == architecture and torch.equal(expected, before):
            continue
        try:
            given = ours_of(tmp_path, changed, theirs)(tokens())
        except ValueError:  # shapes, or a combination that the decoder refuses
            continue
        compared += 1
        if (given - expected).abs().max() > TOLERANCE:
            wrong.append(change)
    assert not wrong
    assert compared > 10
