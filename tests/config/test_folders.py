"""Configs that are given a folder: each fault of the folder is one sentence under the key, before torch is imported."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from kasa_tune import config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def shapes(layers=2, width=32):
    """The weights of a Llama as transformers stores them, of LLAMA's sizes."""
    of_layer = {"q_proj": (32, width), "k_proj": (16, width), "v_proj": (16, width)}
    named = {f"self_attn.{name}": shape for name, shape in of_layer.items()}
    named |= {"self_attn.o_proj": (width, 32), "mlp.down_proj": (width, 48)}
    named |= {"mlp.gate_proj": (48, width), "mlp.up_proj": (48, width)}
    named |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,))
    found = {"model.embed_tokens.weight": (64, width), "model.norm.weight": (width,)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in named.items()}
    return found


def safetensors(tensors=None):
    """The bytes of a file of float32 zeros."""
    entries, end = {}, 0
    for name, shape in (shapes() if tensors is None else tensors).items():
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint, as far as a config's check looks."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, LLAMA)
    (folder / "model.safetensors").write_bytes(safetensors())
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n')
    return folder


def write(folder, values):
    (folder / "config.json").write_text(json.dumps(values))


def problems(folder, *more, name="kasa", **options):
    """Of a shipped config with the two values that a user gives."""
    data = Path(folder).parent / "mine.jsonl"
    given = [f"checkpoint_dir={folder}", f"dataset.data_files={data}", "model.rank=2"]
    try:
        config.load(name, [*given, *more], **options)
    except config.ConfigError as error:
        return [tuple(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize("name", ["kasa", "lora", "dora", "corda", "qcorda", "qlora"])
def test_two_values_are_enough(folder, name):
    more = ["model.truncation_rank=2"] if name == "kasa" else []
    more += ["calibration.max_seq_len=128"] if "corda" in name else []
    assert problems(folder, *more, name=name) == []


def test_the_two_values_are_asked_for_and_nothing_else():
    with pytest.raises(config.ConfigError) as error:
        config.load("corda")
    keys = [problem.key for problem in error.value.problems]
    assert sorted(keys) == ["checkpoint_dir", "dataset.data_files"]
    assert "checkpoint_dir=/models/Qwen3-8B" in str(error.value)
    assert "dataset.data_files=/data/mine.jsonl" in str(error.value)


def half_a_download(folder):
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replaced(name, content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


def quantized(folder):
    write(folder, LLAMA | {"quantization_config": {"quant_method": "awq"}})


FAULTS = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config.json is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "config.json is damaged: it is no JSON",
    ),
    "of a hybrid model": (
        lambda f: write(f, {"architectures": ["JambaForCausalLM"], "model_type": "jamba"}),
        "models of type 'jamba' are not supported (JambaForCausalLM).",
    ),
    "of a vision model": (
        lambda f: write(f, {"architectures": ["ViTForImageClassification"], "model_type": "vit"}),
        "ViTForImageClassification is not supported.",
    ),
    "half a download": (half_a_download, "lacks 2 of 3 files with weights"),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_bytes(POINTER),
        "is the pointer of a git-lfs file, not the weights",
    ),
    "a file cut short": (
        lambda f: (f / "model.safetensors").write_bytes(safetensors()[:-100]),
        "it was not fetched whole",
    ),
    "a page in place of a file": (
        lambda f: (f / "model.safetensors").write_bytes(b"<html>Not found</html>"),
        "is no safetensors file",
    ),
    "GGUF": (replaced("model-Q4_K.gguf", b"GGUF"), "is a GGUF file"),
    "GGUF without config.json": (
        lambda f: [p.unlink() for p in f.iterdir()] and (f / "a.gguf").write_bytes(b"GGUF"),
        "is a GGUF file",
    ),
    "pickles alone": (replaced("pytorch_model.bin", b"PK"), "as PyTorch pickles alone"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "quantized": (quantized, "the checkpoint is quantized already ('awq')"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "a pointer for a tokenizer": (
        lambda f: (f / "tokenizer.json").write_bytes(POINTER),
        "is a Git LFS pointer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_folder_is_one_sentence(folder, fault):
    change, words = FAULTS[fault]
    change(folder)
    ((key, text),) = problems(folder)
    assert key == "checkpoint_dir"
    assert words in text


@pytest.mark.parametrize(
    ("given", "words"),
    [("nowhere", "is no folder"), ("mine.jsonl", "is a file"), ("a.gguf", "is a GGUF file")],
)
def test_a_path_that_is_no_folder_is_refused(folder, given, words):
    (folder.parent / "a.gguf").write_bytes(b"GGUF")
    ((key, text),) = problems(folder.parent / given)
    assert key == "checkpoint_dir"
    assert words in text


def test_folders_with_a_name_nearly_the_same_are_named(folder):
    ((_, text),) = problems(folder.parent / "mdoel")
    assert text.endswith("Did you mean model?")


def test_a_config_of_one_size_names_those_that_read_any_folder(folder):
    ((key, text),) = problems(folder, "~dataset.data_files", name="llama3_8b_lora")
    assert key == "checkpointer.checkpoint_files"
    assert "4 of 4 files are not in" in text
    assert "such as kasa, read any model's folder" in text


def test_the_run_of_a_report_is_there(folder):
    with pytest.raises(config.ConfigError, match=r"run: got .*, which does not exist"):
        config.load("report", [f"run={folder}_kasa"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.rank=17", "got 17, but v_proj has a smaller dimension of 16"),
        ("model.apply_to_output=True", "is its embedding and takes no adapter"),
    ],
)
def test_keys_are_compared_with_config_json(folder, override, words):
    ((key, text),) = problems(folder, override)
    assert key == override.partition("=")[0]
    assert words in text


def test_rows_are_no_longer_than_the_model_takes(folder, caplog):
    assert problems(folder, name="corda_kpm") == []
    assert "calibration.max_seq_len: 2048 is cut to 128" in caplog.text
    (problem,) = problems(folder, "calibration.max_seq_len=2048", name="corda_kpm")
    assert problem == (
        "calibration.max_seq_len",
        "got 2048, and the model takes 128 tokens; set at most 128",
    )
    reader = "tokenizer._component_=kasa_tune.components.data.hf_tokenizer"
    path = f"tokenizer.path={folder / 'tokenizer.json'}"
    (problem,) = problems(folder, reader, path, "~tokenizer.checkpoint_dir")
    assert problem[0] == "tokenizer.max_seq_len"


@pytest.mark.parametrize(
    ("changed", "tensors", "told"),
    [
        (
            {},
            shapes(width=24),
            r"embed_tokens.weight of shape (64, 24), and config.json tells (64, 32)",
        ),
        (
            {"num_hidden_layers": 3},
            shapes(),
            "tells 3 layers, and the weights of layer 2 are missing",
        ),
        (
            {"num_key_value_heads": 4},
            shapes(),
            "k_proj.weight of shape (16, 32), and config.json tells (32, 32)",
        ),
        ({"intermediate_size": 96}, shapes(), "(and 5 more)"),
    ],
    ids=["width", "layers", "heads", "mlp"],
)
def test_weights_of_other_shapes_than_config_json_tells(folder, changed, tensors, told):
    write(folder, LLAMA | changed)
    (folder / "model.safetensors").write_bytes(safetensors(tensors))
    ((key, text),) = problems(folder)
    assert key == "checkpointer.checkpoint_dir"
    assert told in text
    assert problems(folder, "dry_run=true") == []


@pytest.mark.parametrize(
    ("name", "source", "sep"),
    [
        ("a.csv", "csv", None), ("b.TSV", "csv", "\t"), ("c.parquet", "parquet", None),
        ("d.csv.gz", "csv", None), ("e.jsonl", None, None), ("f.json", None, None),
    ],
)  # fmt: skip
def test_the_ending_of_data_files_tells_their_reader(folder, name, source, sep):
    (folder.parent / name).write_text("input,output\na,b\n")
    given = [f"checkpoint_dir={folder}", "model.rank=2"]
    cfg = config.load("kasa", [*given, f"dataset.data_files={folder.parent / name}"])
    assert (cfg.dataset.get("source"), cfg.dataset.get("sep")) == (source, sep)


def test_a_source_that_is_given_stays(folder):
    (folder.parent / "a.csv").write_text("input,output\na,b\n")
    given = [f"checkpoint_dir={folder}", f"dataset.data_files={folder.parent / 'a.csv'}"]
    cfg = config.load("kasa", [*given, "model.rank=2", "+dataset.source=json"[1:]])
    assert cfg.dataset.source == "json"


def test_a_dry_run_needs_config_json_alone(folder):
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
    assert problems(folder, "dry_run=true", "dataset.data_files=null") == []


def test_faults_are_found_without_torch(folder):
    (folder / "config.json").unlink()
    code = (
        "import sys\nfrom kasa_tune import config\n"
        "try:\n    config.load('kasa', sys.argv[1:])\n"
        "except config.ConfigError as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    words = [f"checkpoint_dir={folder}", f"dataset.data_files={folder.parent / 'mine.jsonl'}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words], capture_output=True, text=True
    )
    assert "config.json is missing" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_the_key_of_the_top_level_moves_every_section(folder, tmp_path):
    """As for a run whose base has moved: its config.yaml holds the old place everywhere."""
    cfg = config.load("llama3_8b_kasa", [f"checkpoint_dir={folder}"], check_files=False)
    assert cfg.checkpointer.checkpoint_dir == str(folder)
    assert cfg.tokenizer.path == f"{folder}/tokenizer.json"
    saved = tmp_path / "config.yaml"
    data = f"dataset.data_files={tmp_path / 'mine.jsonl'}"
    cfg = config.load("kasa", [f"checkpoint_dir={folder}", data, "model.rank=2"])
    from omegaconf import OmegaConf

    OmegaConf.save(cfg, saved)
    folder.rename(tmp_path / "moved")
    cfg = config.load(saved, [f"checkpoint_dir={tmp_path / 'moved'}"])
    places = {cfg[name].checkpoint_dir for name in ("model", "tokenizer", "checkpointer")}
    assert places == {str(tmp_path / "moved")}
    assert cfg.output_dir == "/tmp/kasa_tune/model_kasa"


def test_generation_takes_all_sections_or_none(folder):
    given = ["prompts=[a]", "device=cpu"]
    with pytest.raises(config.ConfigError, match="adapter_checkpoint: missing"):
        config.load("generate", given)
    config.load("generate", [*given, f"checkpoint_dir={folder}"])
    component = "model._component_=kasa_tune.components.models.lora_from_checkpoint"
    with pytest.raises(config.ConfigError, match="tokenizer: missing; give all of"):
        config.load("generate", [*given, component, f"model.checkpoint_dir={folder}"])
