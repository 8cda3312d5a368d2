"""`kasa-tune` does by itself what `tune` does for our recipes, and does not import torch to do it."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from kasa_tune import cli, config, errors, registry

ROOT = registry.PACKAGE_ROOT.parent
# A recipe that notes what it was started with.
RECIPE = """\
import json, os, sys
note = {"argv": sys.argv, "name": __name__, "path": sys.path, "torch": "torch" in sys.modules}
with open(f"started_{os.environ.get('RANK', '')}.json", "w") as file:
    json.dump(note, file)
sys.exit(int(os.environ.get("EXIT", 0)))
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed package; the working directory is an empty folder elsewhere."""
    root = tmp_path / "site" / "kasa_tune"
    (root / "recipes").mkdir(parents=True)
    (root / "configs").mkdir()
    (root / "recipes" / "kasa_finetune_single_device.py").write_text(RECIPE)
    (root / "configs" / "toy_kasa.yaml").write_text("# how to run it\nseed: 42\nbatch_size: 2\n")
    monkeypatch.setattr(registry, "PACKAGE_ROOT", root)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return root


def kasa_tune(*args, cwd, **environment):
    """Run the real command in a process of its own; fails the test if anything but `run` imports torch."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from kasa_tune.cli import main\n"
        "code = main()\nassert not {'torch', 'torchtune', 'transformers'} & set(sys.modules)\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def started(cwd, rank=""):
    return json.loads((cwd / f"started_{rank}.json").read_text())


def test_ls_shows_recipes_with_their_configs(package, capsys):
    (package / "recipes" / "evaluate_model.py").touch()
    assert cli.main(["ls"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["RECIPE", "CONFIG"],
        ["evaluate_model", "<>"],
        ["kasa_finetune_single_device", "toy_kasa"],
    ]


@pytest.mark.parametrize(
    ("destination", "written"),
    [
        ("mine", "mine.yaml"),
        ("mine.yaml", "mine.yaml"),
        ("v1.2", "v1.2.yaml"),
        (".", "toy_kasa.yaml"),
    ],
)
def test_cp_adds_what_is_missing(package, destination, written):
    assert cli.main(["cp", "toy_kasa", destination]) == 0
    with open(written) as copy:
        assert copy.read() == (package / "configs" / "toy_kasa.yaml").read_text()


def test_cp_recipe_and_parents(package, tmp_path):
    assert cli.main(["cp", "kasa_finetune_single_device", "a/b/mine", "--make-parents"]) == 0
    assert (tmp_path / "work/a/b/mine.py").read_text() == RECIPE


def test_cp_copies_prompts_of_the_package(package, tmp_path):
    prompts = package / "prompts"
    (prompts / "judge").mkdir(parents=True)
    for name in ("synthesis.txt", "judge/single.txt"):
        (prompts / name).write_text(name)
    assert cli.main(["cp", "kasa_tune://prompts/synthesis.txt", "mine"]) == 0
    assert (tmp_path / "work/mine.txt").read_text() == "synthesis.txt"
    assert cli.main(["cp", "kasa_tune://prompts/judge", "mine_too"]) == 0
    assert (tmp_path / "work/mine_too/single.txt").read_text() == "judge/single.txt"


def test_cp_of_a_read_only_file_can_be_edited(package, tmp_path):
    (package / "configs" / "toy_kasa.yaml").chmod(0o444)
    assert cli.main(["cp", "toy_kasa", "mine"]) == 0
    assert (tmp_path / "work/mine.yaml").stat().st_mode & 0o200


def test_cp_keeps_an_existing_file_when_told_to(package, tmp_path, capsys):
    mine = tmp_path / "work" / "mine.yaml"
    mine.write_text("my own")
    assert cli.main(["cp", "-n", "toy_kasa", "mine"]) == 0
    assert mine.read_text() == "my own"
    assert "mine.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["cp", "toy_kassa", "mine"], "Did you mean toy_kasa?"),
        (["cp", "toy_kasa", "missing/mine"], "--make-parents"),
        (["cp", "./same.yaml", "same"], "the file to copy"),
        (["cat", "kasa_finetune_single_devic"], "Did you mean kasa_finetune_single_device?"),
        (["cat", "--sort", "broken.yaml"], "not valid YAML"),
        (["validate", "toy_lora"], "Did you mean toy_kasa?"),
        (
            ["run", "kasa_fine_single_device", "--config", "toy_kasa"],
            "Did you mean kasa_finetune_single_device?",
        ),
        (["run", "kasa_finetune_single_device", "--config", "toy_kas"], "Did you mean toy_kasa?"),
        (["run", "kasa_finetune_single_device", "batch_size=3"], "needs --config"),
        (["run", "kasa_finetune_single_device", "--config"], "needs --config"),
    ],
)
def test_a_mistake_is_explained_and_exits_with_2(package, tmp_path, capsys, args, message):
    (tmp_path / "work" / "same.yaml").touch()
    (tmp_path / "work" / "broken.yaml").write_text("a: [")
    assert cli.main(args) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_missing_config_lists_the_configs_of_the_recipe(package, capsys):
    assert cli.main(["run", "kasa_finetune_single_device"]) == 2
    assert "toy_kasa" in capsys.readouterr().err


def test_cat_prints_the_file_with_its_comments(package, capsys):
    assert cli.main(["cat", "toy_kasa"]) == 0
    assert capsys.readouterr().out == (package / "configs" / "toy_kasa.yaml").read_text()


def test_cat_sorts_keys(package, capsys):
    assert cli.main(["cat", "toy_kasa", "--sort"]) == 0
    shown = capsys.readouterr().out
    assert list(yaml.safe_load(shown)) == ["batch_size", "seed"]
    assert shown.index("batch_size") < shown.index("seed")


def test_run_by_name_resolves_the_config_name(package, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["kasa-tune"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as done:
        cli.main(["run", "kasa_finetune_single_device", "--config", "toy_kasa", "a.b=c=d"])
    assert done.value.code == 0
    note = started(tmp_path / "work")
    script, config = (
        package / "recipes" / "kasa_finetune_single_device.py",
        package / "configs" / "toy_kasa.yaml",
    )
    assert note["argv"] == [str(script), "--config", str(config), "a.b=c=d"]
    assert note["name"] == "__main__"


@pytest.mark.parametrize("recipe", ["my", "my.py", "./my.py", "{cwd}/my.py"])
@pytest.mark.parametrize(
    "config", ["--config=./my.yaml", "--config my.yaml", "--config {cwd}/my.yaml"]
)
def test_run_a_recipe_of_ones_own(tmp_path, recipe, config):
    (tmp_path / "my.py").write_text(RECIPE)
    (tmp_path / "my.yaml").touch()
    args = f"run {recipe} {config} x=1".format(cwd=tmp_path).split()
    done = kasa_tune(*args, cwd=tmp_path, EXIT="7")
    assert done.returncode == 7, done.stderr
    note = started(tmp_path)
    assert note["argv"] == [str(tmp_path / "my.py"), "--config", str(tmp_path / "my.yaml"), "x=1"]
    assert str(tmp_path) in note["path"], "components of the working directory must be importable"
    assert not note["torch"]


def test_components_beside_a_recipe_can_be_imported(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "my.py").write_text(RECIPE)
    (tmp_path / "my.yaml").touch()
    done = kasa_tune("run", "scripts/my.py", "--config", "my.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {str(tmp_path), str(tmp_path / "scripts")} <= set(started(tmp_path)["path"])


def test_help_of_a_recipe_reaches_the_recipe(tmp_path):
    (tmp_path / "my.py").write_text(RECIPE)
    assert kasa_tune("run", "my.py", "--help", cwd=tmp_path).returncode == 0
    assert started(tmp_path)["argv"][1:] == ["--help"]


def test_torchrun_options_are_refused_for_one_process(package, capsys):
    args = ["run", "--nproc_per_node", "2", "kasa_finetune_single_device", "--config", "toy_kasa"]
    assert cli.main(args) == 2
    assert "one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "added"),
    [
        (["--nproc_per_node", "2"], ["--standalone"]),
        (["--nproc-per-node=2"], ["--standalone"]),
        (["--nnodes", "2", "--master_addr", "host"], []),
        (["--rdzv-endpoint=host:29400"], []),
        (["--standalone", "--nproc_per_node", "2"], []),
    ],
)
def test_processes_of_one_machine_need_no_port(options, added):
    assert cli._standalone(options) == added


@pytest.mark.slow
def test_run_on_two_processes(tmp_path):
    (tmp_path / "my.py").write_text(RECIPE)
    (tmp_path / "my.yaml").touch()
    command = [
        sys.executable,
        "-m",
        "kasa_tune",
        "run",
        "--nproc_per_node",
        "2",
        "my.py",
        "--config",
        "my.yaml",
        "x=1",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert started(tmp_path, rank)["argv"] == [
            str(tmp_path / "my.py"),
            "--config",
            str(tmp_path / "my.yaml"),
            "x=1",
        ]


@pytest.mark.parametrize(
    "args",
    [
        ["ls"],
        ["cp", "kasa_finetune_single_device", "my_kasa"],
        ["cat", "tiny_kasa"],
        ["validate", "tiny_kasa"],
        ["validate", "tiny_kasa", "batch_size=4", "optimizer.lr=1e-3"],
        ["validate", "tiny_kasa_generate", "adapter_checkpoint=null"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_shipped_names_without_torch(tmp_path, args):
    done = kasa_tune(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [("batch_size=0", "batch_size"), ("batchsize=2", "batch_size"), ("dtype=fp16", "bf16")],
)
def test_validate_refuses_without_torch(tmp_path, override, said):
    done = kasa_tune("validate", "tiny_kasa", override, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_before_the_model_is_downloaded(tmp_path):
    args = ["validate", "tiny_kasa", "checkpointer.checkpoint_dir=/not/yet/here"]
    refused = kasa_tune(*args, cwd=tmp_path)
    assert refused.returncode == 2
    assert "/not/yet/here" in refused.stderr
    done = kasa_tune(*args, "--skip-files", "batch_size=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused = kasa_tune(*args, "--skip-files", "batch_size=0", cwd=tmp_path)
    assert "batch_size" in refused.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["ls", "x"],
        ["validate", "toy_kasa", "--no-such-option"],
        ["cat", "toy_kasa", "--sorted"],
        [],
    ],
)
def test_unknown_arguments_exit_with_2(package, args):
    with pytest.raises(SystemExit, match="2"):
        cli.main(args)


def test_an_interrupt_is_one_sentence_and_status_130(package, tmp_path, monkeypatch, capsys):
    """Before the recipe's first line of its own, and in its main function."""
    path = tmp_path / "mine.py"
    path.write_text("raise KeyboardInterrupt")
    assert cli.main(["run", str(path), "--config", "toy_kasa"]) == 130
    assert capsys.readouterr().err == f"{errors.INTERRUPTED}\n"

    @config.parse(None)
    def recipe_main(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "PACKAGE_ROOT", ROOT / "kasa_tune")
    monkeypatch.setattr(sys, "argv", ["mine.py", "--config", "tiny_kasa"])
    monkeypatch.delenv("KASA_TUNE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        recipe_main()
    assert end.value.code == 130
    assert capsys.readouterr().err == f"{errors.INTERRUPTED}\n"
