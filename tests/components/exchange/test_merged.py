"""A trained model as a checkpoint of its own: every tensor, file and word in it, and the memory that writing takes."""

import gc
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.exchange import merged
from kasa_tune.components.exchange.merged import write_merged
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.linalg.nf4 import dequantize, is_quantized
from kasa_tune.components.models.base_weights import read_base_weights
from tests.tolerances import assert_same_bits
from tests.toy_checkpoints import MODELS, checkpointer, to_hf, toy
from tests.trained_runs import EVERYWHERE, IN_PLACES, QUANTIZED, effective_weight, toy_run

INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch):
    """Torchtune's checkpointer collects garbage after each file."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


def exported(tmp_path, run, folder="merged", **options):
    """The folder that was written, and the errors told."""
    (tmp_path / folder).mkdir()
    return tmp_path / folder, write_merged(open_run(run.path), tmp_path / folder, **options)


def tensors_in(folder):
    """All tensors by name, none of them in two files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def trained_weights(run, name):
    """The weights of the run's model in float64, in the base's layout."""
    weights = {key: value.double() for key, value in toy(name)[1].items()}
    for path, module in run.model.named_modules():
        if is_quantized(getattr(module, "weight", torch.empty(0))):
            weights[f"{path}.weight"] = dequantize(module.weight).double()
    weights |= {
        f"{path}.weight": effective_weight(linear) for path, linear in adapter_linears(run.model)
    }
    return to_hf(weights, MODELS[name].model_type, MODELS[name].sizes)


# --------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("method", ["kasa", "corda_kpm", "corda_mixed", "dora", "qcorda", "qlora"])
@pytest.mark.parametrize("name", ["llama2", "gemma2", "qwen2_tied", "phi3_gqa"])
def test_adapted_weights_are_the_trained_ones_and_all_others_the_bases(name, method, tmp_path):
    run = toy_run(tmp_path, name, method, where=IN_PLACES)
    folder, errors = exported(tmp_path, run)
    found, original, trained = (
        tensors_in(folder),
        tensors_in(tmp_path / "base"),
        trained_weights(run, name),
    )
    assert found.keys() == original.keys()
    fused = {"k_proj": "qkv_proj", "up_proj": "gate_up_proj"} if "phi" in name else {}
    leaves = {fused.get(leaf, leaf) for leaf in ("k_proj", "up_proj")}
    changed = {
        key for key in found if key.endswith("_proj.weight") and key.split(".")[-2] in leaves
    }
    if method in QUANTIZED:
        changed = {key for key in found if key.endswith("_proj.weight")}
    for key, value in found.items():
        assert value.dtype == torch.float32
        if key in changed:
            torch.testing.assert_close(value.double(), trained[key], rtol=1e-5, atol=1e-6)
        else:
            assert_same_bits(value, original[key])
    assert errors.keys() == {key.removesuffix(".weight") for key in changed}
    assert set(errors.values()) == {(0.0, 0.0)}


def test_rows_of_a_fused_weight_that_have_no_adapter_are_the_bases_bit_for_bit(tmp_path):
    run = toy_run(tmp_path, "phi3_gqa", "kasa", where=IN_PLACES)
    folder, _ = exported(tmp_path, run)
    found, original = tensors_in(folder), tensors_in(tmp_path / "base")
    key = "model.layers.0.self_attn.qkv_proj.weight"
    rows = (found[key] != original[key]).any(dim=1)
    queries, keys = toy("phi3_gqa")[0]["embed_dim"], 2 * 8  # heads x head_dim of what was adapted
    assert rows.tolist() == [queries <= row < queries + keys for row in range(len(rows))]


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, base_dtype, tmp_path):
    """The base's where none is said; what training left alone is only cast, and the errors are those of rounding."""
    run = toy_run(tmp_path, "llama2", "kasa", base_dtype=base_dtype, where=IN_PLACES)
    folder, errors = exported(tmp_path, run, dtype=dtype)
    found, original, written = (
        tensors_in(folder),
        tensors_in(tmp_path / "base"),
        dtype or base_dtype,
    )
    changed = {f"{module}.weight" for module in errors}
    assert len(changed) == 4
    for key, value in found.items():
        assert value.dtype == written
        if key not in changed:
            assert_same_bits(value, original[key].to(written))
    if base_dtype == torch.float32:
        trained = trained_weights(run, "llama2")
        for module, error in errors.items():
            key = f"{module}.weight"
            wrong = (found[key].double() - trained[key]).norm()
            change = (trained[key] - original[key].double()).norm()
            if written == torch.float32:
                assert error == (0.0, 0.0)
            else:
                assert error.of_weight == pytest.approx(
                    (wrong / trained[key].norm()).item(), rel=1e-3
                )
                assert error.of_update == pytest.approx((wrong / change).item(), rel=1e-3)
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == str(written).removeprefix("torch.")


def test_tensors_that_are_no_weights_are_kept_as_they_are(tmp_path):
    def change(state):
        state[INV_FREQ] = torch.linspace(0.0, 1.0, 7)

    run = toy_run(tmp_path, "llama2", "kasa", change=change)
    folder, errors = exported(tmp_path, run, dtype=torch.bfloat16)
    found = tensors_in(folder)
    assert_same_bits(found.pop(INV_FREQ), torch.linspace(0.0, 1.0, 7))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not any("rotary" in name for name in errors)


def stored_output(state):
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_stored_tied_output_takes_the_dtype_too(dtype, tmp_path):
    run = toy_run(tmp_path, "qwen2_tied", "kasa", change=stored_output)
    folder, _ = exported(tmp_path, run, dtype=dtype)
    found, original = tensors_in(folder), tensors_in(tmp_path / "base")
    assert_same_bits(found["lm_head.weight"], original["lm_head.weight"].to(dtype or torch.float32))
    assert_same_bits(found["lm_head.weight"], found["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["llama3_2", "gemma", "qwen2_tied"])
def test_a_tied_output_that_was_not_stored_is_not_now(name, tmp_path):
    folder, _ = exported(tmp_path, toy_run(tmp_path, name, "kasa"))
    assert "lm_head.weight" not in tensors_in(folder)


def test_an_adapted_output(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa", where=EVERYWHERE | {"apply_to_output": True})
    folder, errors = exported(tmp_path, run)
    assert "lm_head" in errors
    expected = trained_weights(run, "llama2")["lm_head.weight"]
    torch.testing.assert_close(
        tensors_in(folder)["lm_head.weight"].double(), expected, rtol=1e-5, atol=1e-6
    )


def test_our_own_recipes_read_it_as_a_base(tmp_path):
    run = toy_run(tmp_path, "phi3_gqa", "corda_ipm")
    folder, _ = exported(tmp_path, run, max_shard_size="10KB")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    weights = read_base_weights(checkpointer(folder, files, "PHI3_MINI"))
    assert weights.keys() == toy("phi3_gqa")[1].keys()
    for name, linear in adapter_linears(run.model):
        torch.testing.assert_close(
            weights[f"{name}.weight"], linear.merged_weight(), rtol=1e-6, atol=1e-7
        )


# --------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_are_no_larger_than_asked_and_the_index_knows_each_tensor(shards, tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa", shards=shards)
    folder, _ = exported(tmp_path, run, max_shard_size="16KB")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [
        f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found, total = {}, 0
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = {key: opened.get_tensor(key).nbytes for key in opened.keys()}  # noqa: SIM118 (not a dict)
        assert sum(sizes.values()) <= 16_000 or len(sizes) == 1
        found |= dict.fromkeys(sizes, file)
        total += sum(sizes.values())
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total
    assert found.keys() == tensors_in(tmp_path / "base").keys()


def test_one_shard_has_no_index(tmp_path):
    folder, _ = exported(tmp_path, toy_run(tmp_path, "llama2", "kasa", shards=3))
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]


def test_sizes_are_those_of_the_dtype_that_is_written(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    size = sum(tensor.nbytes for tensor in tensors_in(tmp_path / "base").values())
    limit = f"{size * 2 // 3 // 1000}KB"
    wide, _ = exported(tmp_path, run, "wide", max_shard_size=limit)
    half, _ = exported(tmp_path, run, "half", max_shard_size=limit, dtype=torch.bfloat16)
    assert len(list(wide.glob("*.safetensors"))) == 2
    assert len(list(half.glob("*.safetensors"))) == 1


@pytest.fixture
def live_bytes():
    """Called, the bytes of all tensors that were made since and are still there, each storage once."""

    def count():
        made = [
            thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
        ]
        storages = [tensor.untyped_storage() for tensor in made if tensor.device.type == "cpu"]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    gc.freeze()  # what is there already is not listed
    yield count
    gc.unfreeze()


@pytest.mark.parametrize("method", ["kasa", "qlora"])
def test_memory_holds_a_shard_and_a_few_copies_of_one_weight(
    method, tmp_path, monkeypatch, live_bytes
):
    """Counted where most is held: when a merged weight is compared with the trained one, and when a shard is saved."""
    path = toy_run(tmp_path, "llama2", method, where=IN_PLACES).path
    sizes = {key: tensor.nbytes for key, tensor in tensors_in(tmp_path / "base").items()}
    largest, whole, limit = max(sizes.values()), sum(sizes.values()), 16_000
    opened = open_run(path)
    before, seen, alive = live_bytes(), [], []
    assert before < whole / 2
    compare, save = merged.deviation, merged.save_file

    def comparing(*tensors):
        seen.append(live_bytes() - before)
        return compare(*tensors)

    def saving(tensors, *args, **options):
        assert not [shard for shard in alive if shard() is not None]  # earlier ones are gone
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        seen.append(live_bytes() - before)
        save(tensors, *args, **options)

    monkeypatch.setattr(merged, "deviation", comparing)
    monkeypatch.setattr(merged, "save_file", saving)
    (tmp_path / "merged").mkdir()
    write_merged(opened, tmp_path / "merged", max_shard_size=f"{limit // 1000}KB")
    assert len(seen) > 8
    assert max(seen) > largest  # what is counted is what is held
    assert max(seen) <= limit + 4 * largest
    assert max(seen) < 0.6 * whole


# --------------------------------------------------------------------------------- the other files


def test_side_files_come_along_and_no_weights(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa", shards=2)
    base = tmp_path / "base"
    kept = {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
    }
    kept |= {
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "model.py",
    }
    others = {
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "README.md",
    }
    others |= {"consolidated.00.pth", "model.gguf", "training_args.bin"}
    for name in kept | others:
        (base / name).write_text(json.dumps(name))
    (base / "nested").mkdir()
    (base / "nested" / "config.json").write_text("{}")
    folder, _ = exported(tmp_path, run)
    written = {path.name for path in folder.iterdir()}
    assert written == kept | {"config.json", "model.safetensors", "tokenizer.model"}
    for name in kept | {"tokenizer.model"}:
        assert (folder / name).read_bytes() == (base / name).read_bytes()


def test_a_tokenizer_that_lies_elsewhere_comes_along_too(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "other.model"
    path.write_bytes(b"other pieces")
    tokenizer = {
        "_component_": "torchtune.models.llama2.llama2_tokenizer",
        "path": str(path),
        "max_seq_len": 64,
    }
    run = toy_run(tmp_path, "llama2", "kasa", tokenizer=tokenizer)
    folder, _ = exported(tmp_path, run)
    assert (folder / "other.model").read_bytes() == b"other pieces"


def test_only_tokenizer_files_are_copied_at_a_checkpoints_word(tmp_path):
    """A run.json that names a private file as its tokenizer would have it published with the model."""
    private = tmp_path / "id_rsa"
    private.write_text("private")
    credentials = tmp_path / "credentials.json"
    credentials.write_text("{}")
    tokenizer = {"path": str(private), "merges_file": str(credentials), "other": "a\0b"}
    run = toy_run(tmp_path, "llama2", "kasa", tokenizer=tokenizer)
    folder, _ = exported(tmp_path, run)
    assert not {"id_rsa", "credentials.json"} & {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("where", ["base", "elsewhere"])
def test_a_link_out_of_the_folder_is_not_copied(tmp_path, where):
    """A base or a tokenizer from somebody else would have a private file published with the model."""
    link = tmp_path / where / "tokenizer_config.json"
    run = toy_run(tmp_path, "llama2", "kasa", tokenizer={"path": str(link)})
    link.parent.mkdir(exist_ok=True)
    (tmp_path / "private").write_text("private")
    link.symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is a link to .*private, outside"):
        exported(tmp_path, run)
    assert not any((tmp_path / "merged").iterdir())


def test_links_of_hugging_faces_cache_are_followed(tmp_path):
    model = tmp_path / "models--a--b"
    (model / "blobs").mkdir(parents=True)
    (model / "blobs" / "4567").write_text("{}")
    inside = model / "snapshots" / "0123" / "sub"
    inside.mkdir(parents=True)
    (inside / "config.json").symlink_to("../../../blobs/4567")
    merged._check_own_file(inside / "config.json")
    (model / "secret").write_text("")
    (inside / "NOTICE").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="outside its folder"):
        merged._check_own_file(inside / "NOTICE")


def test_the_config_says_the_dtype_under_the_key_it_has(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    for index, keys in enumerate([["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []]):
        path.write_text(json.dumps(config | dict.fromkeys(keys, "float32")))
        folder, _ = exported(tmp_path, run, f"merged{index}", dtype=torch.bfloat16)
        expected = config | dict.fromkeys(keys or ["torch_dtype"], "bfloat16")
        assert json.loads((folder / "config.json").read_text()) == expected
    assert json.loads(path.read_text()) == config  # the base's own is as it was


def test_of_several_dtypes_the_config_says_what_it_said(tmp_path):
    def change(state):
        state["model.norm.weight"] = state["model.norm.weight"].bfloat16()

    run = toy_run(tmp_path, "llama2", "kasa", change=change)
    folder, _ = exported(tmp_path, run)
    assert tensors_in(folder)["model.norm.weight"].dtype == torch.bfloat16
    assert (folder / "config.json").read_text().split() == json.dumps(
        json.loads((tmp_path / "base" / "config.json").read_text()), indent=2
    ).split()


def test_a_size_that_is_none(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    with pytest.raises(ValueError, match="lots"):
        exported(tmp_path, run, max_shard_size="lots")
