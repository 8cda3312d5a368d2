"""Configs: what is read, what is refused before anything loads, and what the messages say."""

import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kasa_tune import config
from kasa_tune.config import reading
from kasa_tune.config.entries import Check, Section
from kasa_tune.methods import methods_of
from tests.config_trees import SHARDS, complete, folder_of, load, only_problem, problems, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> dict:
    return complete(tmp_path)


# --- what is accepted -------------------------------------------------------------------------------------------------


def test_a_complete_config_loads_with_defaults_in_the_schemas_order(tree):
    cfg = load(tree, "batch_size=3")
    assert list(cfg) == list(config.FINETUNE)
    assert (cfg.seed, cfg.dataset_val, cfg.adapter.gamma) == (42, None, 1e-3)
    assert cfg.batch_size_val == 3  # follows batch_size
    assert cfg.checkpointer.output_dir == cfg.metric_logger.log_dir == tree["output_dir"]
    assert cfg.profiler.enabled is False


def test_keys_of_the_default_node_complete_a_node_of_the_same_component_only(tree):
    same = {"_component_": "kasa_tune.components.training.JSONLLogger", "filename": "m.jsonl"}
    assert load(tree | {"metric_logger": same}).metric_logger.log_dir == tree["output_dir"]
    other = {"_component_": "torchtune.training.metric_logging.StdoutLogger"}
    assert load(tree | {"metric_logger": other}).metric_logger == other


def test_numbers_are_read_as_written(tree):
    text = write(tree, folder_of(tree)).read_text()
    text = text.replace("lr: 0.0002", "lr: 2e-4") + "clip_grad_norm: 1\nkeep_last: 0x10\n"
    path = folder_of(tree) / "numbers.yaml"
    path.write_text(text)
    cfg = config.load(path)
    assert (cfg.optimizer.lr, cfg.clip_grad_norm, cfg.keep_last) == (2e-4, 1.0, 16)
    assert isinstance(cfg.clip_grad_norm, float)


def test_a_number_from_the_environment_is_a_number(tree, monkeypatch):
    monkeypatch.setenv("MY_LR", "2e-4")
    assert load(tree, "optimizer.lr=${oc.env:MY_LR}").optimizer.lr == 2e-4


def test_strings_may_hold_what_looks_like_an_interpolation(tree):
    schema = config.FINETUNE | {"note": config.Key(str)}
    assert load(tree, r"note='costs \${5}'", schema=schema).note == "costs ${5}"


def test_resource_paths_become_absolute(tree):
    path = load(tree, "tokenizer.path=kasa_tune://registry.py").tokenizer.path
    assert Path(path) == ROOT / "kasa_tune" / "registry.py"
    key, text = only_problem(tree, "tokenizer.path=kasa_tune://no_such_file")
    assert key == "tokenizer.path"
    assert "no_such_file" in text


def test_a_recipe_may_add_keys(tree):
    schema = config.FINETUNE | {
        "my_key": config.Key(int, default=3),
        "mine": Section({"ratio": config.Key(float, 0.5, lambda value: value < 1)}),
    }
    cfg = load(tree, schema=schema)
    assert (cfg.my_key, cfg.mine.ratio) == (3, 0.5)
    assert "expected an integer" in problems(tree, "my_key=a", schema=schema)["my_key"]
    assert "got 2" in problems(tree, "mine.ratio=2", schema=schema)["mine.ratio"]
    assert "my_key" in problems(tree, "my_key=3")  # it is this recipe's alone


def test_the_schema_follows_from_the_name(tree, tmp_path):
    for key in ("dataset", "optimizer", "lr_scheduler"):
        tree.pop(key)
    tree["prompts"] = ["a name", "another"]
    config.validate_file(write(tree, tmp_path, "tiny_kasa_generate.yaml"))
    with pytest.raises(config.ConfigError, match="prompts: unknown key"):
        config.validate_file(write(tree, tmp_path, "tiny_kasa.yaml"))
    with pytest.raises(config.ConfigError, match="nothing to complete"):
        config.validate_file(tmp_path / "tiny_kasa_generate.yaml", ["prompts=[]"])


# --- what is refused --------------------------------------------------------------------------------------------------

# override -> the key it is reported under, and what the message must hold
REFUSED = {
    # names
    "epoch=2": ("epoch", "unknown key (given 2)", "epochs"),
    "gradient_acumulation_steps=2": ("gradient_acumulation_steps", "gradient_accumulation_steps"),
    "adapter.betta=1": ("adapter.betta", "unknown key", "beta"),
    "model.rnak=4": ("model.rnak", "unknown key", "rank"),
    "model.lora_attn_modules=[q_proj]": ("model.lora_attn_modules", "attn_modules"),
    "optimizer.learning_rate=1": ("optimizer.learning_rate", "Known keys: lr,"),
    "dataset.splitt=test": ("dataset.splitt", "split"),
    "dataset.data_file=x": ("dataset.data_file", "data_files"),
    "checkpointer.checkpoint_dirs=x": ("checkpointer.checkpoint_dirs", "checkpoint_dir"),
    "model=kasa_tune.components.models.kasa_lama3_8b": ("model._component_", "kasa_llama3_8b"),
    "optimizer=torch.optim.AdmW": ("optimizer._component_", "torch.optim.AdamW"),
    "optimizer=no_such_package.Adam": ("optimizer._component_", "no package 'no_such_package'"),
    "optimizer=torhc.optim.AdamW": (
        "optimizer._component_",
        "no package 'torhc'",
        "Did you mean torch",
    ),
    "optimizer=torch.optim": ("optimizer._component_", "torch.optim is a module"),
    "optimizer=AdamW": ("optimizer._component_", "dotted path"),
    # required
    "~output_dir": ("output_dir", "missing"),
    "~device": ("device", "missing"),
    "~optimizer": ("optimizer", "missing"),
    "~model.attn_modules": ("model.attn_modules", "missing", "kasa_llama3_8b"),
    "~tokenizer._component_": ("tokenizer._component_", "missing"),
    # types
    "batch_size=many": ("batch_size", "got 'many'", "an integer"),
    "batch_size=2.0": ("batch_size", "got 2.0", "an integer"),
    "batch_size=True": ("batch_size", "got True", "an integer"),
    "compile=yes": ("compile", "got 'yes'", "True or False"),
    "shuffle=1": ("shuffle", "got 1", "True or False"),
    "optimizer.lr=fast": ("optimizer.lr", "got 'fast'", "a number"),
    "optimizer.lr=True": ("optimizer.lr", "got True", "a number"),
    "optimizer.fused=maybe": ("optimizer.fused", "True or False or null"),
    "output_dir=3": ("output_dir", "got 3", "a string"),
    "adapter=3": ("adapter", "got 3", "a mapping"),
    "model=null": ("model", "got null", "_component_"),
    "dataset=[]": ("dataset", "empty list"),
    "loss=null": ("loss", "got null"),
    "dataset.train_on_input='yes'": ("dataset.train_on_input", "True or False"),
    "tokenizer.max_seq_len=long": ("tokenizer.max_seq_len", "an integer or null"),
    # values
    "model.rank=0": ("model.rank", "got 0", "at least 1"),
    "model.rank=-4": ("model.rank", "got -4", "at least 1"),
    "model.alpha=0": ("model.alpha", "greater than 0"),
    "model.dropout=1.0": ("model.dropout", "below 1"),
    "model.dropout=-0.1": ("model.dropout", "at least 0"),
    "model.truncation_rank=-1": ("model.truncation_rank", "at least 0"),
    "model.truncation=papr": ("model.truncation", "one of paper, published"),
    "model.diag_init=zeros": ("model.diag_init", "one of normal, ones"),
    "model.edit_storage=disk": ("model.edit_storage", "one of auto, folded, factored"),
    "model.attn_modules=[q_proj,o_proj]": (
        "model.attn_modules",
        "q_proj, k_proj, v_proj, output_proj",
    ),
    "model.attn_modules=q_proj": ("model.attn_modules", "a list"),
    "model.attn_modules=[]": ("model.attn_modules", "nothing to adapt"),
    "model.apply_to_mlp=[w4]": ("model.apply_to_mlp", "w1, w2, w3"),
    "adapter.orthogonal_gram=thick": ("adapter.orthogonal_gram", "one of thin, full"),
    "adapter.reduction=max": ("adapter.reduction", "one of mean, sum"),
    "adapter.beta=-1": ("adapter.beta", "at least 0"),
    "adapter.dtype=fp16": ("adapter.dtype", "gradient scaling"),
    "dtype=fp16": ("dtype", "got 'fp16'", "bf16 or fp32", "gradient scaling"),
    "dtype=int8": ("dtype", "bf16 or fp32"),
    "device=gpu": ("device", "cpu, cuda"),
    "batch_size=0": ("batch_size", "got 0", "at least 1"),
    "batch_size_val=0": ("batch_size_val", "at least 1"),
    "epochs=0": ("epochs", "got 0", "at least 1"),
    "gradient_accumulation_steps=0": ("gradient_accumulation_steps", "at least 1"),
    "max_steps=0": ("max_steps", "at least 1"),
    "max_steps_per_epoch=0": ("max_steps_per_epoch", "at least 1"),
    "save_every_n_steps=0": ("save_every_n_steps", "at least 1"),
    "keep_last=0": ("keep_last", "at least 1"),
    "log_every_n_steps=0": ("log_every_n_steps", "at least 1"),
    "num_workers=-1": ("num_workers", "at least 0"),
    "clip_grad_norm=0": ("clip_grad_norm", "greater than 0"),
    "seed=null": ("seed", "got null", "an integer"),
    "seed=-1": ("seed", "at least 0"),
    "optimizer.lr=-1e-4": ("optimizer.lr", "got -0.0001", "at least 0"),
    "optimizer.lr=.nan": ("optimizer.lr", "got nan"),
    "optimizer.lr=.inf": ("optimizer.lr", "got inf"),
    "optimizer.weight_decay=-1": ("optimizer.weight_decay", "at least 0"),
    "lr_scheduler.num_warmup_steps=-1": ("lr_scheduler.num_warmup_steps", "at least 0"),
    "dataset.weight=0": ("dataset.weight", "greater than 0"),
    "dataset.max_packs=0": ("dataset.max_packs", "at least 1"),
    "tokenizer.max_seq_len=0": ("tokenizer.max_seq_len", "at least 1"),
    "checkpointer.model_type=LLAMA": ("checkpointer.model_type", "LLAMA3"),
    "world_size=0": ("world_size", "at least 1"),
    "data_parallel_shard_dim=0": ("data_parallel_shard_dim", "at least 1"),
    "timeout=0.5": ("timeout", "an integer"),
    # between keys
    "fsdp_cpu_offload=True": ("fsdp_cpu_offload", "cpu"),
    "enable_activation_offloading=True": (
        "enable_activation_offloading",
        "enable_activation_checkpointing",
        "cpu",
    ),
    "run_val_every_n_steps=5": ("run_val_every_n_steps", "dataset_val"),
    # supplied by the recipe
    "lr_scheduler.num_training_steps=9": (
        "lr_scheduler.num_training_steps",
        "the recipe supplies it",
    ),
    "optimizer.params=[]": ("optimizer.params", "the recipe supplies it"),
    "dataset.tokenizer=null": ("dataset.tokenizer", "the recipe supplies it"),
    "checkpointer.should_load_recipe_state=True": (
        "checkpointer.should_load_recipe_state",
        "resume_from_checkpoint",
    ),
    "lr_scheduler=torch.optim.lr_scheduler.LinearLR": (
        "lr_scheduler._component_",
        "takes no num_training_steps",
    ),
}


@pytest.mark.parametrize("override", REFUSED)
def test_refused(tree, override):
    key, *words = REFUSED[override]
    if override.startswith("lr_scheduler=torch"):
        tree["lr_scheduler"].pop("num_warmup_steps")
    with pytest.raises(config.ConfigError) as caught:
        load(tree, override)
    texts = [problem.text for problem in caught.value.problems]
    assert {problem.key for problem in caught.value.problems} == {key}
    for word in words:
        assert word in " ".join(texts)


def test_warmup_is_given_once(tree):
    tree["lr_scheduler"] = {
        "_component_": "kasa_tune.components.training.cosine_schedule",
        "warmup_ratio": 0.1,
    }
    load(tree)
    key, text = only_problem(tree, "lr_scheduler.num_warmup_steps=5")
    assert key == "lr_scheduler.warmup_ratio"
    assert "0.1" in text
    assert "5" in text
    assert "between 0 and 1" in only_problem(tree, "lr_scheduler.warmup_ratio=1.5")[1]


def test_offloading_goes_with_checkpointing_on_a_gpu(tree):
    both = ("enable_activation_offloading=True", "enable_activation_checkpointing=True")
    assert "device cpu" in only_problem(tree, *both)[1]
    load(tree, *both, "device=cuda")  # without asking torch
    assert (
        "without enable_activation_checkpointing" in only_problem(tree, both[0], "device=cuda:1")[1]
    )


def test_weights_are_offloaded_from_a_gpu(tree):
    assert "device cpu" in only_problem(tree, "fsdp_cpu_offload=True")[1]
    assert load(tree, "fsdp_cpu_offload=True", "device=cuda").fsdp_cpu_offload is True
    assert load(tree).fsdp_cpu_offload is False


def test_processes_are_described_in_every_finetuning_config(tree, corda_tree, qcorda_tree):
    sizes = {"world_size": 8, "data_parallel_shard_dim": 4, "timeout": 60}
    for each in (tree, corda_tree, qcorda_tree):
        cfg = load(each, *(f"{key}={value}" for key, value in sizes.items()))
        assert {key: cfg[key] for key in sizes} == sizes
        alone = load(each)
        assert {key: alone[key] for key in sizes} == {
            "world_size": None,
            "data_parallel_shard_dim": None,
            "timeout": 600,
        }


def test_everything_wrong_is_said_at_once_and_the_message_names_it(tree):
    wrong = [
        "batch_size=0",
        "modle.rank=4",
        "dtype=fp16",
        "adapter.bta=1",
        "optimizer.lr=-1",
        "tokenizer.path=/none",
    ]
    found = problems(tree, *wrong)
    assert set(found) == {
        "batch_size",
        "modle",
        "dtype",
        "adapter.bta",
        "optimizer.lr",
        "tokenizer.path",
    }
    with pytest.raises(config.ConfigError) as caught:
        load(tree, *wrong)
    message = str(caught.value)
    assert "mine.yaml: 6 problems" in message
    assert all(f"{key}: {text}" in message for key, text in found.items())
    assert isinstance(caught.value, ValueError)


def test_a_misspelt_required_key_is_not_also_missing(tree):
    tree["optimiser"] = tree.pop("optimizer")
    key, text = only_problem(tree)
    assert key == "optimiser"
    assert "optimizer" in text


def test_every_entry_of_a_list_of_datasets_is_checked(tree):
    tree["dataset"] = [
        tree["dataset"] | {"weight": 2},
        tree["dataset"] | {"weight": -1, "sourc": "json"},
    ]
    assert set(problems(tree)) == {"dataset.1.weight", "dataset.1.sourc"}
    assert only_problem(
        tree, "dataset.1.weight=1", "~dataset.1.sourc", "dataset.0=torchtune.datasets.nope"
    )[0] == ("dataset.0._component_")


def test_free_keywords_pass_and_misspelt_ones_do_not(tree):
    tree["dataset"]["source"] = "csv"
    assert load(tree, "dataset.delimiter=;").dataset.delimiter == ";"  # a reader's option
    assert load(tree, "dataset.names=[a,b]").dataset.names == ["a", "b"]
    assert "streaming" in only_problem(tree, "dataset.streamin=True")[1]


def test_torchtunes_own_lora_builders_are_checked_too(tree):
    tree["model"] = {
        "_component_": "torchtune.models.llama3.lora_llama3_8b",
        "lora_attn_modules": ["q_proj"],
        "lora_rank": 0,
        "lora_alpha": 16,
        "rank": 8,
    }
    found = problems(tree)
    assert set(found) == {"model.lora_rank", "model.rank"}
    assert "lora_rank" in found["model.rank"]


# --- CorDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corda_tree(tree) -> dict:
    """The complete config for the CorDA recipe, calibrated on its own dataset."""
    model = tree["model"] | {"_component_": "kasa_tune.components.models.corda_llama3_8b"}
    return tree | {"model": model, "calibration": {"dataset": "${dataset}"}}


CORDA_ADAPTER_KEYS, CALIBRATION_KEYS = (
    list(config.CORDA[name].keys) for name in ("adapter", "calibration")
)


def test_cordas_config_is_finetunings_with_its_own_adapter_and_calibration(corda_tree):
    cfg = load(corda_tree, "seed=5")
    assert list(cfg) == list(config.CORDA)
    others = {key for key, spec in config.CORDA.items() if config.FINETUNE.get(key) is not spec}
    assert others == {"adapter", "calibration"}
    assert list(cfg).index("calibration") == list(cfg).index("adapter") + 1
    assert (cfg.adapter.method, cfg.adapter.mode, cfg.adapter.max_rank) == ("corda", "ipm", None)
    assert cfg.calibration.dataset == corda_tree["dataset"]
    assert cfg.calibration.seed == 5  # follows seed
    assert cfg.calibration.cache_dir == corda_tree["output_dir"] + "/decomposition"


def test_calibration_takes_one_dataset_or_many_its_own_or_anothers(corda_tree):
    many = [corda_tree["dataset"], corda_tree["dataset"] | {"weight": 2}]
    assert load(corda_tree | {"dataset": many}).calibration.dataset == many
    corda_tree["calibration"]["dataset"] = many[1]
    assert load(corda_tree).calibration.dataset == many[1]
    corda_tree["calibration"]["dataset"] = many
    assert load(corda_tree).calibration.dataset == many
    assert (
        only_problem(corda_tree, "calibration.dataset.1.weight=0")[0]
        == "calibration.dataset.1.weight"
    )


def test_a_fault_of_the_dataset_is_said_once(corda_tree):
    for override in (
        "dataset.weight=-1",
        "dataset.splitt=x",
        "dataset.data_files=none",
        "dataset._component_=a.b",
    ):
        assert only_problem(corda_tree, override)[0] == override.partition("=")[0]
    assert only_problem(corda_tree, "~dataset")[0] == "dataset"


CORDA_SETTINGS = ", ".join(dict.fromkeys(method.setting for method in methods_of("corda_finetune")))

# override -> the key it is reported under, and what the message must hold
CORDA_REFUSED = {
    "adapter.method=cordaa": ("adapter.method", f"one of {CORDA_SETTINGS}"),
    "adapter.mode=top": ("adapter.mode", "one of ipm, kpm"),
    "adapter.dtype=fp16": ("adapter.dtype", "gradient scaling"),
    "adapter.split=even": ("adapter.split", "one of balanced, paper"),
    "adapter.covariance_power=-1": ("adapter.covariance_power", "at least 0"),
    "adapter.damping=-1": ("adapter.damping", "at least 0"),
    "adapter.damping_search=1": ("adapter.damping_search", "True or False"),
    "adapter.normalization=none": ("adapter.normalization", "one of unit_mean_diag, published"),
    "adapter.dynamic_ranks=1": ("adapter.dynamic_ranks", "True or False"),
    "adapter.min_rank=-1": ("adapter.min_rank", "at least 0"),
    "adapter.max_rank=0": ("adapter.max_rank", "at least 1"),
    "adapter.lr_ratio=0": ("adapter.lr_ratio", "greater than 0"),
    "adapter.beta=1e-4": ("adapter.beta", "unknown key"),  # KaSA's
    "calibration=3": ("calibration", "got 3", "a mapping with the keys dataset,"),
    "calibration.concatenate=1": ("calibration.concatenate", "True or False"),
    "calibration.num_samples=0": ("calibration.num_samples", "at least 1"),
    "calibration.max_seq_len=0": ("calibration.max_seq_len", "at least 1"),
    "calibration.rounds=0": ("calibration.rounds", "at least 1"),
    "calibration.batch_size=0": ("calibration.batch_size", "at least 1"),
    "calibration.seed=null": ("calibration.seed", "an integer"),
    "calibration.accumulate=bf16": ("calibration.accumulate", "one of fp32, fp64"),
    "calibration.offload=1": ("calibration.offload", "True or False"),
    "calibration.max_selection_dim=0": ("calibration.max_selection_dim", "at least 1"),
    "calibration.cache_dir=/proc/none": ("calibration.cache_dir", "nothing can be written"),
    "calibration.dataset=[]": ("calibration.dataset", "empty list"),
    "calibration.dataset=3": ("calibration.dataset", "got 3", "_component_"),
    "calibration.dataset=kasa_tune.components.data.nope": (
        "calibration.dataset._component_",
        "has no 'nope'",
    ),
    "calibration.dataset={_component_: torchtune.datasets.alpaca_dataset, splitt: a}": (
        "calibration.dataset.splitt",
        "split",
    ),
    "calibration.dataset=${no_such_key}": ("calibration.dataset", "no_such_key"),
    # between keys
    "~calibration.dataset": (
        "calibration.dataset",
        "${dataset} for mode ipm",
        "questions of the knowledge to keep",
    ),
    "calibration.dataset=null": ("calibration.dataset", "adapter.method corda needs it"),
    "model=kasa_tune.components.models.kasa_llama3_8b": (
        "model._component_",
        "kasa_finetune_single_device",
        "corda_llama3_8b",
    ),
    "model=kasa_tune.components.models.lora_llama3_8b": (
        "model._component_",
        "adapter.method corda needs a corda_<model> builder",
    ),
    "adapter.min_rank=9 adapter.max_rank=8": (
        "adapter.min_rank",
        "got 9, which is more than max_rank 8",
    ),
    "adapter.min_rank=9": ("adapter.min_rank", "without dynamic_ranks=True"),
    "adapter.max_rank=9": ("adapter.max_rank", "without dynamic_ranks=True"),
    "adapter.dynamic_ranks=True adapter.min_rank=9": (
        "adapter.min_rank",
        "model.rank 8",
        "at most 8",
    ),
    "adapter.dynamic_ranks=True adapter.max_rank=7": (
        "adapter.max_rank",
        "model.rank 8",
        "at least 8",
    ),
    "adapter.method=pissa calibration.rounds=2": (
        "calibration.rounds",
        "adapter.method pissa",
        "set it to 1",
    ),
    "adapter.method=olora adapter.split=paper ~calibration": (
        "adapter.split",
        "set it to 'balanced'",
    ),
    "adapter.method=eva calibration.rounds=2": ("calibration.rounds", "adapter.method corda, set"),
    "adapter.method=milora adapter.dynamic_ranks=True": (
        "adapter.dynamic_ranks",
        "adapter.method milora",
        "False",
    ),
    "adapter.method=lora adapter.dynamic_ranks=True": (
        "adapter.dynamic_ranks",
        "adapter.method lora",
        "False",
    ),
    "adapter.method=milora model=kasa_tune.components.models.lora_llama3_8b": (
        "model._component_",
        "adapter.method milora needs a corda_<model> builder",
    ),
    "adapter.method=lora model=torchtune.models.llama3.llama3": (
        "model._component_",
        "lora_<model> or corda_<model> builder",
    ),
}


@pytest.mark.parametrize("overrides", CORDA_REFUSED)
def test_refused_of_corda(corda_tree, overrides):
    key, *words = CORDA_REFUSED[overrides]
    given = [overrides] if "{_" in overrides else overrides.split(" ")
    if "torchtune.models" in overrides:
        corda_tree["model"] = {}
        sizes = (
            "vocab_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "embed_dim",
            "max_seq_len",
        )
        given += [f"model.{size}=8" for size in sizes]
    found_key, text = only_problem(corda_tree, *given)
    assert found_key == key
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.mode=kpm"],
        [
            "adapter.dynamic_ranks=True",
            "calibration.rounds=5",
            "adapter.min_rank=8",
            "adapter.max_rank=8",
        ],
        ["adapter.method=pissa", "~calibration"],
        ["adapter.method=milora", "calibration.dataset=null"],
        ["adapter.method=lora", "~calibration"],
        [
            "adapter.method=lora",
            "model=kasa_tune.components.models.lora_llama3_8b",
            "model.use_dora=True",
        ],
        ["calibration.max_selection_dim=4096", "calibration.cache_dir=decomposition"],
    ],
    ids=str,
)
def test_accepted_of_corda(corda_tree, overrides):
    load(corda_tree, *overrides)


def test_cordas_builders_are_the_corda_recipes(tree):
    key, text = only_problem(tree, "model=kasa_tune.components.models.corda_llama3_8b")
    assert key == "model._component_"
    assert "corda_finetune_single_device" in text
    assert "kasa_llama3_8b" in text


def test_generation_takes_the_builders_of_every_method(tree):
    for key in ("optimizer", "lr_scheduler"):
        tree.pop(key)
    tree["adapter"] = {"beta": 0.0}
    for method in ("kasa", "lora", "corda"):
        model = f"model=kasa_tune.components.models.{method}_llama3_8b"
        assert f".{method}_" in load(tree, model, schema=config.GENERATE).model["_component_"]


def test_a_component_inside_a_section_is_overridden_like_one_at_the_top(corda_tree):
    alpaca = (
        "calibration.dataset=torchtune.datasets.alpaca_dataset",
        "calibration.dataset.split=train[:5%]",
    )
    expected = {"_component_": "torchtune.datasets.alpaca_dataset", "split": "train[:5%]"}
    assert load(corda_tree, *alpaca).calibration.dataset == expected
    chat = load(
        corda_tree, *alpaca, "calibration.dataset=torchtune.datasets.alpaca_cleaned_dataset"
    )
    assert chat.calibration.dataset == expected | {
        "_component_": "torchtune.datasets.alpaca_cleaned_dataset"
    }
    assert (
        load(corda_tree, *alpaca, "calibration.dataset=${dataset}").calibration.dataset
        == corda_tree["dataset"]
    )
    corda_tree.pop("calibration")
    assert load(corda_tree, *alpaca, schema=config.CORDA).calibration.dataset == expected


def test_keys_of_anothers_node_are_not_overridden_in_its_copy(corda_tree):
    override = "calibration.dataset.split=test"
    key, text = only_problem(corda_tree, override)
    assert key == override
    assert "calibration.dataset is ${dataset}" in text


def test_calibration_data_is_looked_for(corda_tree):
    corda_tree["calibration"]["dataset"] = dict(corda_tree["dataset"])
    load(corda_tree)
    folder = folder_of(corda_tree)
    key, text = only_problem(corda_tree, f"calibration.dataset.data_files={folder}/row.jsonl")
    assert key == "calibration.dataset.data_files"
    assert "Did you mean rows.jsonl" in text
    corda_tree["calibration"]["dataset"] = [
        corda_tree["dataset"],
        corda_tree["dataset"] | {"data_files": "none"},
    ]
    assert only_problem(corda_tree)[0] == "calibration.dataset.1.data_files"


@pytest.mark.parametrize(
    "ending", ["corda", "corda_kpm", "pissa", "milora", "dora", "lora_plus", "x"]
)
def test_cordas_schema_follows_from_the_name_or_the_keys(corda_tree, tmp_path, ending):
    config.validate_file(write(corda_tree, tmp_path, f"tiny_{ending}.yaml"))
    only_adapter = {key: value for key, value in corda_tree.items() if key != "calibration"}
    path = write(only_adapter | {"adapter": {"method": "pissa"}}, tmp_path, f"tiny_{ending}.yaml")
    config.validate_file(path)


def test_a_name_that_tells_the_recipe_is_believed(corda_tree, tmp_path):
    with pytest.raises(config.ConfigError, match="calibration: unknown key"):
        config.validate_file(write(corda_tree, tmp_path, "tiny_kasa.yaml"))


def test_generations_schema_follows_from_its_keys(tree, tmp_path):
    for key in ("dataset", "optimizer", "lr_scheduler"):
        tree.pop(key)
    config.validate_file(write(tree | {"prompts": ["a name"]}, tmp_path))


# --- QCorDA -----------------------------------------------------------------------------------------------------------

BUILDERS = "model=kasa_tune.components.models."
QCORDA_METHODS = {
    method.setting: method.builders[0] for method in methods_of("qcorda_finetune_single_device")
}


QCORDA_ADAPTER_KEYS, QUANTIZATION_KEYS = (
    list(config.QCORDA[name].keys) for name in ("adapter", "quantization")
)


@pytest.fixture
def qcorda_tree(corda_tree) -> dict:
    """The complete config for the QCorDA recipe."""
    return corda_tree | {"quantization": {"block_size": 64}}


def test_qcordas_config_is_cordas_with_its_own_adapter_and_quantization(qcorda_tree):
    cfg = load(qcorda_tree, "seed=5")
    assert list(cfg) == list(config.QCORDA)
    others = {key for key, spec in config.QCORDA.items() if config.CORDA.get(key) is not spec}
    assert others == {"adapter", "quantization"}
    place = list(cfg).index("adapter")
    assert list(cfg)[place : place + 3] == ["adapter", "quantization", "calibration"]
    assert cfg.quantization == {"block_size": 64, "scaler_block_size": 256}
    assert (cfg.adapter.method, cfg.adapter.dtype, cfg.adapter.quantization_iterations) == (
        "qcorda",
        "fp32",
        None,
    )
    assert cfg.calibration.dataset == qcorda_tree["dataset"]
    assert cfg.calibration.seed == 5  # follows seed


def test_qcordas_adapter_has_what_cordas_and_kasas_have():
    of_qcorda, of_corda, of_kasa = (
        s["adapter"].keys for s in (config.QCORDA, config.CORDA, config.FINETUNE)
    )
    assert {*of_qcorda} == ({*of_corda} | {*of_kasa} | {"quantization_iterations"}) - {"mode"}
    theirs = of_corda | of_kasa
    assert all(
        of_qcorda[key] == theirs[key] for key in of_qcorda.keys() & theirs.keys() - {"method"}
    )


# override -> the key it is reported under, and what the message must hold
QCORDA_REFUSED = {
    "adapter.method=qcordaa": ("adapter.method", "one of qcorda, qpissa, loftq, qlora, qkasa"),
    "adapter.method=corda": ("adapter.method", "a method of corda_finetune_single_device"),
    "adapter.method=kasa": ("adapter.method", "a method of kasa_finetune_single_device"),
    "adapter.mode=ipm": ("adapter.mode", "unknown key", "a key of corda_finetune_single_device"),
    "adapter.dtype=fp16": ("adapter.dtype", "bf16 or fp32", "gradient scaling"),
    "adapter.quantization_iterations=0": (
        "adapter.quantization_iterations",
        "an integer or null, at least 1",
    ),
    "adapter.gamma=-1": ("adapter.gamma", "at least 0"),
    "quantization=4": ("quantization", "got 4", "the keys block_size, scaler_block_size"),
    "quantization.bits=8": ("quantization.bits", "unknown key", "block_size"),
    "quantization.block_size=0": ("quantization.block_size", "got 0", "even and at least 2"),
    "quantization.block_size=63": ("quantization.block_size", "got 63", "even and at least 2"),
    "quantization.block_size=64.0": ("quantization.block_size", "an integer"),
    "quantization.scaler_block_size=0": ("quantization.scaler_block_size", "at least 1"),
    # between keys
    "~calibration.dataset": (
        "calibration.dataset",
        "adapter.method qcorda needs it",
        "set it to ${dataset}, the new",
    ),
    "calibration.dataset=null": ("calibration.dataset", "adapter.method qcorda needs it"),
    BUILDERS + "lora_llama3_8b": (
        "model._component_",
        "adapter.method qcorda needs a corda_<model> builder; use corda_llama3_8b, or adapter.method=qlora",
    ),
    BUILDERS + "kasa_llama3_8b": (
        "model._component_",
        "adapter.method qcorda needs a corda_<model> builder; use corda_llama3_8b, or adapter.method=qkasa",
    ),
    "adapter.method=qpissa " + BUILDERS + "kasa_llama3_8b": (
        "model._component_",
        "use corda_llama3_8b",
    ),
    "adapter.method=loftq " + BUILDERS + "lora_llama3_8b": (
        "model._component_",
        "use corda_llama3_8b",
    ),
    "adapter.method=qlora " + BUILDERS + "kasa_llama3_8b": (
        "model._component_",
        "needs a lora_<model> or corda_<model> builder; use lora_llama3_8b or corda_llama3_8b, or adapter.method=qkasa",
    ),
    "adapter.method=qkasa": (
        "model._component_",
        "adapter.method qkasa needs a kasa_<model> builder; use kasa_llama3_8b, or adapter.method=qcorda",
    ),
    "adapter.method=qkasa model=torchtune.models.llama3.llama3_8b ~model.attn_modules ~model.rank ~model.alpha": (
        "model._component_",
        "needs a kasa_<model> builder; use one",
    ),
    "adapter.method=qkasa model.edit_storage=folded " + BUILDERS + "kasa_llama3_8b": (
        "model.edit_storage",
        "got 'folded' with adapter.method qkasa",
        "set auto or factored",
    ),
    "model.edit_storage=factored": (
        "model.edit_storage",
        "'factored' with adapter.method qcorda",
        "auto or folded",
    ),
    "adapter.method=qpissa model.edit_storage=factored": (
        "model.edit_storage",
        "qpissa",
        "set auto or folded",
    ),
    "adapter.method=loftq model.edit_storage=factored": (
        "model.edit_storage",
        "loftq",
        "set auto or folded",
    ),
    "adapter.method=qlora model.use_dora=True " + BUILDERS + "lora_llama3_8b": (
        "model.use_dora",
        "rows that are quantized",
        "set it to False, or train with corda_finetune_single_device",
    ),
    "model.apply_to_output=True": (
        "model.apply_to_output",
        "keeps its precision",
        "set it to False",
    ),
    "adapter.quantization_iterations=5": (
        "adapter.quantization_iterations",
        "got 5 with adapter.method qcorda; it belongs to adapter.method qpissa or loftq, set it to null",
    ),
    "adapter.method=qlora adapter.quantization_iterations=1": (
        "adapter.quantization_iterations",
        "set it to null",
    ),
    "adapter.method=qpissa adapter.dynamic_ranks=True": (
        "adapter.dynamic_ranks",
        "got True with adapter.method qpissa; it belongs to adapter.method qcorda, set it to False",
    ),
    "adapter.method=loftq calibration.rounds=5": (
        "calibration.rounds",
        "adapter.method qcorda, set it to 1",
    ),
    "adapter.method=qlora adapter.dynamic_ranks=True": (
        "adapter.dynamic_ranks",
        "qlora",
        "set it to False",
    ),
    "adapter.method=qkasa calibration.rounds=2 " + BUILDERS + "kasa_llama3_8b": (
        "calibration.rounds",
        "set it to 1",
    ),
    "adapter.max_rank=9": ("adapter.max_rank", "without dynamic_ranks=True"),
    "adapter.dynamic_ranks=True adapter.min_rank=9": (
        "adapter.min_rank",
        "model.rank 8",
        "at most 8",
    ),
    "adapter.lr_ratio=2 ~optimizer.lr": ("adapter.lr_ratio", "without optimizer.lr"),
}


@pytest.mark.parametrize("overrides", QCORDA_REFUSED)
def test_refused_of_qcorda(qcorda_tree, overrides):
    key, *words = QCORDA_REFUSED[overrides]
    found_key, text = only_problem(qcorda_tree, *overrides.split(" "))
    assert found_key == key
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "adapter.dynamic_ranks=True",
            "calibration.rounds=5",
            "adapter.min_rank=8",
            "adapter.max_rank=8",
        ],
        [
            "model.edit_storage=folded",
            "quantization.block_size=32",
            "quantization.scaler_block_size=1",
        ],
        ["adapter.method=qpissa", "~calibration"],
        ["adapter.method=qpissa", "adapter.quantization_iterations=5", "model.edit_storage=auto"],
        ["adapter.method=loftq", "calibration.dataset=null", "adapter.quantization_iterations=1"],
        ["adapter.method=qlora", "~calibration"],
        [
            "adapter.method=qlora",
            BUILDERS + "lora_llama3_8b",
            "model.use_dora=False",
            "adapter.lr_ratio=16",
        ],
        [
            "adapter.method=qkasa",
            BUILDERS + "kasa_llama3_8b",
            "adapter.beta=0",
            "model.edit_storage=factored",
        ],
        ["adapter.method=qkasa", BUILDERS + "kasa_llama3_8b", "~calibration"],
    ],
    ids=str,
)
def test_accepted_of_qcorda(qcorda_tree, overrides):
    load(qcorda_tree, *overrides)


@pytest.mark.parametrize("method", QCORDA_METHODS)
def test_a_quantized_method_in_another_recipe_is_answered_with_the_right_one(
    tree, corda_tree, method
):
    for schema, plain in ((config.FINETUNE, tree), (config.CORDA, corda_tree)):
        key, text = only_problem(plain, f"adapter.method={method}", schema=schema)
        assert key == "adapter.method"
        assert "qcorda_finetune_single_device" in text
        assert " corda_finetune_single_device" not in text


def test_a_key_of_another_recipe_is_answered_with_the_recipes_that_have_it(tree, corda_tree):
    key, text = only_problem(corda_tree, "quantization.block_size=64", schema=config.CORDA)
    assert (key, "It is a key of qcorda_finetune_single_device." in text) == ("quantization", True)
    assert (
        "It is a key of generate_text."
        in only_problem(tree, "prompts=[a]", schema=config.FINETUNE)[1]
    )
    assert (
        "Did you mean beta?" in only_problem(tree, "adapter.betta=1", schema=config.FINETUNE)[1]
    )  # nobody's


@pytest.mark.parametrize(
    ("name", "schema", "belongs", "named"),
    [
        ("tiny_corda", config.FINETUNE, "corda_finetune_single_device (or _distributed)", "kasa_"),
        ("tiny_kasa", config.CORDA, "kasa_finetune_single_device (or _distributed)", "corda_"),
        ("tiny_kasa_generate", config.FINETUNE, "generate_text", "kasa_"),
        ("tiny_kasa", config.EXPORT, "kasa_finetune_single_device (or _distributed)", "export_"),
    ],
)
def test_a_config_of_another_recipe_is_one_sentence(name, schema, belongs, named):
    with pytest.raises(config.ConfigError) as error:
        config.load(name, schema=schema)
    (problem,) = error.value.problems
    assert problem.text.startswith(f"this is a config of {belongs}, and {named}")


@pytest.mark.parametrize("ending", ["kasa", "corda", "qcorda", "qlora", "x"])
@pytest.mark.parametrize("method", QCORDA_METHODS)
def test_a_quantized_method_tells_the_schema_whatever_the_name(
    qcorda_tree, tmp_path, method, ending
):
    tree = {key: value for key, value in qcorda_tree.items() if key != "quantization"} | {
        "adapter": {"method": method}
    }
    path = write(tree, tmp_path, f"tiny_{ending}.yaml")
    cfg = config.load(path, [f"{BUILDERS}{QCORDA_METHODS[method]}_llama3_8b"])
    assert list(cfg) == list(config.QCORDA)


@pytest.mark.parametrize("ending", QCORDA_METHODS)
def test_qcordas_schema_follows_from_the_name(qcorda_tree, tmp_path, ending):
    tree = {key: value for key, value in qcorda_tree.items() if key != "quantization"}
    assert "quantization" in config.load(write(tree, tmp_path, f"tiny_{ending}.yaml"))


def test_qcordas_schema_follows_from_the_key_quantization(qcorda_tree, tmp_path):
    assert list(config.load(write(qcorda_tree, tmp_path, "x.yaml"))) == list(config.QCORDA)
    with pytest.raises(
        config.ConfigError, match=r"quantization: unknown key.*qcorda_finetune_single_device"
    ):
        config.load(
            write(qcorda_tree, tmp_path, "tiny_corda.yaml")
        )  # a name that tells the recipe is believed


def test_a_method_that_is_none_does_not_hide_the_recipe_that_the_name_tells(qcorda_tree, tmp_path):
    path = write(qcorda_tree | {"adapter": {"method": "qcordaa"}}, tmp_path, "tiny_qcorda.yaml")
    with pytest.raises(config.ConfigError, match=r"1 problem\n.*one of qcorda, qpissa"):
        config.load(path)


def test_the_config_that_a_run_leaves_is_read_as_the_recipes_own(qcorda_tree, tmp_path):
    """What `@config.parse(None)` takes: no name to tell, all keys filled in."""
    cfg = load(qcorda_tree, "adapter.method=loftq")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    assert config.load(tmp_path / "config.yaml") == cfg


# --- files ------------------------------------------------------------------------------------------------------------


def test_missing_files_are_named_with_the_nearest_in_the_folder(tree):
    folder = folder_of(tree)
    key, text = only_problem(tree, f"tokenizer.path={folder}/model/tokeniser.model")
    assert key == "tokenizer.path"
    assert "Did you mean tokenizer.model" in text
    key, text = only_problem(tree, f"checkpointer.checkpoint_dir={folder}/modle")
    assert key == "checkpointer.checkpoint_dir"
    assert "tune download" in text
    assert "Did you mean model" in text
    assert "is a file" in only_problem(tree, f"checkpointer.checkpoint_dir={folder}/rows.jsonl")[1]
    key, text = only_problem(tree, f"dataset.data_files={folder}/row.jsonl")
    assert key == "dataset.data_files"
    assert "Did you mean rows.jsonl" in text
    load(tree, f"dataset.data_files={folder}/row.jsonl", check_files=False)


@pytest.mark.parametrize(
    ("old", "new"),
    [("datasets.alpaca_dataset", "data"), ("losses.ChunkedCrossEntropy", "training")],
)
def test_a_component_that_has_moved_is_told_with_its_new_path(tree, old, new):
    key = "dataset" if new == "data" else "loss"
    name = old.rpartition(".")[2]
    told = only_problem(tree, f"{key}={{_component_: kasa_tune.components.{old}}}")
    assert told[0] == f"{key}._component_"
    assert f"It is now kasa_tune.components.{new}.{name}" in told[1]


def test_what_may_be_resumed_from_is_told(tree):
    key, text = only_problem(tree, "resume_from_checkpoint=restrat")
    assert key == "resume_from_checkpoint"
    assert "may be True, False, restart or the folder of a run" in text


def test_an_optimizer_that_needs_a_closure_is_told_with_all_other_problems(tree):
    _, text = only_problem(tree, "optimizer={_component_: torch.optim.LBFGS, lr: 0.1}")
    assert "needs a closure" in text


@pytest.mark.parametrize("as_list", [True, False])
def test_each_checkpoint_file_must_be_there(tree, as_list):
    if not as_list:
        tree["checkpointer"]["checkpoint_files"] = {
            "filename_format": "model-{}-of-{}.safetensors",
            "max_filename": "00003",
        }
    load(tree)
    Path(tree["checkpointer"]["checkpoint_dir"], SHARDS[1]).unlink()
    key, text = only_problem(tree)
    assert key == "checkpointer.checkpoint_files"
    assert SHARDS[1] in text
    assert "does not exist" in text


def test_the_form_of_checkpoint_files(tree):
    tree["checkpointer"]["checkpoint_files"] = {
        "filename_format": "model-{}-of-{}.safetensors",
        "max_filename": "00003",
    }
    assert (
        load(tree, "checkpointer.checkpoint_files.max_filename=00003").checkpointer.checkpoint_files
        == (tree["checkpointer"]["checkpoint_files"])
    )
    prefix = "checkpointer.checkpoint_files"
    assert "5000 of 5000 files" in only_problem(tree, f"{prefix}.max_filename=05000")[1]
    assert "digits" in problems(tree, f"{prefix}.max_filename=3")[f"{prefix}.max_filename"]
    assert (
        "braces"
        in problems(tree, f"{prefix}.filename_format=m-{{}}.pt")[f"{prefix}.filename_format"]
    )
    assert "filename_format and max_filename" in problems(tree, f"~{prefix}.max_filename")[prefix]
    assert "empty list" in problems(tree, f"{prefix}=[]")[prefix]


def test_huggingface_checkpoints_need_their_config(tree):
    Path(tree["checkpointer"]["checkpoint_dir"], "config.json").unlink()
    assert "config.json" in only_problem(tree)[1]


def test_a_dry_run_needs_no_weights(tree):
    load(tree, "checkpointer.checkpoint_dir=/not/downloaded/yet", "dry_run=True")
    assert (
        only_problem(tree, "checkpointer.checkpoint_dir=/not/downloaded/yet")[0]
        == "checkpointer.checkpoint_dir"
    )


def test_data_files_may_be_patterns_lists_mappings_addresses_or_on_the_hub(tree):
    folder = folder_of(tree)
    for good in (f"{folder}/*.jsonl", "https://a.b/c.json", f"[{folder}/rows.jsonl, hf://x/y]"):
        load(tree, f"dataset.data_files={good}")
    load(tree, "dataset.source=tatsu-lab/alpaca", "dataset.data_files=data/part.parquet")
    for bad in (
        f"{folder}/*.csv",
        f"[{folder}/rows.jsonl, {folder}/no]",
        f"{{train: [{folder}/no]}}",
    ):
        assert only_problem(tree, f"dataset.data_files={bad}")[0] == "dataset.data_files"
    assert only_problem(tree, "dataset.source=./none", "~dataset.data_files")[0] == "dataset.source"
    ours = ("dataset=kasa_tune.components.data.alpaca_dataset", "~dataset.source")
    load(tree, *ours)
    assert only_problem(tree, *ours, "dataset.data_files=none.json")[0] == "dataset.data_files"


def test_what_to_resume_must_be_there(tree):
    load(tree, "resume_from_checkpoint=True")
    load(tree, f"resume_from_checkpoint={folder_of(tree)}/model")
    assert "does not exist" in only_problem(tree, "resume_from_checkpoint=/no/checkpoint")[1]


def test_the_output_folder_must_be_writable(tree):
    folder = folder_of(tree)
    (folder / "file").touch()
    for bad in (folder / "file" / "out", "/proc/out", folder / ("x" * 300) / "out"):
        found = problems(tree, f"output_dir={bad}")
        assert "nothing can be written" in found["output_dir"]
        assert str(bad)[:60] in found["output_dir"]
    load(tree, f"output_dir={folder}/new/and/deep")
    assert not (folder / "new").exists()  # looking leaves nothing behind


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_not_writable(tree):
    closed = folder_of(tree) / "closed"
    closed.mkdir(mode=0o500)
    assert str(closed) in only_problem(tree, f"output_dir={closed}/out")[1]


def test_results_do_not_go_among_the_base_models_files(tree):
    model = tree["checkpointer"]["checkpoint_dir"]
    for bad in (model, f"{model}/out", f"{model}/../model/out"):
        key, text = only_problem(tree, f"output_dir={bad}")
        assert key == "output_dir"
        assert "choose a folder outside" in text
    assert only_problem(tree, f"checkpointer.output_dir={model}")[0] == "checkpointer.output_dir"
    load(tree, f"output_dir={model}_out")


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "expected a mapping"),
        ("just words\n", "expected a mapping"),
        ("a: [1, 2\nb: 3\n", "not valid YAML, line"),
        ("seed: 1\nmodel: {a: 1}\nseed: 2\n", "line 3, column 1: the key 'seed' is there twice"),
        ("model:\n  rank: 1\n  rank: 2\n", "line 3, column 3: the key 'rank' is there twice"),
        ("[a, b]: 1\n", "a key must be a name"),
        ("a: !!python/object:os.system {}\n", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError) as caught:
        config.validate_file(path)
    assert "broken.yaml: 1 problem" in str(caught.value)
    assert words.replace("not valid YAML, ", "not valid YAML: ") in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(config.ConfigError, match="not valid YAML"):
        config.validate_file(path)


def test_an_unknown_config_is_answered_with_the_nearest_names(tmp_path):
    with pytest.raises(config.ConfigError, match="No config named"):
        config.validate_file(tmp_path / "none.yaml")
    shipped = sorted((ROOT / "configs").glob("*.yaml"))
    name = shipped[0].stem
    with pytest.raises(config.ConfigError, match=f"Did you mean .*{name}"):
        config.validate_file(name + "x")


def test_merge_keys_and_anchors(tree):
    text = write(tree, folder_of(tree)).read_text() + "dataset_val:\n  <<: *data\n  split: test\n"
    path = folder_of(tree) / "anchors.yaml"
    path.write_text(text.replace("dataset:\n", "dataset: &data\n"))
    assert config.load(path).dataset_val == tree["dataset"] | {"split": "test"}


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_set_replace_and_remove(tree):
    cfg = load(
        tree,
        "optimizer=torch.optim.SGD",  # another component keeps the other keys
        "model.rank=4",
        "adapter.beta=0",  # a section that the file does not have
        "dataset_val=torchtune.datasets.alpaca_dataset",
        "dataset_val.split=train[:5%]",
        "lr_scheduler=null",
        "~model.alpha",
        "clip_grad_norm=None",
        "seed=7",
        "seed=8",
    )
    assert cfg.optimizer == {"_component_": "torch.optim.SGD", "lr": 2e-4}
    assert (cfg.model.rank, "alpha" in cfg.model, cfg.adapter.beta) == (4, False, 0)
    assert cfg.dataset_val == {
        "_component_": "torchtune.datasets.alpaca_dataset",
        "split": "train[:5%]",
    }
    assert (cfg.lr_scheduler, cfg.clip_grad_norm, cfg.seed) == (None, None, 8)


def test_entries_of_a_list_are_overridden_by_their_place(tree):
    tree["dataset"] = [tree["dataset"], dict(tree["dataset"])]
    chat = ("dataset.1=torchtune.datasets.chat_dataset", "dataset.1.conversation_column=c")
    cfg = load(tree, "dataset.0.weight=2", *chat, "dataset.1.conversation_style=openai")
    assert cfg.dataset[0].weight == 2.0
    assert cfg.dataset[1]["_component_"] == "torchtune.datasets.chat_dataset"
    assert cfg.dataset[1].source == "json"
    assert len(load(tree, "~dataset.1").dataset) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed=", "no value given"),
        ("dataset=[a, b", "not valid YAML"),
        ("~sed", "there is no sed. Did you mean seed?"),
        ("~model.rnk", "there is no model.rnk. Did you mean rank?"),
        ("~nothing.at.all", "there is no nothing."),
        ("seed.x=1", "seed is 1, which has no keys"),
        ("dataset.0.weight=1", "dataset is one component, not a list; leave out .0"),
        ("checkpointer.checkpoint_files.7=x", "checkpointer.checkpoint_files.2"),
        ("checkpointer.checkpoint_files.a=x", "is a list with the entries"),
    ],
)
def test_overrides_that_cannot_be_applied(tree, override, words):
    key, text = only_problem(tree | {"seed": 1}, override)
    assert key == override
    assert words in text


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], max_codepoint=0xD7FF)))
def test_any_value_can_be_given_on_the_command_line(text):
    tree = {}
    reading.override(tree, f"note={json.dumps(text, ensure_ascii=False)}", {})
    assert tree == {"note": text}


@given(st.from_regex(r"[a-zA-Z/_]+(=[a-zA-Z0-9=_.,/+-]*)+", fullmatch=True))
def test_values_with_equals_signs_need_no_quotes(text):
    tree = {}
    reading.override(tree, f"a.b={text}", {})
    assert tree == {"a": {"b": text}}


# --- interpolations ---------------------------------------------------------------------------------------------------


def test_a_missing_environment_variable_is_named(tree):
    found = problems(
        tree, "output_dir=${oc.env:NO_SUCH_VARIABLE}/out", "tokenizer.path=${oc.env:NOR_THIS}"
    )
    assert "Environment variable 'NO_SUCH_VARIABLE' not found" in found["output_dir"]
    assert "'NOR_THIS' not found" in found["tokenizer.path"]


@pytest.mark.parametrize(
    "value", ["${no_such_key}", "${no.such.key}", "${output_dir}", "'${unclosed'", "'${nothing:3}'"]
)
def test_interpolations_that_lead_nowhere(tree, value):
    assert "output_dir" in problems(tree, f"output_dir={value}")


# --- typos ------------------------------------------------------------------------------------------------------------


def typos(keys: list[str]) -> st.SearchStrategy[tuple[str, str]]:
    """A key and the key with one character missing, added or changed."""

    def edit(key: str, place: int, character: str, kind: str) -> tuple[str, str]:
        place %= len(key)
        return key, key[:place] + ("" if kind == "drop" else character) + key[
            place + (kind != "add") :
        ]

    letters = st.sampled_from(string.ascii_lowercase + "_")
    return st.builds(
        edit,
        st.sampled_from(keys),
        st.integers(0, 99),
        letters,
        st.sampled_from(["drop", "add", "change"]),
    )


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory) -> dict:
    return complete(tmp_path_factory.mktemp("typos"))


ADAPTER_KEYS = list(config.FINETUNE["adapter"].keys)
MODEL_KEYS = ["attn_modules", "apply_to_mlp", "apply_to_output", "rank", "alpha", "dropout"]
MODEL_KEYS += ["truncation_rank", "truncation", "diag_init", "edit_storage"]


def _assert_caught(tree: dict, section: str, keys: list[str], key: str, typo: str) -> None:
    assume(typo and typo != key and typo not in keys)
    where = f"{section}{typo}"
    with pytest.raises(config.ConfigError) as caught:
        load(tree, f"{where}=1", check_files=False)
    texts = [problem.text for problem in caught.value.problems if problem.key == where]
    assert len(texts) == 1
    assert key in texts[0].split("Did you mean ")[1].rstrip("?").split(", ")


@settings(max_examples=60, deadline=None)
@given(typo=typos(list(config.FINETUNE)))
def test_any_one_character_typo_at_the_top_is_caught(shared_tree, typo):
    _assert_caught(shared_tree, "", list(config.FINETUNE), *typo)


@settings(max_examples=40, deadline=None)
@given(typo=typos(ADAPTER_KEYS))
def test_any_one_character_typo_in_a_section_is_caught(shared_tree, typo):
    _assert_caught(shared_tree, "adapter.", ADAPTER_KEYS, *typo)


@settings(max_examples=60, deadline=None)
@given(typo=typos(CORDA_ADAPTER_KEYS + CALIBRATION_KEYS))
def test_any_one_character_typo_in_cordas_sections_is_caught(shared_tree, typo):
    model = shared_tree["model"] | {"_component_": "kasa_tune.components.models.corda_llama3_8b"}
    tree = shared_tree | {"model": model, "calibration": {"dataset": "${dataset}"}}
    of_adapter = typo[0] in CORDA_ADAPTER_KEYS
    section, keys = (
        ("adapter.", CORDA_ADAPTER_KEYS) if of_adapter else ("calibration.", CALIBRATION_KEYS)
    )
    _assert_caught(tree, section, keys, *typo)


@settings(max_examples=60, deadline=None)
@given(typo=typos(QCORDA_ADAPTER_KEYS + QUANTIZATION_KEYS))
def test_any_one_character_typo_in_qcordas_sections_is_caught(shared_tree, typo):
    model = shared_tree["model"] | {"_component_": "kasa_tune.components.models.corda_llama3_8b"}
    tree = shared_tree | {
        "model": model,
        "quantization": {},
        "calibration": {"dataset": "${dataset}"},
    }
    of_adapter = typo[0] in QCORDA_ADAPTER_KEYS
    section, keys = (
        ("adapter.", QCORDA_ADAPTER_KEYS) if of_adapter else ("quantization.", QUANTIZATION_KEYS)
    )
    _assert_caught(tree, section, keys, *typo)


@settings(max_examples=40, deadline=None)
@given(typo=typos(MODEL_KEYS))
def test_any_one_character_typo_in_a_component_is_caught(shared_tree, typo):
    _assert_caught(shared_tree, "model.", MODEL_KEYS, *typo)


@settings(max_examples=40, deadline=None)
@given(
    typo=typos(
        [
            "source",
            "split",
            "data_files",
            "train_on_input",
            "column_map",
            "packed",
            "weight",
            "name",
        ]
    )
)
def test_any_one_character_typo_is_caught_where_free_keywords_are_allowed(shared_tree, typo):
    assume(typo[1] != "names")  # a csv reader's
    _assert_caught(shared_tree, "dataset.", ["source", "split", "name"], *typo)


# --- parse ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tree, monkeypatch):
    """Call a recipe's main function with a command line; `{config}` in it stands for the config's path."""

    def call(*arguments: str, schema=config.FINETUNE):
        @config.parse(schema)
        def recipe_main(cfg):
            """What the recipe does."""
            return cfg

        path = str(write(tree, folder_of(tree)))
        monkeypatch.setattr(
            sys, "argv", ["my_recipe.py", *(a.replace("{config}", path) for a in arguments)]
        )
        return recipe_main()

    return call


@pytest.mark.parametrize("arguments", [("--config", "{config}"), ("--config={config}",)])
def test_parse_hands_the_config_over_and_the_result_back(run, arguments):
    cfg = run(
        *arguments, "seed=3", "my_key=a=b", schema=config.FINETUNE | {"my_key": config.Key(str)}
    )
    assert (cfg.seed, cfg.my_key) == (3, "a=b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--config", "{config}", "batch_size=0"),
            "batch_size: got 0; expected an integer, at least 1",
        ),
        (("--config", "{config}", "--seed", "3"), "--seed: unknown option"),
        (("--config",), "--config: missing"),
        (("seed=3",), "--config: missing"),
        (("--config", "no_such_config"), "No config named 'no_such_config'"),
    ],
)
def test_parse_explains_and_exits(run, capsys, arguments, words):
    with pytest.raises(SystemExit) as exited:
        run(*arguments)
    assert exited.value.code == 2
    assert words in capsys.readouterr().err


def test_of_many_processes_the_first_explains(run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        run("--config", "{config}", "batch_size=0")
    assert capsys.readouterr().err == ""


def test_parse_asks_torch_for_the_device(run, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run("--config", "{config}", "device=cuda")
    assert "device: got 'cuda', but torch sees no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run("--config", "{config}", "device=cuda").device == "cuda"


def test_help_lists_every_key(run, capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}:" in shown for key in (*config.FINETUNE, *ADAPTER_KEYS))
    assert "keep_last: an integer, at least 1 (default 2)" in shown


def test_help_lists_the_components_of_sections(run, capsys):
    assert run("--help", schema=config.CORDA) == 0
    shown = capsys.readouterr().out
    assert "    dataset: a component or a list of them (default null); " in shown
    assert all(f"    {key}:" in shown for key in (*CORDA_ADAPTER_KEYS, *CALIBRATION_KEYS))
    assert run("--help", schema=config.QCORDA) == 0
    shown = capsys.readouterr().out
    assert "    method: one of qcorda, qpissa, loftq, qlora, qkasa (default qcorda); " in shown
    assert all(
        f"    {key}:" in shown
        for key in (*QCORDA_ADAPTER_KEYS, *QUANTIZATION_KEYS, *CALIBRATION_KEYS)
    )


def test_parse_for_every_recipes_configs(run, corda_tree, tmp_path, capsys):
    path = write(corda_tree, tmp_path, "theirs.yaml")
    assert run("--config", str(path), "adapter.mode=kpm", schema=None).adapter.mode == "kpm"
    path = write(corda_tree | {"adapter": {"method": "qpissa"}}, tmp_path, "theirs.yaml")
    assert (
        run(
            "--config", str(path), "quantization.block_size=32", schema=None
        ).quantization.block_size
        == 32
    )
    assert run("--config", "{config}", "adapter.beta=0.5", schema=None).adapter.beta == 0.5
    assert run("--help", schema=None) == 0
    assert "  output_dir:" in capsys.readouterr().out


def test_parse_without_a_schema_says_how_to_write_it():
    with pytest.raises(TypeError, match=r"config.parse\(config.FINETUNE\)"):
        config.parse(lambda cfg: 0)


RECIPE = """
import sys
from kasa_tune import config

@config.parse(config.FINETUNE)
def recipe_main(cfg):
    print(cfg.output_dir, "torch" in sys.modules)
    return 3

if __name__ == "__main__":
    sys.exit(recipe_main())
"""


def run_python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip


def test_a_script_of_ones_own_runs_and_fails_without_a_traceback(tree, tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    write(tree, tmp_path)
    done = run_python(
        "mine.py", "--config", "mine.yaml", f"output_dir={tmp_path}/a=b", cwd=tmp_path
    )
    assert (done.returncode, done.stdout.split()) == (3, [f"{tmp_path}/a=b", "False"])
    failed = run_python("mine.py", "--config", "mine.yaml", "model.rank=0", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert "model.rank: got 0" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_validation_imports_no_torch(tree, tmp_path):
    write(tree, tmp_path)
    code = "import sys; from kasa_tune import config; config.validate_file('mine.yaml')"
    done = run_python(
        "-c",
        f"{code}; print([m for m in ('torch', 'torchtune', 'datasets') if m in sys.modules])",
        cwd=tmp_path,
    )
    assert done.stdout == "[]\n", done.stderr


# --- components that source does not tell about -----------------------------------------------------------------------


def test_computed_components_are_imported_before_a_run_and_left_alone_else(
    tree, tmp_path, monkeypatch
):
    source = "def make():\n    def build(params, lr: float):\n        return lr\n    return build\n\n\nbuild = make()\n"
    (tmp_path / "computed_optimizer.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    tree["optimizer"] = {"_component_": "computed_optimizer.build", "lr": 1e-3, "momentum": 0.9}
    load(tree)
    assert problems(tree, "optimizer.lr=-1")[
        "optimizer.lr"
    ]  # what the schema says of lr holds all the same
    assert only_problem(tree, about_to_run=True)[0] == "optimizer.momentum"
    load(tree, "~optimizer.momentum", about_to_run=True)
    assert (
        "cannot be used"
        in only_problem(tree, "optimizer=computed_optimizer.make.x", about_to_run=True)[1]
    )
    (tmp_path / "raising_optimizer.py").write_text("build = 1 / 0\n")
    key, text = only_problem(tree, "optimizer=raising_optimizer.build", about_to_run=True)
    assert key == "optimizer._component_"
    assert "ZeroDivisionError" in text


def test_instantiate_builds_what_a_node_describes():
    from omegaconf import OmegaConf

    node = OmegaConf.create({"_component_": "fractions.Fraction", "numerator": 1, "denominator": 2})
    assert config.instantiate(node) == 0.5
    assert config.instantiate(None) is None


def test_checks_say_what_they_allow():
    even = Check("even", lambda value: value % 2 == 0)
    assert config.Key(int, check=even).accept(2) == 2
    with pytest.raises(ValueError, match="an integer, even"):
        config.Key(int, check=even).accept(3)
    assert config.Key(int, default=None).accept(None) is None
    assert config.Key(list[str]).accept(["a"]) == ["a"]
    with pytest.raises(ValueError, match="a list, each a string"):
        config.Key(list[str]).accept(["a", 1])
