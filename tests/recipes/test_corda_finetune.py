"""The CorDA recipe end to end: every method learns from the base, decompositions are those of the dense matrices, and
what was found once is found again.
"""

import json
import math
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from torchtune.models.llama3 import llama3

from kasa_tune import config
from kasa_tune.components import checkpoints
from kasa_tune.components.adapters import CorDALinear, LoRALinear
from kasa_tune.components.corda import all_layers, calibration, calibrator
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.components.training import Step
from kasa_tune.components.training.loggers import read_metrics
from kasa_tune.methods import methods_of
from kasa_tune.registry import PACKAGE_ROOT

from .conftest import (
    PLUS_PLUS,
    SMALL_CALIBRATION,
    SMALL_CORDA_RUN,
    Run,
    assert_same_run,
    assert_same_tree,
    copy_run,
    recipe_class,
    run_corda,
)

FACTS = PACKAGE_ROOT / "tiny_world" / "data" / "facts_calibration.jsonl"
SCHEDULE = (
    "lr_scheduler={_component_: kasa_tune.components.training.cosine_schedule, num_warmup_steps: 1}"
)
# 3 steps an epoch, random numbers in each.
RESUMABLE = [
    *PLUS_PLUS,
    "model.dropout=0.1",
    "dataset.split=train[:20]",
    "epochs=2",
    "max_steps=6",
    SCHEDULE,
]
STARTS = {
    **{method.name: (f"tiny_{method.name}", []) for method in methods_of("corda_finetune")},
    "corda++": ("tiny_corda", PLUS_PLUS),
    "lora": ("tiny_corda", ["adapter.method=lora"]),
}
LORA_LINEARS = [f"tiny_{m.name}" for m in methods_of("corda_finetune") if "lora" in m.builders]


@pytest.fixture(scope="module")
def base_model():
    """The embedded model without adapters, built by torchtune alone."""
    cfg = config.load("tiny_corda", [], config.CORDA)
    sizes = "vocab_size num_layers num_heads num_kv_heads embed_dim max_seq_len intermediate_dim rope_base norm_eps"
    model = llama3(**{name: cfg.model[name] for name in sizes.split()})
    model.load_state_dict(read_base_weights(config.instantiate(cfg.checkpointer)))
    return model.eval()


@pytest.fixture(scope="module")
def plus_plus(corda_recipe, tmp_path_factory) -> Run:
    """A whole run of CorDA++, which nothing interrupts; random numbers in every step."""
    folder = tmp_path_factory.mktemp("plus_plus") / "run"
    return run_corda(corda_recipe, folder, *RESUMABLE)


@pytest.fixture
def found(plus_plus, tmp_path):
    """A copy of what the CorDA++ run has found, as a folder for ``calibration.cache_dir``."""
    return shutil.copytree(plus_plus.folder / "decomposition", tmp_path / "found")


def forbid(monkeypatch, owner, name: str) -> None:
    monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail(f"{name} was called"))


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics if "loss" in line]


def decomposition(run: Run) -> dict:
    return json.loads((run.folder / "decomposition.json").read_text())


def edits(run: Run) -> dict[str, torch.Tensor]:
    """What was taken out of every weight, dense."""
    state = run.part("adapter")
    names = [key.removesuffix(".lora_edit_out") for key in state if key.endswith(".lora_edit_out")]
    return {name: state[f"{name}.lora_edit_out"] @ state[f"{name}.lora_edit_in"] for name in names}


# ------------------------------------------------------------------------------------------------------------ it learns


@pytest.mark.parametrize(("config_name", "overrides"), STARTS.values(), ids=STARTS)
def test_it_starts_as_the_base_and_learns(corda, base_model, config_name, overrides):
    run = corda(*overrides, config_name=config_name)
    total, count = 0.0, 0
    for sample in (run.recipe._data.dataset[i] for i in range(8)):
        with torch.no_grad():
            logits = base_model(torch.as_tensor(sample["tokens"])[None])[0]
        total += F.cross_entropy(logits, torch.as_tensor(sample["labels"]), reduction="sum").item()
        count += int((sample["labels"] != -100).sum())
    assert losses(run)[0] == pytest.approx(total / count, rel=1e-5)
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    linears = run.recipe._linears.values()
    assert len(linears) == 5 * 7
    assert {type(linear) for linear in linears} == {
        LoRALinear if config_name in LORA_LINEARS else CorDALinear
    }
    for linear in linears:
        learned = linear.scaling * linear.lora_b.weight @ linear.lora_a.weight - linear.edit.dense()
        assert learned.abs().max() > 1e-4


def test_a_factored_edit_computes_the_same_as_a_folded_one(corda, tmp_path):
    cache = f"calibration.cache_dir={tmp_path / 'cache'}"
    folded, factored = (
        corda(f"model.edit_storage={how}", cache, name=how) for how in ("folded", "factored")
    )
    assert losses(factored) == pytest.approx(losses(folded), rel=1e-4)
    assert all(linear.folded for linear in folded.recipe._linears.values())
    assert not any(linear.folded for linear in factored.recipe._linears.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_with_a_factored_edit_the_start_is_the_base_bit_for_bit(corda, dtype):
    run = corda(
        f"dtype={dtype}", "model.edit_storage=factored", "run_val_every_n_steps=2", "max_steps=2"
    )
    before = run.metrics[0]
    assert before["val_loss"] == before["val_loss_base"]
    assert run.metrics[-1]["val_loss"] < before["val_loss"]


def test_a_bf16_base_keeps_a_full_precision_adapter(corda):
    run = corda("dtype=bf16", "max_steps=2", "run_val_every_n_steps=2")
    assert {tensor.dtype for tensor in run.part("adapter").values()} == {torch.float32}
    assert all(
        linear.weight.dtype == torch.bfloat16 and linear.folded
        for linear in run.recipe._linears.values()
    )
    before = run.metrics[0]
    assert before["val_loss"] == pytest.approx(
        before["val_loss_base"], rel=2e-2
    )  # folding rounds to 8 bits
    assert run.metrics[-1]["val_loss"] < before["val_loss"]


def test_activation_checkpointing_changes_nothing(corda):
    plain, checkpointed = (
        corda("max_steps=2", f"enable_activation_checkpointing={on}", name=str(on))
        for on in (False, True)
    )
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)
    assert plain.part("adapter").keys() == checkpointed.part("adapter").keys()
    assert decomposition(checkpointed) == decomposition(plain)


def test_every_other_option_at_once(corda):
    """The published normalization, damping and split, sums in float64, one stream of tokens, pooled wide inputs."""
    published = [
        "adapter.normalization=published",
        "adapter.damping_search=True",
        "adapter.split=paper",
    ]
    rest = [
        "accumulate=fp64",
        "offload=True",
        "concatenate=True",
        "max_selection_dim=128",
        "rounds=2",
        "seed=7",
    ]
    run = corda(*published, *(f"calibration.{each}" for each in rest), "run_val_every_n_steps=4")
    before = run.metrics[0]
    assert before["val_loss"] == pytest.approx(before["val_loss_base"], rel=1e-5)
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    for name, layer in decomposition(run)["layers"].items():
        pooled = name.endswith(".w2")  # 384 inputs, the others have 128
        assert (layer["round"] == -1) == pooled
        assert len(layer["scores"]) == (0 if pooled else 2)


def test_the_bare_algorithm_may_leave_a_layer_without_an_adapter(corda, run_main):
    bare = [*PLUS_PLUS, "model.rank=1", "adapter.min_rank=0", "run_val_every_n_steps=4"]
    run = corda(*bare)
    ranks = {name: layer["rank"] for name, layer in decomposition(run)["layers"].items()}
    assert 0 in ranks.values()
    assert {name: linear.rank for name, linear in run.recipe._linears.items()} == ranks
    assert run.metrics[0]["val_loss"] == pytest.approx(run.metrics[0]["val_loss_base"], rel=1e-5)
    assert losses(run)[-1] < losses(run)[0]
    resumed = corda(*bare, "resume_from_checkpoint=True", "max_steps=5", "epochs=5")
    assert resumed.recipe.steps.step == 5
    assert run_main("report_run", "--config", str(run.folder / "config.yaml")) == 0


# --------------------------------------------------------------------------------- what is taken out of the weights


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_edit_is_that_of_the_dense_matrices(corda, base_model, mode):
    """Against covariances summed in a plain model over the very rows, and a dense SVD: with 8 rows to draw from, 8 are
    drawn, whatever the seed.
    """
    options = [
        "adapter.damping=0.05",
        "calibration.max_seq_len=40",
        "calibration.batch_size=3",
        "max_steps=1",
    ]
    run = corda(f"adapter.mode={mode}", *options)
    adapted, inputs = ("layers.0.attn.k_proj", "layers.4.mlp.w2", "layers.2.mlp.w1"), {}
    for name in adapted:

        def note(_, args, name=name):
            inputs.setdefault(name, []).append(args[0][0].double())

        base_model.get_submodule(name).register_forward_pre_hook(note)
    with torch.no_grad():
        for sample in (run.recipe._data.dataset[i] for i in range(8)):
            base_model(torch.as_tensor(sample["tokens"][:40])[None])
    for name in adapted:
        base_model.get_submodule(name)._forward_pre_hooks.clear()
        x, weight = torch.cat(inputs[name]), base_model.get_submodule(name).weight.detach().double()
        covariance = x.T @ x
        covariance = covariance / covariance.diagonal().mean() + 0.05 * torch.eye(len(covariance))
        values = torch.linalg.svdvals(weight @ covariance)
        wanted = values[:16] if mode == "ipm" else values[-16:]
        stored = torch.tensor(
            decomposition(run)["layers"][name]["singular_values"], dtype=torch.float64
        )
        torch.testing.assert_close(stored.sort().values, wanted.sort().values, rtol=2e-4, atol=1e-5)
        # That the span is the extreme one is said by what it keeps of W C, even where its vectors are hardly apart.
        span = torch.linalg.qr(run.part("adapter")[f"{name}.lora_edit_out"].double()).Q
        kept = torch.linalg.matrix_norm(span.T @ weight @ covariance)
        assert kept.item() == pytest.approx(wanted.norm().item(), rel=1e-3)
        torch.testing.assert_close(
            edits(run)[name].double(), span @ span.T @ weight, rtol=1e-4, atol=1e-5
        )


def test_packing_calibrates_on_the_same_tokens(corda):
    options = ["calibration.max_seq_len=256", "max_steps=1"]
    plain, packed = (
        corda(*options, name="plain"),
        corda(*options, "dataset.packed=True", name="packed"),
    )
    rows = [
        batch["tokens"].shape[0]
        for run in (plain, packed)
        for batch in run.recipe._calibrator.rounds[0]
    ]
    assert rows[0] == 8
    assert rows[1] < 8
    for name, layer in decomposition(plain)["layers"].items():
        other = decomposition(packed)["layers"][name]["singular_values"]
        assert other == pytest.approx(layer["singular_values"], rel=1e-4)
    assert losses(packed) == pytest.approx(losses(plain), rel=1e-4)


def test_decomposition_json_tells_what_was_chosen(plus_plus):
    report, adapter = decomposition(plus_plus), plus_plus.part("adapter")
    assert report["mode"] == "ipm"
    linears = plus_plus.recipe._linears
    assert report["layers"].keys() == linears.keys()
    spent = budget = 0
    for name, layer in report["layers"].items():
        assert layer["rank"] == len(adapter[f"{name}.lora_a.weight"])
        assert layer["solver"]
        assert len(layer["scores"]) == 3
        assert layer["round"] == min(range(3), key=layer["scores"].__getitem__)
        values, full = layer["singular_values"], min(linears[name].in_dim, linears[name].out_dim)
        assert len(values) == full
        assert values == sorted(values, reverse=True)
        chosen = layer["log_compactness"] * sum(values) / values[0]  # CorDA++, equation 9
        assert layer["scores"][layer["round"]] == pytest.approx(chosen, rel=1e-9)
        spent += layer["rank"] * (linears[name].in_dim + linears[name].out_dim)
        budget += 16 * (linears[name].in_dim + linears[name].out_dim)
    assert len({layer["rank"] for layer in report["layers"].values()}) > 1
    assert len({layer["round"] for layer in report["layers"].values()}) > 1
    assert budget - (128 + 384) <= spent <= budget


def test_lora_writes_no_decomposition(corda):
    run = corda("adapter.method=lora", "max_steps=1")
    assert not (run.folder / "decomposition.json").exists()
    assert not (run.folder / "decomposition").exists()


# ---------------------------------------------------------------------------------------------------- found once


def test_a_second_run_reads_what_the_first_found(corda, plus_plus, found, monkeypatch):
    forbid(monkeypatch, calibration, "covariances")
    again = corda(*RESUMABLE, f"calibration.cache_dir={found}")
    assert again.curve == plus_plus.curve
    assert_same_tree(again.part("adapter"), plus_plus.part("adapter"))
    assert decomposition(again) == decomposition(plus_plus)


def test_the_other_mode_reads_the_same_spectra(corda, found, monkeypatch):
    other = [*PLUS_PLUS, "dataset.split=train[:20]", "adapter.mode=kpm", "max_steps=1"]
    fresh = corda(*other, name="fresh")
    forbid(monkeypatch, all_layers, "layer_spectra")
    reusing = corda(*other, f"calibration.cache_dir={found}", name="reusing")
    assert decomposition(reusing) == decomposition(fresh)
    assert_same_tree(reusing.part("adapter"), fresh.part("adapter"))
    assert sorted(path.name for path in found.iterdir()) == [
        f"{n}.safetensors" for n in ("ipm", "kpm", "spectra")
    ]


def test_a_smaller_rank_is_cut_and_a_larger_found(corda, monkeypatch, tmp_path):
    same, cache = ["adapter.mode=kpm", "max_steps=1"], f"calibration.cache_dir={tmp_path / 'cache'}"
    corda(*same, cache, "model.rank=8", name="first")
    with monkeypatch.context() as patch:
        forbid(patch, calibration, "covariances")
        cut = edits(corda(*same, cache, "model.rank=3", name="cut"))
    for name, edit in edits(corda(*same, "model.rank=3", name="fresh")).items():
        torch.testing.assert_close(cut[name], edit, rtol=1e-4, atol=1e-5)
    larger = corda(*same, cache, "model.rank=12", name="larger")
    assert {
        len(layer["singular_values"]) for layer in decomposition(larger)["layers"].values()
    } == {12}


def test_pissa_needs_no_calibration_data(corda, monkeypatch, tmp_path):
    forbid(monkeypatch, calibrator, "draw_rounds")
    cache = f"calibration.cache_dir={tmp_path / 'cache'}"
    corda(cache, "max_steps=1", config_name="tiny_pissa")
    forbid(monkeypatch, all_layers, "co_svd")
    again = corda(cache, "max_steps=1", config_name="tiny_pissa", name="again")
    assert decomposition(again)["mode"] == "ipm"


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [2, 4])  # an epoch has 3 steps
def test_resume_is_bitwise_the_uninterrupted_run(
    corda, corda_recipe, plus_plus, monkeypatch, tmp_path, step
):
    """With every layer's own rank, and without looking at calibration data again."""
    copy_run(plus_plus, tmp_path / "resumed", until_step=step)
    shutil.rmtree(tmp_path / "resumed" / "decomposition")
    forbid(monkeypatch, calibrator, "draw_rounds")
    forbid(monkeypatch, corda_recipe, "decompose")
    resumed = corda(*RESUMABLE, "resume_from_checkpoint=True", name="resumed")
    assert len(plus_plus.metrics) == 6
    assert_same_run(resumed, plus_plus)


def test_resume_under_another_start_is_refused_but_calibration_data_may_move(
    corda, plus_plus, tmp_path
):
    copy_run(plus_plus, tmp_path / "resumed", until_step=4)
    same = [*RESUMABLE, "resume_from_checkpoint=True"]
    for other in (
        "adapter.mode=kpm",
        "adapter.lr_ratio=2",
        "calibration.num_samples=9",
        "calibration.seed=1",
    ):
        with pytest.raises(ValueError, match=rf"other settings.*{other.partition('.')[0]}"):
            corda(*same, other, name="resumed")
    moved = f"calibration.dataset={{_component_: kasa_tune.components.data.instruct_dataset, data_files: {FACTS}}}"
    resumed = corda(
        *same, moved, "calibration.batch_size=2", "calibration.offload=True", name="resumed"
    )
    assert resumed.curve == plus_plus.curve


def test_a_signal_saves_and_resume_goes_on(corda, corda_recipe, plus_plus, monkeypatch):
    steps, apply = [], Step.apply

    def stopped_in_the_third(self, *args, **options):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return apply(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "apply", stopped_in_the_third)
        stopped = corda(*RESUMABLE, "save_every_n_steps=1000", name="stopped")
    assert stopped.status == 128 + signal.SIGTERM
    assert [path.name for path in stopped.checkpoints] == ["step_00000003"]
    resumed = corda(*RESUMABLE, "resume_from_checkpoint=True", name="stopped")
    assert resumed.curve == plus_plus.curve
    assert_same_tree(resumed.part("adapter"), plus_plus.part("adapter"))


# ----------------------------------------------------------------------------------------------------------- LoRA+


def test_b_moves_at_the_ratio_times_the_rate_of_a(corda):
    """AdamW's first step moves every parameter that has a gradient by its learning rate; A has none while B is 0."""
    run = corda(
        "adapter.lr_ratio=5", "optimizer.lr=1e-3", "max_steps=1", config_name="tiny_lora_plus"
    )
    for name, value in run.part("adapter").items():
        if name.endswith("lora_b.weight"):
            moved = value[value != 0].abs()
            assert moved.numel() > 0.9 * value.numel()
            assert moved.median().item() == pytest.approx(5e-3, rel=1e-3)


def test_the_ratio_holds_through_the_schedule_and_after_resume(corda, monkeypatch):
    rates, real_step = [], torch.optim.AdamW.step

    def noted(self):
        if len(self.param_groups) == 2:  # not the trial before the model is built
            rates.append([group["lr"] for group in self.param_groups])
        return real_step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    same = [SCHEDULE, "optimizer.lr=1e-3", "adapter.lr_ratio=4"]
    whole = corda(*same, "max_steps=4", config_name="tiny_lora_plus")
    expected = [
        1e-3 * (0.0 if i < 1 else 0.5 * (1 + math.cos(math.pi * (i - 1) / 3))) for i in range(4)
    ]
    assert [a for a, _ in rates] == pytest.approx(expected)
    assert [b for _, b in rates] == pytest.approx([4 * rate for rate in expected])
    assert [line["lr"] for line in whole.metrics] == pytest.approx(expected)
    before = list(rates)
    shutil.rmtree(whole.checkpoints[-1])
    corda(*same, "max_steps=4", "resume_from_checkpoint=True", config_name="tiny_lora_plus")
    assert rates[len(before) :] == before[2:]


# --------------------------------------------------------------------------------------------- what comes after a run


def test_generation_takes_a_checkpoint_with_a_rank_for_each_layer(
    plus_plus, load_recipe, run_main, tmp_path
):
    outputs = {}
    for name, adapter in {"with": plus_plus.folder, "without": "null"}.items():
        out = tmp_path / name
        few = [
            f"adapter_checkpoint={adapter}",
            "num_samples=3",
            "max_new_tokens=12",
            f"output_dir={out}",
        ]
        assert run_main("generate_text", "--config", "tiny_corda_generate", *few) == 0
        outputs[name] = [
            json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()
        ]
    assert [row["base"] for row in outputs["with"]] == [row["base"] for row in outputs["without"]]
    assert all(row["base"] != row["tuned"] for row in outputs["with"])
    cfg = config.load(
        "tiny_corda_generate", [f"adapter_checkpoint={plus_plus.folder}"], config.GENERATE
    )
    generating = load_recipe("generate_text").GenerateTextRecipe(cfg)
    generating.setup(cfg)
    for name, trained in plus_plus.recipe._linears.items():
        torch.testing.assert_close(
            generating._model.get_submodule(name).merged_weight(),
            trained.merged_weight(),
            rtol=1e-5,
            atol=1e-6,
        )


def test_generation_takes_a_dora_checkpoint(corda, run_main, tmp_path):
    run = corda(config_name="tiny_dora")
    few = [
        f"adapter_checkpoint={run.folder}",
        "num_samples=2",
        "max_new_tokens=12",
        f"output_dir={tmp_path / 'out'}",
    ]
    assert (
        run_main("generate_text", "--config", "tiny_lora_generate", "model.use_dora=True", *few)
        == 0
    )
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()
    ]
    assert all(row["base"] != row["tuned"] for row in rows)
    with pytest.raises(ValueError, match="use_dora"):
        run_main("generate_text", "--config", "tiny_lora_generate", *few)


def test_report_draws_a_run_with_a_rank_for_each_layer(plus_plus, run_main, tmp_path):
    folder = shutil.copytree(plus_plus.folder, tmp_path / "run")
    assert (
        run_main("report_run", "--config", str(folder / "config.yaml"), f"output_dir={folder}") == 0
    )
    for name in ("loss_curve.png", "singular_values.png", "ranks.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (folder / name).stat().st_size > 10_000


def test_report_of_one_rank_for_all_draws_no_ranks(corda, run_main):
    run = corda("max_steps=1")
    assert run_main("report_run", "--config", "tiny_corda", f"output_dir={run.folder}") == 0
    assert (run.folder / "singular_values.png").is_file()
    assert not (run.folder / "ranks.png").exists()


# ------------------------------------------------------------------------------------- before anything is computed


def test_dry_run_prints_the_calibration_budget_and_writes_nothing(corda_recipe, tmp_path, capsys):
    few = [
        *SMALL_CORDA_RUN,
        *SMALL_CALIBRATION,
        "calibration.rounds=2",
        "calibration.num_samples=4",
    ]
    windows = ["calibration.concatenate=True", "calibration.max_seq_len=32"]
    cfg = config.load(
        "tiny_corda",
        [*few, *windows, f"output_dir={tmp_path / 'run'}", "dry_run=True"],
        config.CORDA,
    )
    recipe_class(corda_recipe)(cfg).setup(cfg)
    sizes = {}
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(" MiB"):
            purpose, size, _ = line.rsplit(maxsplit=2)
            sizes[purpose.strip()] = float(size.replace(",", ""))
    assert sizes["calibration hidden states"] == round(2 * 4 * 32 * 128 * 4 / 2**20, 1)
    assert sizes["covariances of one block"] == round((3 * 128**2 + 384**2) * 4 / 2**20, 1)
    assert sizes["CO-SVD workspace"] > 0
    before_training = ("calibration hidden states", "covariances of one block", "CO-SVD workspace")
    sums = ("set-up, at most", "training step")
    during = sum(
        size for purpose, size in sizes.items() if purpose not in (*before_training, *sums)
    )
    assert sizes["training step"] == pytest.approx(during, abs=0.4)
    at_once = sum(sizes[purpose] for purpose in ("base weights", "adapters", *before_training))
    assert sizes["set-up, at most"] == pytest.approx(at_once, abs=0.4)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("schema", "config_name", "builder", "message"),
    [
        ("FINETUNE", "tiny_kasa", "corda_llama3", "which corda_finetune_single_device trains"),
        ("CORDA", "tiny_corda", "kasa_llama3", "which kasa_finetune_single_device trains"),
        (
            "CORDA",
            "tiny_pissa",
            "lora_llama3",
            "adapter.method pissa needs a corda_<model> builder",
        ),
        ("CORDA", "tiny_dora", "kasa_llama3", "which kasa_finetune_single_device trains"),
    ],
)
def test_a_recipe_refuses_the_builders_of_the_other(schema, config_name, builder, message):
    component = f"model._component_=kasa_tune.components.models.{builder}"
    with pytest.raises(config.ConfigError, match=rf"model\._component_.*{message}"):
        config.load(config_name, [component], getattr(config, schema))


def test_a_second_run_in_the_folder_of_a_live_one_touches_nothing(corda, plus_plus, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(plus_plus.folder, folder)
    shutil.rmtree(folder / "checkpoints")  # not one written yet
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with (
        checkpoints.run_lock(folder / "checkpoints"),
        pytest.raises(ValueError, match="another run is writing"),
    ):
        corda(
            "max_steps=1", "dataset.split=train[:20]", "calibration.rounds=3"
        )  # ranks differ, the cache fits
    assert {path: path.read_bytes() for path in before} == before
    assert len(read_metrics(folder / "metrics.jsonl")) == 6
