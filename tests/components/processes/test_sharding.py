"""Whole tensors to parts and back, on several processes; and on one, where nothing happens."""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import device_mesh
from torch.distributed.fsdp._fully_shard import _fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from kasa_tune.components.adapters import CorDALinear, KaSALinear, kasa_regularization
from kasa_tune.components.linalg import LowRank
from kasa_tune.components.processes import World, shard
from kasa_tune.components.processes.sharding import (
    distribute_like,
    distribute_optimizer_state,
    full_tensor,
    full_tensors,
)
from tests.tolerances import SCALAR_FP32, assert_same_bits

# --------------------------------------------------------------------------------- on one process


def test_whole_tensors_pass_through():
    tensor, like = torch.ones(3), torch.ones(3)
    assert full_tensor(tensor) is tensor
    assert distribute_like(tensor, like) is tensor
    parameter = nn.Parameter(tensor)
    assert full_tensor(parameter) is parameter


def test_a_tree_keeps_its_kinds_and_leaves():
    leaf, words = torch.ones(2), object()
    tree = {"a": [leaf, (1, "b")], 3: {"c": None, "d": words}, "e": ()}
    found = full_tensors(tree)
    assert found == tree
    assert found is not tree
    assert found["a"][0] is leaf
    assert found[3]["d"] is words
    assert isinstance(found["a"][1], tuple)


def test_an_optimizer_of_whole_parameters_keeps_its_state():
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    state = optimizer.state_dict()
    cut = distribute_optimizer_state(optimizer, state)
    assert cut["param_groups"] == state["param_groups"]
    assert cut["state"].keys() == {0}
    assert cut["state"][0].keys() == state["state"][0].keys()
    assert all(cut["state"][0][name] is value for name, value in state["state"][0].items())


# --------------------------------------------------------------------------------- there and back


def numbered(shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape).to(dtype)


def cut_and_joined(world, shape, dim, dtype):
    """A tensor cut by us and by torch: this process's part of each, and ours made whole again."""
    tensor = numbered(shape, dtype)
    like = distribute_tensor(torch.zeros(shape), world.mesh, [Shard(dim)])
    part = distribute_like(tensor, like)
    assert isinstance(part, DTensor)
    assert (part.shape, part.stride(), part.placements) == (
        tensor.shape,
        tensor.stride(),
        like.placements,
    )
    expected = distribute_tensor(tensor, world.mesh, [Shard(dim)]).to_local()
    return part.to_local(), expected, full_tensor(part)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    dim=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_a_part_is_what_torch_would_cut_and_the_parts_are_the_whole(processes, shape, dim, dtype):
    """Fewer rows than processes included, where some hold nothing."""
    dim, tensor = dim % len(shape), numbered(shape, dtype)
    pieces = processes(cut_and_joined, shape, dim, dtype)
    for part, expected, joined in pieces:
        assert_same_bits(part.contiguous(), expected.contiguous())
        assert_same_bits(joined, tensor)
    assert torch.equal(torch.cat([part for part, _, _ in pieces], dim), tensor)


def other_width(world):
    """A tensor as wide as the parameter's rows are not, cut like it: state with a number for each row, say."""
    like = distribute_tensor(torch.zeros(5, 4), world.mesh, [Shard(0)])
    part = distribute_like(numbered((5, 1)), like)
    return part.to_local(), full_tensor(part)


def test_dimensions_that_are_not_cut_may_be_of_another_size(processes):
    pieces = processes(other_width)
    assert torch.cat([part for part, _ in pieces]).tolist() == numbered((5, 1)).tolist()
    assert all(torch.equal(joined, numbered((5, 1))) for _, joined in pieces)


def nobody_is_asked(world):
    """Rank 0 alone takes its part: with a word to the others it would wait for them."""
    like = distribute_tensor(torch.zeros(5, 2), world.mesh, [Shard(0)])
    parts = [distribute_like(numbered((5, 2)), like) for _ in range(3 * world.is_rank_zero)]
    meta = DTensor.from_local(
        torch.empty(0, 2, device="meta"), world.mesh, [Shard(0)], shape=(5, 2), stride=(2, 1)
    )
    return len(parts), distribute_like(numbered((5, 2)), meta).to_local().device.type


def test_taking_a_part_asks_no_other_process_and_puts_it_where_the_mesh_is(two_processes):
    assert two_processes(nobody_is_asked) == [(3, "cpu"), (0, "cpu")]


def in_copies(world):
    """Cut by the mesh of four in two copies, and by one whose second dimension replicates."""
    tensor, found = numbered((5, 3)), []
    for placements in ([Replicate(), Shard(0)], [Shard(1), Replicate()]):
        like = distribute_tensor(torch.zeros(5, 3), world.mesh, placements)
        part = distribute_like(tensor, like)
        found.append(
            (
                part.to_local(),
                distribute_tensor(tensor, world.mesh, placements).to_local(),
                full_tensor(part),
            )
        )
    return found


def test_copies_hold_the_same_parts(two_by_two_processes):
    for rank, ((rows, expected_rows, one), (columns, expected_columns, two)) in enumerate(
        two_by_two_processes(in_copies)
    ):
        assert torch.equal(rows, expected_rows)
        assert torch.equal(rows, numbered((5, 3))[[slice(0, 3), slice(3, 5)][rank % 2]])
        assert torch.equal(columns, expected_columns)
        assert torch.equal(one, numbered((5, 3)))
        assert torch.equal(two, numbered((5, 3)))


def gradient_of_a_part(world):
    part = distribute_like(
        numbered((5, 2)), distribute_tensor(torch.zeros(5, 2), world.mesh, [Shard(0)])
    ).requires_grad_()
    (full_tensor(part) ** 2).sum().backward()
    return full_tensor(part.grad)


def test_gradients_flow_back_to_the_parts(processes):
    """Each process computes the same square; a sum over processes is what torch makes of it."""
    for gradient in processes(gradient_of_a_part):
        assert torch.equal(gradient / gradient[4, 1] * 9, numbered((5, 2)))


def tree_of_parts(world):
    cut = distribute_tensor(numbered((5, 2)), world.mesh, [Shard(0)])
    return full_tensors({"state": [cut, (cut, 1)], "plain": torch.ones(2), "lr": 0.5})


def test_every_part_in_a_tree_becomes_whole(processes):
    for tree in processes(tree_of_parts):
        for tensor in (tree["state"][0], tree["state"][1][0]):
            assert type(tensor) is torch.Tensor
            assert torch.equal(tensor, numbered((5, 2)))
        assert tree["state"][1][1] == 1
        assert tree["lr"] == 0.5
        assert torch.equal(tree["plain"], torch.ones(2))


# --------------------------------------------------------------------------------- optimizers


class Toy(nn.Module):
    """Parameters of 5 x 3, 1 x 3 and 7 elements, of which hardly any number of processes is a divisor."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.b = nn.Parameter(torch.randn(1, 3, generator=generator))
        self.c = nn.Parameter(torch.randn(7, generator=generator))

    def forward(self, x):
        return (
            (self.a @ x).square().sum() + (self.b @ x).sin().sum() + (self.c * x.sum()).cos().sum()
        )


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1, "foreach": False}),
    "AdamW of several at once": (torch.optim.AdamW, {"lr": 0.1, "foreach": True}),
    "AdamW, amsgrad": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


def stepped(model, optimizer, steps, processes=1):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(3, generator=torch.Generator().manual_seed(step))
        model(x).backward()
        optimizer.step()


def groups_of(model):
    """B and C learn faster, as in LoRA+: parameters are numbered through all groups."""
    return [{"params": [model.a]}, {"params": [model.b, model.c], "lr": 0.2}]


def resumed(model, kind, saved):
    make, options = OPTIMIZERS[kind]
    optimizer = make(groups_of(model), **options)
    if saved:
        optimizer.load_state_dict(distribute_optimizer_state(optimizer, saved))
    return optimizer


def go_on(world, kind, weights, saved):
    """Two steps from a saved state, in parts; weights and state then, whole; and what a process holds of the state."""
    model = Toy()
    model.load_state_dict(weights)
    shard(model, world)
    optimizer = resumed(model, kind, copy.deepcopy(saved))
    held = [
        (name, tuple(value.to_local().shape), tuple(parameter.to_local().shape))
        for parameter in model.parameters()
        for name, value in optimizer.state[parameter].items()
        if isinstance(value, DTensor)
    ]
    stepped(model, optimizer, (3, 4))
    return full_tensors(model.state_dict()), full_tensors(optimizer.state_dict()), held


def tensors_of(state):
    return {
        (index, name): value
        for index, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def assert_same_state(found, expected):
    assert found["param_groups"] == expected["param_groups"]
    assert tensors_of(found).keys() == tensors_of(expected).keys()
    for key, value in tensors_of(expected).items():
        assert type(tensors_of(found)[key]) is torch.Tensor
        torch.testing.assert_close(tensors_of(found)[key], value, **SCALAR_FP32)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_goes_on_in_parts_and_back_on_one_process(processes, kind):
    """Each step is the same but for the order of a mean over equal gradients."""
    model = Toy()
    optimizer = resumed(model, kind, None)
    stepped(model, optimizer, (1, 2))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    stepped(model, optimizer, (3, 4))
    outcomes = processes(go_on, kind, weights, saved)
    for then, state, held in outcomes:
        assert held
        assert all(shape == as_parameter for _, shape, as_parameter in held)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(then[name], value, **SCALAR_FP32)
        assert_same_state(state, optimizer.state_dict())
    then, state, _ = outcomes[0]
    again = Toy()
    again.load_state_dict(then)
    back = resumed(again, kind, state)
    stepped(model, optimizer, (5, 6))
    stepped(again, back, (5, 6))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, **SCALAR_FP32)


def saved_in_parts(world):
    """State taken off a cut optimizer and put back, beside one that simply went on."""
    model = Toy()
    shard(model, world)
    optimizer = resumed(model, "AdamW", None)
    stepped(model, optimizer, (1, 2))
    state = copy.deepcopy(
        full_tensors(optimizer.state_dict())
    )  # from a file it would share no tensor either
    other = Toy()
    shard(other, world)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    restored = resumed(other, "AdamW", state)
    stepped(model, optimizer, (3,))
    stepped(other, restored, (3,))
    return full_tensors(model.state_dict()), full_tensors(other.state_dict())


def test_saved_and_restored_on_as_many_it_is_the_same_bit_for_bit(processes):
    for one, other in processes(saved_in_parts):
        for name, value in one.items():
            assert_same_bits(other[name], value)


def cut_and_kept(world):
    """Whether the state that was cut is still whole, and the numbers beside it."""
    model = nn.Linear(2, 5, bias=False)
    shard(model, world)
    state = {
        "state": {0: {"step": torch.tensor(1.0), "m": torch.ones(5, 2)}},
        "param_groups": [{"lr": 1.0}],
    }
    cut = distribute_optimizer_state(torch.optim.SGD(model.parameters(), lr=1.0), state)
    return (
        type(state["state"][0]["m"]),
        [type(cut["state"][0][name]) for name in ("step", "m")],
        cut["param_groups"],
    )


def test_cutting_leaves_the_given_state_whole_and_numbers_alone(processes):
    for kept, cut, groups in processes(cut_and_kept):
        assert kept is torch.Tensor
        assert cut == [torch.Tensor, DTensor]
        assert groups == [{"lr": 1.0}]


# ------------------------------------------------------------------------------------ parts that wait on the host


@pytest.fixture
def meta_mesh(monkeypatch):
    """A mesh of two processes on the meta device, in place of two GPUs: the host is not the mesh's device.

    The processes are torch's pretended ones, which exchange nothing.
    """
    monkeypatch.setattr(device_mesh, "_get_device_handle", lambda kind="": torch.cpu)
    monkeypatch.setattr(_fully_shard, "_get_device_from_mesh", lambda mesh: torch.device("meta"))
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield device_mesh.init_device_mesh("meta", (2,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def on_host(tensor, mesh):
    """A parameter whose part waits on the host, as under FSDP2's CPU offload."""
    spec = DTensor.from_local(tensor.to("meta"), mesh, [Shard(0)], run_check=False)._spec
    return DTensor(tensor, spec, requires_grad=True)


def test_a_part_on_the_host_becomes_whole_on_the_device_and_its_gradient_comes_back(meta_mesh):
    with FakeTensorMode(allow_non_fake_inputs=True):
        part = on_host(torch.zeros(4, 3), meta_mesh)
        whole = full_tensor(part)
        whole.square().sum().backward()
    assert (whole.shape, whole.device.type) == ((8, 3), "meta")
    assert (part.to_local().device.type, part.grad.to_local().device.type) == ("cpu", "cpu")


def test_kasas_regularizers_of_parts_on_the_host_leave_gradients_there(meta_mesh):
    linear = KaSALinear(6, 4, rank=2, alpha=2, truncation_rank=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in linear.adapter_params():
            owner, _, leaf = name.rpartition(".")
            part = on_host(torch.zeros_like(linear.get_parameter(name)), meta_mesh)
            setattr(linear.get_submodule(owner), leaf, nn.Parameter(part))
        sum(kasa_regularization([linear])).backward()
    for name in linear.adapter_params():
        assert linear.get_parameter(name).grad.to_local().device.type == "cpu"


def test_folded_edits_stay_on_the_host(meta_mesh):
    linear = CorDALinear(6, 4, rank=2, alpha=2)
    start = LowRank(torch.randn(4, 2), torch.randn(2, 6))
    linear.start_from(start)
    edit = linear.edit.dense()
    for owner in (linear, linear.lora_a, linear.lora_b):
        owner.weight = nn.Parameter(owner.weight.to("meta"), owner.weight.requires_grad)
    shard(
        linear, World(0, 2, torch.device("meta"), meta_mesh, dist.group.WORLD, None, meta_mesh, 1.0)
    )
    assert isinstance(linear.lora_a.weight, DTensor)
    assert linear.lora_edit_in.device.type == linear.lora_edit_out.device.type == "cpu"
    assert torch.equal(linear.edit.dense(), edit)
    assert {"lora_edit_out", "lora_edit_in"} <= dict(linear.named_buffers()).keys()
