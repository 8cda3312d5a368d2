"""The shipped configs are what the tables make, and their figures are what a dry run counts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kasa_tune import config
from kasa_tune.components.training import budget_report, build_training_model
from kasa_tune.families import (
    MODELS,
    TASKS,
    Figures,
    TrainingConfig,
    figures,
    tables,
    training_configs,
    training_text,
)
from kasa_tune.families.__main__ import main, texts
from kasa_tune.families.headers import GPUS, gpu, paragraph
from kasa_tune.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.yaml")}
PAGE = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
CONFIGS = {made.name: made for made in training_configs()}
ON_A_GPU = [
    made for made in CONFIGS.values() if made.task.device == "cuda" and not made.model.is_any
]
COUNTED = re.compile(r"\n#   -> .*?(?=\n\n)", re.DOTALL)  # the figures, the last lines of a header


def of(model, task, method):
    return TrainingConfig(MODELS[model], TASKS[task], METHODS[method])


# ------------------------------------------------------------------------------------------------------ what is written


def test_files_are_what_the_tables_make_but_for_their_figures():
    made = texts(figures={})
    assert {*FILES} == {*made}, "run `make configs`, and delete the files that have no row"
    for name, text in made.items():
        assert COUNTED.sub("", FILES[name]) == text, f"{name}: run `make configs`"


def test_configs_for_a_gpu_have_figures_and_the_others_have_none():
    assert {name for name, text in FILES.items() if COUNTED.search(text)} == {
        made.name for made in ON_A_GPU
    }


def some_of_each_model() -> list[TrainingConfig]:
    """One method of each model, another than of the next one, and the methods that few models have.

    What is counted for a model or a method differs from what stands in its files in one of these. Counting all takes a
    minute, as `make configs` does.
    """
    turns = [("kasa",), ("corda", "corda_kpm"), ("lora",), ("qcorda",), ("qlora",)]
    models = dict.fromkeys(made.model.name for made in ON_A_GPU)
    wanted = {
        (model, method)
        for number, model in enumerate(models)
        for method in turns[number % len(turns)]
    }
    common = {method for methods in turns for method in methods}
    return [
        made
        for made in ON_A_GPU
        if (made.model.name, made.method.name) in wanted or made.method.name not in common
    ]


@pytest.mark.slow
def test_figures_of_files_and_docs_are_those_that_are_counted():
    counted = figures.figures_of_all(some := some_of_each_model())
    for made in some:
        text = training_text(made, counted[made.name])
        assert FILES[made.name] == text, f"{made.name}: run `make configs`"
    page = "\n\n".join(
        f"<!-- memory of {method}, written by `make configs` -->\n<!-- end of memory -->"
        for method in re.findall(r"^<!-- memory of (\w+)", PAGE, re.MULTILINE)
    )
    rows = [line for line in tables.fill(page, counted).splitlines() if line.startswith("| `")]
    assert {row.rpartition("_")[2].partition("`")[0] for row in rows} == {"kasa", "corda"}
    assert {*rows} <= {*PAGE.splitlines()}, "run `make configs`"


def test_the_tables_have_a_row_for_each_config_of_their_method():
    rows = re.findall(r"^\| `(\w+_(?:kasa|corda))` \| [\d,]+ \|", PAGE, re.MULTILINE)
    assert rows == [made.name for made in ON_A_GPU if made.method.name == "kasa"] + [
        made.name for made in ON_A_GPU if made.method.name == "corda"
    ]


@pytest.mark.parametrize("method", ["kasa", "corda_kpm", "qcorda", "qlora"])
def test_figures_of_a_file_are_those_that_are_counted(method):
    made = of("llama3_2_1b", "instruction", method)
    assert FILES[made.name] == training_text(made, figures.figures_of(made))


def test_writing_changes_what_differs_and_names_what_has_no_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "figures_of_all", lambda configs: {})
    page = tmp_path / "page.md"
    page.write_text("no table")
    (tmp_path / "tiny_kasa.yaml").write_text(FILES["tiny_kasa"])
    (tmp_path / "gone_1b_kasa.yaml").write_text("x: 1")
    main(tmp_path, page)
    assert f"; {len(FILES) - 1} of them changed" in (printed := capsys.readouterr().out)
    assert f"{tmp_path / 'gone_1b_kasa.yaml'} has no row" in printed
    assert (tmp_path / "tiny_corda.yaml").read_text() == FILES["tiny_corda"]


def test_the_tables_need_no_torch():
    code = "import sys, kasa_tune.families.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_paragraph_is_a_comment_of_lines_that_hang_under_its_text():
    lines = paragraph("word " * 60, indent="#   -> ").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("#   -> word")
    assert all(line.startswith("#      word") for line in lines[1:])
    assert max(map(len, lines)) <= 120


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("layers", [7, 10])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["kasa", "lora", "dora", "corda", "qcorda", "qkasa"])
def test_two_shallow_models_give_the_budget_of_the_whole(method, checkpointing, layers):
    cfg = figures.checked(of("tiny", "tiny_world", method))
    cfg.model.num_layers, cfg.enable_activation_checkpointing = layers, checkpointing
    del cfg.checkpointer  # whose config.json has another depth
    assert figures.budget_of(cfg) == figures.budget_of(cfg, shallow=False)


@pytest.mark.parametrize("name", ["gemma2_2b_kasa", "llama3_2_1b_qcorda", "phi3_mini_corda"])
def test_two_shallow_models_give_the_budget_of_real_ones(name):
    cfg = figures.checked(CONFIGS[name])
    assert figures.budget_of(cfg) == figures.budget_of(cfg, shallow=False)


@pytest.mark.parametrize("method", ["kasa", "qlora", "corda", "qcorda"])
def test_figures_are_those_that_the_recipe_prints(method, load_recipe, capsys):
    """Of a step; the data that calibrates has shorter rows than the figures allow for."""
    made = of("tiny", "tiny_world", method)
    recipe = vars(load_recipe(made.recipe))
    (build,) = (value for key, value in recipe.items() if key.endswith("RecipeSingleDevice"))
    cfg = config.load(made.name, ["dry_run=true"], about_to_run=True)
    build(cfg).setup(cfg)
    printed = capsys.readouterr().out
    counted = figures.figures_of(made)
    assert f"Trainable parameters: {counted.parameters:,}" in printed
    assert re.search(rf"training step +{counted.step / 2**20:,.1f} MiB", printed)


def test_the_report_of_a_budget_has_its_figures():
    made = of("tiny", "tiny_world", "corda")
    cfg = figures.checked(made)
    budget = figures.budget_of(cfg)
    trained = budget.pop("trained parameters")
    counted = figures.figures_of(made)
    report = budget_report(build_training_model(cfg, dtype=figures.torch.float32), budget)
    assert report[-1].split()[-2] == f"{counted.step / 2**20:,.1f}"
    assert report[-2].split()[-2] == f"{counted.set_up / 2**20:,.1f}"
    assert trained == counted.parameters


@pytest.mark.parametrize("gib", [0.5, 6.0, 6.8, 6.9, 20.4, 20.5, 41.9, 42.1, 100.0, 135.0, 180.0])
def test_a_gpu_has_room_to_spare_and_the_next_smaller_has_not(gib):
    for step, set_up in ((gib, 0.1), (0.1, gib)):
        size = gpu(Figures(1, int(step * 2**30), int(set_up * 2**30), 0))
        smaller = [other for other in GPUS if other < size]
        assert size - gib >= min(0.15 * size, 6) - 1e-6
        assert not smaller or smaller[-1] - gib < min(0.15 * smaller[-1], 6)


def test_tasks_that_differ_in_their_data_are_counted_once():
    figures._figures.cache_clear()
    for task in ("instruction", "gsm8k"):
        figures.figures_of(of("llama3_8b", task, "lora"))
    assert figures._figures.cache_info().misses == 1
    assert OmegaConf.is_config(figures.checked(of("llama3_8b", "instruction", "lora")))


# ----------------------------------------------------------------------------------------------------------------- rows


def test_every_builder_and_checkpointer_of_a_row_exists():
    from kasa_tune.components import models

    for made in CONFIGS.values():
        builder = made.model.builder or made.model.name
        assert hasattr(models, f"{made.method.builders[0]}_{builder}"), made.name


def test_a_config_belongs_to_one_row():
    names = [made.name for made in training_configs()]
    assert len(names) == len({*names})
    assert {made.method.name for made in training_configs()} == {*METHODS}


def test_a_batch_makes_up_an_optimizer_step():
    for made in training_configs():
        samples = made.setting.samples or made.model.family.samples
        assert made.model.batch_size * made.accumulation == samples, made.name
