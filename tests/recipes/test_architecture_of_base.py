"""A base whose config.json describes another model than the config builds is met by no recipe."""

import json
import shutil

import pytest
import torch
from torchtune.models.llama3 import llama3
from torchtune.training import FullModelHFCheckpointer

from kasa_tune import config
from kasa_tune.architectures import read_architecture
from kasa_tune.architectures.saving import from_json, to_json
from kasa_tune.cli import main as kasa_tune
from kasa_tune.components.checkpoints import Checkpoint, CheckpointError, save_checkpoint
from kasa_tune.components.exchange.adapter_set import AdapterSet
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.config import loading
from kasa_tune.registry import PACKAGE_ROOT

from .conftest import run_recipe

TINY_MODEL = PACKAGE_ROOT / "tiny_world" / "model"
SIZES = {
    "vocab_size": 1024,
    "num_layers": 5,
    "num_heads": 8,
    "num_kv_heads": 4,
    "embed_dim": 128,
    "max_seq_len": 512,
    "intermediate_dim": 384,
}
OTHER = {"rope_theta": 500_000.0, "rms_norm_eps": 1e-6}
# Both values, the key of config.json and the one to set: of the run, and of `validate`.
SAID = (
    r"rope_theta is 500000, and the model has 10000 \(set model\.rope_base=500000\); "
    r"rms_norm_eps is 1e-06, and the model has 1e-05 \(set model\.norm_eps=1e-06\)"
)
WORDS = (
    r"rope_theta is 500000, and kasa_llama3 has 10000; set it to 500000\n"
    r".*rms_norm_eps is 1e-06, and kasa_llama3 has 1e-05; set it to 1e-06"
)
RUN = ["max_steps=1", "model.dropout=0.0"]


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(TINY_MODEL, tmp_path / "base")


@pytest.fixture
def mismatched(base):
    """The weights of the embedded model, with another rotary base and epsilon in config.json."""
    change_config(base, **OTHER)
    return base


@pytest.fixture
def unchecked(monkeypatch):
    """What is found without torch is not said, so that the model itself is compared."""
    monkeypatch.setattr(loading, "OF_ARCHITECTURE", ())


RECIPES = {
    "kasa_finetune_single_device": ("tiny_kasa", config.FINETUNE),
    "corda_finetune_single_device": ("tiny_corda", config.CORDA),
    "qcorda_finetune_single_device": ("tiny_qcorda", config.QCORDA),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_run_starts(recipe, load_recipe, mismatched, tmp_path, unchecked):
    name, schema = RECIPES[recipe]
    overrides = ["max_steps=1", f"checkpointer.checkpoint_dir={mismatched}"]
    with pytest.raises(ValueError, match=SAID):
        run_recipe(
            load_recipe(recipe), tmp_path / "run", *overrides, config_name=name, schema=schema
        )
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_distributed_run_starts(recipe, mismatched, tmp_path, unchecked, load_recipe):
    """Each process compares its model before any weight is read. A dry run does so without others."""
    name, schema = RECIPES[recipe]
    distributed = recipe.replace("single_device", "distributed")
    overrides = [f"output_dir={tmp_path / 'run'}", f"checkpointer.checkpoint_dir={mismatched}"]
    cfg = config.load(name, [*overrides, "dry_run=True"], schema)
    module = load_recipe(distributed)
    with pytest.raises(ValueError, match=SAID):
        module.recipe_main.__wrapped__(cfg)


def test_validate_says_it_without_torch(mismatched, capsys):
    override = f"checkpointer.checkpoint_dir={mismatched}"
    with pytest.raises(config.ConfigError, match=WORDS) as caught:
        config.load("tiny_kasa", [override], config.FINETUNE)
    assert [problem.key for problem in caught.value.problems] == [
        "model.rope_base",
        "model.norm_eps",
    ]
    assert kasa_tune(["validate", "tiny_kasa", override]) == 2
    assert "model.norm_eps" in capsys.readouterr().err
    config.load("tiny_kasa", [override, "model.rope_base=500000", "model.norm_eps=1e-6"])


def test_what_is_set_as_told_trains(finetune, mismatched):
    told = ["model.rope_base=500000", "model.norm_eps=1e-06"]
    run = finetune(*RUN, *told, f"checkpointer.checkpoint_dir={mismatched}")
    kept = from_json(run.part("run")["architecture"], "run.json")
    assert kept == read_architecture(mismatched)
    assert kept.layers[0].rotary.base == 500_000
    assert kept.norm_eps == 1e-6


# -------------------------------------------------- a run, and its base with another config.json


@pytest.fixture
def trained(finetune, base):
    """A run on a base whose config.json changed afterwards; the weights are the same."""
    run = finetune(*RUN, f"checkpointer.checkpoint_dir={base}")
    change_config(base, **OTHER)
    return run


def before_architectures_were_kept(run):
    """The run as it was written before run.json had an architecture."""
    path = run.checkpoints[-1]
    parts = {name: Checkpoint(path).part(name) for name in Checkpoint(path).manifest["parts"]}
    del parts["run"]["architecture"]
    shutil.rmtree(path)
    save_checkpoint(path.parent, parts["run"]["step"], parts)


TOLD = r"another config\.json: (?s:.*)base 10000 of the run, 500000 here"


def export_of(load_recipe, run, folder, format="merged", **options):
    overrides = [f"adapter_checkpoint={run.folder}", f"output_dir={folder}", f"format={format}"]
    overrides += [f"{key}={value}" for key, value in options.items()]
    cfg = config.load(f"{format}_export", overrides, config.EXPORT)
    return load_recipe("export_adapter").recipe_main.__wrapped__(cfg)


def test_a_run_is_not_exported_on_it(trained, load_recipe, tmp_path):
    with pytest.raises(CheckpointError, match=TOLD):
        export_of(load_recipe, trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    good = export_of(load_recipe, trained, tmp_path / "out", checkpoint_dir=TINY_MODEL)
    assert good == 0


def test_a_run_of_before_is_not_exported_on_it_either(trained, load_recipe, tmp_path):
    before_architectures_were_kept(trained)
    with pytest.raises(ValueError, match="rope_theta is 500000, and the model has 10000"):
        export_of(load_recipe, trained, tmp_path / "out")
    assert export_of(load_recipe, trained, tmp_path / "out", checkpoint_dir=TINY_MODEL) == 0


def test_a_run_is_not_resumed_on_it(trained, finetune, base, unchecked):
    resumed = ["max_steps=2", "model.dropout=0.0", "resume_from_checkpoint=True"]
    with pytest.raises(ValueError, match=SAID):
        finetune(*resumed, f"checkpointer.checkpoint_dir={base}")
    checkpoint = Checkpoint(trained.checkpoints[-1])
    about = {"base_fingerprint": checkpoint.run["base"], "model": checkpoint.config["model"]}
    checkpoint.check_belongs(**about, architecture=read_architecture(TINY_MODEL))
    with pytest.raises(CheckpointError, match=TOLD):
        checkpoint.check_belongs(**about, architecture=read_architecture(base))


@pytest.mark.parametrize("recipe", ["generate_text", "report_run"])
def test_nothing_is_generated_or_reported_on_it(recipe, trained, load_recipe, base, unchecked):
    module = load_recipe(recipe)
    if recipe == "report_run":
        cfg = config.load(str(trained.folder / "config.yaml"), [], config.FINETUNE)
    else:
        overrides = [f"adapter_checkpoint={trained.folder}"]
        overrides += [f"checkpointer.checkpoint_dir={base}"]
        cfg = config.load("tiny_kasa_generate", overrides, config.GENERATE)
    with pytest.raises(ValueError, match=r"rope_theta is 500000|base 10000 of the run, 500000"):
        module.recipe_main.__wrapped__(cfg)


def test_a_native_adapter_keeps_what_it_belongs_to(trained, load_recipe, base, tmp_path):
    options = {"checkpoint_dir": TINY_MODEL}
    export_of(load_recipe, trained, tmp_path / "native", "native", **options)
    kept = Checkpoint(tmp_path / "native").architecture
    assert to_json(kept) == to_json(read_architecture(TINY_MODEL))
    native = type(trained)(0, tmp_path / "native", None)
    with pytest.raises(CheckpointError, match=TOLD):
        export_of(load_recipe, native, tmp_path / "out", checkpoint_dir=base)


def test_a_peft_adapter_is_not_imported_onto_it(trained, load_recipe, base, tmp_path, unchecked):
    export_of(load_recipe, trained, tmp_path / "peft", "peft", checkpoint_dir=TINY_MODEL)
    sums = json.loads((tmp_path / "peft" / "checksums.json").read_text())
    assert from_json(sums["architecture"], "") == read_architecture(TINY_MODEL)
    module = load_recipe("import_adapter")
    overrides = [f"peft_adapter={tmp_path / 'peft'}", f"output_dir={tmp_path / 'in'}"]
    overrides += [f"checkpointer.checkpoint_dir={base}"]
    told = ["model.rope_base=500000", "model.norm_eps=1e-06"]
    with pytest.raises(ValueError, match=r"another config\.json than .*500000"):
        module.recipe_main.__wrapped__(config.load("tiny_kasa", [*overrides, *told], config.IMPORT))
    (tmp_path / "peft" / "checksums.json").unlink()  # an adapter that says nothing of its base
    with pytest.raises(ValueError, match="rope_theta is 500000, and the model has 10000"):
        module.recipe_main.__wrapped__(config.load("tiny_kasa", overrides, config.IMPORT))
    good = config.load("tiny_kasa", overrides[:2], config.IMPORT)
    assert module.recipe_main.__wrapped__(good) == 0
    assert Checkpoint(tmp_path / "in").architecture == read_architecture(TINY_MODEL)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "before"])
def test_an_adapter_set_takes_it_on_no_model_that_computes_otherwise(trained, kept, tmp_path):
    if not kept:
        before_architectures_were_kept(trained)
    files = FullModelHFCheckpointer(
        str(TINY_MODEL), ["model.safetensors"], "LLAMA3", str(tmp_path / "unused")
    )
    weights = dict(read_base_weights(files))

    def base_of(**values):
        model = llama3(**SIZES, **{"rope_base": 10_000, "norm_eps": 1e-5} | values)
        model.load_state_dict(weights)
        return AdapterSet(model)

    base_of().add("good", trained.folder)
    for values, words in (
        ({"rope_base": 500_000}, "rotary base 10000 of the run, 500000 here"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-05 of the run, 1e-06 here"),
    ):
        adapters = base_of(**values)
        with pytest.raises(CheckpointError, match=words):
            adapters.add("bad", trained.folder)
        assert adapters.names == []


def test_what_run_json_holds_is_not_trusted(trained, load_recipe, tmp_path):
    path = trained.checkpoints[-1]
    parts = {name: Checkpoint(path).part(name) for name in Checkpoint(path).manifest["parts"]}
    parts["run"]["architecture"] |= {"_component_": "os.abort"}
    shutil.rmtree(path)
    save_checkpoint(path.parent, parts["run"]["step"], parts)
    with pytest.raises(ValueError, match=r"run\.json: architecture has unknown values"):
        export_of(load_recipe, trained, tmp_path / "out", checkpoint_dir=TINY_MODEL)


# ---------------------------------------------------------------------------------------- dry run


def dry_run(load_recipe, *overrides):
    cfg = config.load("tiny_kasa", ["dry_run=True", *overrides], config.FINETUNE)
    load_recipe("kasa_finetune_single_device").recipe_main.__wrapped__(cfg)


def test_a_dry_run_compares_shapes_with_the_headers(load_recipe, base, tmp_path, capsys):
    there = [f"output_dir={tmp_path / 'run'}", f"checkpointer.checkpoint_dir={base}"]
    dry_run(load_recipe, *there)
    assert f"config.json and 48 shapes in {base} are those of the model" in capsys.readouterr().out
    path = base / "model.safetensors"
    torch.save({}, base / "other.bin")
    dry_run(load_recipe, *there, "checkpointer.checkpoint_files=[other.bin]")
    assert "would read it whole" in capsys.readouterr().out
    change_config(base, vocab_size=2048)  # as the config then says too, and the weights do not
    with pytest.raises(ValueError, match=r"2 of 48 tensors differ .*the model has \(2048, 128\)"):
        dry_run(load_recipe, *there, "model.vocab_size=2048")
    path.rename(base / "elsewhere")
    dry_run(load_recipe, *there, "model.vocab_size=2048")
    assert "lacks model.safetensors, so shapes were not compared" in capsys.readouterr().out


def test_a_dry_run_goes_on_without_the_folder(load_recipe, tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    dry_run(load_recipe, f"output_dir={tmp_path / 'run'}", f"checkpointer.checkpoint_dir={nowhere}")
    assert (
        f"{nowhere} is not there, so the model was not compared with it" in capsys.readouterr().out
    )
