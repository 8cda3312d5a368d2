"""What two processes do is what one device does, step by step; each takes over where the other stopped; and what only
one of them meets stops both.
"""

import re

import pytest
import torch

from kasa_tune.components.checkpoints import latest_checkpoint
from kasa_tune.components.linalg.nf4 import NF4Tensor
from kasa_tune.components.quantized.base import FOLDER

from .conftest import BOTH_WAYS, STEP_OF_ONE, Run, assert_same_tree, copy_run, run_alone

pytestmark = pytest.mark.slow

# How far apart the losses of one device and of two processes may be, relatively. Both add the same float32 numbers in
# another order, about 1e-7 apart in the first step, and nothing draws them together again: Adam divides every gradient
# by its own size, so that one near zero may turn the other way. QLoRA has steps of one sample, where more of them are
# near zero. In QCorDA covariances that differ in the last bit move a weight that lies between two codes of NF4 to the
# other one, or the scale of a block by one of its 256 levels.
SAME = 1e-5
TOLERANCES = {"kasa": SAME, "corda++": SAME, "qkasa": SAME, "qlora": 2e-4, "qcorda": 3e-3}
LOSSES = ("loss", "val_loss", "val_loss_base", "l2", "l3", "grad_norm")
DISTRIBUTED = [f"{method}_finetune_distributed" for method in ("kasa", "corda", "qcorda")]


def assert_same_losses(
    metrics: list[dict], expected: list[dict], tolerance: float, names=LOSSES
) -> None:
    """Step by step, none left out; a gradient's norm within ten times the losses' tolerance."""
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, wanted in zip(metrics, expected, strict=True):
        assert line.keys() & set(names) == wanted.keys() & set(names)
        for name in wanted.keys() & set(names):
            allowed = tolerance * (10 if name == "grad_norm" else 1)
            assert line[name] == pytest.approx(wanted[name], rel=allowed), (
                f"{name} of step {line['step']}"
            )
        assert line.get("num_tokens") == wanted.get("num_tokens")
        assert line.get("lr") == pytest.approx(wanted.get("lr"))


def learned(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every adapter adds to its layer, up to its scale: ``B A`` or ``B diag(d) A``, whatever the basis."""
    names = [
        key.removesuffix(".lora_a.weight") for key in adapter if key.endswith(".lora_a.weight")
    ]
    factors = {
        name: [adapter[f"{name}.lora_{half}.weight"].double() for half in "ba"] for name in names
    }
    diagonals = {
        name: adapter.get(f"{name}.lora_diag", torch.ones(len(a))).double()
        for name, (_, a) in factors.items()
    }
    return {name: b @ (diagonals[name][:, None] * a) for name, (b, a) in factors.items()}


def stored_base(run: Run) -> dict[str, NF4Tensor]:
    """The quantized weights beside a run's checkpoints, by their names."""
    stored, _ = latest_checkpoint(run.folder / FOLDER)
    return {
        name: weight
        for part in stored.manifest["parts"]
        for name, weight in stored.part(part).items()
    }


# ------------------------------------------------------------------------------------------------------ the same run


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_two_processes_train_as_one_device(runs, name):
    alone, pair = runs[0][name], runs[1][name]
    assert pair.ends == [{"status": 0, "step": pair.metrics[-1]["step"]}] * 2
    assert len(pair.metrics) > 10
    assert pair.metrics[-1]["loss"] < 0.7 * pair.metrics[1]["loss"]
    assert_same_losses(pair.metrics, alone.metrics, TOLERANCES[name])


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_checkpoints_of_two_processes_are_those_of_one_device(runs, name):
    alone, pair = runs[0][name], runs[1][name]
    assert [path.name for path in pair.checkpoints] == [path.name for path in alone.checkpoints]
    adapter, wanted = pair.part("adapter"), alone.part("adapter")
    assert {k: (v.shape, v.dtype) for k, v in adapter.items()} == {
        k: (v.shape, v.dtype) for k, v in wanted.items()
    }
    updates, wanted = learned(adapter), learned(wanted)
    for layer, update in wanted.items():
        assert (updates[layer] - update).norm() <= 30 * TOLERANCES[name] * update.norm(), layer
    states, wanted = (run.part("optimizer")["state"] for run in (pair, alone))
    assert {i: {k: v.shape for k, v in state.items()} for i, state in states.items()} == {
        i: {k: v.shape for k, v in state.items()} for i, state in wanted.items()
    }
    assert (alone.part("run").get("world_size", 1), pair.part("run")["world_size"]) == (1, 2)


@pytest.mark.parametrize("name", ["qlora", "qkasa"])
def test_the_base_in_four_bits_is_the_same_in_every_bit(runs, name):
    assert_same_tree(stored_base(runs[1][name]), stored_base(runs[0][name]))


def test_rounding_moves_few_codes_of_qcorda(runs):
    """By one code, of one weight in 10,000 at most."""
    moved = total = 0
    bases = [stored_base(runs[way]["qcorda"]) for way in (0, 1)]
    assert bases[0].keys() == bases[1].keys()
    for name, weight in bases[0].items():
        codes = [
            torch.stack((w.quantized_data >> 4, w.quantized_data & 15)).int()
            for w in (weight, bases[1][name])
        ]
        distance = (codes[0] - codes[1]).abs()
        assert distance.max() <= 1, name
        moved, total = moved + int(distance.sum()), total + distance.numel()
    assert moved <= total / 10_000


def test_an_epoch_that_does_not_divide_has_every_sample_once(runs):
    """17 samples in steps of 8: rank 1 has none in the last, and no epoch more or fewer tokens than another."""
    counts = [line["num_tokens"] for line in runs[1]["qlora"].metrics if line["step"]]
    epochs = [sum(counts[i : i + 3]) for i in range(0, 12, 3)]
    assert len(counts) == 12
    assert len(set(epochs)) == 1
    assert all(count < epochs[0] / 8 for count in counts[2::3])


# ---------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("name", ["kasa", "qcorda"])
def test_one_device_goes_on_where_two_processes_stopped(runs, load_recipe, tmp_path, name):
    pair = runs[1][name]
    copy_run(pair, tmp_path / "run", until_step=4)
    rest = run_alone(load_recipe, name, tmp_path / "run", "resume_from_checkpoint=True")
    assert_same_losses(
        rest.metrics, pair.metrics, SAME
    )  # the base is that of two processes, in every bit
    assert rest.part("run").get("world_size", 1) == 1


@pytest.mark.parametrize("name", ["kasa", "qcorda"])
def test_two_processes_go_on_where_one_device_stopped(runs, name):
    alone, rest = runs[0][name], runs[1][f"{name} from one"]
    assert_same_losses(
        rest.metrics, [line for line in alone.metrics if line["step"] > STEP_OF_ONE], SAME
    )
    if name == "qcorda":
        assert_same_tree(stored_base(rest), stored_base(alone))


def test_two_processes_go_on_bit_for_bit_where_two_stopped(runs):
    whole, rest = runs[1]["qcorda"], runs[1]["qcorda resumed"]
    assert rest.curve == whole.curve[5:]
    for part in ("adapter", "optimizer", "rng"):
        assert_same_tree(rest.part(part), whole.part(part), part)
    assert_same_tree(stored_base(rest), stored_base(whole))


def test_steps_of_another_size_are_refused_with_both_sizes(runs):
    for end in runs[1]["kasa other product"].ends:
        assert end["error"] == "ValueError"
        assert (
            "4 samples a step; batch_size x gradient_accumulation_steps x processes is now 12"
            in end["message"]
        )


def test_completions_of_a_run_of_two_processes(runs, run_main, tmp_path):
    few = [f"adapter_checkpoint={runs[1]['kasa'].folder}", "num_samples=2", "max_new_tokens=8"]
    assert (
        run_main("generate_text", "--config", "tiny_kasa_generate", *few, f"output_dir={tmp_path}")
        == 0
    )
    assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------------------------------------- what stops both


def test_a_signal_to_one_rank_saves_once_and_two_processes_go_on_bit_for_bit(runs):
    stopped, resumed, whole = (runs[1][name] for name in ("stopped", "stopped resumed", "rough"))
    assert stopped.ends == [{"status": 143, "step": 5}] * 2
    assert [path.name for path in stopped.checkpoints] == ["step_00000005"]
    assert stopped.curve == whole.curve[:6]  # with that of step 0
    assert resumed.curve == whole.curve[6:]
    for part in ("adapter", "optimizer", "rng"):
        assert_same_tree(resumed.part(part), whole.part(part), part)


def test_a_loss_on_one_rank_that_is_no_number_stops_both_before_the_step(runs):
    run, whole = runs[1]["nan"], runs[1]["rough"]
    for end in run.ends:
        assert end["error"] == "NonFiniteError"
        assert re.match(r"Step 4: loss nan, .*those of step 3\. Lower", end["message"])
    assert run.curve == whole.curve[:4]
    assert run.checkpoints[-1].name == "step_00000003"  # saved by both when they stopped


def test_a_folder_that_holds_a_run_or_is_written_to_is_refused_on_both(runs):
    for end in runs[1]["kasa again"].ends:
        assert end["error"] == "ValueError"
        assert (
            "already holds checkpoints, the newest step_00000015. Set resume_from_checkpoint"
            in end["message"]
        )
    for end in runs[1]["locked"].ends:
        assert "another run is writing to" in end["message"]


@pytest.mark.parametrize(("name", "what"), [("other config", "config"), ("other rows", "data")])
def test_ranks_that_were_given_different_things_say_which(runs, name, what):
    ends = runs[1][name].ends
    assert [end["error"] for end in ends] == ["ValueError"] * 2
    assert all(end["message"].startswith(f"Rank 1 has another {what} than rank 0.") for end in ends)
    assert not runs[1][name].checkpoints


# ------------------------------------------------------------------------------------------------------ in one process


@pytest.mark.parametrize("recipe", DISTRIBUTED)
def test_started_without_torchrun_it_says_how_to(recipe, run_main, monkeypatch, tmp_path):
    for variable in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(variable, raising=False)
    config_name = f"tiny_{recipe.partition('_')[0]}"
    with pytest.raises(
        ValueError,
        match=r"tune run --nproc_per_node <n> <recipe> --config <config>.*_single_device",
    ):
        run_main(recipe, "--config", config_name, f"output_dir={tmp_path}")


@pytest.mark.parametrize("recipe", DISTRIBUTED)
def test_dry_run_shows_what_one_of_eight_processes_holds(recipe, run_main, capsys, tmp_path):
    large = [
        "model.embed_dim=2048",
        "model.intermediate_dim=4096",
        "model.vocab_size=4096",
        "model.rank=64",
        "checkpointer.checkpoint_dir=/not/downloaded",  # whose config.json would say other sizes
    ]
    large += ["dry_run=True", f"output_dir={tmp_path}"]
    budgets = {}
    for processes in (1, 8):
        assert (
            run_main(
                recipe,
                "--config",
                f"tiny_{recipe.partition('_')[0]}",
                *large,
                f"world_size={processes}",
            )
            == 0
        )
        printed = re.findall(r"^ *(\w.*?) +([\d,.]+) MiB$", capsys.readouterr().out, re.MULTILINE)
        budgets[processes] = {purpose: float(size.replace(",", "")) for purpose, size in printed}
    whole, part = budgets[1], budgets[8]
    cut = ["base weights", "gradients", "optimizer"] + ["base weights in NF4"] * recipe.startswith(
        "qcorda"
    )
    for purpose in cut:
        assert whole[purpose] > 8
        assert part[purpose] == pytest.approx(whole[purpose] / 8, abs=0.11), (
            purpose
        )  # printed with one decimal
    assert part["activations (estimate)"] == whole["activations (estimate)"]
    assert "gathered weights" not in whole
    assert part["gathered weights"] > 0
    assert part["training step"] < whole["training step"]
