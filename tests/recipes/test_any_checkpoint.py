"""From a folder that transformers saved and a data file to a run, its exports and its completions: two values each."""

import json
import shutil

import pytest
import torch

from kasa_tune import config
from kasa_tune.components.checkpoints import CheckpointError
from kasa_tune.components.exchange.adapter_set import AdapterSet
from kasa_tune.components.models import CheckpointFolder
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.components.models.from_checkpoint import from_checkpoint
from kasa_tune.components.training.loggers import read_metrics
from tests.toy_folders import KINDS, write_folder, write_rows

transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")
peft = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
pytestmark = pytest.mark.parity

# What a toy on a CPU needs besides. The papers' 128 samples a step are more than the file has.
SMALL = ["device=cpu", "dtype=fp32", "max_steps=3", "gradient_accumulation_steps=2"]
SMALL += ["optimizer.lr=1e-2", "enable_activation_checkpointing=False"]
SMALLER = ["model.rank=4", "model.alpha=8", "calibration.max_seq_len=64"]
SMALLER += ["calibration.num_samples=8"]
RECIPES = {"kasa": "kasa", "corda_kpm": "corda", "qcorda": "qcorda"}
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _peft_beside_torchtune(monkeypatch):
    """PEFT refuses the torchao that torchtune needs, although a LoRA uses none of it."""
    import peft.tuners.lora.torchao

    monkeypatch.setattr(peft.tuners.lora.torchao, "is_torchao_available", lambda: False)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The folders of the three models by kind, and the data."""
    root = tmp_path_factory.mktemp("models")
    made = {kind: write_folder(root / kind, kind) for kind in KINDS}
    texts = [{"text": f"Number {i} comes before {i + 1}."} for i in range(40)]
    return made | {
        "rows": write_rows(root / "mine.jsonl"),
        "texts": write_rows(root / "texts.jsonl", texts),
    }


@pytest.fixture
def call(run_main, capsys):
    """Run a recipe as from the command line; returns what it printed."""

    def run(recipe, *words):
        capsys.readouterr()
        assert run_main(recipe, "--config", *map(str, words)) == 0
        return capsys.readouterr().out

    return run


def train(call, places, kind, method, folder, *more):
    """A run with the two values that a user gives, and what a toy needs."""
    two = [f"checkpoint_dir={places[kind]}", f"dataset.data_files={places['rows']}"]
    small = SMALL + (SMALLER if method != "kasa" else [])
    if method == "corda_kpm":  # its questions would come from the hub
        small.append(
            "calibration.dataset={_component_: kasa_tune.components.data.by_columns_dataset, "
            f"data_files: {places['texts']}}}"
        )
    recipe = f"{RECIPES[method]}_finetune_single_device"
    call(recipe, method, *two, *small, f"output_dir={folder}", *more)
    return folder


def logits_of_run(load_recipe, run, tokens, *more):
    """What the trained model computes here, built from the run alone."""
    cfg = config.load(
        "generate",
        [f"adapter_checkpoint={run}", "device=cpu", "prompts=[a]", *more],
        about_to_run=True,
    )
    module = load_recipe("generate_text")
    cfg = module.complete_config(cfg)
    recipe = module.GenerateTextRecipe(cfg)
    recipe.setup(cfg)
    with torch.no_grad():
        return recipe._model.eval()(tokens)


def tokens():
    """Ids ``[2, 40]``, longer than Gemma's window."""
    return torch.randint(4, 260, (2, 40), generator=torch.Generator().manual_seed(3))


def of_transformers(folder, adapter=None):
    """Logits of the exported model, or of the base with the exported adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_two_values_train_a_model_that_transformers_computes(
    kind, method, places, call, load_recipe, tmp_path
):
    run = train(call, places, kind, method, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["step"]]
    assert len(losses) == 3
    ours = logits_of_run(load_recipe, run, tokens())
    base = of_transformers(places[kind])
    assert (ours - base).abs().max() > 100 * TOLERANCE
    call("export_adapter", "merged_export", f"adapter_checkpoint={run}")
    torch.testing.assert_close(
        of_transformers(f"{run}_merged"), ours, rtol=0, atol=TOLERANCE * float(ours.abs().max())
    )
    if method != "qcorda":  # of a run on an NF4 base a LoRA is an approximation
        call("export_adapter", "peft_export", f"adapter_checkpoint={run}")
        theirs = of_transformers(places[kind], f"{run}_peft")
        torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE * float(ours.abs().max()))


@pytest.mark.slow
def test_the_base_may_move(places, call, load_recipe, tmp_path):
    here, moved = tmp_path / "here", tmp_path / "moved"
    shutil.copytree(places["olmo2"], here)
    run = train(call, {**places, "olmo2": here}, "olmo2", "kasa", tmp_path / "run")
    before = logits_of_run(load_recipe, run, tokens())
    here.rename(moved)
    now = f"checkpoint_dir={moved}"
    assert torch.equal(logits_of_run(load_recipe, run, tokens(), now), before)
    call("export_adapter", "peft_export", f"adapter_checkpoint={run}", now)
    theirs = of_transformers(moved, f"{run}_peft")
    torch.testing.assert_close(theirs, before, rtol=0, atol=TOLERANCE * float(before.abs().max()))
    model = from_checkpoint(moved)
    model.load_state_dict(dict(read_base_weights(CheckpointFolder(moved))))
    adapters = AdapterSet(model.eval(), checkpoint_dir=str(moved))
    adapters.add("own", run)
    with adapters.use("own"), torch.no_grad():
        switched = model(tokens())
    torch.testing.assert_close(switched, before, rtol=0, atol=TOLERANCE * float(before.abs().max()))
    assert "Singular values" in call("report_run", "report", f"run={run}", now)
    assert (run / "loss_curve.png").is_file()
    call(
        "kasa_finetune_single_device", run / "config.yaml", now, "max_steps=4",
        "resume_from_checkpoint=True",
    )  # fmt: skip
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    with pytest.raises(CheckpointError, match="other base weights"):
        logits_of_run(load_recipe, run, tokens(), f"checkpoint_dir={places['qwen3']}")


@pytest.mark.slow
def test_an_adapter_of_peft_is_imported_with_the_config_of_its_method(
    places, call, load_recipe, tmp_path
):
    run = train(call, places, "qwen3", "kasa", tmp_path / "run")
    call("export_adapter", "peft_export", f"adapter_checkpoint={run}")
    folder = tmp_path / "imported"
    given = [f"checkpoint_dir={places['qwen3']}", "dtype=fp32", "device=cpu"]
    call("import_adapter", "lora", f"peft_adapter={run}_peft", f"output_dir={folder}", *given)
    out = tmp_path / "merged"
    call("export_adapter", "merged_export", f"adapter_checkpoint={folder}", f"output_dir={out}")
    ours = logits_of_run(load_recipe, run, tokens())
    torch.testing.assert_close(
        of_transformers(out), ours, rtol=0, atol=TOLERANCE * float(ours.abs().max())
    )


@pytest.mark.parametrize("method", ["kasa", "corda_kpm", "qcorda"])
def test_a_dry_run_needs_config_json_alone(method, places, call, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(places["gemma3"] / "config.json", folder)
    small = ["model.rank=4", "device=cpu"]
    if method != "kasa":
        small.append("calibration.max_seq_len=64")
    recipe = f"{RECIPES[method]}_finetune_single_device"
    printed = call(recipe, method, f"checkpoint_dir={folder}", "dry_run=true", *small)
    model = transformers.AutoModelForCausalLM.from_pretrained(places["gemma3"])
    assert f"Parameters of the base: {model.num_parameters():,}\n" in printed
    assert f"{folder} holds no weights" in printed
    assert "each row was counted as 256 tokens" in printed
    whole = call(
        recipe, method, f"checkpoint_dir={places['gemma3']}", "dry_run=true", *small,
        f"dataset.data_files={places['rows']}",
        *([f"calibration.dataset={{_component_: kasa_tune.components.data.by_columns_dataset, "
           f"data_files: {places['texts']}}}"] if method == "corda_kpm" else []),
    )  # fmt: skip
    assert "holds no weights" not in whole
    line = next(line for line in printed.splitlines() if line.startswith("Trainable parameters"))
    assert line in whole


@pytest.mark.parametrize("dry", [False, True])
def test_the_config_json_of_another_model_is_refused_before_data_is_read(
    dry, places, load_recipe, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(places["olmo2"], folder)
    other = json.loads((places["gemma3"] / "config.json").read_text())
    other["tie_word_embeddings"] = False  # or the two output projections are told first
    (folder / "config.json").write_text(json.dumps(other))
    given = [f"checkpoint_dir={folder}", f"dataset.data_files={places['rows']}", *SMALL]
    given.append(f"dry_run={dry}")
    if not dry:  # which the config's check compares by themselves
        with pytest.raises(config.ConfigError, match=r"holds model\..* and config\.json tells"):
            config.load("kasa", given)
    cfg = config.load("kasa", given, about_to_run=True, check_files=dry)
    recipe = load_recipe("kasa_finetune_single_device").KaSAFinetuneRecipeSingleDevice(cfg)
    with pytest.raises(ValueError, match=r"config\.json is of another model than its weights"):
        recipe.setup(cfg)
    assert hasattr(recipe, "_data") == dry


def test_a_folder_alone_completes_prompts(places, load_recipe):
    cfg = config.load(
        "generate",
        [
            f"checkpoint_dir={places['gemma3']}",
            "device=cpu",
            "dtype=fp32",
            "prompts=[a]",
            "max_new_tokens=8",
        ],
        about_to_run=True,
    )
    module = load_recipe("generate_text")
    cfg = module.complete_config(cfg)
    recipe = module.GenerateTextRecipe(cfg)
    recipe.setup(cfg)
    with torch.no_grad():
        ours = recipe._model.eval()(tokens())
    torch.testing.assert_close(
        ours, of_transformers(places["gemma3"]), rtol=0, atol=TOLERANCE * float(ours.abs().max())
    )
    (record,) = recipe.generate(cfg)
    assert set(record) == {"prompt", "base"}
