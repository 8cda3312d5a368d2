"""An architecture as JSON: read back as it was, and nothing else is taken for one."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasa_tune.architectures import (
    ATTENTION,
    MLP,
    Architecture,
    Experts,
    Layer,
    Rotary,
    Vision,
    read_architecture,
)
from kasa_tune.architectures.saving import from_json, to_json

SIZES = st.integers(1, 2**20)
NUMBERS = st.floats(1e-9, 1e9)
ROTARIES = st.builds(
    Rotary,
    base=NUMBERS,
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
    interleaved=st.booleans(),
    scaling=st.sampled_from(["none", "linear", "llama3", "yarn", "longrope"]),
    options=st.dictionaries(
        st.sampled_from(["factor", "truncate", "short_factor"]),
        st.one_of(NUMBERS, st.booleans(), SIZES, st.lists(NUMBERS, max_size=3).map(tuple)),
    ),
)
LAYERS = st.builds(
    Layer, rotary=st.none() | ROTARIES, window=st.none() | SIZES, sparse=st.booleans()
)
ARCHITECTURES = st.builds(
    Architecture,
    model_type=st.text(max_size=9),
    vocab_size=SIZES,
    num_heads=SIZES,
    num_kv_heads=SIZES,
    head_dim=SIZES,
    embed_dim=SIZES,
    intermediate_dim=SIZES,
    max_seq_len=SIZES,
    layers=st.lists(LAYERS, min_size=1, max_size=5).map(tuple),
    norm=st.sampled_from(["rms", "layer"]),
    norm_eps=NUMBERS,
    norm_before=st.booleans(),
    qk_norm=st.sampled_from(["none", "head", "full"]),
    biases=st.frozensets(st.sampled_from([*ATTENTION, *MLP])),
    activation=st.sampled_from(["silu", "gelu_tanh", "relu_squared"]),
    attention_cap=st.none() | NUMBERS,
    query_temperature=st.none() | st.tuples(NUMBERS, SIZES),
    experts=st.none() | st.builds(Experts, SIZES, SIZES, SIZES, st.booleans()),
    vision=st.none()
    | st.builds(
        Vision,
        *[SIZES] * 6,
        NUMBERS,
        st.sampled_from(["quick_gelu", "gelu"]),
        st.booleans(),
        st.booleans(),
        SIZES,
    ),
)
PLAIN = Architecture("llama", 9, 4, 2, 8, 32, 48, 64, (Layer(), Layer(), Layer(None, 7, True)))


@given(ARCHITECTURES)
def test_it_comes_back_as_it_was(architecture):
    assert from_json(json.loads(json.dumps(to_json(architecture))), "a file") == architecture


def test_those_of_published_models_come_back(real_data):
    found = 0
    for path in sorted((real_data / "configs").glob("*/config.json")):
        try:
            architecture = read_architecture(path.parent)
        except ValueError:
            continue  # of no supported family
        assert from_json(json.loads(json.dumps(to_json(architecture))), path) == architecture
        found += 1
    assert found > 50


def test_layers_that_are_alike_stand_there_once():
    assert [count for count, _ in to_json(PLAIN)["layers"]] == [2, 1]


def changed(**values):
    return {**to_json(PLAIN), **values}


def layer(**values):
    return {**to_json(PLAIN)["layers"][0][1], **values}


def rotary(**values):
    return layer(rotary={**layer()["rotary"], **values})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "must be an object"),
        ([1], "must be an object"),
        (changed(_component_="os.system"), "unknown values.*_component_"),
        ({key: value for key, value in changed().items() if key != "vocab_size"}, "vocab_size"),
        (changed(vocab_size=True), "vocab_size is True"),
        (changed(vocab_size=-1), "vocab_size is -1"),
        (changed(vocab_size="9"), "vocab_size is '9'"),
        (changed(norm_eps="1e-5"), "norm_eps is '1e-5'"),
        (changed(norm_eps=math.nan), "norm_eps is nan"),
        (changed(norm_eps=0), "norm_eps is 0"),
        (changed(norm="batch"), "norm is 'batch'"),
        (changed(tied=1), "tied is 1"),
        (changed(biases=["q_proj", "os"]), "biases is"),
        (changed(biases="q_proj"), "biases is 'q_proj'"),
        (changed(model_type=7), "model_type is 7"),
        (changed(query_temperature=[1.0]), "query_temperature is"),
        (changed(experts={"count": 4}), "experts.active is missing"),
        (changed(layers=None), "layers is None"),
        (changed(layers=[[1001, layer()]]), "at most 1000"),
        (changed(layers=[[600, layer()], [600, layer()]]), "at most 1000"),
        (changed(layers=[[0, layer()]]), "at most 1000"),
        (changed(layers=[[1, {"rotary": [], "window": None}]]), "rotary is"),
        (changed(layers=[[1, layer(window=0)]]), "window is 0"),
        (changed(layers=[[1, rotary(scaling="dynamic")]]), "scaling is 'dynamic'"),
        (changed(layers=[[1, rotary(options={"factor": "8"})]]), "factor is '8'"),
        (changed(layers=[[1, rotary(options={"factor": {"a": 1}})]]), "factor is"),
        (changed(layers=[[1, rotary(options={"factor": math.inf})]]), "factor is inf"),
        (changed(layers=[[1, rotary(options=[8])]]), "options is"),
    ],
)
def test_what_is_none_is_refused_with_its_place(value, words):
    with pytest.raises(ValueError, match=f"(?s)a file: architecture.*{words}"):
        from_json(value, "a file")
