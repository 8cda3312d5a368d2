"""Muon on matrices and AdamW on the rest: each parameter moves as under the optimizer of torch that has it alone."""

import copy

import pytest
import torch

from kasa_tune.components.training import MuonWithAdamW, linear_schedule

SHAPES = {"a": (3, 5), "b": (6, 3), "diag": (3,), "magnitude": (6,)}
OPTIONS = {"lr": 0.02, "weight_decay": 0.1}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def train(parameters, optimizers, steps, first=0, schedules=()):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for each in (*optimizers, *schedules):
            each.step()


def matrices(parameters):
    return [p for p in parameters.values() if p.ndim == 2]


def others(parameters):
    return [p for p in parameters.values() if p.ndim != 2]


@pytest.mark.parametrize("adamw_lr", [None, 0.005])
def test_each_parameter_moves_as_under_its_optimizer_alone(adamw_lr):
    ours, theirs = parameters(), parameters()
    optimizer = MuonWithAdamW(list(ours.values()), adamw_lr=adamw_lr, **OPTIONS)
    peers = (
        torch.optim.Muon(matrices(theirs), adjust_lr_fn="match_rms_adamw", **OPTIONS),
        torch.optim.AdamW(others(theirs), **OPTIONS | {"lr": adamw_lr or OPTIONS["lr"]}),
    )
    schedules = [
        linear_schedule(each, num_training_steps=6, warmup_ratio=0.3)
        for each in (optimizer, *peers)
    ]
    train(ours, [optimizer], 5, schedules=schedules[:1])
    train(theirs, peers, 5, schedules=schedules[1:])
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        assert not torch.equal(parameter, parameters()[name])


def test_groups_keep_their_rates():
    ours, theirs = parameters(), parameters()
    groups = [
        {"params": [ours["a"], ours["diag"]]},
        {"params": [ours["b"], ours["magnitude"]], "lr": 0.3},
    ]
    peers = [
        torch.optim.Muon([theirs["a"]], adjust_lr_fn="match_rms_adamw", **OPTIONS),
        torch.optim.Muon([theirs["b"]], adjust_lr_fn="match_rms_adamw", **OPTIONS | {"lr": 0.3}),
        torch.optim.AdamW([theirs["diag"]], **OPTIONS),
        torch.optim.AdamW([theirs["magnitude"]], **OPTIONS | {"lr": 0.3}),
    ]
    train(ours, [MuonWithAdamW(groups, **OPTIONS)], 3)
    train(theirs, peers, 3)
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def test_a_resumed_optimizer_goes_on_exactly():
    whole, resumed = parameters(), parameters()
    first = MuonWithAdamW(list(whole.values()), **OPTIONS)
    train(whole, [first], 6)
    second = MuonWithAdamW(list(resumed.values()), **OPTIONS)
    train(resumed, [second], 3)
    saved = copy.deepcopy(second.state_dict())
    third = MuonWithAdamW(list(resumed.values()), **OPTIONS | {"lr": 7.0})
    third.load_state_dict(saved)
    train(resumed, [third], 3, first=3)
    for name, parameter in whole.items():
        assert torch.equal(parameter, resumed[name]), name


@pytest.mark.parametrize("of", [matrices, others])
def test_one_kind_of_parameter_is_enough(of):
    ours = parameters()
    train(ours, [MuonWithAdamW(of(ours), lr=0.1)], 1)
    before = parameters()
    moved = {name for name, p in ours.items() if not torch.equal(p, before[name])}
    assert {id(ours[name]) for name in moved} == {id(p) for p in of(ours)}


def test_a_torch_without_muon_is_named(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"Muon came with torch 2\.9.*AdamW"):
        MuonWithAdamW([torch.nn.Parameter(torch.ones(2, 2))])
