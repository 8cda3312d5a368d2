"""Values that no run can use: each is refused while the config is read, in a short sentence that names its key."""

import json
import time
from pathlib import Path

import pytest

from kasa_tune import config
from tests.config_trees import (
    LLAMA3_8B,
    SHARDS,
    complete,
    folder_of,
    load,
    only_problem,
    problems,
    write,
)

TINY = "tiny_kasa"


@pytest.fixture
def tree(tmp_path: Path) -> dict:
    return complete(tmp_path)


def refused(name: str, *overrides: str) -> dict[str, str]:
    """The problems of a shipped config with overrides, by key."""
    with pytest.raises(config.ConfigError) as caught:
        config.load(name, overrides, check_files=False)
    return dict(caught.value.problems)


# --- mappings and lists inside components -------------------------------------------------------

NESTED = {
    "tokenizer.prompt_template={usr: [a, b]}": "a mapping of system, user, assistant",
    "tokenizer.prompt_template={user: a}": "a list of 2",
    "tokenizer.prompt_template={user: [a]}": "a list of 2",
    "tokenizer.prompt_template={user: [a, [b]]}": "a list of 2",
    "tokenizer.prompt_template=torchtune.data.NoSuchTemplate": "NoSuchTemplate",
    "dataset.column_map={imput: a, output: b}": "input, output",
    "dataset.column_map={input: [a], output: b}": "each to a string",
    "dataset.data_files={train: [[a]]}": "a path",
    "dataset.split_names=[a]": "unknown key",
    "optimizer.betas=[0.9]": "a list of 2",
    "optimizer.betas=[0.9, 1.5]": "below 1",
    "optimizer.betas=[0.9, true]": "a list of 2",
    "checkpointer.checkpoint_files=[[model.safetensors]]": "a list, each a string",
    "model.attn_modules=[[q_proj]]": "a list",
}


@pytest.mark.parametrize("override", NESTED)
def test_a_nested_value_of_the_wrong_shape_is_refused(override):
    found = refused(TINY, override)
    assert [*found] == [override.partition("=")[0]]
    assert NESTED[override] in found[override.partition("=")[0]]


def test_options_of_a_files_reader_are_checked_by_its_own_signature(tree):
    load(tree, "dataset.field=rows")
    assert "unknown key" in only_problem(tree, "dataset.delimiter=;")[1]  # csv's, not json's
    tree["dataset"]["source"] = "csv"
    load(tree, "dataset.delimiter=;", "dataset.names=[a, b]")
    assert "got [['a']]" in only_problem(tree, "dataset.names=[[a]]")[1]
    assert "got 'x'" in only_problem(tree, "dataset.skiprows=x")[1]


# --- numbers ------------------------------------------------------------------------------------

NUMBERS = {
    "model": {
        "num_heads": (0, -8, 10**7),
        "num_kv_heads": (0, 3),
        "embed_dim": (-8, 0, 10**12, 129),
        "num_layers": (0, 1_000_000),
        "vocab_size": (0, 10**9),
        "max_seq_len": (-1, 10**12),
        "rope_base": (0, -1, ".nan", "1e400"),
        "norm_eps": (".nan", ".inf", 0, -1e-5, 1),
        "alpha": (".inf", "1e300", 10**25),
        "rank": (10**9,),
        "dropout": (".nan",),
    },
    "adapter": {"beta": (".nan", "1e300"), "gamma": (-1, ".inf")},
    "optimizer": {"lr": ("1e300", ".nan"), "eps": (-1, "1e10"), "weight_decay": (".inf",)},
    "dataset": {"weight": (0, -1, ".nan", ".inf", "1e300")},
    "lr_scheduler": {"warmup_ratio": (".nan", 2), "min_lr_ratio": (-1, ".nan")},
    "loss": {"chunk_size": (0, -5), "label_smoothing": (2, ".nan")},
    "tokenizer": {"max_seq_len": (0, -1, 10**30)},
    "profiler": {"active_steps": (0,), "wait_steps": (-1,)},
}
AT_THE_TOP = {
    "seed": (2**32, -1, 10**30),
    "batch_size": (10**12,),
    "gradient_accumulation_steps": (10**12,),
    "num_workers": (100_000,),
    "timeout": (10**15,),
    "clip_grad_norm": (".nan", ".inf", "1e400", -1),
    "epochs": (10**12,),
}


@pytest.mark.parametrize(
    "override",
    [f"{s}.{k}={v}" for s, keys in NUMBERS.items() for k, values in keys.items() for v in values]
    + [f"{key}={value}" for key, values in AT_THE_TOP.items() for value in values],
)
def test_a_number_that_no_run_can_use_is_refused(override):
    key = override.partition("=")[0]
    found = refused(TINY, override)
    assert {name for name in found if name != "model.num_heads"} <= {key}, found
    assert found


@pytest.mark.parametrize(
    "override", ["damping=1e300", "damping=.nan", "covariance_power=1e9", "lr_ratio=.inf"]
)
def test_a_number_of_cordas_start_that_no_run_can_use_is_refused(override):
    assert [*refused("tiny_corda", f"adapter.{override}")] == [
        f"adapter.{override.partition('=')[0]}"
    ]


@pytest.mark.parametrize("value", ["1e-320", "1e400", ".nan"])
def test_a_temperature_that_overflows_is_refused(value):
    assert [*refused("tiny_kasa_generate", f"temperature={value}")] == ["temperature"]


def test_a_key_without_a_bound_of_its_own_takes_finite_numbers_only(tree):
    schema = config.FINETUNE | {"mine": config.Key(float), "any": config.Key(dict)}
    for bad in ("mine=.inf", "mine=1e400", "any={a: [.nan]}", f"any={{a: {2**63}}}"):
        found = problems(tree, "mine=1", "any={}", bad, schema=schema)
        assert [*found] == [bad.partition("=")[0]]


def test_a_rank_above_the_weights_is_refused_by_the_builders_sizes(tree):
    assert (
        "v_proj has a smaller dimension of 1024"
        in refused("llama3_8b_kasa", "model.rank=1025")["model.rank"]
    )
    config.load("llama3_8b_kasa", ["model.rank=1024"], check_files=False)
    assert "v_proj has a smaller" in refused("gemma2_9b_lora", "model.rank=2049")["model.rank"]
    assert "dimension of 64" in refused(TINY, "model.rank=65")["model.rank"]
    assert [*refused(TINY, "model.truncation_rank=65")] == ["model.truncation_rank"]


# --- paths --------------------------------------------------------------------------------------

PATHS = (
    "output_dir",
    "adapter_checkpoint",
    "resume_from_checkpoint",
    "tokenizer.path",
    "checkpointer.checkpoint_dir",
    "checkpointer.output_dir",
    "metric_logger.log_dir",
    "metric_logger.filename",
    "profiler.output_dir",
    "dataset.source",
    "dataset.data_files",
    "dataset.data_dir",
    "dataset.cache_dir",
)


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("''", "must not be empty"),
        ("'  '", "must not be empty"),
        (r'"a\0b"', "control characters"),
        (r'"a\nb"', "control characters"),
        ("~no_such_user_here/x", "does not know"),
        ("a" * 5000, "at most 4095 bytes"),
    ],
)
def test_a_path_that_is_none_is_refused_whatever_its_key(key, given, words):
    found = refused(TINY, f"{key}={given}")
    assert [*found] == [key]
    assert words in found[key]


def test_the_home_folder_is_written_as_a_tilde_in_every_key(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    keys = [key for key in PATHS if key != "metric_logger.filename"]
    cfg = config.load(TINY, [f"{key}=~/x" for key in keys], check_files=False)
    for key in keys:
        node = cfg
        for name in key.split("."):
            node = node[name]
        assert node == "/home/of/mine/x", key
    lists = config.load(TINY, ["dataset.data_files={train: [~/a, b]}"], check_files=False)
    assert lists.dataset.data_files == {"train": ["/home/of/mine/a", "b"]}
    assert [*refused("tiny_corda", "calibration.cache_dir=''")] == ["calibration.cache_dir"]
    for name, key in (
        ("peft_export", "output_dir"),
        ("peft_export", "checkpoint_dir"),
        ("peft_export", "base_model"),
        ("peft_import", "peft_adapter"),
        ("peft_import", "initial_adapter"),
    ):
        assert key in refused(name, f"{key}=''")


@pytest.mark.parametrize("name", ["../m.jsonl", "/m.jsonl", "a/b", "..", ".", "config.yaml", "a/"])
def test_a_log_file_stays_in_its_folder(name):
    found = refused(TINY, f"metric_logger.filename={name}")
    assert "without a folder" in found["metric_logger.filename"]


def test_a_name_that_is_there_is_no_pattern(tree):
    folder = folder_of(tree) / "run[1]"
    folder.mkdir()
    (folder / "rows*.jsonl").touch()
    for given in (f"{folder}/rows*.jsonl", f"{folder}/*.jsonl"):
        load(tree, f"dataset.data_files='{given}'", f"output_dir='{folder}/out'")
    load(tree, f"dataset.data_dir='{folder}'", "dataset.data_files='rows*.jsonl'")
    assert "does not exist" in only_problem(tree, f"dataset.data_files='{folder}/*.csv'")[1]
    assert "is a folder" in only_problem(tree, f"dataset.data_files='{folder}'")[1]
    key, text = only_problem(tree, f"dataset.source='{folder}'", "~dataset.data_files")
    assert key == "dataset.source"
    assert "data_dir" in text


def test_a_dangling_link_is_no_output_folder(tree):
    link = folder_of(tree) / "link"
    link.symlink_to(folder_of(tree) / "nowhere")
    for given in (link, link / "deeper"):
        assert "is a link to" in problems(tree, f"output_dir={given}")["output_dir"]


# --- what the files are -------------------------------------------------------------------------

SENTENCEPIECE = "kasa_tune://tiny_world/model/tokenizer.model"
CONTENTS = {
    "a tokenizer.json of Hugging Face": b'{"version": "1.0", "model": {}}',
    "a tiktoken file": b"IQ== 0\nIg== 1\n",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "an empty file": b"",
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_tokenizers_file_of_another_kind_is_refused_with_its_reader(tmp_path, kind):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(CONTENTS[kind])
    with pytest.raises(config.ConfigError) as caught:
        config.validate_file(TINY, [f"tokenizer.path={file}"])
    ((key, text),) = caught.value.problems
    assert key == "tokenizer.path"
    assert f"which is {kind}" in text
    assert ("hf_tokenizer" in text) == (kind == "a tokenizer.json of Hugging Face")


def test_a_sentencepiece_file_is_no_tiktoken_file(tree):
    key, text = only_problem(tree, f"tokenizer.path={SENTENCEPIECE}")
    assert key == "tokenizer.path"
    assert "which is a SentencePiece model; llama3_tokenizer reads a tiktoken file" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "a JSON object"),
        ('{"hidden_size": 8}', "no num_attention_heads"),
        ('{"num_attention_heads": "8", "hidden_size": 8}', "num_attention_heads '8'"),
        ('{"num_attention_heads": 8, "hidden_size": 8, "num_key_value_heads": 0}', "heads 0"),
    ],
)
def test_a_config_of_the_base_that_tells_no_sizes_is_refused(tree, text, words):
    Path(tree["checkpointer"]["checkpoint_dir"], "config.json").write_text(text)
    key, found = only_problem(tree)
    assert key == "checkpointer.checkpoint_dir"
    assert words in found


def test_without_heads_of_keys_and_values_there_are_as_many_as_heads(tree):
    """Llama 2 7B has as many, Llama 3 8B fewer."""
    llama2 = LLAMA3_8B | {"vocab_size": 32_000, "intermediate_size": 11_008, "rope_theta": 1e4}
    del llama2["num_key_value_heads"]
    path = Path(tree["checkpointer"]["checkpoint_dir"], "config.json")
    path.write_text(json.dumps(llama2))
    load(tree, "model=kasa_tune.components.models.kasa_llama2_7b")
    path.write_text(json.dumps(LLAMA3_8B | {"num_key_value_heads": None}))
    key, text = only_problem(tree)
    assert key == "model._component_"
    assert "num_key_value_heads is 32 by default, and kasa_llama3_8b has 8" in text


def test_every_part_of_the_weights_is_listed(tree):
    key, text = only_problem(tree, f"checkpointer.checkpoint_files=[{SHARDS[1]}]")
    assert key == "checkpointer.checkpoint_files"
    assert "1 of 3 parts" in text
    assert SHARDS[0] in text
    model = Path(tree["checkpointer"]["checkpoint_dir"])
    for name in ("a.safetensors", "b.safetensors"):
        (model / name).touch()
    index = model / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert "1 of 2" in only_problem(tree, "checkpointer.checkpoint_files=[a.safetensors]")[1]
    load(tree, "checkpointer.checkpoint_files=[a.safetensors, b.safetensors]")
    assert "no weights" in only_problem(tree, f"checkpointer.checkpoint_files=[{index.name}]")[1]


def test_files_of_weights_stay_in_their_folder_and_are_no_pointers(tree):
    model = Path(tree["checkpointer"]["checkpoint_dir"])
    (model / "p.safetensors").write_bytes(CONTENTS["a Git LFS pointer"])
    assert "LFS" in only_problem(tree, "checkpointer.checkpoint_files=[p.safetensors]")[1]
    for name in ("../rows.jsonl", "/etc/passwd", "''", "."):
        found = only_problem(tree, f"checkpointer.checkpoint_files=[{name}]")
        assert "names of files" in found[1]


@pytest.mark.parametrize(
    ("logger", "package"),
    [
        ("torchtune.training.metric_logging.WandBLogger", "wandb"),
        ("torchtune.training.metric_logging.CometLogger", "comet_ml"),
        ("torchtune.training.metric_logging.MLFlowLogger", "mlflow"),
        ("torchtune.training.metric_logging.TensorBoardLogger", "tensorboard"),
        ("kasa_tune.components.training.TrackioLogger", "trackio"),
    ],
)
def test_a_tracker_that_is_not_installed_is_told_before_the_run(tree, monkeypatch, logger, package):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    tree["metric_logger"] = {"_component_": logger}
    if "log_dir" in logger or package == "tensorboard":
        tree["metric_logger"]["log_dir"] = "${output_dir}"
    key, text = only_problem(tree)
    assert key == "metric_logger._component_"
    assert f"`pip install {package}`" in text
    load(tree, check_files=False)


# --- YAML ---------------------------------------------------------------------------------------

BOMBS = {
    "anchors": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    "merges": "a0: &a0 {x0: 1, x1: 1, x2: 1, x3: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)),
    "self": "a: &a\n  b: *a\n",
    "self in a list": "a: &a [*a]\n",
    "merge of itself": "a: &a {<<: *a, b: 1}\n",
    "levels in flow": "a: " + "[" * 3000 + "]" * 3000,
    "levels in blocks": "".join(" " * i + "a:\n" for i in range(1000)),
    "interpolations": "a0: xxxxxxxxxx\n"
    + "".join(f"a{i}: '{f'${{a{i - 1}}}' * 10}'\n" for i in range(1, 12)),
    "circle": "seed: ${batch_size}\nbatch_size: ${seed}\n",
    "nested interpolation": "a: '" + "${" * 3000 + "}" * 3000 + "'",
    "digits": f"seed: {'9' * 10_000}",
    "hexadecimal digits": f"seed: 0x{'f' * 10_000}",
    "large file": "a: '" + "x" * 2_000_000 + "'",
    "many keys": "".join(f"a{i}: 1\n" for i in range(50_000)),
    "tags": "a: !!set {x}\nb: !!binary aGVsbG8=\nc: !!timestamp 2020-01-01\n",
    "wrong tags": "a: !!bool maybe\n",
    "wrong time": "a: !!timestamp soon\n",
    "key": "? [a]\n: 1",
    "long key": f"{'k' * 100_000}: 1",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_yaml_bomb_is_refused_at_once_and_in_few_words(tmp_path, bomb):
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[bomb])
    started = time.monotonic()
    with pytest.raises(config.ConfigError) as caught:
        config.validate_file(file)
    assert time.monotonic() - started < 30  # a hang takes hours; a busy machine some seconds
    assert all(len(str(problem)) < 300 for problem in caught.value.problems)


@pytest.mark.parametrize(
    "given",
    ["x" * 100_000, "[" + "x, " * 10_000 + "]", "{" + "y" * 100_000 + ": 1}", "[[[[[[[[x]]]]]]]]"],
)
@pytest.mark.parametrize(
    "key", ["seed", "output_dir", "model", "tokenizer", "dataset.data_files", "optimizer.lr", "z"]
)
def test_a_message_repeats_little_of_a_long_value(tmp_path, key, given):
    with pytest.raises(config.ConfigError) as caught:
        config.validate_file(TINY, [f"{key}={given}"])
    for problem in caught.value.problems:
        assert len(str(problem)) < 300
        assert "x" * 81 not in str(problem)
        assert "y" * 81 not in str(problem)


# --- resuming -----------------------------------------------------------------------------------


def test_restart_is_a_word_and_no_path(tree):
    assert load(tree, "resume_from_checkpoint=restart").resume_from_checkpoint == "restart"
    assert "does not exist" in only_problem(tree, "resume_from_checkpoint=./restart")[1]
    assert "sampled, full" in only_problem(tree, "verify_base=some")[1]
    assert load(tree).verify_base == "sampled"
    assert load(tree, "verify_base=full").verify_base == "full"


# --- keys of a copied recipe --------------------------------------------------------------------

RECIPE = """
import no_such_package_of_the_training_alone
from kasa_tune import config as c

LARGEST = 5

def small(value):
    return value <= LARGEST

@c.parse(c.FINETUNE | {"my_key": c.Key(int, default=3, check=small)})
def recipe_main(cfg): ...
"""


def validate(tree: dict, recipe: str, *overrides: str, name: str = "my.py") -> int:
    from kasa_tune import cli

    file = folder_of(tree) / name
    file.write_text(recipe)
    path = write(tree, folder_of(tree))
    return cli.main(["validate", str(path), *overrides, "--recipe", str(file)])


def test_validate_reads_the_keys_that_a_copied_recipe_adds(tree, capsys):
    assert validate(tree, RECIPE, "my_key=4") == 0
    assert validate(tree, RECIPE, "my_key=6") == 2
    assert "my_key: got 6" in capsys.readouterr().err
    from kasa_tune import cli

    path = write(tree, folder_of(tree))
    assert cli.main(["validate", str(path), "my_key=4"]) == 2
    assert cli.main(["validate", str(path), "--recipe", "kasa_finetune_single_device"]) == 0
    assert cli.main(["validate", str(path), "--recipe", "corda_finetune_single_device"]) == 2


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("x = 1", "no function with the decorator"),
        ("def (", "no Python file"),
        ("@config.parse(missing)\ndef f(cfg): ...", "NameError"),
        ("@config.parse(1 / 0)\ndef f(cfg): ...", "ZeroDivisionError"),
        ("@config.parse([])\ndef f(cfg): ...", "no mapping"),
    ],
)
def test_a_recipe_without_a_schema_is_told(tree, capsys, recipe, words):
    assert validate(tree, recipe) == 2
    assert words in capsys.readouterr().err
