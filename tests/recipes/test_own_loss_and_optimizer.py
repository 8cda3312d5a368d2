"""What a copied recipe may change in its config: any loss that is a sum, any optimizer that steps by itself."""

import contextlib
import fcntl
import itertools
import math

import pytest
import torch
from torch import nn

from kasa_tune.components.training import NonFiniteError, Step, Steps
from kasa_tune.components.training.memory import stepped_optimizer
from tests.recipes.conftest import recipe_class, run_recipe

CROSS_ENTROPY = "loss={_component_: torch.nn.CrossEntropyLoss, reduction: sum}"
FOCAL = "loss={{_component_: tests.recipes.focal_loss.FocalLoss, gamma: {gamma}}}"
THREE_STEPS = ["max_steps=3", "run_val_every_n_steps=3", "model.dropout=0.0"]


def losses(run):
    return [line[key] for line in run.metrics for key in ("loss", "val_loss") if key in line]


@pytest.fixture(scope="module")
def default_losses(load_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("default") / "run"
    return losses(run_recipe(load_recipe("kasa_finetune_single_device"), folder, *THREE_STEPS))


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, FOCAL.format(gamma=0.0)])
def test_cross_entropy_of_torch_and_a_focal_loss_without_focus_train_as_the_default_does(
    finetune, default_losses, loss
):
    run = finetune(loss, *THREE_STEPS)
    assert losses(run) == pytest.approx(default_losses, rel=1e-5)


def test_a_focal_loss_trains_on_what_it_says(finetune, default_losses):
    run = finetune(FOCAL.format(gamma=2.0), *THREE_STEPS)
    found = losses(run)
    assert all(0 < own < default for own, default in zip(found, default_losses, strict=True))
    model, data = run.recipe._model, run.recipe._data
    total, count = 0.0, 0
    for sample in (data.dataset_val[i] for i in range(len(data.dataset_val))):
        tokens, labels = (torch.as_tensor(sample[key]) for key in ("tokens", "labels"))
        with torch.no_grad():
            hidden = model.eval()(tokens[None])[0]
            p = model.output(hidden).softmax(-1)[torch.arange(len(labels)), labels.clamp_min(0)]
        kept = labels != -100
        total += (-((1 - p) ** 2) * p.log())[kept].sum().item()
        count += int(kept.sum())
    assert run.metrics[-1]["val_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("loss={_component_: torch.nn.CrossEntropyLoss}", "not a sum over tokens.*reduction=sum"),
        ("loss={_component_: torch.nn.MSELoss, reduction: sum}", "cannot be called with logits"),
    ],
)
def test_a_loss_that_is_no_sum_is_refused_before_weights_are_read(
    finetune, load_recipe, monkeypatch, loss, words
):
    recipe = recipe_class(load_recipe("kasa_finetune_single_device"))
    monkeypatch.setattr(recipe, "_setup_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        finetune(loss)


def test_an_optimizer_that_needs_a_closure_is_refused(finetune):
    with pytest.raises(ValueError, match=r"LBFGS, which needs a closure.*torch\.optim\.AdamW"):
        finetune("optimizer={_component_: torch.optim.LBFGS}")


def test_an_optimizer_of_ones_own_that_needs_a_closure_is_refused():
    """The config cannot know it without an import."""
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"LBFGS needs a closure.*torch\.optim\.AdamW"):
        stepped_optimizer(torch.optim.LBFGS, linear.weight)


def test_a_loop_that_forgets_the_step_is_told_so(finetune, monkeypatch):
    monkeypatch.setattr(Step, "apply", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"without step\.apply"):
        finetune("max_steps=2")


def test_a_failing_step_gives_back_the_lock_and_the_signals(finetune, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(Step, "apply", fail)
    with pytest.raises(ZeroDivisionError):
        finetune("max_steps=2")
    with (tmp_path / "run" / "checkpoints" / ".lock").open("w") as file, contextlib.ExitStack():
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError while it is held


def curve(run):
    return [
        {key: value for key, value in line.items() if key not in ("tokens_per_second", "seconds")}
        for line in run.metrics
    ]


def test_a_failing_step_saves_the_finished_ones_and_the_run_resumes_bit_for_bit(
    finetune, monkeypatch
):
    """Of an epoch with dropout, with no checkpoint due before the failure."""
    options = ["max_steps=6", "save_every_n_steps=1000"]
    whole = finetune(*options, name="whole")
    steps, apply = [], Step.apply

    def fails_in_the_fourth(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:
            raise ZeroDivisionError
        apply(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "apply", fails_in_the_fourth)
        with pytest.raises(ZeroDivisionError):
            finetune(*options, name="failed")
    resumed = finetune(*options, "resume_from_checkpoint=True", name="failed")
    assert resumed.recipe.steps.step == 6
    assert curve(resumed) == curve(whole)


@pytest.mark.parametrize("applied", [True, False])
def test_a_break_out_of_the_loop_saves_the_finished_steps(finetune, monkeypatch, applied):
    """As a recipe does that stops early: after the update of the third step, or before it."""
    options = ["max_steps=6", "save_every_n_steps=1000"]
    whole = finetune(*options, name="whole")
    steps, apply, iterate = [], Step.apply, Steps.__iter__

    def counted(self, *args, **kwargs):
        steps.append(1)
        if applied or len(steps) < 3:
            apply(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "apply", counted)
        patch.setattr(Steps, "__iter__", lambda self: itertools.islice(iterate(self), 3))
        broken = finetune(*options, name="broken")
    finished = 3 if applied else 2
    assert [path.name for path in broken.checkpoints] == [f"step_{finished:08}"]
    assert curve(broken) == curve(whole)[: len(curve(broken))]
    assert broken.metrics[-1]["step"] == finished
    resumed = finetune(*options, "resume_from_checkpoint=True", name="broken")
    assert curve(resumed) == curve(whole)


@pytest.fixture
def finished_run(finetune):
    return finetune("max_steps=1").recipe


def test_a_step_is_applied_once(finished_run):
    step = Step(finished_run.steps, [])
    step.apply(finished_run._optimizer)
    with pytest.raises(RuntimeError, match=r"step\.apply was called twice"):
        step.apply(finished_run._optimizer)


def test_a_step_logs_numbers_and_names_the_one_that_is_not_finite(finished_run):
    step = Step(finished_run.steps, [])
    step.log(temperature=0.5, l2=torch.tensor([2.0]))
    step.apply(finished_run._optimizer)
    assert (step.metrics["temperature"], step.metrics["l2"]) == (0.5, 2.0)
    step = Step(finished_run.steps, [])
    with pytest.raises(ValueError, match=r"scalars, but ranks has the shape \(2,\)"):
        step.log(ranks=torch.ones(2))
    step.log(odd=math.inf)
    with pytest.raises(NonFiniteError, match=r"odd inf"):
        step.apply(finished_run._optimizer)


def test_an_optimizer_that_fails_half_way_saves_nothing(finetune, tmp_path, monkeypatch):
    updates, real = [], torch.optim.AdamW.step

    def half_way(self, *args, **kwargs):
        real(self, *args, **kwargs)
        updates.append(len(self.param_groups[0]["params"]))
        if sum(number > 1 for number in updates) == 2:  # the trial before the run has one parameter
            raise ZeroDivisionError

    monkeypatch.setattr(torch.optim.AdamW, "step", half_way)
    with pytest.raises(ZeroDivisionError):
        finetune("max_steps=6", "save_every_n_steps=1000")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_step_without_labelled_tokens_changes_no_weight(finetune, caplog):
    run = finetune("max_steps=1")
    before = {name: value.clone() for name, value in run.recipe._model.state_dict().items()}
    steps = run.recipe.steps
    steps.num_labelled = 0
    step = Step(steps, [])
    loss = run.recipe._linears[0].lora_a.weight.sum() / step.num_tokens
    loss.backward()
    step.apply(run.recipe._optimizer, run.recipe._lr_scheduler)
    after = run.recipe._model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (step.metrics["num_tokens"], "loss" in step.metrics) == (0, False)
    assert "no labelled token" in caplog.text


@pytest.mark.parametrize("limit", [513, 1024])
def test_a_tokenizer_may_not_give_more_than_the_model_takes(finetune, limit):
    with pytest.raises(ValueError, match=rf"max_seq_len {limit} is more .*takes, 512"):
        finetune(f"tokenizer.max_seq_len={limit}")


def test_without_a_limit_of_its_own_the_tokenizer_takes_the_models(finetune, tmp_path):
    row = '{"input": "Data: %s", "output": "it is long"}\n' % ("a b c d " * 600)
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n' * 3 + row)
    run = finetune(
        "tokenizer.max_seq_len=null",
        f"dataset.data_files={tmp_path / 'rows.jsonl'}",
        "dataset.split=train",
        "batch_size=1",
        "gradient_accumulation_steps=4",
        "max_steps=1",
    )
    assert run.status == 0
    assert run.recipe._tokenizer.max_seq_len == 512


class MeanLoss(nn.Module):
    """Not a sum."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits[torch.arange(len(labels)), labels].mean()


def test_a_loss_is_tried_without_touching_the_random_state():
    from kasa_tune.components.training import ChunkedCrossEntropy, summed_loss

    before = torch.get_rng_state()
    summed_loss(ChunkedCrossEntropy(), vocab_size=11)
    with pytest.raises(ValueError, match="MeanLoss is not a sum"):
        summed_loss(MeanLoss(), vocab_size=11)
    assert torch.equal(before, torch.get_rng_state())
