"""Training from an adapter: one of ours, or one that PEFT saved and import_adapter brought here."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_tune import config
from kasa_tune.components.adapters.state import adapter_state_dict
from kasa_tune.components.checkpoints import find_checkpoint, load_part
from kasa_tune.components.exchange.native import write_native
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.quantized.base import FOLDER
from kasa_tune.registry import PACKAGE_ROOT
from tests.tolerances import assert_same_bits

from .conftest import (
    SMALL_CALIBRATION,
    SMALL_CORDA_RUN,
    Run,
    nf4_weights,
    run_pair,
    run_quantized,
    run_recipe,
)

TINY_MODEL = PACKAGE_ROOT / "tiny_world" / "model"
# Every sample in every step, so that a step's loss is that of the adapter alone, but for the order of the sums.
ALL_IN_A_STEP = [*SMALL_CORDA_RUN, "dataset_val=null"]


def loss_of_step(run: Run, step: int) -> float:
    return next(line["loss"] for line in run.metrics if line["step"] == step)


def assert_same_tensors(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert_same_bits(left[name], right[name])


def set_up(module, folder, *overrides, **options) -> Run:
    """A run up to its first step."""
    cfg = config.load(
        options.pop("config_name"), [f"output_dir={folder}", *ALL_IN_A_STEP, *overrides], **options
    )
    (recipe,) = (
        made(cfg)
        for name, made in vars(module).items()
        if name.endswith("FinetuneRecipeSingleDevice")
    )
    recipe.setup(cfg)
    return Run(0, folder, recipe)


# ----------------------------------------------------------------------------------------------------- from one of ours


@pytest.mark.parametrize(
    "config_name", ["tiny_kasa", "tiny_lora", "tiny_dora", "tiny_corda", "tiny_pissa"]
)
def test_a_run_starts_with_the_adapter_of_another(load_recipe, tmp_path, config_name):
    """Its first loss is that of the other's next step; optimizer, schedule and step are new."""
    of_kasa = config_name in ("tiny_kasa", "tiny_lora")
    module = load_recipe(f"{'kasa' if of_kasa else 'corda'}_finetune_single_device")
    small = [*ALL_IN_A_STEP, *SMALL_CALIBRATION * (config_name == "tiny_corda"), "epochs=5"]
    options = {
        "config_name": config_name,
        "schema": config.FINETUNE if of_kasa else config.CORDA,
        "small": small,
    }
    longer = run_recipe(
        module, tmp_path / "longer", "max_steps=3", "save_every_n_steps=2", **options
    )
    run = run_recipe(
        module,
        tmp_path / "run",
        "max_steps=2",
        f"adapter_checkpoint={longer.checkpoints[0]}",
        "seed=7",
        **options,
    )
    assert loss_of_step(run, 1) == pytest.approx(loss_of_step(longer, 3), rel=1e-4)
    assert abs(loss_of_step(longer, 1) - loss_of_step(longer, 3)) > 0.01
    assert [line["step"] for line in run.metrics if line["step"]] == [1, 2]
    assert run.part("run")["step"] == 2
    assert {state["step"].item() for state in run.part("optimizer")["state"].values()} == {2}
    assert not (run.folder / "decomposition.json").exists()


def test_the_adapter_is_taken_over_in_every_bit_and_nothing_is_calibrated(
    corda_recipe, corda, tmp_path
):
    """Also per-layer ranks, which the config does not tell."""
    first = corda("calibration.rounds=2", "adapter.dynamic_ranks=True", name="first")
    overrides = ["adapter.dynamic_ranks=True", "calibration.rounds=2"]
    options = {"config_name": "tiny_corda", "schema": config.CORDA}
    run = set_up(
        corda_recipe, tmp_path / "run", *overrides, f"adapter_checkpoint={first.folder}", **options
    )
    assert_same_tensors(adapter_state_dict(run.recipe._model), first.part("adapter"))
    assert run.recipe._calibrator is None
    assert run.recipe.steps.step == 0
    ranks = {linear.rank for linear in run.recipe._linears.values()}
    assert len(ranks) > 1


def test_resuming_goes_before_the_adapter(finetune, load_recipe, tmp_path):
    """A run that was started with one goes on as itself, wherever the adapter is now."""
    options = {
        "config_name": "tiny_lora",
        "small": [*ALL_IN_A_STEP, "save_every_n_steps=1", "epochs=5"],
    }
    other = finetune("max_steps=2", name="other", **options)
    start = f"adapter_checkpoint={other.folder}"
    whole = finetune(start, "max_steps=4", name="whole", **options)
    finetune(start, "max_steps=2", name="cut", **options)
    moved = other.checkpoints[0]
    rest = finetune(
        f"adapter_checkpoint={moved}",
        "max_steps=4",
        "resume_from_checkpoint=True",
        name="cut",
        **options,
    )
    assert rest.curve == whole.curve
    assert_same_tensors(rest.part("adapter"), whole.part("adapter"))


@pytest.mark.parametrize("method", ["qcorda", "qlora", "qkasa"])
def test_a_quantized_run_brings_its_base(whole_quantized, qcorda_recipe, tmp_path, method):
    first = whole_quantized(method)
    overrides = [f"adapter_checkpoint={first.folder}"]
    run = set_up(
        qcorda_recipe,
        tmp_path / "run",
        *overrides,
        config_name=f"tiny_{method}",
        schema=config.QCORDA,
    )
    assert_same_tensors(nf4_weights(run.recipe._model), nf4_weights(first.recipe._model))
    assert_same_tensors(adapter_state_dict(run.recipe._model), first.part("adapter"))
    assert run.recipe._fingerprints["quantized_base"] == first.part("run")["quantized_base"]
    assert run.recipe._calibrator is None
    assert (run.folder / FOLDER).is_dir()


def test_a_quantized_run_starts_from_a_native_adapter_and_resumes(
    whole_quantized, qcorda_recipe, tmp_path
):
    """The native adapter holds the quantized base; the new run keeps a copy and needs the adapter no more."""
    native = tmp_path / "native"
    native.mkdir()
    write_native(open_run(whole_quantized("loftq").folder), native)
    options = {"config_name": "tiny_loftq"}
    small = ["dataset_val=null", "save_every_n_steps=1"]
    start = [*small, f"adapter_checkpoint={native}"]
    whole = run_quantized(qcorda_recipe, tmp_path / "whole", *start, "max_steps=3", **options)
    run_quantized(qcorda_recipe, tmp_path / "cut", *start, "max_steps=2", **options)
    native.rename(tmp_path / "elsewhere")
    resume = [*small, "resume_from_checkpoint=True", "max_steps=3"]
    rest = run_quantized(qcorda_recipe, tmp_path / "cut", *resume, **options)
    assert rest.curve == whole.curve
    assert_same_tensors(rest.part("adapter"), whole.part("adapter"))


def test_a_plain_lora_starts_on_freshly_quantized_weights(finetune, qcorda_recipe, tmp_path):
    lora = finetune("max_steps=2", name="lora", config_name="tiny_lora", small=ALL_IN_A_STEP)
    options = {"config_name": "tiny_qlora", "schema": config.QCORDA}
    fresh = set_up(qcorda_recipe, tmp_path / "fresh", **options)
    run = set_up(qcorda_recipe, tmp_path / "run", f"adapter_checkpoint={lora.folder}", **options)
    assert_same_tensors(nf4_weights(run.recipe._model), nf4_weights(fresh.recipe._model))
    assert_same_tensors(adapter_state_dict(run.recipe._model), lora.part("adapter"))


def test_nothing_is_taken_out_for_an_adapter_that_took_nothing(corda, qcorda_recipe, tmp_path):
    """Whatever adapter.method would start with: the weights that are quantized are W0 itself."""
    lora = corda("adapter.method=lora", "max_steps=1", name="lora", config_name="tiny_pissa")
    fresh = set_up(
        qcorda_recipe, tmp_path / "fresh", config_name="tiny_qlora", schema=config.QCORDA
    )
    start = f"adapter_checkpoint={lora.folder}"
    run = set_up(
        qcorda_recipe, tmp_path / "run", start, config_name="tiny_qpissa", schema=config.QCORDA
    )
    assert_same_tensors(nf4_weights(run.recipe._model), nf4_weights(fresh.recipe._model))
    assert_same_tensors(adapter_state_dict(run.recipe._model), lora.part("adapter"))
    assert not (run.folder / "decomposition.json").exists()


def test_what_was_taken_out_of_other_weights_is_refused(
    finetune, corda, qcorda, whole_quantized, tmp_path
):
    kasa = finetune("max_steps=1", small=ALL_IN_A_STEP, name="kasa")
    with pytest.raises(
        ValueError, match=r"took out of full-precision weights; here they are quantized"
    ):
        qcorda(f"adapter_checkpoint={kasa.folder}", config_name="tiny_qkasa")
    with pytest.raises(
        ValueError, match=r"out of weights before they were quantized; here they are not"
    ):
        corda(f"adapter_checkpoint={whole_quantized('qpissa').folder}", config_name="tiny_pissa")
    for setting, message in {
        "quantization.block_size=32": r"quantization: saved {'block_size': 64.*now {'block_size': 32",
        "dtype=bf16": "dtype: saved fp32, now bf16",
    }.items():
        with pytest.raises(
            ValueError, match=rf"brings its quantized base, made with other settings: .*{message}"
        ):
            qcorda(
                f"adapter_checkpoint={whole_quantized('qlora').folder}",
                setting,
                config_name="tiny_qlora",
            )


def test_a_quantized_lora_starts_on_full_precision_weights(load_recipe, whole_quantized, tmp_path):
    """Nothing was taken out, so nothing is missing."""
    first = whole_quantized("qlora")
    module, options = load_recipe("kasa_finetune_single_device"), {"config_name": "tiny_lora"}
    run = set_up(
        module,
        tmp_path / "run",
        f"adapter_checkpoint={first.folder}",
        **options,
        schema=config.FINETUNE,
    )
    assert_same_tensors(adapter_state_dict(run.recipe._model), first.part("adapter"))


def test_an_adapter_of_another_model_or_base_is_refused(finetune, tmp_path):
    first = finetune("max_steps=1", small=ALL_IN_A_STEP, name="first", config_name="tiny_lora")
    start = f"adapter_checkpoint={first.folder}"
    options = {"small": ALL_IN_A_STEP, "config_name": "tiny_lora"}
    with pytest.raises(
        ValueError, match=r"belongs to another model: model\.rank: checkpoint 16, config 8"
    ):
        finetune(start, "model.rank=8", **options)
    with pytest.raises(ValueError, match=r"belongs to another model: model\.rank"):
        finetune(start, "model.rank=8", "dry_run=True", **options)
    with pytest.raises(
        ValueError, match=r"model\._component_: checkpoint '.*lora_llama3', config '.*kasa_llama3'"
    ):
        finetune(start, small=ALL_IN_A_STEP, config_name="tiny_kasa")
    other = tmp_path / "other"
    other.mkdir()
    weights = load_file(TINY_MODEL / "model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, other / "model.safetensors")
    (other / "config.json").write_text((TINY_MODEL / "config.json").read_text())
    with pytest.raises(ValueError, match="belongs to other base weights"):
        finetune(start, f"checkpointer.checkpoint_dir={other}", **options)
    with pytest.raises(
        ValueError, match=r"adapter_checkpoint: got .*nowhere.*, which does not exist"
    ):
        finetune(f"adapter_checkpoint={tmp_path / 'nowhere'}", **options)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        finetune(f"adapter_checkpoint={other}", **options)


def test_a_dry_run_counts_no_calibration(corda_recipe, corda, tmp_path, capsys):
    first = corda("max_steps=1", name="first")
    for start, counted in ((first.folder, False), ("null", True)):
        overrides = ["dry_run=True", f"adapter_checkpoint={start}", *SMALL_CALIBRATION]
        set_up(
            corda_recipe,
            tmp_path / "dry",
            *overrides,
            config_name="tiny_corda",
            schema=config.CORDA,
        )
        assert ("calibration hidden states" in capsys.readouterr().out) == counted


# --------------------------------------------------------------------------------------------------------- from PEFT's


@pytest.fixture
def peft():
    module = pytest.importorskip("peft", reason="needs peft (extra `parity`)")
    pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")
    torch.manual_seed(0)
    return module


TOKENS = torch.arange(3, 67).reshape(2, 32)
KINDS = {
    "lora": {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "kasa": {"kasa_config": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora": {"use_dora": True},
}


def saved_by_peft(peft, folder, **options) -> torch.Tensor:
    """A PEFT adapter of the tiny model, as after a training; its logits."""
    import transformers

    if options.get("kasa_config"):
        options["kasa_config"] = peft.KasaConfig()
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=6, **{"target_modules": "all-linear"} | options)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        logits = model.eval()(TOKENS).logits
    model.save_pretrained(folder)
    return logits


def peft_logits(peft, folder) -> torch.Tensor:
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(base, folder).eval()(TOKENS).logits


def imported(run_main, capsys, *arguments: str) -> tuple[str, list[str]]:
    """Run import_adapter; the recipe it names and the arguments it says to give it."""
    assert run_main("import_adapter", "--config", "tiny_lora", *arguments) == 0
    command, _, keys = (
        capsys.readouterr().out.splitlines()[-1].partition("> output_dir=<a new folder> ")
    )
    return command.split()[2], shlex.split(keys)


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_pefts_adapter(peft, load_recipe, run_main, tmp_path, capsys, kind):
    """With the printed keys alone: before the first step PEFT's logits, after it a step's; then back to PEFT."""
    expected = saved_by_peft(peft, tmp_path / "peft", **KINDS[kind])
    out = tmp_path / "imported"
    recipe, keys = imported(
        run_main, capsys, f"peft_adapter={tmp_path / 'peft'}", f"output_dir={out}", "dtype=fp32"
    )
    method = recipe.partition("_")[0]
    assert method == {"pissa": "corda"}.get(kind, "kasa")
    assert f"adapter_checkpoint={out}" in keys
    module, schema = load_recipe(recipe), {"kasa": config.FINETUNE, "corda": config.CORDA}[method]
    options = {"config_name": "tiny_lora", "schema": schema}
    run = set_up(module, tmp_path / "setup", *keys, **options)
    with torch.no_grad():
        model = run.recipe._model.eval()
        got = model.output(model(TOKENS))
    assert torch.linalg.vector_norm(got - expected) < 5e-5 * torch.linalg.vector_norm(expected)
    small = [*ALL_IN_A_STEP, "max_steps=2"]
    trained = run_recipe(module, tmp_path / "run", *keys, small=small, **options)
    assert loss_of_step(trained, 2) < loss_of_step(trained, 1)
    before, after = load_part(out, "adapter"), trained.part("adapter")
    moved = {
        name.rpartition(".lora_")[2]
        for name in before
        if not torch.equal(before[name], after[name])
    }
    assert moved == {"a.weight", "b.weight"} | {"kasa": {"diag"}, "dora": {"magnitude"}}.get(
        kind, set()
    )
    export = [
        "--config",
        "peft_export",
        f"adapter_checkpoint={out}",
        f"output_dir={tmp_path / 'back'}",
    ]
    assert run_main("export_adapter", *export) == 0
    back = peft_logits(peft, tmp_path / "back")
    assert torch.linalg.vector_norm(back - expected) < 5e-5 * torch.linalg.vector_norm(expected)


@pytest.mark.parity
def test_prompts_are_completed_with_an_imported_adapter(peft, run_main, tmp_path, capsys):
    saved_by_peft(peft, tmp_path / "peft", **KINDS["lora"])
    out = tmp_path / "imported"
    _, keys = imported(run_main, capsys, f"peft_adapter={tmp_path / 'peft'}", f"output_dir={out}")
    few = ["num_samples=2", "max_new_tokens=8", f"output_dir={tmp_path / 'completions'}"]
    assert run_main("generate_text", "--config", "tiny_lora_generate", *keys, *few) == 0
    rows = [
        json.loads(line)
        for line in (tmp_path / "completions" / "completions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2
    assert all(row["base"] != row["tuned"] for row in rows)


@pytest.mark.parity
def test_nothing_is_left_behind_and_nothing_overwritten(peft, run_main, tmp_path, monkeypatch):
    saved_by_peft(peft, tmp_path / "peft", target_modules=["q_proj", "v_proj"])
    out = tmp_path / "out" / "imported"
    arguments = [
        "--config",
        "tiny_lora",
        f"peft_adapter={tmp_path / 'peft'}",
        f"output_dir={out}",
        "dtype=bf16",
    ]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("kasa_tune.components.checkpoints.writing.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run_main("import_adapter", *arguments)
    assert list(out.parent.iterdir()) == []
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    good = weights.read_bytes()
    state = load_file(weights)
    next(reversed(state.values())).fill_(torch.nan)
    save_file(state, weights)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        run_main("import_adapter", *arguments)
    assert list(out.parent.iterdir()) == []
    weights.write_bytes(good)
    assert run_main("import_adapter", *arguments) == 0
    assert find_checkpoint(out).path == out
    with pytest.raises(FileExistsError, match="exists already; choose another output_dir"):
        run_main("import_adapter", *arguments)


def test_the_config_says_what_is_missing(run_main, tmp_path, capsys):
    """Keys of training configs are not looked at; what import needs is."""
    arguments = [
        f"output_dir={tmp_path / 'out'}",
        "dataset.data_files=/nowhere.jsonl",
        "adapter.beta=3",
    ]
    with pytest.raises(SystemExit):
        run_main("import_adapter", "--config", "tiny_lora", *arguments)
    assert "peft_adapter: missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_main(
            "import_adapter",
            "--config",
            "tiny_lora",
            *arguments,
            f"peft_adapter={tmp_path / 'none'}",
            "rank=3",
        )
    told = capsys.readouterr().err
    assert "2 problems" in told
    assert "peft_adapter: got " in told
    assert "rank: unknown key" in told
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="is no PEFT adapter"):
        run_main(
            "import_adapter",
            "--config",
            "tiny_qcorda",
            *arguments[:1],
            f"peft_adapter={tmp_path / 'none'}",
        )
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_write_into_what_it_starts_from(finetune):
    run = finetune("max_steps=1", name="first")
    with pytest.raises(
        config.ConfigError, match=r"output_dir: got .*first', which is adapter_checkpoint"
    ):
        finetune(f"adapter_checkpoint={run.folder}", name="first")


# --------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("method", ["corda", "qlora"])
def test_two_processes_start_as_one_does(finetune, load_recipe, tmp_path, method):
    """From the same adapter: on full-precision weights, and on freshly quantized ones."""
    recipe, schema = {"corda": ("corda", config.CORDA), "qlora": ("qcorda", config.QCORDA)}[method]
    module, config_name = load_recipe(f"{recipe}_finetune_single_device"), f"tiny_{method}"
    small = [*ALL_IN_A_STEP, "max_steps=2"]
    if method == "qlora":
        first = finetune("max_steps=2", name="first", config_name="tiny_lora", small=small)
    else:
        options = {"config_name": config_name, "schema": schema, "small": small}
        first = run_recipe(module, tmp_path / "first", *SMALL_CALIBRATION, **options)
    start = [f"adapter_checkpoint={first.folder}", "calibration.num_samples=8"]
    alone = run_recipe(
        module, tmp_path / "alone", *start, config_name=config_name, schema=schema, small=small
    )
    overrides = [f"output_dir={tmp_path / 'both'}", *small, *start, "batch_size=4"]
    entry = {"name": "both", "recipe": recipe, "config": config_name, "overrides": overrides}
    both = run_pair(entry, tmp_path)
    assert both.status == 0, both.ends
    for step in (1, 2):
        assert loss_of_step(both, step) == pytest.approx(loss_of_step(alone, step), rel=1e-4)
    assert not (both.folder / "decomposition.json").exists()
    if recipe == "qcorda":
        assert both.part("run")["quantized_base"] == alone.part("run")["quantized_base"]
