"""A trained adapter as a plain LoRA: what stands in its two files, and by how much it differs from what was trained."""

import gc
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.checkpoints import load_part, save_checkpoint
from kasa_tune.components.exchange.deviations import Deviation, Deviations, deviation
from kasa_tune.components.exchange.peft_lora import write_peft
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.linalg.nf4 import dequantize, is_quantized
from tests.toy_checkpoints import MODELS, to_hf, toy
from tests.trained_runs import (
    ALPHA,
    EVERYWHERE,
    IN_PLACES,
    RANK,
    STEP,
    effective_weight,
    toy_run,
    update_of,
)

PREFIX = "base_model.model."
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch):
    """Torchtune's checkpointer collects garbage after each file."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


class Exported:
    """What was written of a toy's run."""

    def __init__(self, tmp_path, name, method, *, run=None, folder="peft", **options):
        self.name = name
        self.run = run or toy_run(tmp_path, name, method)
        self.folder = tmp_path / folder
        self.folder.mkdir()
        self.errors = write_peft(
            open_run(self.run.path), self.folder, base_model="some/base", **options
        )
        self.config = json.loads((self.folder / "adapter_config.json").read_text())
        self.tensors = load_file(self.folder / "adapter_model.safetensors")
        self.original = {
            key: value.double()
            for path in self.base_files
            for key, value in load_file(path).items()
        }

    @property
    def base_files(self):
        return sorted((self.run.path.parent / "base").glob("*.safetensors"))

    @property
    def modules(self):
        return sorted(
            key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            for key in self.tensors
            if "lora_A" in key
        )

    def factors(self, module):
        """``A`` and ``B`` in float64."""
        return (self.tensors[f"{PREFIX}{module}.lora_{part}.weight"].double() for part in "AB")

    def update(self, module):
        """What PEFT adds to the module's weight, by the files alone."""
        a, b = self.factors(module)
        rank = self.config["rank_pattern"].get(module, self.config["r"])
        alpha = self.config["alpha_pattern"].get(module, self.config["lora_alpha"])
        assert rank == len(a)
        return alpha / rank * b @ a

    def exported(self, module):
        weight = self.original[f"{module}.weight"]
        return weight + self.update(module) if module in self.modules else weight

    def trained(self):
        """The weights of the run's model in float64, in the base's layout."""
        weights = {key: value.double() for key, value in toy(self.name)[1].items()}
        for path, module in self.run.model.named_modules():
            if is_quantized(getattr(module, "weight", torch.empty(0))):
                weights[f"{path}.weight"] = dequantize(module.weight).double()
        weights |= {
            f"{path}.weight": effective_weight(linear)
            for path, linear in adapter_linears(self.run.model)
        }
        return to_hf(weights, MODELS[self.name].model_type, MODELS[self.name].sizes)

    def updates(self):
        """What the run's adapters add, in the base's layout; zeros elsewhere."""
        weights = {
            key: torch.zeros_like(value, dtype=torch.float64)
            for key, value in toy(self.name)[1].items()
        }
        weights |= {
            f"{path}.weight": update_of(linear) for path, linear in adapter_linears(self.run.model)
        }
        return to_hf(weights, MODELS[self.name].model_type, MODELS[self.name].sizes)


def singular_values(matrix):
    return np.linalg.svd(matrix.numpy(), compute_uv=False)


# --------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("method", "rank"), [("kasa", RANK + 3), ("lora", RANK), ("pissa", 2 * RANK)]
)
def test_what_the_config_says(method, rank, tmp_path):
    found = Exported(tmp_path, "llama2", method)
    assert found.config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [
            "down_proj",
            "gate_proj",
            "k_proj",
            "o_proj",
            "q_proj",
            "up_proj",
            "v_proj",
        ],
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safe_open(found.folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("where", "targets"),
    [
        (IN_PLACES, ["k_proj", "up_proj"]),
        ({"attn_modules": ["output_proj"]}, ["o_proj"]),
        (
            EVERYWHERE | {"apply_to_mlp": False, "apply_to_output": True},
            "k_proj lm_head o_proj q_proj v_proj".split(),
        ),
    ],
)
def test_targets_are_the_files_names_of_what_was_adapted(where, targets, tmp_path):
    found = Exported(
        tmp_path, "llama3", "lora", run=toy_run(tmp_path, "llama3", "lora", where=where)
    )
    assert found.config["target_modules"] == targets
    assert {module.rpartition(".")[2] for module in found.modules} == set(targets)
    assert len(found.modules) == sum(1 if target == "lm_head" else 2 for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factors_have_the_dtype_and_lengths_that_are_alike(dtype, tmp_path):
    """The i-th column of B and row of A: the root of the update's i-th singular value each, so neither underflows."""
    found = Exported(tmp_path, "llama2", "corda_ipm", dtype=dtype)
    assert {tensor.dtype for tensor in found.tensors.values()} == {dtype}
    for module in found.modules:
        a, b = found.factors(module)
        roots = singular_values(found.update(module))[: len(a)] ** 0.5
        tolerance = {
            "rtol": 20 * torch.finfo(dtype).eps,
            "atol": 20 * torch.finfo(dtype).eps * roots[0],
        }
        np.testing.assert_allclose(a.norm(dim=1), roots, **tolerance)
        np.testing.assert_allclose(b.norm(dim=0), roots, **tolerance)


@pytest.mark.parametrize("name", ["llama2", "phi3_gqa"])
def test_dora_is_kept_with_its_magnitudes(name, tmp_path):
    run = toy_run(tmp_path, name, "dora", where=IN_PLACES)
    found = Exported(tmp_path, name, "dora", run=run)
    assert found.config["use_dora"] is True
    trained = found.trained()
    for module in found.modules:
        magnitude = found.tensors[f"{PREFIX}{module}.lora_magnitude_vector"]
        weight = found.exported(module)
        weight *= (magnitude.double() / weight.norm(dim=1))[:, None]
        torch.testing.assert_close(weight, trained[f"{module}.weight"], rtol=1e-5, atol=1e-6)
        assert found.errors[module].of_weight < 1e-6


# --------------------------------------------------------------------------------- ranks


def test_one_rank_for_all_is_the_largest_that_a_layer_needs(tmp_path):
    found = Exported(tmp_path, "llama2", "corda_mixed")
    assert found.config["r"] == found.config["lora_alpha"] == 2 * 8
    for module in found.modules:
        a, b = found.factors(module)
        assert len(a) == b.shape[1] == 16
        rank = np.linalg.matrix_rank(found.update(module).numpy(), rtol=1e-5)
        assert not b[:, rank:].any()
        assert a[rank:].any(dim=1).all()
    assert len(found.modules) == 14


def test_a_rank_for_each_leaves_out_layers_without_an_update(tmp_path):
    found = Exported(tmp_path, "llama2", "corda_mixed", rank_pattern=True)
    ranks = {}
    for module in found.modules:
        a, b = found.factors(module)
        ranks[module] = len(a)
        assert (
            np.linalg.matrix_rank(found.update(module).numpy(), rtol=1e-5) == len(a) == b.shape[1]
        )
    without = {module for module in found.errors if module not in ranks}
    trained = found.trained()
    for module in without:
        assert torch.equal(trained[f"{module}.weight"], found.original[f"{module}.weight"])
    assert len(without) == 2
    pattern = found.config["rank_pattern"]
    assert {module: pattern.get(module, found.config["r"]) for module in found.modules} == ranks
    assert found.config["r"] == found.config["lora_alpha"] == max(ranks.values())
    assert found.config["r"] not in pattern.values()
    assert found.config["alpha_pattern"] == {}
    assert found.config["target_modules"] == found.modules


# How the readers that are known find the factor before B A: of a module's name, its A and the config.
READERS = {
    # PEFT; vLLM from 0.32
    "rank by pattern": lambda config, module, a: (
        config["lora_alpha"] / config["rank_pattern"].get(module, config["r"])
    ),
    # llama.cpp: one alpha, the rank from the tensor
    "rank of the tensor": lambda config, module, a: config["lora_alpha"] / len(a),
    # vLLM before 0.32: one alpha, one r
    "one rank for all": lambda config, module, a: config["lora_alpha"] / config["r"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank_pattern", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_adds_the_same(reader, rank_pattern, dtype, tmp_path):
    """But for the one that knows a single rank, which the form without a pattern is for."""
    found = Exported(tmp_path, "llama2", "corda_mixed", rank_pattern=rank_pattern, dtype=dtype)
    if rank_pattern:
        assert found.config["rank_pattern"]
    trained, wrong = found.trained(), []
    for module in found.modules:
        a, b = found.factors(module)
        added = READERS[reader](found.config, module, a) * b @ a
        expected = trained[f"{module}.weight"] - found.original[f"{module}.weight"]
        error = (added - expected).norm() / trained[f"{module}.weight"].norm()
        wrong += [module] if error > 4 * torch.finfo(dtype).eps else []
        told = found.errors[module].of_weight
        if reader != "one rank for all":
            assert told == pytest.approx(error.item(), rel=1e-2, abs=1e-6)
    expected = [m for m in found.modules if m in found.config["rank_pattern"]]
    assert wrong == (expected if reader == "one rank for all" else [])


def test_layers_of_one_rank_need_no_pattern(tmp_path):
    found = Exported(tmp_path, "llama2", "kasa", rank_pattern=True)
    assert (found.config["rank_pattern"], found.config["alpha_pattern"]) == ({}, {})
    assert "q_proj" in found.config["target_modules"]


def test_fused_weights_need_the_sum_of_their_parts_ranks(tmp_path):
    found = Exported(tmp_path, "phi3_gqa", "kasa", rank_pattern=True)
    per_linear = RANK + 3
    ranks = {
        module.rpartition(".")[2]: len(next(found.factors(module))) for module in found.modules
    }
    expected = {"qkv_proj": 3 * per_linear, "o_proj": per_linear, "gate_up_proj": 2 * per_linear}
    assert ranks == expected | {"down_proj": per_linear}


def test_a_larger_rank_is_filled_with_what_changes_nothing_and_can_learn(tmp_path):
    run = toy_run(tmp_path, "llama2", "kasa")
    usual = Exported(tmp_path, "llama2", "kasa", run=run)
    found = Exported(tmp_path, "llama2", "kasa", run=run, rank=16, folder="wide")
    assert found.config["r"] == found.config["lora_alpha"] == 16
    for module in found.modules:
        (a, b), (usual_a, usual_b) = found.factors(module), usual.factors(module)
        assert torch.equal(a[: RANK + 3], usual_a)
        assert torch.equal(b[:, : RANK + 3], usual_b)
        assert (len(a), b.shape[1]) == (16, 16)
        assert not b[:, RANK + 3 :].any()
        # As a LoRA starts: B learns from the first step. With both at zero, neither ever would.
        bound = a.shape[1] ** -0.5
        assert a[RANK + 3 :].abs().max() <= bound
        assert a[RANK + 3 :].std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert found.errors == usual.errors


@pytest.mark.parametrize(
    ("name", "method", "rank", "words"),
    [
        (
            "llama2",
            "kasa",
            RANK + 2,
            rf"rank {RANK + 2} is too small: model\.layers\.\d\.\S+ needs {RANK + 3} ",
        ),
        (
            "llama2",
            "corda_mixed",
            15,
            r"rank 15 is too small: model\.layers\.1\.self_attn\.q_proj needs 16 ",
        ),
        (
            "phi3_gqa",
            "lora",
            RANK,
            r"rank 4 is too small: model\.layers\.0\.self_attn\.qkv_proj needs 12 ",
        ),
    ],
)
def test_a_rank_that_is_too_small_is_refused_by_the_layer(name, method, rank, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Exported(tmp_path, name, method, rank=rank)
    assert not list((tmp_path / "peft").iterdir())


# --------------------------------------------------------------------------------- a tolerance


@pytest.mark.parametrize("rank_pattern", [False, True])
@pytest.mark.parametrize("tolerance", [1e-3, 0.1, 0.5])
def test_a_tolerance_costs_the_singular_values_that_it_leaves_out(
    tolerance, rank_pattern, tmp_path
):
    """Of the update that was trained, Eckart and Young: no less is possible at that rank."""
    found = Exported(
        tmp_path, "llama2", "corda_mixed", tolerance=tolerance, rank_pattern=rank_pattern
    )
    trained, ranks = found.trained(), {}
    for module in found.errors:
        key = f"{module}.weight"
        values = singular_values(trained[key] - found.original[key])
        ranks[module] = int((values > tolerance * values[0]).sum())
        lost = np.linalg.norm(values[ranks[module] :])
        error = (found.exported(module) - trained[key]).norm().item()
        norm = trained[key].norm().item()
        assert error == pytest.approx(lost, rel=1e-3, abs=1e-6 * norm)
        assert found.errors[module].of_weight == pytest.approx(lost / norm, rel=1e-3, abs=1e-6)
        if rank_pattern and ranks[module]:
            assert len(next(found.factors(module))) == ranks[module]
    if not rank_pattern:
        assert found.config["r"] == max(ranks.values())
    if tolerance == 0.5:
        assert max(ranks.values()) < 16


def test_a_tolerance_makes_room_for_a_rank(tmp_path):
    run = toy_run(tmp_path, "llama2", "pissa", moved=1e-3)
    opened = open_run(run.path)
    with pytest.raises(ValueError, match=r"needs 8 .*tolerance="):
        Exported(tmp_path, "llama2", "pissa", run=run, rank=6, folder="exact")
    spectra = [singular_values(opened.update(name).dense()) for name in opened.linears]
    enough = 1.01 * max(values[7] / values[0] for values in spectra)
    found = Exported(tmp_path, "llama2", "pissa", run=run, rank=7, tolerance=enough)
    assert found.config["r"] == 7


def rewritten(run, change):
    """The run's checkpoint with another adapter."""
    checkpoint = next((run.path / "checkpoints").iterdir())
    parts = {name: load_part(checkpoint, name) for name in ("adapter", "run")}
    change(parts["adapter"])
    save_checkpoint(checkpoint.parent, STEP, parts)
    return run


@pytest.mark.parametrize("rank_pattern", [False, True])
def test_an_adapter_that_changes_nothing(rank_pattern, tmp_path):
    """A tolerance leaves nothing of it, and PEFT takes no adapter without a layer."""
    run = toy_run(tmp_path, "llama2", "lora", moved=0.0)
    found = Exported(tmp_path, "llama2", "lora", run=run, tolerance=1e-3, rank_pattern=rank_pattern)
    assert found.config["r"] == 1
    assert found.tensors
    assert not any(tensor.any() for name, tensor in found.tensors.items() if "lora_B" in name)
    assert set(found.errors.values()) == {Deviation(0.0, 0.0)}


def test_a_magnitude_without_an_update_keeps_its_layer(tmp_path):
    """PEFT drops magnitudes of a module that is no target."""

    def change(adapter):
        adapter["layers.1.attn.k_proj.lora_b.weight"].zero_()
        adapter["layers.1.attn.k_proj.lora_magnitude"] *= 1.5

    run = rewritten(toy_run(tmp_path, "llama2", "dora"), change)
    found = Exported(tmp_path, "llama2", "dora", run=run, tolerance=1e-3, rank_pattern=True)
    named = {
        key.removeprefix(PREFIX).rpartition(".lora_magnitude")[0]
        for key in found.tensors
        if "magnitude" in key
    }
    assert named == set(found.modules) == set(found.errors)
    targets = found.config["target_modules"]
    assert all(
        module in targets or module.rpartition(".")[2] in targets for module in found.modules
    )


# --------------------------------------------------------------------------------- what rounding costs


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["kasa", "corda_ipm", "qlora"])
def test_errors_in_bfloat16_are_those_of_the_files(method, base_dtype, tmp_path):
    """A bfloat16 run multiplies with weights that were rounded when the edit was folded in; that counts as well."""
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[base_dtype]
    run = toy_run(tmp_path, "llama2", method, base_dtype=base_dtype, dtype=dtype)
    found = Exported(tmp_path, "llama2", method, run=run, dtype=torch.bfloat16)
    trained, updates = found.trained(), found.updates()
    assert len(found.errors) == 14
    for module, error in found.errors.items():
        key = f"{module}.weight"
        wrong = found.exported(module) - trained[key]
        assert error.of_weight == pytest.approx(
            (wrong.norm() / trained[key].norm()).item(), rel=1e-3
        )
        assert error.of_update == pytest.approx(
            (wrong.norm() / updates[key].norm()).item(), rel=1e-3
        )
        if method != "qlora":
            assert error.of_weight < 2**-7
    assert found.errors.worst == max(
        found.errors, key=lambda module: found.errors[module].of_weight
    )


def bfloat16_errors(found, name):
    """Of a layer, as a share of its change: the balanced factors, and the plain ones ``[sB | -E][A ; E_in]``."""
    part = {
        key: value
        for key, value in found.run.model.get_submodule(name).state_dict().items()
        if "lora" in key
    }
    diag = part.get("lora_diag", torch.ones(RANK))
    out = torch.cat((ALPHA / RANK * part["lora_b.weight"] * diag, -part["lora_edit_out"]), dim=1)
    into = torch.cat((part["lora_a.weight"], part["lora_edit_in"]))
    exact = out.double() @ into.double()
    plain = out.bfloat16().double() @ into.bfloat16().double()
    a, b = found.factors(
        "model." + name.replace("attn", "self_attn").replace("output_proj", "o_proj")
    )
    return ((b @ a - exact).norm() / exact.norm()).item(), (
        (plain - exact).norm() / exact.norm()
    ).item()


@pytest.mark.parametrize(("method", "times"), [("pissa", 20), ("corda_ipm", 20), ("milora", 5)])
def test_little_training_survives_bfloat16(method, times, tmp_path):
    """``B A - B0 A0`` cancels: rounded by themselves, the factors of a small change lose it."""
    run = toy_run(tmp_path, "llama2", method, moved=0.01)
    found = Exported(tmp_path, "llama2", method, run=run, dtype=torch.bfloat16)
    for layer in range(2):
        for leaf in ("v_proj", "output_proj"):
            balanced, plain = bfloat16_errors(found, f"layers.{layer}.attn.{leaf}")
            assert balanced < 2**-8
            assert plain > times * balanced


def test_errors_count_what_was_quantized_without_an_adapter(tmp_path):
    """The LoRA stands on the unquantized base: whatever was quantized differs from the weights that were trained."""
    run = toy_run(tmp_path, "phi3_gqa", "qlora", where=IN_PLACES)
    found = Exported(tmp_path, "phi3_gqa", "qlora", run=run)
    trained, updates = found.trained(), found.updates()
    linears = {key.removesuffix(".weight") for key in found.original if "_proj" in key}
    assert found.errors.keys() == linears
    for module, error in found.errors.items():
        key = f"{module}.weight"
        wrong = (found.exported(module) - trained[key]).norm().item()
        assert error.of_weight == pytest.approx(wrong / trained[key].norm().item(), rel=1e-3)
        norm = updates[key].norm().item()
        assert error.of_update == pytest.approx(wrong / norm if norm else float("inf"), rel=1e-3)


def test_deviation_against_float64():
    torch.manual_seed(0)
    trained, exported = torch.randn(6, 5), torch.randn(6, 5)
    error = (exported.double() - trained.double()).norm().item()
    found = deviation(exported.clone(), trained, 0.25)
    assert found == pytest.approx((error / trained.double().norm().item(), error / 0.25), rel=1e-6)
    assert (
        deviation(trained.clone(), trained, 0.25)
        == deviation(trained.clone(), trained, 0.0)
        == (0, 0)
    )
    assert deviation(exported.clone(), torch.zeros(6, 5), 0.0) == (float("inf"), float("inf"))
    errors = Deviations({"small": Deviation(1e-3, 1.0), "large": Deviation(1e-2, 0.1)})
    assert errors.worst == "large"
