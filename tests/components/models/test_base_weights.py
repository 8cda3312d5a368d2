"""Weights read one at a time against torchtune's own checkpointer and the tensors that were written."""

import gc
import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torchtune.training import FullModelTorchTuneCheckpointer

from kasa_tune.components.models import streamed
from kasa_tune.components.models.base_weights import (
    read_base_weights,
    shapes_of,
    weights_fingerprint,
)
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.components.models.streamed import StreamedWeights
from tests.toy_checkpoints import MODELS, checkpointer, to_hf, toy, write_checkpoint
from tests.toy_models import FAMILIES, tokens


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch):
    """Torchtune's checkpointer collects garbage after each file: most of this module's time."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def spy(monkeypatch):
    """Names of the tensors that are read from the files, in order."""
    read, opened = [], streamed.safe_open

    class Spied:
        def __init__(self, *args, **options):
            self._file = opened(*args, **options)

        def __enter__(self):
            self._inside = self._file.__enter__()
            return self

        def __exit__(self, *exc_info):
            return self._file.__exit__(*exc_info)

        def __getattr__(self, name):
            return getattr(self._inside, name)

        def get_tensor(self, name):
            read.append(name)
            return self._inside.get_tensor(name)

    monkeypatch.setattr(streamed, "safe_open", Spied)
    return read


# --------------------------------------------------------------------------------- the same weights


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_that_of_torchtunes_checkpointer(name, dtype, shards, tmp_path):
    files = write_checkpoint(tmp_path / "hf", name, dtype=dtype, shards=shards)
    make = partial(checkpointer, tmp_path / "hf", files, MODELS[name].model_type)
    streamed, whole = read_base_weights(make()), make().load_checkpoint()["model"]
    assert isinstance(streamed, StreamedWeights)
    assert streamed.keys() == whole.keys() == toy(name)[1].keys()
    assert len(streamed) == len(whole) == len(list(streamed))
    assert (
        shapes_of(streamed)
        == shapes_of(whole)
        == {key: tuple(value.shape) for key, value in whole.items()}
    )
    for key, expected in whole.items():
        found = streamed[key]
        assert found.dtype == streamed.meta[key].dtype == expected.dtype == dtype
        assert not found.is_meta
        assert torch.equal(found, expected), key
        assert torch.equal(found, toy(name, dtype)[1][key]), key
    assert weights_fingerprint(streamed) == weights_fingerprint(whole)


@pytest.mark.parametrize("name", ["llama3_2", "gemma2", "qwen2_tied", "phi3_gqa"])
def test_a_model_is_filled_with_them(name, tmp_path):
    files = write_checkpoint(tmp_path / "hf", name, shards=2)
    family, (sizes, weights) = FAMILIES[MODELS[name].family], toy(name)
    model = build_on_meta(
        partial(family.kasa, ["q_proj"], rank=2, truncation_rank=0, **sizes), dtype=torch.float32
    )
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, MODELS[name].model_type))
    load_base_weights(model, streamed, device=torch.device("cpu"), adapter_dtype=torch.float32)
    usual = family.base(**sizes).eval()
    usual.load_state_dict(weights)
    assert torch.equal(model.eval()(tokens()), usual(tokens()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_floating_dtypes_are_read_as_they_are(dtype, tmp_path):
    files = write_checkpoint(tmp_path / "hf", "llama2", dtype=dtype)
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))
    assert {tensor.dtype for tensor in streamed.values()} == {
        tensor.dtype for tensor in streamed.meta.values()
    }
    assert streamed["output.weight"].dtype == dtype


def test_of_a_name_in_several_files_the_last_counts_as_for_torchtune(tmp_path):
    files = write_checkpoint(tmp_path / "hf", "llama2")
    again = {
        "model.norm.weight": torch.full((32,), 7.0),
        "lm_head.weight": torch.full((40, 32), 3.0).bfloat16(),
    }
    save_file(again, tmp_path / "hf" / "model-00002-of-00001.safetensors")
    make = partial(
        checkpointer, tmp_path / "hf", [*files, "model-00002-of-00001.safetensors"], "LLAMA2"
    )
    streamed, whole = read_base_weights(make()), make().load_checkpoint()["model"]
    assert streamed["norm.scale"].unique().tolist() == [7.0]
    assert streamed["output.weight"].dtype == streamed.meta["output.weight"].dtype == torch.bfloat16
    assert len(streamed) == len(whole)
    assert all(torch.equal(streamed[key], whole[key]) for key in whole)


def test_what_is_not_a_weight_is_skipped(tmp_path):
    def change(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    files = write_checkpoint(tmp_path / "hf", "llama2", change=change)
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))
    assert streamed.keys() == toy("llama2")[1].keys()


def test_a_tied_output_that_is_stored_all_the_same_is_skipped(tmp_path):
    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    files = write_checkpoint(tmp_path / "hf", "qwen2_tied", change=change)
    make = partial(checkpointer, tmp_path / "hf", files, "QWEN2")
    assert (
        read_base_weights(make()).keys()
        == toy("qwen2_tied")[1].keys()
        == make().load_checkpoint()["model"].keys()
    )


# --------------------------------------------------------------------------------- where a weight lies


def weights_of_linears(name):
    return [key for key, value in toy(name)[1].items() if value.ndim == 2]


def renumbered(weights):
    """The same names and shapes, every number but once in the model."""
    first, found = 0, {}
    for key, value in weights.items():
        found[key] = torch.arange(first, first + value.numel(), dtype=torch.float64).view_as(value)
        first += value.numel()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_places_are_where_torchtunes_way_back_puts_the_rows(name, tmp_path):
    streamed = read_base_weights(
        checkpointer(
            tmp_path / "hf", write_checkpoint(tmp_path / "hf", name), MODELS[name].model_type
        )
    )
    sizes, weights = toy(name)
    numbers = renumbered(weights)
    written = to_hf(numbers, MODELS[name].model_type, sizes)
    for weight in weights_of_linears(name):
        key, rows = streamed.location(weight)
        assert torch.equal(written[key][rows], numbers[weight]), weight
        assert torch.equal(streamed.read(key)[rows], streamed[weight]), weight


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_a_file_is_the_place_of_one_weights_row(name, tmp_path, spy):
    files = write_checkpoint(tmp_path / "hf", name, shards=2)
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, MODELS[name].model_type))
    taken = {}
    for weight in weights_of_linears(name):
        key, rows = streamed.location(weight)
        taken.setdefault(key, []).append(rows)
    for key, rows in taken.items():
        assert torch.cat(rows).sort().values.tolist() == list(range(len(streamed.stored[key])))
    fused = {
        "model.layers.1.self_attn.qkv_proj.weight": 3,
        "model.layers.1.mlp.gate_up_proj.weight": 2,
    }
    assert {key: len(rows) for key, rows in taken.items() if len(rows) > 1} == {
        f"model.layers.{layer}.{key.removeprefix('model.layers.1.')}": count
        for layer in range(2)
        for key, count in (fused if "phi" in name else {}).items()
    }
    assert spy == []


def test_queries_and_keys_lie_permuted_in_the_files_of_llama_and_not_of_qwen(tmp_path):
    for name, permuted in (("llama2", True), ("qwen2", False)):
        files = write_checkpoint(tmp_path / name, name)
        streamed = read_base_weights(checkpointer(tmp_path / name, files, MODELS[name].model_type))
        for leaf in ("q_proj", "k_proj", "v_proj"):
            rows = streamed.location(f"layers.0.attn.{leaf}.weight").rows
            assert torch.equal(rows, torch.arange(len(rows))) == (not permuted or leaf == "v_proj")


def test_the_files_own_names_shapes_and_dtypes_are_known_unread(tmp_path, spy):
    def change(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    files = write_checkpoint(tmp_path / "hf", "qwen2_tied", dtype=torch.bfloat16, change=change)
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, "QWEN2"))
    assert (
        streamed.stored["lm_head.weight"].shape
        == streamed.stored["model.embed_tokens.weight"].shape
    )
    assert streamed.stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert all(tensor.is_meta for tensor in streamed.stored.values())
    assert len(streamed.stored) == len(toy("qwen2_tied")[1]) + 2
    assert spy == []
    assert streamed.read("model.layers.0.self_attn.rotary_emb.inv_freq").tolist() == [1.0] * 4
    assert spy == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


# --------------------------------------------------------------------------------- read when asked for


def test_nothing_but_headers_is_read_before_a_tensor_is_asked_for(tmp_path, spy):
    files = write_checkpoint(tmp_path / "hf", "phi3_gqa", shards=2)
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, "PHI3_MINI"))
    assert shapes_of(streamed)["layers.0.attn.k_proj.weight"] == (16, 32)
    assert "layers.0.attn.k_proj.weight" in list(streamed)
    assert len(streamed) == len(toy("phi3_gqa")[1])
    assert all(tensor.is_meta for tensor in streamed.meta.values())
    assert spy == []
    streamed["layers.0.attn.k_proj.weight"]
    assert spy == ["model.layers.0.self_attn.qkv_proj.weight"]
    streamed["layers.1.mlp.w3.weight"], streamed["norm.scale"]
    assert spy[1:] == ["model.layers.1.mlp.gate_up_proj.weight", "model.norm.weight"]


def test_each_request_reads_anew(tmp_path, spy):
    files = write_checkpoint(tmp_path / "hf", "llama2")
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))
    streamed["norm.scale"].zero_()
    assert streamed["norm.scale"].all()
    assert spy == ["model.norm.weight"] * 2


def test_a_model_of_other_shapes_is_refused_without_reading_a_tensor(tmp_path, spy):
    files = write_checkpoint(tmp_path / "hf", "llama2")
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))
    family = FAMILIES["llama2"]
    sizes = family.sizes | {"intermediate_dim": 56}
    model = build_on_meta(partial(family.lora, ["q_proj"], rank=2, **sizes), dtype=torch.float32)
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.mlp\.w1\.weight: the model has \(56, 32\), the checkpoint \(48,",
    ):
        load_base_weights(model, streamed, device=torch.device("cpu"), adapter_dtype=torch.float32)
    assert spy == []


def test_a_name_that_is_not_there(tmp_path):
    files = write_checkpoint(tmp_path / "hf", "llama2")
    streamed = read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))
    assert "layers.2.attn.q_proj.weight" not in streamed
    with pytest.raises(KeyError):
        streamed["layers.2.attn.q_proj.weight"]


# --------------------------------------------------------------------------------- other kinds of checkpoints


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2_tied", "phi3_gqa"])
def test_pickled_checkpoints_are_loaded_by_their_checkpointer(name, tmp_path):
    files = write_checkpoint(tmp_path / "hf", name, shards=2, save=torch.save)
    found = read_base_weights(checkpointer(tmp_path / "hf", files, MODELS[name].model_type))
    assert not isinstance(found, StreamedWeights)
    expected = toy(name)[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert shapes_of(found) == {key: tuple(value.shape) for key, value in expected.items()}


def test_one_pickled_file_among_others_is_enough_for_that(tmp_path):
    files = write_checkpoint(tmp_path / "hf", "llama2")
    torch.save(
        {"model.norm.weight": torch.full((32,), 7.0)}, tmp_path / "hf" / "model-00002-of-00001.bin"
    )
    found = read_base_weights(
        checkpointer(tmp_path / "hf", [*files, "model-00002-of-00001.bin"], "LLAMA2")
    )
    assert found["norm.scale"].unique().tolist() == [7.0]


def test_torchtunes_own_checkpoints_keep_their_names(tmp_path):
    _, weights = toy("llama2")
    (tmp_path / "tune").mkdir()
    torch.save(weights, tmp_path / "tune" / "model.pt")
    options = {
        "checkpoint_files": ["model.pt"],
        "model_type": "LLAMA2",
        "output_dir": str(tmp_path / "out"),
    }
    found = read_base_weights(
        FullModelTorchTuneCheckpointer(checkpoint_dir=str(tmp_path / "tune"), **options)
    )
    assert all(torch.equal(found[key], weights[key]) for key in weights)


# --------------------------------------------------------------------------------- refused

W2 = "model.layers.0.mlp.down_proj"


def bitsandbytes(state):
    state[f"{W2}.weight"] = torch.zeros(768, 1, dtype=torch.uint8)
    state[f"{W2}.weight.absmax"] = torch.ones(24)


def float8(state):
    state[f"{W2}.weight"] = state[f"{W2}.weight"].to(torch.float8_e4m3fn)
    state[f"{W2}.weight_scale_inv"] = torch.ones(1, 1)


def gptq(state):
    del state[f"{W2}.weight"]
    state |= {
        f"{W2}.qweight": torch.ones(6, 32, dtype=torch.int32),
        f"{W2}.scales": torch.ones(1, 32).half(),
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (bitsandbytes, rf"{W2}\.weight is stored as U8"),
        (float8, rf"{W2}\.weight is stored as F8_E4M3"),
        (gptq, rf"{W2}\.qweight is stored as I32"),
    ],
)
def test_quantized_checkpoints_are_refused_by_the_key(change, words, tmp_path):
    files = write_checkpoint(tmp_path / "hf", "llama2", change=change)
    with pytest.raises(ValueError, match=words + ": the checkpoint is quantized already") as caught:
        read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))
    assert str(tmp_path / "hf") in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "word"),
    [(torch.uint8, "uint8"), (torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int8, "int8")],
)
def test_pickled_quantized_checkpoints_are_refused_too(dtype, word, tmp_path):
    def change(state):
        state[f"{W2}.weight"] = state[f"{W2}.weight"].to(dtype)

    files = write_checkpoint(tmp_path / "hf", "llama2", change=change, save=torch.save)
    with pytest.raises(
        ValueError,
        match=rf"layers\.0\.mlp\.w2\.weight is stored as {word}: the checkpoint is quant",
    ):
        read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))


@pytest.mark.parametrize(
    ("name", "model_type"), [("llama2", "PHI3_MINI"), ("phi3", "LLAMA2"), ("qwen2", "LLAMA3")]
)
def test_another_model_type_is_refused_with_folder_and_type(name, model_type, tmp_path):
    files = write_checkpoint(tmp_path / "hf", name)
    with pytest.raises(ValueError, match=rf"Could not read .*hf as a {model_type} checkpoint"):
        read_base_weights(checkpointer(tmp_path / "hf", files, model_type))


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_refused_with_its_folder(kept, tmp_path):
    (file,) = write_checkpoint(tmp_path / "hf", "llama2")
    content = (tmp_path / "hf" / file).read_bytes()
    (tmp_path / "hf" / file).write_bytes(
        content[: int(kept * len(content)) if isinstance(kept, float) else kept]
    )
    with pytest.raises(ValueError, match=r"Could not read .*hf as a LLAMA2 checkpoint"):
        read_base_weights(checkpointer(tmp_path / "hf", [file], "LLAMA2"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("hidden_size", r"hf/config\.json: hidden_size is 'None'"),
        ("num_attention_heads", r"hf/config\.json: num_attention_heads is 'None'"),
        # It then means as many as heads, which these weights do not have.
        ("num_key_value_heads", r"Could not read .*hf as a LLAMA2"),
    ],
)
def test_a_config_without_what_the_conversion_needs_is_refused_with_its_key(key, words, tmp_path):
    files = write_checkpoint(tmp_path / "hf", "llama2")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))


def test_heads_that_the_weights_do_not_have_are_refused(tmp_path):
    files = write_checkpoint(tmp_path / "hf", "llama2")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"num_attention_heads": 3}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"Could not read .*hf as a LLAMA2"):
        read_base_weights(checkpointer(tmp_path / "hf", files, "LLAMA2"))
