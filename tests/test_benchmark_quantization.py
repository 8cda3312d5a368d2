"""The quantization benchmarks on tiny inputs: identities that their functions must keep, and the orders they show."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from kasa_tune import config
from kasa_tune.components.linalg.nf4 import quantize
from kasa_tune.tiny_world import evaluate, world

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LOSSLESS = (
    "QLoRA",
    "LoftQ",
    "QPiSSA",
    "QPiSSA 5",
    "QCorDA",
    "QCorDA, p = 1/2",
)  # but for quantization


@pytest.fixture(scope="module")
def scripts():
    """The scripts, which import their neighbours by name; the names are forgotten afterwards."""
    known = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {
            name: importlib.import_module(name)
            for name in ("quantization_error", "quantized_training")
        }
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - known:
            if (BENCHMARKS / f"{name}.py").exists():
                del sys.modules[name]


@pytest.fixture(scope="module")
def error(scripts):
    return scripts["quantization_error"]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A quantizer that anyone can repeat."""
    return (4 * weight).round() / 4


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def covariance() -> torch.Tensor:
    x = (
        torch.randn(32, 100, generator=torch.Generator().manual_seed(1))
        * torch.linspace(0.2, 4, 32)[:, None]
    )
    return x @ x.T / 100


@pytest.mark.parametrize("method", LOSSLESS)
def test_without_rounding_every_start_is_the_weight(error, weight, covariance, method):
    effective = error.effective_weight(method, weight, covariance, 4, lambda residual: residual)
    assert error.output_error(weight, effective, covariance) < 1e-6


def test_qkasa_is_off_by_what_it_removes(error, weight, covariance):
    effective = error.effective_weight("QKaSA", weight, covariance, 4, lambda residual: residual)
    values = torch.linalg.svdvals(weight.double())
    expected = (values[-4:].square().sum() / values.square().sum()).sqrt().item()
    assert error.output_error(weight, effective) == pytest.approx(expected, rel=1e-5)


def test_the_error_is_that_of_the_outputs(error, weight):
    x = torch.randn(32, 50, dtype=torch.float64)
    effective = rounded(weight)
    expected = torch.linalg.norm((weight - effective).double() @ x) / torch.linalg.norm(
        weight.double() @ x
    )
    assert error.output_error(weight, effective, x @ x.T) == pytest.approx(
        expected.item(), rel=1e-10
    )
    of_white = torch.linalg.norm(weight - effective) / torch.linalg.norm(weight)
    assert error.output_error(weight, effective) == pytest.approx(of_white.item(), rel=1e-5)


def test_qlora_knows_neither_rank_nor_context(error, weight, covariance):
    starts = [
        error.effective_weight("QLoRA", weight, c, r, rounded)
        for c, r in ((covariance, 1), (torch.eye(32), 8))
    ]
    assert torch.equal(*starts)
    assert torch.equal(starts[0], rounded(weight))


@pytest.mark.parametrize(
    ("method", "power"), [("QPiSSA", 0.0), ("QCorDA", 1.0), ("QCorDA, p = 1/2", 0.5)]
)
def test_what_is_quantized_is_the_weight_without_its_component(
    error, weight, covariance, method, power
):
    values, vectors = torch.linalg.eigh(covariance.double())
    U = torch.linalg.svd(weight.double() @ (vectors * values**power) @ vectors.T)[0][:, :4]
    part = (U @ (U.T @ weight.double())).float()
    effective = error.effective_weight(method, weight, covariance, 4, rounded)
    # A residual on the edge between two codes may fall to either side: a handful of weights, by one code of 1/4.
    differs = (effective - (rounded(weight - part) + part)).abs() > 1e-4
    assert differs.float().mean() < 0.01


def test_loftq_of_full_rank_takes_up_all_that_is_lost(error, weight, covariance):
    effective = error.effective_weight("LoftQ", weight, covariance, 24, rounded)
    torch.testing.assert_close(effective, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["QLoRA", "LoftQ", "QPiSSA"])
def test_the_start_is_the_recipe_s(error, method, load_recipe, tmp_path):
    overrides = [f"output_dir={tmp_path}", "model.rank=4", "model.alpha=8", "max_steps=1"]
    cfg = config.load(f"tiny_{method.lower()}", overrides, config.QCORDA, about_to_run=True)
    recipe = load_recipe("qcorda_finetune_single_device").QCorDAFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    recipe.cleanup()
    linears = recipe._linears
    weights = evaluate.load_model(evaluate.HERE / "model").state_dict()
    for name in ("layers.0.attn.k_proj", "layers.2.mlp.w2"):
        weight = weights[f"{name}.weight"]
        expected = error.effective_weight(method, weight, torch.eye(weight.shape[1]), 4, quantize)
        torch.testing.assert_close(linears[name].merged_weight(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("outliers", "first"), [(1.0, "QPiSSA"), (64.0, "QCorDA")])
def test_the_order_is_decided_by_outlier_channels(error, outliers, first):
    context = error.synthetic(0, d_out=96, d_in=128, outliers=outliers)
    found = {}
    for method in ("QLoRA", "QPiSSA", "QCorDA"):
        effective = error.effective_weight(
            method, context.weights["weight"], context.calibration["weight"], 8, quantize
        )
        found[method] = error.output_error(
            context.weights["weight"], effective, context.held_out["weight"]
        )
    assert min(found, key=found.get) == first
    assert max(found, key=found.get) == "QLoRA"


def test_outlier_share(error):
    energy = torch.ones(100)
    energy[7] = 101.0
    assert error.outlier_share(energy.diag()) == pytest.approx(101 / 200)
    assert error.outlier_share(torch.eye(32)) == pytest.approx(1 / 32)


def test_loss_of_answers_is_that_of_every_answer_alone(error):
    model = evaluate.load_model(evaluate.HERE / "model")
    tokenizer = evaluate.load_tokenizer(evaluate.HERE / "model")
    facts = evaluate.load_rows("facts_test.jsonl")[:5]
    total, num_tokens = 0.0, 0
    for fact in facts:
        prompt = tokenizer.encode(world.fact_prompt(fact["question"]), add_bos=True, add_eos=False)
        answer = tokenizer.encode(fact["answer"], add_bos=False, add_eos=True)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        num_tokens += len(answer)
    assert error.loss_of_answers(model, tokenizer, facts) == pytest.approx(
        total / num_tokens, rel=1e-4
    )


def test_the_means_are_over_linears_and_kinds(error):
    results = [
        {
            "context": "c",
            "method": "LoftQ",
            "rank": 2,
            "errors": {"0.w1": 1.0, "1.w1": 3.0, "0.w2": 8.0},
        },
        {
            "context": "c",
            "method": "LoftQ",
            "rank": 4,
            "errors": {"0.w1": 9.0, "1.w1": 9.0, "0.w2": 9.0},
        },
    ]
    assert error.overall(error.choose(results, "c", "LoftQ", 2)) == [4.0]
    assert error.overall(error.choose(results, "c", "LoftQ"), kind="w1") == [2.0, 9.0]


def test_a_row_of_training_counts_the_steps_to_the_goal_of_the_same_seed(scripts):
    def run(losses):
        return {"losses": losses, "val_loss_start": 7.0, "val_loss": 1.0, "trained": 10}

    falling = [
        float(loss) for loss in range(60, 0, -1)
    ]  # the mean of the last 20 is 10.5 at the end
    sooner, never = [loss - 5 for loss in falling], [loss + 5 for loss in falling]
    runs = {"qlora": {0: run(falling), 1: run(never)}, "qcorda": {0: run(sooner), 1: run(falling)}}
    runs["loftq"] = {0: run(never), 1: run(never)}
    rows = {row[0]: row for row in scripts["quantized_training"].rows(runs)}
    assert rows["QLoRA"][5] == "60 ±0"
    assert rows["QCorDA"][5] == "55 ±0"
    assert rows["LoftQ"][5] == "60, 1 of 2 never"
    assert rows["QLoRA"][4] == "13.000 ±3.536"
