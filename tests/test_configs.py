"""The shipped configs: valid as they stand, the papers' settings, headers that work, two steps at toy size.

tests/families holds that every file is what the tables make. A rule that the writer follows for all is tested once for
each task and method here, not once for each file.
"""

import fnmatch
import inspect
import json
import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune.data import Message
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.gemma2._convert_weights import gemma2_tune_to_hf
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf

from kasa_tune import config, registry
from kasa_tune.components import models
from kasa_tune.components.checkpoints import list_checkpoints, load_part, verify_checkpoint
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.components.training.loggers import read_metrics
from kasa_tune.config import describe, parts, reading
from kasa_tune.config.schemas import SCHEMAS
from kasa_tune.families import MODELS, TASKS, TrainingConfig, training_configs
from kasa_tune.methods import METHODS, method_of
from tests.toy_checkpoints import config_of

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
TRAINING = {config.name: config for config in training_configs()}
OF_SEVERAL = [name for name in FILES if f"_{name}".endswith("_compare")]
SELF_CONTAINED = [
    name for name in FILES if name.startswith(("tiny_", "stories260k_")) and name not in OF_SEVERAL
]  # their models are at hand
EXCHANGED = [name for name in FILES if name.endswith(("_export", "_import"))]  # of any model
OF_A_RUN = ["generate", "report", "gpt2_e2e_evaluate"]
SERVED = [name for name in FILES if f"_{name}".endswith(("_synthesize", "_judge"))]
OF_ANY = [name for name, made in TRAINING.items() if made.model.is_any]  # their model is the user's
OF_ENCODERS = [name for name in FILES if name.endswith("_classify")]
OTHERS = SELF_CONTAINED + EXCHANGED + OF_A_RUN + OF_ANY + OF_SEVERAL + SERVED + OF_ENCODERS
FINETUNED = [name for name in FILES if name not in OTHERS]
# What a user must give.
TWO = ["checkpoint_dir=/models/own", "dataset.data_files=/data/own.jsonl"]
GIVEN = dict.fromkeys(OF_ANY, TWO)
GIVEN |= {"generate": ["adapter_checkpoint=/tmp/run", "prompts=[Hello]"], "report": ["run=/tmp"]}
GIVEN |= {
    "synthesize": ["seeds=/tmp/seeds.jsonl"],
    "judge": ["evaluations=[/tmp]", "tasks=[texts]"],
}


def schema_of(name):
    return next(schema for ending, schema in SCHEMAS.items() if f"_{name}".endswith(ending))


def one_of_each(*properties):
    """The first config for each task, method and combination of the given properties of a TrainingConfig."""
    kinds = {}
    for name, made in TRAINING.items():
        kind = (made.task.words, made.method.name, *(get(made) for get in properties))
        kinds.setdefault(kind, name)
    return list(kinds.values())


@pytest.fixture(scope="session")
def trees():
    """Configs as written."""
    return {name: reading.read(path) for name, path in FILES.items()}


def recipe_of(name):
    """Of the recipes a config belongs to, the one for one device."""
    (recipe,) = (
        recipe.name
        for recipe in registry.recipes()
        if not recipe.supports_distributed and name in [shipped.name for shipped in recipe.configs]
    )
    return recipe


def needs_data(name):
    if name.startswith("stories260k_") and not os.environ.get("KASA_TUNE_DATA"):
        pytest.skip("KASA_TUNE_DATA does not name the folder with real models and datasets")
    if name.startswith("tiny_") and not (ROOT / "kasa_tune" / "tiny_world" / "model").is_dir():
        pytest.skip("the embedded model is not there")


# ------------------------------------------------------------------------------------------------- as they stand


@pytest.mark.parametrize("name", FILES)
def test_is_valid_as_it_stands(name):
    needs_data(name)
    config.load(name, GIVEN.get(name, []), schema_of(name), check_files=False)


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_user_must_give_is_asked_for(name):
    for given in GIVEN[name]:
        others = [other for other in GIVEN[name] if other != given]
        with pytest.raises(config.ConfigError) as error:
            config.load(name, others, schema_of(name), check_files=False)
        (problem,) = error.value.problems
        assert problem.key == given.partition("=")[0]


@pytest.mark.parametrize("name", one_of_each())
def test_keys_stand_in_the_schemas_order(name, trees):
    assert list(trees[name]) == [key for key in schema_of(name) if key in trees[name]]


OF_E2E = ("gpt2_medium", "gpt2_large")  # models of one experiment of KaSA's paper


def test_every_method_trains_the_tiny_model_and_has_a_config_for_every_real_one():
    for name in METHODS:
        assert f"tiny_{name}" in FILES
    of_every_model = ("kasa", "lora", "corda", "corda_kpm", "qcorda", "qlora")
    for made in TRAINING.values():
        of_one_experiment = made.task.methods != of_every_model or made.model.name in OF_E2E
        if made.task.device == "cuda" and not of_one_experiment:
            names = {f"{made.prefix}_{method}".lstrip("_") for method in of_every_model}
            assert names <= {*FILES}


def without(tree, *keys):
    return {key: value for key, value in tree.items() if key not in keys}


# Ending of a config's name, the ending of the one that it is compared with, and the sections in which they differ.
DIFFERENCES = [
    ("lora", "kasa", {"model", "adapter"}),
    ("corda_kpm", "corda", {"adapter", "calibration"}),
    ("pissa", "corda", {"adapter", "calibration"}),
    ("milora", "corda", {"adapter", "calibration"}),
    ("olora", "corda", {"adapter", "calibration"}),
    ("eva", "corda", {"adapter"}),
    ("qcorda", "corda", {"adapter", "quantization"}),
    ("qpissa", "pissa", {"adapter", "quantization"}),
    ("loftq", "pissa", {"adapter", "quantization"}),
    ("qlora", "lora", {"adapter", "quantization"}),
    ("qkasa", "kasa", {"adapter", "quantization"}),
]


@pytest.mark.parametrize("model", ["tiny", "llama3_8b"])
@pytest.mark.parametrize(("method", "base", "sections"), DIFFERENCES)
def test_a_baseline_differs_in_its_method_alone(model, method, base, sections, trees):
    """So that results can be compared: data, places, rank, batch and schedule are those of the other config."""
    ours, theirs = trees[f"{model}_{method}"], trees[f"{model}_{base}"]
    different = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert different == sections | {"output_dir"}
    of_method = ("_component_", "truncation_rank", "diag_init")
    assert without(ours["model"], *of_method) == without(theirs["model"], *of_method)


@pytest.mark.parametrize("name", one_of_each())
def test_the_start_is_the_one_the_method_stands_for(name, trees):
    tree, method = trees[name], TRAINING[name].method
    adapter = tree.get("adapter", {})
    assert adapter.get("method") == method.setting
    assert ("quantization" in tree) == method.quantized
    assert ("calibration" in tree) == method.calibrated
    assert adapter.get("quantization_iterations") == method.quantization_iterations
    if method.quantized:  # arXiv 2305.14314's
        assert tree["quantization"] == {"block_size": 64, "scaler_block_size": 256}
    if method.setting == "corda":
        assert (adapter["mode"], adapter["split"]) == {
            "corda": ("ipm", "balanced"),
            "corda_kpm": ("kpm", "paper"),
        }[method.name]


@pytest.mark.parametrize("prefix", ["tiny", "stories260k", "llama3_8b", "llama3_8b_gsm8k"])
def test_modes_differ_in_what_they_calibrate_on(prefix, trees):
    ipm, kpm = trees[f"{prefix}_corda"], trees[f"{prefix}_corda_kpm"]
    assert ipm["calibration"]["dataset"] == "${dataset}"
    assert not ipm["calibration"]["concatenate"]
    assert ipm["calibration"]["max_seq_len"] >= ipm["tokenizer"]["max_seq_len"]  # no sample is cut
    assert kpm["calibration"]["dataset"] not in ("${dataset}", ipm["dataset"])
    # a fact of the tiny world is a row
    assert kpm["calibration"]["concatenate"] or prefix == "tiny"


def test_dora_and_lora_plus_are_lora_with_one_thing_more(trees):
    dora, plus, lora = (trees[f"tiny_{method}"] for method in ("dora", "lora_plus", "lora"))
    assert dora["model"] == lora["model"] | {"use_dora": True}
    assert without(dora["adapter"], "dtype") == {"method": "lora"}
    assert plus["model"] == lora["model"]
    assert without(plus["adapter"], "dtype") == {"method": "lora", "lr_ratio": 16}
    assert plus["optimizer"]["lr"] < lora["optimizer"]["lr"] < 16 * plus["optimizer"]["lr"]
    for own in (dora, plus):
        assert without(own, "output_dir", "model", "adapter", "optimizer") == without(
            lora, "output_dir", "model", "adapter", "optimizer"
        )


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("_generate")])
def test_completions_come_from_the_model_that_was_trained(name, trees):
    generate, trained = trees[name], trees[name.removesuffix("_generate")]
    for key in ("tokenizer", "model"):
        assert generate[key] == trained[key]
    assert generate["adapter_checkpoint"] == trained["output_dir"]


# What arXiv 2412.06071 trains with: instruction following, and commonsense reasoning per model.
INSTRUCTION = {
    "rank": 8,
    "alpha": 16,
    "modules": {"q_proj", "v_proj"},
    "beta": 1e-4,
    "gamma": 1e-3,
    "lr": 2e-4,
}
COMMONSENSE = {
    "rank": 32,
    "alpha": 64,
    "modules": {"q_proj", "k_proj", "v_proj", "w2", "w3"},
    "gamma": 1e-3,
    "lr": 3e-4,
}
E2E = INSTRUCTION | {"rank": 4, "alpha": 32}
PRESETS = {
    "gpt2_medium_e2e_kasa": E2E,
    "gpt2_large_e2e_kasa": E2E,
    "llama2_7b_commonsense_kasa": COMMONSENSE | {"beta": 1e-2},
    "llama3_8b_commonsense_kasa": COMMONSENSE | {"beta": 1e-4},
}


def test_presets_are_the_papers(trees):
    names = [name for name in FINETUNED if name.endswith("_kasa")]
    assert len(names) >= 25
    for name in names:
        check_preset(name, trees[name])


@pytest.mark.parametrize("name", [f"{model}_e2e_kasa" for model in OF_E2E])
def test_preset_of_e2e_is_the_papers(name, trees):
    """Its table 8, with the rank of the script that it follows."""
    tree = trees[name]
    assert (tree["optimizer"]["weight_decay"], tree["loss"]["label_smoothing"]) == (0.01, 0.1)
    assert (tree["model"]["dropout"], tree["epochs"], tree["dtype"]) == (0.1, 5, "fp32")
    assert tree["batch_size"] * tree["gradient_accumulation_steps"] == 8
    assert tree["lr_scheduler"]["_component_"].endswith(".linear_schedule")
    assert tree["lr_scheduler"]["num_warmup_steps"] == 500
    decoding = yaml.safe_load(FILES["gpt2_e2e_evaluate"].read_text())["tasks"]["decoding"]
    expected = {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4}
    assert decoding == expected | {"stop_tokens": [628]}


@pytest.mark.parametrize(("task", "rank"), [("okvqa", 32), ("pmc_vqa", 128)])
def test_preset_of_llava_is_the_papers(task, rank, trees):
    """CorDA++'s: ranks by task, all linears of the language model, and what its experiments on text have."""
    lora, kpm = (trees[f"llava1_5_7b_{task}_{method}"] for method in ("lora", "corda_kpm"))
    for tree in (lora, kpm):
        model = without(tree["model"], "_component_")
        assert model == {
            "attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_to_mlp": True,
            "apply_to_output": False,
            "rank": rank,
            "alpha": rank,
            "dropout": 0.0,
            "train_connector": "full",
        }
        assert tree["batch_size"] * tree["gradient_accumulation_steps"] == 128
        assert (tree["optimizer"]["lr"], tree["optimizer"]["weight_decay"]) == (2e-5, 0.0)
        assert (tree["lr_scheduler"]["warmup_ratio"], tree["epochs"]) == (0.03, 1)
        assert (tree["dtype"], tree["dataset"]["image_aspect_ratio"]) == ("fp32", "pad")
    different = {key for key in kpm | lora if kpm.get(key) != lora.get(key)}
    assert different == {"model", "adapter", "calibration", "output_dir"}
    assert kpm["calibration"]["num_samples"] == 256


def check_preset(name, tree):
    model, adapter = tree["model"], tree["adapter"]
    assert {
        "rank": model["rank"],
        "alpha": model["alpha"],
        "modules": {*model["attn_modules"], *(model["apply_to_mlp"] or ())},
        "beta": adapter["beta"],
        "gamma": adapter["gamma"],
        "lr": tree["optimizer"]["lr"],
    } == PRESETS.get(name, INSTRUCTION), name
    if "_e2e_" in name:
        return
    assert tree["batch_size"] * tree["gradient_accumulation_steps"] == (
        8 if name.startswith("gemma") else 16
    )
    schedule = {key: value for key, value in tree["lr_scheduler"].items() if key != "_component_"}
    kind = tree["lr_scheduler"]["_component_"].rpartition(".")[2]
    cosine, linear = (
        ("cosine_schedule", {"warmup_ratio": 0.1}),
        ("linear_schedule", {"num_warmup_steps": 100}),
    )
    assert (kind, schedule) == (linear if name in PRESETS else cosine)
    assert tree["epochs"] == (3 if name in PRESETS or "gsm8k" in name else 1)
    assert (model["dropout"], tree["tokenizer"]["max_seq_len"], tree["dtype"]) == (
        0.05,
        512,
        "bf16",
    )


# What arXiv 2406.05223 trains with; the split of a component's size between B and A is ours.
CORDA_PRESET = {
    "modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "mlp": True,
    "rank": 128,
    "alpha": 128,
    "dropout": 0.0,
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5, "weight_decay": 0.0},
    "schedule": {
        "_component_": "kasa_tune.components.training.cosine_schedule",
        "warmup_ratio": 0.03,
    },
    "batch": 128,
    "epochs": 1,
    "dtype": "bf16",
}


def test_presets_of_corda_are_the_papers(trees):
    names = [name for name in FINETUNED if TRAINING[name].method.builders[0] == "corda"]
    names = [name for name in names if not name.startswith("llava")]  # an experiment of its own
    for name in names:
        check_corda_preset(name, trees[name])


def check_corda_preset(name, tree):
    model = tree["model"]
    assert {
        "modules": model["attn_modules"],
        "mlp": model["apply_to_mlp"],
        **{key: model[key] for key in ("rank", "alpha", "dropout")},
        "optimizer": tree["optimizer"],
        "schedule": tree["lr_scheduler"],
        "batch": tree["batch_size"] * tree["gradient_accumulation_steps"],
        **{key: tree[key] for key in ("epochs", "dtype")},
    } == CORDA_PRESET, name


@pytest.mark.parametrize("name", ["llama3_8b_corda", "llama3_8b_commonsense_corda"])
def test_calibration_is_the_papers(name, trees):
    ipm, kpm = trees[name]["calibration"], trees[f"{name}_kpm"]["calibration"]
    assert (ipm["num_samples"], kpm["num_samples"], kpm["max_seq_len"]) == (256, 256, 2048)
    assert kpm["dataset"]["source"] == "google-research-datasets/nq_open"
    assert kpm["dataset"]["column"] == "question"


# --------------------------------------------------------------------------------------------------------- headers


def header_commands(name):
    """The commands in the comments above the first key, in words."""
    head = FILES[name].read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    commands = [
        re.sub(r"^#\s+", "", line) for line in head if re.match(r"#\s+(tune|kasa-tune) ", line)
    ]
    return [shlex.split(command, comments=True) for command in commands]


# The texts of headers depend on these alone, besides names and paths.
HEADERS = one_of_each(
    lambda made: made.model.batch_size == 1, lambda made: made.model.family.samples
)


@pytest.mark.parametrize(
    "name",
    HEADERS
    + EXCHANGED
    + [name for name in FILES if name.endswith(("_generate", "_evaluate"))]
    + ["tiny_roberta_kasa_classify", "deberta_v3_base_cola_kasa_classify"]
    + OF_A_RUN
    + SERVED,
)
def test_commands_of_the_header_run_this_config(name):
    needs_data(name)
    runs = [words for words in header_commands(name) if words[1] == "run"]
    own = [words for words in runs if words[words.index("--config") + 1] == name]
    assert own
    for words in runs:
        recipe, given = words[2], words[words.index("--config") + 1]
        registry.find_recipe(recipe)
        config.load(
            given, words[words.index("--config") + 2 :], schema_of(given), check_files=False
        )


@pytest.mark.parametrize("name", [name for name in HEADERS if name in FINETUNED])
def test_header_shows_an_override_and_the_dry_run(name):
    runs = [words for words in header_commands(name) if words[1] == "run"]
    assert {tuple(words[:5]) for words in runs} == {
        ("tune", "run", recipe_of(name), "--config", name)
    }
    overrides = [words[5:] for words in runs]
    assert [] in overrides
    assert ["dry_run=true"] in overrides
    assert len(overrides) >= 3


@pytest.mark.parametrize("model", [name for name, row in MODELS.items() if row.repository])
def test_download_brings_the_files_the_config_reads(model, trees):
    name = first_of(model)
    (words,) = [words for words in header_commands(name) if words[1] == "download"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    folder, checkpointer = options["--output-dir"], trees[name]["checkpointer"]
    assert checkpointer["checkpoint_dir"] == folder == f"/tmp/{words[2].rpartition('/')[2]}"
    # A checkpointer of the folder finds its files by itself.
    files = checkpointer.get("checkpoint_files", ["model.safetensors", "tokenizer.json"])
    needed = [
        "config.json",
        *(
            files
            if isinstance(files, list)
            else [files["filename_format"].format("00001", "00002")]
        ),
    ]
    for key in ("path", "merges_file"):
        if given := trees[name]["tokenizer"].get(key):
            assert given.startswith(f"{folder}/")
            needed.append(given.removeprefix(f"{folder}/"))
    ignored = options.get("--ignore-patterns", "")
    assert not [file for file in needed if fnmatch.fnmatch(file, ignored)]


# -------------------------------------------------------------------------------------------------- published sizes

# Parameters, rotary base and norm epsilon of the checkpoints on the hub.
PUBLISHED = {
    "llama2_7b": (6_738_415_616, 10_000, 1e-5),
    "llama2_13b": (13_015_864_320, 10_000, 1e-5),
    "llama2_70b": (68_976_648_192, 10_000, 1e-5),
    "llama3_8b": (8_030_261_248, 500_000, 1e-5),
    "llama3_70b": (70_553_706_496, 500_000, 1e-5),
    "llama3_1_8b": (8_030_261_248, 500_000, 1e-5),
    "llama3_1_70b": (70_553_706_496, 500_000, 1e-5),
    "llama3_2_1b": (1_235_814_400, 500_000, 1e-5),
    "llama3_2_3b": (3_212_749_824, 500_000, 1e-5),
    "llama3_3_70b": (70_553_706_496, 500_000, 1e-5),
    "mistral_7b": (7_241_732_096, 10_000, 1e-5),
    "gemma_2b": (2_506_172_416, 10_000, 1e-6),
    "gemma_7b": (8_537_680_896, 10_000, 1e-6),
    "gemma2_2b": (2_614_341_888, 10_000, 1e-6),
    "gemma2_9b": (9_241_705_984, 10_000, 1e-6),
    "qwen2_0_5b": (494_032_768, 1_000_000, 1e-6),
    "qwen2_1_5b": (1_543_714_304, 1_000_000, 1e-6),
    "qwen2_7b": (7_615_616_512, 1_000_000, 1e-6),
    "qwen2_5_0_5b": (494_032_768, 1_000_000, 1e-6),
    "qwen2_5_1_5b": (1_543_714_304, 1_000_000, 1e-6),
    "qwen2_5_3b": (3_085_938_688, 1_000_000, 1e-6),
    "qwen2_5_7b": (7_615_616_512, 1_000_000, 1e-6),
    "phi3_mini": (3_821_079_552, 10_000, 1e-5),
    "phi4_14b": (14_659_507_200, 250_000, 1e-5),
    "gpt2_medium": (354_823_168, None, 1e-5),  # its positions are learned
    "gpt2_large": (774_030_080, None, 1e-5),
    # 7,063,427,072 with the last layer of the tower, of 12,596,224, and the norm behind it, of 2,048
    "llava1_5_7b": (7_050_828_800, 10_000, 1e-5),
}


def first_of(model):
    """The name of a model's config of its first task and its first method."""
    row = MODELS[model]
    return TrainingConfig(row, TASKS[row.tasks[0]], METHODS[row.methods[0]]).name


def on_meta(node):
    arguments = {key: value for key, value in node.items() if key != "_component_"}
    build = getattr(models, node["_component_"].rpartition(".")[2])
    return build_on_meta(partial(build, **arguments), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_is_the_published_one(name, trees):
    model = on_meta(trees[first_of(name)]["model"])
    base = sum(value.numel() for key, value in model.named_parameters() if ".lora_" not in key)
    rotary = getattr(model.layers[0].attn.pos_embeddings, "base", None)
    if own := getattr(model, "architecture", None):  # a decoder of ours
        rotary = own.layers[0].rotary and own.layers[0].rotary.base
    assert (base, rotary, model.layers[0].sa_norm.eps) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["gemma2_2b", "gemma2_9b"])
def test_gemma2_caps_attention_at_50_and_logits_at_30(name, trees):
    model = on_meta(trees[f"{name}_kasa"]["model"])
    assert model.layers[0].attn.softcapping == 50.0
    assert model.norm.capping_value == 30.0


def test_every_model_with_a_config_is_held_against_its_published_size():
    assert {name for name, row in MODELS.items() if row.repository} == {*PUBLISHED}


def test_llama3_8b_trains_as_many_parameters_as_the_paper_says(trees):
    """32 layers, rank 8: q takes 8 (4096 + 4096), v 8 (4096 + 1024); KaSA adds two diagonals of 8 a layer."""
    for method, expected in (("kasa", 3_407_872 + 512), ("lora", 3_407_872)):
        model = on_meta(trees[f"llama3_8b_{method}"]["model"])
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


# ------------------------------------------------------------------------------------------------------- tokenizers


# Base models whose repositories have a chat template.
@pytest.mark.parametrize("name", ["llama3_8b_kasa", "llama3_70b_kasa"])
def test_base_models_see_plain_text_even_where_a_chat_template_lies_beside_the_tokenizer(
    name, trees, tmp_path
):
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<turn>", *characters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<turn>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{% for message in messages %}<turn>{{ message.content }}{% endfor %}"
    settings = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "add_bos_token": True,
        "chat_template": template,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    node = trees[name]["tokenizer"] | {"path": str(tmp_path / "tokenizer.json")}
    messages = [
        Message(role="user", content="Say a.", masked=True),
        Message(role="assistant", content="a"),
    ]
    tokens, mask = config.instantiate(OmegaConf.create(node)).tokenize_messages(messages)
    assert tokens == [vocabulary[token] for token in ["<bos>", *"Say a.", "a", "<eos>"]]
    assert mask == [True] * 7 + [False] * 2


# --------------------------------------------------------------------------------------------------------- toy runs

SIZES = {
    "vocab_size": 1024,  # enough for either tokenizer below
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "intermediate_dim": 160,
    "max_seq_len": 256,
}
ROWS = {
    "alpaca_dataset": {
        "instruction": "Name a colour.",
        "input": "",
        "output": "Red, like the sun.",
    },
    "commonsense_dataset": {
        "instruction": "Is the sun hot?",
        "input": "",
        "output": "the correct answer is true",
    },
    "completion_dataset": {"question": "who wrote the song of the sun"},
    "gsm8k_dataset": {
        "question": "Tom has 2 cats and 3 dogs. How many pets?",
        "answer": "2+3=<<2+3=5>>5\n#### 5",
    },
}


@dataclass(frozen=True)
class Family:
    """One architecture at toy size: our component builder, arguments beyond SIZES, torchtune's way to the HF layout."""

    builder: str
    arguments: tuple = ()
    to_hf: Callable = tune_to_hf

    @property
    def model(self):
        return SIZES | dict(self.arguments)

    @property
    def head_dim(self):
        return self.model.get("head_dim", SIZES["embed_dim"] // SIZES["num_heads"])

    @property
    def tied(self):
        return self.model.get("tie_word_embeddings", self.builder.startswith("gemma"))


ROPE_5E5, TIED, WIDE_HEADS = ("rope_base", 500_000), ("tie_word_embeddings", True), ("head_dim", 48)
QWEN = Family("qwen2", (("rope_base", 1_000_000),), qwen2_tune_to_hf)
QWEN_TIED = Family("qwen2", (("rope_base", 1_000_000), TIED), qwen2_tune_to_hf)
FAMILIES = {  # the longest beginning of a builder's name that fits decides
    "llama2": Family("llama2"),
    "llama3": Family("llama3", (ROPE_5E5,)),
    "llama3_1": Family("llama3_1", (ROPE_5E5,)),
    "llama3_2": Family("llama3_2", (ROPE_5E5, ("scale_factor", 32), TIED)),
    "llama3_3": Family("llama3_1", (ROPE_5E5,)),
    "mistral": Family("mistral"),
    "gemma": Family("gemma", (WIDE_HEADS,)),
    "gemma2": Family("gemma2", (WIDE_HEADS,), gemma2_tune_to_hf),
    "qwen2": QWEN_TIED,
    "qwen2_7b": QWEN,
    "qwen2_5_7b": QWEN,
    "phi": Family("phi3", (), phi3_tune_to_hf),
}


def family_of(tree):
    builder = tree["model"]["_component_"].rpartition(".")[2].partition("_")[2]
    return FAMILIES[max((start for start in FAMILIES if builder.startswith(start)), key=len)]


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory):
    """A folder in Hugging Face layout with a random model of a family; one per family and session."""
    made = {}

    def write(family):
        if family not in made:
            made[family] = _write_checkpoint(family, tmp_path_factory.mktemp(family.builder))
        return made[family]

    return write


def _write_checkpoint(family, folder):
    generator = torch.Generator().manual_seed(0)
    build = partial(
        getattr(models, f"lora_{family.builder}"), attn_modules=["q_proj"], **family.model
    )
    model = build_on_meta(build, dtype=torch.bfloat16)
    weights = {
        name: torch.randn(value.shape, generator=generator).mul(0.05).to(value.dtype)
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
    heads = {
        "num_heads": SIZES["num_heads"],
        "num_kv_heads": SIZES["num_kv_heads"],
        "dim": SIZES["embed_dim"],
    }
    options = {} if family.to_hf is phi3_tune_to_hf else heads | {"head_dim": family.head_dim}
    if family.to_hf is qwen2_tune_to_hf:
        options["tie_word_embeddings"] = family.tied
    tensors = {name: value.contiguous() for name, value in family.to_hf(weights, **options).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = config_of(family.builder, family.model)
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_model():
    """A SentencePiece model whose vocabulary the toy models can have."""
    if data := os.environ.get("KASA_TUNE_DATA"):
        return Path(data) / "models" / "stories260K" / "hf" / "tokenizer.model"
    embedded = ROOT / "kasa_tune" / "tiny_world" / "model" / "tokenizer.model"
    return (
        embedded if embedded.is_file() else pytest.skip("no tokenizer: KASA_TUNE_DATA is not set")
    )


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A JSON Lines file with the columns a dataset builder needs."""
    folder = tmp_path_factory.mktemp("rows")
    for builder, row in ROWS.items():
        (folder / f"{builder}.jsonl").write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    return lambda node: str(folder / f"{node['_component_'].rpartition('.')[2]}.jsonl")


@pytest.fixture(scope="module", autouse=True)
def quiet_and_on_one_thread():
    import datasets

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy_config(trees, toy_checkpoint, tokenizer_model, rows, tmp_path):
    """A shipped config with everything large taken away: sizes, files, device; written to a file and loaded from it."""

    def local(node):
        return node | {"source": "json", "data_files": rows(node), "split": "train"}

    def make(name, *overrides):
        tree, family = trees[name], family_of(trees[name])
        method = tree["model"]["_component_"].rpartition(".")[2].partition("_")[0]
        builder = {"_component_": f"kasa_tune.components.models.{method}_{family.builder}"}
        toy = tree | {
            "output_dir": str(tmp_path / "run"),
            "tokenizer": {
                "_component_": "torchtune.models.llama2.llama2_tokenizer",
                "path": str(tokenizer_model),
                "max_seq_len": 224,
                "prompt_template": None,
            },
            "model": tree["model"]
            | builder
            | family.model
            | ({"rank": 4, "alpha": 4} if tree["model"]["rank"] == 128 else {}),
            "checkpointer": tree["checkpointer"]
            | {
                "checkpoint_dir": str(toy_checkpoint(family)),
                "checkpoint_files": ["model.safetensors"],
            },
            "dataset": local(tree["dataset"]),
            "batch_size": min(2, tree["batch_size"]),
            "gradient_accumulation_steps": 2,
            "max_steps": 2,
            "device": "cpu",
        }
        if "calibration" in tree:
            toy["calibration"] = tree["calibration"] | {"num_samples": 4, "max_seq_len": 32}
            if isinstance(tree["calibration"]["dataset"], dict):
                toy["calibration"]["dataset"] = local(tree["calibration"]["dataset"])
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(toy, sort_keys=False), encoding="utf-8")
        return config.load(path, overrides, schema_of(name), about_to_run=True)

    return make


def check_run(folder, cfg):
    """Two finite lines, a verified checkpoint, and in it the adapters expected, with B moved from where it started."""
    of_kasa = cfg.adapter.get("method", "kasa") in (
        "kasa",
        "qkasa",
    )  # the recipe that has no methods logs both terms
    of_corda = ".corda_" in cfg.model._component_
    takes_out = of_corda and method_of(cfg.adapter).decomposition != "input_svd"  # EVA's B is zero
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"]]
    assert [line["step"] for line in lines] == [1, 2]
    keys = ("loss", "grad_norm", *(("l2", "l3") if of_kasa else ()))
    assert all(math.isfinite(line[key]) for line in lines for key in keys)
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    assert verify_checkpoint(checkpoint)
    adapter = load_part(checkpoint, "adapter")
    expected = adapter_names(cfg.model)
    assert {key for key in adapter if ".lora_edit_" not in key} == expected
    for key in (key for key in expected if key.endswith("lora_b.weight")):
        edit = adapter[key.replace("lora_b.weight", "lora_edit_out")]
        start = edit / (cfg.model.alpha / cfg.model.rank) if takes_out else torch.zeros(())
        assert not torch.equal(adapter[key], start.expand_as(adapter[key])), key
        assert not takes_out or edit.abs().sum() > 0, key


def adapter_names(model):
    """Names of the trained tensors, from what the config's model section says."""
    mlp, depth, whole = model["apply_to_mlp"], model.get("num_layers"), set()
    if "checkpoint_dir" in model:  # the tiny GPT-2, whose MLP has no gate, or the tiny LLaVA
        sizes = json.loads((Path(model["checkpoint_dir"]) / "config.json").read_text())
        if sizes["model_type"] == "gpt2":
            depth, mlp = sizes["n_layer"], ["w1", "w2"]
        else:
            depth = sizes["text_config"]["num_hidden_layers"]
            whole = {f"connector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")}
    places = [f"attn.{leaf}" for leaf in model["attn_modules"]]
    places += [f"mlp.{leaf}" for leaf in (["w1", "w2", "w3"] if mlp is True else mlp or [])]
    parts = ["lora_a.weight", "lora_b.weight"]
    parts += ["lora_diag"] * (".kasa_" in model["_component_"]) + ["lora_magnitude"] * model.get(
        "use_dora", False
    )
    return whole | {
        f"layers.{i}.{place}.{part}" for i in range(depth) for place in places for part in parts
    }


def recipe_for(name, load_recipe, cfg):
    module = load_recipe(recipe_of(name))
    return next(
        made for key, made in vars(module).items() if key.endswith("FinetuneRecipeSingleDevice")
    )(cfg)


def train(recipe, cfg):
    recipe.setup(cfg)
    assert recipe.train(cfg) == 0
    recipe.cleanup()


ONE_PER_FAMILY = [
    "llama2_7b",
    "llama3_8b",
    "llama3_1_8b",
    "llama3_2_1b",
    "mistral_7b",
    "gemma_2b",
    "gemma2_2b",
    "qwen2_5_7b",
    "phi3_mini",
]


# At toy size the models of a family are one, and so are their calibrations. One family runs every method and every
# task's data; the others run both roads, one of adapters that start at zero and one that calibrates and quantizes.
AT_TOY_SIZE = [
    name
    for name in FINETUNED
    if name.startswith("llama3_8b_") and not {"gsm8k", "synth"} & {*name.split("_")}
]
AT_TOY_SIZE = [name for name in AT_TOY_SIZE if "_commonsense_" not in name]
AT_TOY_SIZE += [f"{name}_{method}" for name in ONE_PER_FAMILY for method in ("kasa", "qcorda")]
AT_TOY_SIZE += ["gemma2_2b_lora", "phi3_mini_corda", "qwen2_0_5b_corda"]  # the least alike
AT_TOY_SIZE += [
    f"llama3_8b_{task}_{method}"
    for task in ("commonsense", "gsm8k")
    for method in ("kasa", "corda")
]


@pytest.mark.parametrize("name", dict.fromkeys(AT_TOY_SIZE))
def test_runs_two_steps_at_toy_size(name, toy_config, load_recipe):
    cfg = toy_config(name)
    train(recipe_for(name, load_recipe, cfg), cfg)
    check_run(Path(cfg.output_dir), cfg)


@pytest.mark.parametrize("method", ["kasa", "corda", "corda_kpm", "qcorda"])
@pytest.mark.parametrize("name", ["llama3_8b", "gemma_2b"])
def test_dry_run_prints_the_budget(name, method, toy_config, load_recipe, capsys):
    name = f"{name}_{method}"
    cfg = toy_config(name, "dry_run=true")
    recipe_for(name, load_recipe, cfg).setup(cfg)
    head_dim = 48 if name.startswith("gemma") else 32
    q, kv, mlp = 128 + 4 * head_dim, 128 + 2 * head_dim, 128 + 160  # in and out together
    if method == "kasa":
        trained = 2 * 8 * (q + kv + 2)  # layers, rank; q, v, the two diagonals
    else:
        trained = 2 * 4 * (2 * q + 2 * kv + 3 * mlp)
    printed = capsys.readouterr().out
    assert re.search(rf"^Trainable parameters: {trained:,}\b", printed, re.MULTILINE)
    assert "training step" in printed


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in SELF_CONTAINED
        if not name.endswith(("_generate", "_evaluate", "_classify")) and name not in SERVED
    ],
)
def test_self_contained_config_runs_two_steps(name, tmp_path, load_recipe):
    needs_data(name)
    overrides = [
        f"output_dir={tmp_path}",
        "max_steps=2",
        "run_val_every_n_steps=null",
        "save_every_n_steps=null",
    ]
    if "calibration" in schema_of(name):
        overrides.append("calibration.num_samples=8")
    cfg = config.load(name, overrides, schema_of(name), about_to_run=True)
    train(recipe_for(name, load_recipe, cfg), cfg)
    check_run(tmp_path, cfg)


@pytest.mark.parametrize("name", [name for name in SELF_CONTAINED if name.endswith("_generate")])
def test_generation_config_completes_a_prompt(name, tmp_path, load_recipe):
    needs_data(name)
    overrides = [
        f"output_dir={tmp_path}",
        "adapter_checkpoint=null",
        "num_samples=1",
        "max_new_tokens=4",
    ]
    cfg = config.load(name, overrides, config.GENERATE, about_to_run=True)
    recipe = load_recipe("generate_text").GenerateTextRecipe(cfg)
    recipe.setup(cfg)
    (record,) = recipe.generate(cfg)
    assert record["base"]


# ------------------------------------------------------------------------------------------------------------- docs


SCHEMAS_IN_DOCS = {
    "kasa_finetune_single_device": config.FINETUNE,
    "corda_finetune_single_device": config.CORDA,
    "qcorda_finetune_single_device": config.QCORDA,
    "generate_text": config.GENERATE,
    "classify_finetune_single_device": config.CLASSIFY,
    "evaluate_model": config.EVALUATE,
    "compare_methods": config.COMPARE,
    "export_adapter": config.EXPORT,
    "import_adapter": config.IMPORT,
    "report_run": config.REPORT,
    "synthesize_data": config.SYNTHESIZE,
    "judge_responses": config.JUDGE,
}


def test_docs_have_the_tables_of_keys_that_the_schemas_give():
    page = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    assert page == describe.fill(page), "run `make docs`"
    assert re.findall(r"^<!-- keys of (\w+)", page, re.MULTILINE) == [*SCHEMAS_IN_DOCS]


@pytest.mark.parametrize("recipe", SCHEMAS_IN_DOCS)
def test_every_key_has_a_help_text(recipe):
    assert [row.key for row in describe.rows(SCHEMAS_IN_DOCS[recipe]) if not row.help] == []


def test_a_table_has_only_the_keys_that_differ_from_the_tables_before():
    def keys(*schemas):
        return {row.key for row in describe.rows(schemas[0], schemas[1:])}

    new = keys(config.CORDA, config.FINETUNE)
    assert {key.split(".")[0] for key in new} == {"adapter", "calibration"}
    assert "adapter.dtype" not in new
    assert keys(config.QCORDA, config.FINETUNE, config.CORDA) == {
        "adapter.method",
        "adapter.quantization_iterations",
        "quantization.block_size",
        "quantization.scaler_block_size",
    }
    assert {*config.CORDA["adapter"].keys} - {*config.QCORDA["adapter"].keys} == {"mode"}
    ignored = {*config.QCORDA, *config.CLASSIFY}
    assert {*config.IMPORT} == keys(config.IMPORT, config.FINETUNE) | ignored


def test_the_documented_defaults_of_model_are_the_builders():
    builders = (models.corda_llama3_8b, models.lora_llama3_8b, models.kasa_llama3_8b)
    given = {
        name: parameter.default
        for build in builders
        for name, parameter in inspect.signature(build).parameters.items()
    }
    own = {
        name: key
        for name, key in config.FINETUNE["model"].values.items()
        if not name.startswith("lora_") and name not in parts.SIZES
    }
    assert given.pop("attn_modules") is inspect.Parameter.empty
    assert own.pop("attn_modules").default is config.REQUIRED
    assert {name: key.default for name, key in own.items()} == given


def test_docs_tell_the_recipe_of_every_suffix():
    text = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    told = {
        suffix: recipe
        for suffixes, recipe in re.findall(
            r"^\| ((?:`_\w+`(?:, )?)+) \| `(\w+)` \|", text, re.MULTILINE
        )
        for suffix in re.findall(r"_\w+", suffixes)
    }
    assert {*told} == {*SCHEMAS}
    for recipe in registry.recipes():
        on_one_device = recipe.name.replace("_distributed", "_single_device")
        endings = [suffix for suffix in told if told[suffix] == on_one_device]
        assert all(f"_{shipped.name}".endswith(tuple(endings)) for shipped in recipe.configs)


@pytest.mark.parametrize("name", EXCHANGED)
def test_header_of_an_exchange_shows_how_it_is_called(name):
    runs = [words for words in header_commands(name) if words[1] == "run"]
    assert {tuple(words[:5]) for words in runs} == {
        ("tune", "run", recipe_of(name), "--config", name)
    }
    for words in runs:
        config.load(name, words[5:], check_files=False)
