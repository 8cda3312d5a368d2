"""The QCorDA recipe end to end: every method learns on a base in four bits, and that base is the one that the method's
paper describes, found here once more from the checkpoint's tensors.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.gemma2._convert_weights import gemma2_tune_to_hf
from torchtune.models.llama3 import llama3
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf

from kasa_tune import config
from kasa_tune.components.adapters import CorDALinear, KaSALinear, LoRALinear
from kasa_tune.components.corda import calibration
from kasa_tune.components.linalg.nf4 import NF4Tensor, to_nf4
from kasa_tune.registry import PACKAGE_ROOT
from tests.toy_checkpoints import config_of
from tests.toy_models import FAMILIES, randomized

from .conftest import (
    PLUS_PLUS,
    QUANTIZED,
    SMALL_CALIBRATION,
    SMALL_CORDA_RUN,
    Run,
    assert_same_tree,
    nf4_weights,
    recipe_class,
    run_quantized,
    run_recipe,
)

LINEARS = {"qlora": LoRALinear, "qkasa": KaSALinear}  # of the other methods CorDALinear
KINDS = [f"attn.{kind}_proj" for kind in ("q", "k", "v", "output")] + ["mlp.w1", "mlp.w2", "mlp.w3"]
NAMES = [f"layers.{i}.{kind}" for i in range(5) for kind in KINDS]
# Wide, tall, with fewer outputs than the others, first and last.
LOOKED_AT = ("layers.0.attn.k_proj", "layers.2.mlp.w1", "layers.4.mlp.w2")

# Four bits move a weight by a tenth of its spread and the loss of this model by up to 1.3 %, either way.
FOUR_BITS = 3e-2
# Sums in another order, seven significant digits in each.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def base_weights():
    """The embedded model's weights under torchtune's names, converted by torchtune alone."""
    weights = load_file(PACKAGE_ROOT / "tiny_world" / "model" / "model.safetensors")
    return hf_to_tune(weights, num_heads=8, num_kv_heads=4, dim=128)


@pytest.fixture(scope="module")
def base_model(base_weights):
    """The embedded model in full precision, without adapters, built by torchtune alone."""
    cfg = config.load("tiny_qcorda", [], config.QCORDA)
    sizes = "vocab_size num_layers num_heads num_kv_heads embed_dim max_seq_len intermediate_dim rope_base norm_eps"
    model = llama3(**{name: cfg.model[name] for name in sizes.split()})
    model.load_state_dict(base_weights)
    return model.eval()


def in_nf4(weight: torch.Tensor, block_size: int = 64, scaler_block_size: int = 256) -> NF4Tensor:
    """By torchao alone; the tiny model's layers have 128 blocks, or a multiple of 256."""
    return to_nf4(
        weight.contiguous(), block_size, min(scaler_block_size, weight.numel() // block_size)
    )


def edits(run: Run) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Factors of what every adapter started as, ``s B0`` and ``A0``; of KaSA, of what was taken out."""
    state = run.part("adapter")
    names = [key.removesuffix(".lora_edit_out") for key in state if key.endswith(".lora_edit_out")]
    return {name: (state[f"{name}.lora_edit_out"], state[f"{name}.lora_edit_in"]) for name in names}


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics if "loss" in line]


def decomposition(run: Run) -> dict:
    return json.loads((run.folder / "decomposition.json").read_text())


def forbid(monkeypatch, owner, name: str) -> None:
    monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail(f"{name} was called"))


# ------------------------------------------------------------------------------------------------------------ it learns


@pytest.mark.parametrize("method", QUANTIZED)
def test_it_starts_near_the_base_and_learns(method, whole_quantized, base_model):
    run = whole_quantized(method)
    total, count = 0.0, 0
    for sample in (run.recipe._data.dataset_val[i] for i in range(8)):
        with torch.no_grad():
            logits = base_model(torch.as_tensor(sample["tokens"])[None])[0]
        total += F.cross_entropy(logits, torch.as_tensor(sample["labels"]), reduction="sum").item()
        count += int((sample["labels"] != -100).sum())
    before, after = run.metrics[0], run.metrics[-1]
    assert run.status == 0
    assert before["val_loss"] == pytest.approx(total / count, rel=FOUR_BITS)
    assert before["val_loss_base"] == pytest.approx(total / count, rel=FOUR_BITS)
    assert after["val_loss"] < 0.8 * before["val_loss"]
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    linears = run.recipe._linears
    assert list(linears) == NAMES
    assert {type(linear) for linear in linears.values()} == {LINEARS.get(method, CorDALinear)}
    for linear in linears.values():
        start = linear.edit.dense() if isinstance(linear, CorDALinear) else torch.zeros(())
        assert (
            linear.scaling * linear.lora_b.weight @ linear.lora_a.weight - start
        ).abs().max() > 1e-4


@pytest.mark.parametrize("method", QUANTIZED)
def test_the_adapter_starts_where_its_absence_is(method, whole_quantized):
    """LoRA's update is zero, the others' what was taken out; KaSA's removal alone is felt, on QLoRA's base."""
    before = whole_quantized(method).metrics[0]
    if method == "qkasa":
        assert before["val_loss"] != before["val_loss_base"]
        assert before["val_loss_base"] == whole_quantized("qlora").metrics[0]["val_loss_base"]
    else:
        exactly = method == "qlora"
        assert before["val_loss"] == pytest.approx(
            before["val_loss_base"], rel=0 if exactly else ROUNDING
        )


@pytest.mark.parametrize("method", QUANTIZED)
def test_only_the_adapters_are_trained_and_only_the_blocks_quantized(
    method, whole_quantized, base_weights
):
    run = whole_quantized(method)
    parameters = dict(run.recipe._model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    keys = ["lora_a.weight", "lora_b.weight"] + ["lora_diag"] * (method == "qkasa")
    assert trained.keys() == {f"{name}.{key}" for name in NAMES for key in keys}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {tensor.dtype for tensor in run.part("adapter").values()} == {torch.float32}
    assert list(nf4_weights(run.recipe._model)) == NAMES
    others = base_weights.keys() - {f"{name}.weight" for name in NAMES}
    assert len(others) == 2 * 5 + 3  # two norms a block, the last norm, embedding, output
    for name in others:
        assert_same_tree(
            parameters[name].detach(), torch.nn.Parameter(base_weights[name]).detach(), name
        )


# ---------------------------------------------------------------------------------------------------- what the base is


@pytest.mark.parametrize("method", ["qcorda", "qcorda++", "qpissa"])
def test_the_base_is_what_remains_without_the_start(method, whole_quantized, base_weights):
    run = whole_quantized(method)
    found = edits(run)
    for name, weight in nf4_weights(run.recipe._model).items():
        residual = torch.addmm(base_weights[f"{name}.weight"], *found[name], alpha=-1)
        assert_same_tree(weight, in_nf4(residual), name)


@pytest.mark.parametrize("method", ["qlora", "qkasa"])
def test_the_base_is_the_weight_itself(method, whole_quantized, base_weights):
    for name, weight in nf4_weights(whole_quantized(method).recipe._model).items():
        assert_same_tree(weight, in_nf4(base_weights[f"{name}.weight"]), name)


@pytest.mark.parametrize("method", QUANTIZED)
def test_base_and_start_together_are_within_a_quantization_step_of_the_weight(
    method, whole_quantized, base_weights
):
    """NF4's values lie at most 0.304 of a block's largest magnitude apart, so rounding moves by up to half of that; the
    scales are rounded to 8 bits besides, by less than 0.02 of themselves.
    """
    run = whole_quantized(method)
    for name, weight in nf4_weights(run.recipe._model).items():
        out, into = edits(run).get(name, (None, None)) if method != "qkasa" else (None, None)
        start = out @ into if out is not None else torch.zeros(weight.shape)
        base, full = weight.get_original_weight(), base_weights[f"{name}.weight"]
        residual = (full - start).view(-1, 64)
        moved = (full - start - base).view(-1, 64).abs().amax(dim=1) / residual.abs().amax(dim=1)
        # LoftQ's last residual is not the one that was quantized, but that of the turn before.
        assert moved.max() <= (0.25 if method == "loftq" else 0.304 / 2 + 0.02), name
        assert moved.max() > 0.02, name


def test_qcorda_starts_from_the_components_it_wrote_down(whole_quantized, base_weights):
    run = whole_quantized("qcorda")
    stored = load_file(run.folder / "decomposition" / "ipm.safetensors")
    for name, (out, into) in edits(run).items():
        vectors, weight = (
            stored[f"{name}.vectors"].double(),
            base_weights[f"{name}.weight"].double(),
        )
        assert vectors.shape[1] == 16
        torch.testing.assert_close(
            vectors.T @ vectors, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-5
        )
        component = vectors @ (vectors.T @ weight)
        torch.testing.assert_close(out.double() @ into.double(), component, rtol=1e-5, atol=1e-6)


def largest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The part of a matrix that its first ``rank`` singular triplets carry, float64."""
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vh[:rank]


def test_qpissa_starts_from_the_first_singular_triplets(whole_quantized, base_weights):
    for name, (out, into) in edits(whole_quantized("qpissa")).items():
        wanted = largest(base_weights[f"{name}.weight"], 16)
        torch.testing.assert_close(out.double() @ into.double(), wanted, rtol=1e-4, atol=1e-5)


def test_qkasa_removes_the_last_singular_triplet_beside_the_base(whole_quantized, base_weights):
    run = whole_quantized("qkasa")
    assert not any(linear.folded for linear in run.recipe._linears.values())
    for name, (out, into) in edits(run).items():
        weight = base_weights[f"{name}.weight"].double()
        values = torch.linalg.svdvals(weight)
        remaining = torch.linalg.svdvals(weight - out.double() @ into.double())
        torch.testing.assert_close(remaining[:-1], values[:-1], rtol=1e-5, atol=1e-6)
        assert remaining[-1] < 1e-5
        assert torch.linalg.matrix_norm(out.double() @ into.double()) == pytest.approx(
            values[-1].item(), rel=1e-4
        )


def in_turns(
    weight: torch.Tensor, start: torch.Tensor, turns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoftQ's loop (arXiv 2310.08659, algorithm 1) on dense matrices: the last quantized and the last low-rank part."""
    for _ in range(turns):
        base = in_nf4((weight - start).float()).get_original_weight()
        start = largest(weight - base, 16)
    return base, start


def assert_found_in_turns(run: Run, weights, start, turns: int) -> None:
    """A last digit of E may turn a code at the border of two, and that a few others in the turns to come: what comes
    out in the end is the same to a hundredth of what quantization loses.
    """
    for name in LOOKED_AT:
        weight = weights[f"{name}.weight"].double()
        base, wanted = in_turns(weight, start(weight), turns)
        out, into = edits(run)[name]
        lost = torch.linalg.matrix_norm(weight - base)
        assert torch.linalg.matrix_norm(out.double() @ into.double() - wanted) < 0.01 * lost
        if start(
            weight
        ).any():  # QPiSSA quantizes once more, LoftQ keeps what the last turn has quantized
            base = in_nf4((weight - wanted).float()).get_original_weight()
        found = nf4_weights(run.recipe._model)[name].get_original_weight()
        assert torch.linalg.matrix_norm(found - base) < 0.05 * lost


def test_loftq_is_found_in_five_turns(whole_quantized, base_weights):
    assert_found_in_turns(whole_quantized("loftq"), base_weights, torch.zeros_like, 5)


def test_loftq_of_one_turn_gets_back_the_most_that_its_rank_can(qcorda, base_weights):
    """The base is QLoRA's, bit for bit; by Eckart and Young the rank-16 start takes the first values of its error."""
    run = qcorda("adapter.quantization_iterations=1", "max_steps=1", config_name="tiny_loftq")
    for name, weight in nf4_weights(run.recipe._model).items():
        full = base_weights[f"{name}.weight"].double()
        assert_same_tree(weight, in_nf4(full.float()), name)
        error, (out, into) = full - weight.get_original_weight().double(), edits(run)[name]
        left = torch.linalg.matrix_norm(error - out.double() @ into.double()).item()
        assert left == pytest.approx(torch.linalg.svdvals(error)[16:].norm().item(), rel=1e-4)


def test_qpissa_may_find_its_start_again(qcorda, whole_quantized, base_weights):
    run = qcorda("adapter.quantization_iterations=3", "max_steps=1", config_name="tiny_qpissa")
    assert_found_in_turns(run, base_weights, lambda weight: largest(weight, 16), 2)
    losses_of = {}
    for turns, each in ((1, whole_quantized("qpissa")), (3, run)):
        bases = nf4_weights(each.recipe._model)
        losses_of[turns] = sum(
            torch.linalg.matrix_norm(
                base_weights[f"{name}.weight"] - out @ into - bases[name].get_original_weight()
            )
            for name, (out, into) in edits(each).items()
        )
    assert losses_of[3] < losses_of[1]


def test_ranks_and_rounds_of_corda_plus_plus(whole_quantized):
    run = whole_quantized("qcorda++")
    report, spent, budget = decomposition(run), 0, 0
    assert report["mode"] == "ipm"
    assert list(report["layers"]) == NAMES
    for name, linear in run.recipe._linears.items():
        layer = report["layers"][name]
        assert len(layer["scores"]) == 3
        assert layer["round"] == min(range(3), key=layer["scores"].__getitem__)
        assert (
            layer["rank"]
            == linear.rank
            == len(linear.lora_a.weight)
            == edits(run)[name][0].shape[1]
        )
        spent += linear.rank * (linear.in_dim + linear.out_dim)
        budget += 16 * (linear.in_dim + linear.out_dim)
    assert len({layer["rank"] for layer in report["layers"].values()}) > 1
    assert len({layer["round"] for layer in report["layers"].values()}) > 1
    assert budget - (128 + 384) <= spent <= budget


@pytest.mark.parametrize("method", ["qcorda", "qlora"])
def test_linears_without_an_adapter_are_quantized_too(qcorda, base_weights, method):
    only = ["model.attn_modules=[q_proj]", "model.apply_to_mlp=False", "max_steps=2"]
    run = qcorda(*only, config_name=f"tiny_{method}")
    adapted = [f"layers.{i}.attn.q_proj" for i in range(5)]
    assert list(run.recipe._linears) == adapted
    bases = nf4_weights(run.recipe._model)
    assert list(bases) == NAMES
    for name in NAMES:
        if name not in adapted:
            assert type(run.recipe._model.get_submodule(name)) is torch.nn.Linear
            assert_same_tree(bases[name], in_nf4(base_weights[f"{name}.weight"]), name)
    assert losses(run)[-1] < losses(run)[0]
    assert {key.partition(".lora_")[0] for key in run.part("adapter")} == set(adapted)


def test_other_block_sizes(qcorda, base_weights):
    run = qcorda(
        "quantization.block_size=32",
        "quantization.scaler_block_size=128",
        "max_steps=2",
        config_name="tiny_qlora",
    )
    for name, weight in nf4_weights(run.recipe._model).items():
        assert_same_tree(weight, in_nf4(base_weights[f"{name}.weight"], 32, 128), name)
    assert losses(run)[-1] < losses(run)[0]


def test_a_bf16_adapter(qcorda, base_weights):
    """What is taken out before quantization is what the rounded start puts back."""
    run = qcorda(
        "adapter.dtype=bf16", "max_steps=2", "run_val_every_n_steps=2", config_name="tiny_qpissa"
    )
    state = run.part("adapter")
    assert {tensor.dtype for key, tensor in state.items() if "edit" not in key} == {torch.bfloat16}
    for name, weight in nf4_weights(run.recipe._model).items():
        out, into = edits(run)[name]
        assert torch.equal(into.bfloat16().float(), into)
        assert_same_tree(
            weight, in_nf4(torch.addmm(base_weights[f"{name}.weight"], out, into, alpha=-1)), name
        )
    before = run.metrics[0]
    assert before["val_loss"] == pytest.approx(
        before["val_loss_base"], rel=1e-3
    )  # the update is multiplied in bf16
    assert run.metrics[-1]["val_loss"] < before["val_loss"]


def test_a_bf16_model_has_codes_of_the_full_precision_weights(
    qcorda, whole_quantized, base_weights
):
    run = qcorda("dtype=bf16", "max_steps=2", "run_val_every_n_steps=2", config_name="tiny_qlora")
    for name, weight in nf4_weights(run.recipe._model).items():
        wanted = in_nf4(base_weights[f"{name}.weight"])
        assert weight.dtype == torch.bfloat16
        for part in ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean"):
            assert_same_tree(getattr(weight, part), getattr(wanted, part), f"{name}.{part}")
    assert {tensor.dtype for tensor in run.part("adapter").values()} == {torch.float32}
    exact = whole_quantized("qlora").metrics[0]["val_loss"]
    assert run.metrics[0]["val_loss"] == pytest.approx(exact, rel=2e-2)  # activations of 8 bits
    assert run.metrics[-1]["val_loss"] < run.metrics[0]["val_loss"]


FAMILIES_OF_CHECKPOINTS = {  # torchtune's model type, from torchtune's names to the file's
    "qwen2": ("QWEN2", qwen2_tune_to_hf),  # biases
    "gemma2": (
        "GEMMA2",
        gemma2_tune_to_hf,
    ),  # embedding and output are one, an attention of its own
    "phi3": ("PHI3_MINI", phi3_tune_to_hf),  # q, k and v in one linear, w1 and w3 in another
}


@pytest.mark.parametrize("name", FAMILIES_OF_CHECKPOINTS)
def test_other_families_of_models(qcorda, tmp_path, name):
    """A toy of random numbers in the file layout of its family: its base, and what goes on from the first step."""
    family, (model_type, convert) = FAMILIES[name], FAMILIES_OF_CHECKPOINTS[name]
    sizes = family.sizes | {"vocab_size": 1024, "max_seq_len": 512, "num_kv_heads": 4}
    weights = randomized(family.base(**sizes)).state_dict()
    head_dim = {key: sizes[key] for key in ("head_dim",) if key in sizes}
    shape = {"num_heads": 4, "num_kv_heads": 4, "dim": 32, **head_dim} if name != "phi3" else {}
    files = convert(weights, **shape)
    (tmp_path / "base").mkdir()
    save_file(
        {key: value.clone() for key, value in files.items()},
        tmp_path / "base" / "model.safetensors",
    )
    about = config_of(name, sizes)
    (tmp_path / "base" / "config.json").write_text(json.dumps(about))
    adapters = {"attn_modules": ["q_proj", "v_proj"], "apply_to_mlp": True, "rank": 4, "alpha": 8}
    model = {"_component_": f"kasa_tune.components.models.corda_{name}", **sizes, **adapters}
    overrides = [f"model={json.dumps(model)}", f"checkpointer.checkpoint_dir={tmp_path / 'base'}"]
    overrides += [f"checkpointer.model_type={model_type}", "run_val_every_n_steps=4", "max_steps=4"]
    run = qcorda(*overrides)
    parameters = {
        key.replace("._orig_mod", ""): p for key, p in run.recipe._model.named_parameters()
    }
    bases, found = nf4_weights(run.recipe._model), edits(run)
    assert bases.keys() > found.keys()
    for key, weight in weights.items():
        linear = key.removesuffix(".weight")
        if linear in bases:
            start = found.get(
                linear, (weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1]))
            )
            residual = torch.addmm(weight, *start, alpha=-1)
            blocks = weight.numel() // 64
            scalers = max(size for size in range(1, min(256, blocks) + 1) if blocks % size == 0)
            assert_same_tree(bases[linear], to_nf4(residual, 64, scalers), key)
        else:
            assert torch.equal(parameters[key], weight), key
    assert sum(
        key.startswith("layers.") and value.ndim == 2 for key, value in weights.items()
    ) == len(bases)
    before = run.metrics[0]
    assert before["val_loss"] == pytest.approx(before["val_loss_base"], rel=ROUNDING)
    assert losses(run)[-1] < losses(run)[0]
    shutil.rmtree(run.checkpoints[-1])
    resumed = qcorda(*overrides, "resume_from_checkpoint=True")
    assert resumed.curve == run.curve


# ---------------------------------------------------------------------------------------------------- found once


def test_a_corda_run_and_a_qcorda_run_share_what_they_find(corda, qcorda, monkeypatch, tmp_path):
    same, cache = ["max_steps=1", *PLUS_PLUS], f"calibration.cache_dir={tmp_path / 'cache'}"
    full = corda(*same, cache, name="full")
    fresh = qcorda(*same, name="fresh")
    forbid(monkeypatch, calibration, "covariances")
    sharing = qcorda(*same, cache, name="sharing")
    assert decomposition(fresh) == decomposition(sharing) == decomposition(full)
    assert_same_tree(edits(sharing), edits(full))
    assert_same_tree(edits(fresh), edits(full))
    assert_same_tree(nf4_weights(fresh.recipe._model), nf4_weights(sharing.recipe._model))


@pytest.mark.parametrize("method", QUANTIZED)
def test_only_qcorda_looks_at_data_beforehand(method, whole_quantized):
    run = whole_quantized(method)
    calibrator = run.recipe._calibrator
    rounds = len(calibrator.rounds) if calibrator else 0
    assert rounds == {"qcorda": 1, "qcorda++": 3}.get(method, 0)
    assert (run.folder / "decomposition").exists() == method.startswith("qcorda")
    assert (run.folder / "decomposition.json").exists() == (method not in ("qlora", "qkasa"))


# --------------------------------------------------------------------------------------------------- equivalent runs


@pytest.mark.parametrize(
    ("method", "recipe", "schema", "calibrates"),
    [
        ("corda", "corda_finetune_single_device", "CORDA", True),
        ("pissa", "corda_finetune_single_device", "CORDA", False),
        ("lora", "kasa_finetune_single_device", "FINETUNE", False),
        ("kasa", "kasa_finetune_single_device", "FINETUNE", False),
    ],
)
def test_without_rounding_it_is_the_full_precision_recipe(
    qcorda, qcorda_recipe, load_recipe, monkeypatch, tmp_path, method, recipe, schema, calibrates
):
    same = ["max_steps=3", "optimizer.lr=4e-3", "run_val_every_n_steps=3", "adapter.dtype=fp32"]
    same += ["model.edit_storage=factored"] * (method == "kasa")
    monkeypatch.setattr(qcorda_recipe, "quantize", lambda weight, **_: weight)
    unrounded = qcorda(*same, config_name=f"tiny_q{method}")
    assert len(unrounded.curve) == 4
    assert not nf4_weights(unrounded.recipe._model)
    options = {"config_name": f"tiny_{method}", "schema": getattr(config, schema)}
    small = SMALL_CORDA_RUN + SMALL_CALIBRATION * calibrates
    full = run_recipe(load_recipe(recipe), tmp_path / "full", *same, small=small, **options)
    logged = {
        name for line in unrounded.metrics for name in line
    }  # of LoRA, the kasa recipe logs regularizers too
    assert unrounded.curve == [tuple((k, v) for k, v in line if k in logged) for line in full.curve]


TWO_STEPS = ["calibration.max_seq_len=256", "max_steps=2"]


@pytest.fixture(scope="module")
def plain(qcorda_recipe, tmp_path_factory) -> Run:
    """Two steps of QCorDA on the same 8 samples, whole ones to calibrate on."""
    return run_quantized(qcorda_recipe, tmp_path_factory.mktemp("plain") / "run", *TWO_STEPS)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(["enable_activation_checkpointing=True"], id="activation checkpointing"),
        pytest.param(["batch_size=2", "gradient_accumulation_steps=4"], id="accumulation"),
        pytest.param(["dataset.packed=True"], id="packing"),
        pytest.param(["loss.chunk_size=7"], id="loss in chunks"),
    ],
)
def test_runs_that_compute_the_same_have_the_same_curve(qcorda, plain, changed):
    run = qcorda(*TWO_STEPS, *changed)
    assert losses(run) == pytest.approx(losses(plain), rel=2e-4)
    assert [line["num_tokens"] for line in run.metrics] == [
        line["num_tokens"] for line in plain.metrics
    ]
    assert run.part("adapter").keys() == plain.part("adapter").keys()


@pytest.mark.slow
def test_compiled_equals_eager(qcorda, plain):
    compiled = qcorda(*TWO_STEPS, "compile=True")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)


# ------------------------------------------------------------------------------------- before anything is computed


def test_dry_run_prints_the_size_in_four_bits_and_writes_nothing(
    qcorda_recipe, whole_quantized, tmp_path, capsys
):
    overrides = [
        *SMALL_CORDA_RUN,
        *SMALL_CALIBRATION,
        f"output_dir={tmp_path / 'run'}",
        "dry_run=True",
    ]
    cfg = config.load("tiny_qcorda", overrides, config.QCORDA)
    recipe_class(qcorda_recipe)(cfg).setup(cfg)
    sizes = {}
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(" MiB"):
            purpose, size, _ = line.rsplit(maxsplit=2)
            sizes[purpose.strip()] = float(size.replace(",", ""))
    model = whole_quantized("qcorda").recipe._model
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    parts = [
        getattr(w, part) for w in nf4_weights(model).values() for part in w.__tensor_flatten__()[0]
    ]
    others = [parameter for parameter in frozen if not isinstance(parameter, NF4Tensor)]
    in_mib = {
        "base weights in NF4": sum(part.numel() * part.element_size() for part in parts) / 2**20,
        "base weights": sum(parameter.numel() * 4 for parameter in others) / 2**20,
        "one block unquantized": 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128) / 2**20,
    }
    for purpose, size in in_mib.items():
        assert sizes[purpose] == pytest.approx(size, abs=0.06), purpose
    assert sizes["calibration hidden states"] > 0
    assert not (tmp_path / "run").exists()
