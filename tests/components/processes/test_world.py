"""Processes that meet, agree, and share out work and weights: real ones, on the CPU."""

import itertools
import os
import random
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import DTensor

from kasa_tune.components.adapters import CorDALinear, KaSALinear, LoRALinear
from kasa_tune.components.checkpoints import rng_state
from kasa_tune.components.corda.all_layers import decompose
from kasa_tune.components.corda.cache import DecompositionCache
from kasa_tune.components.corda.calibration import (
    add_up,
    covariances,
    damped_covariances,
    shared_inputs,
)
from kasa_tune.components.corda.calibration_data import batched
from kasa_tune.components.corda.covariance import Covariance
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import quantize
from kasa_tune.components.models.base_weights import SharedReading, shapes_of
from kasa_tune.components.models.loading import build_on_meta, put_weight
from kasa_tune.components.processes import OtherRankError, World, distribute_jobs, shard
from kasa_tune.components.processes.sharding import full_tensor
from kasa_tune.methods import METHODS
from tests.components.corda import test_all_layers as test_corda
from tests.components.several_processes import Processes
from tests.tolerances import FP64, MODEL_FP32, assert_same_bits
from tests.toy_models import FAMILIES, VOCAB, randomized

# --------------------------------------------------------------------------------- meeting


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR"])
def test_without_torchrun_the_message_says_how_to_start(monkeypatch, missing):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv(missing)
    with pytest.raises(
        ValueError, match=r"--nproc_per_node <n>.*On one device, use .*_single_device"
    ):
        World.join("cpu", timeout=1)


@pytest.mark.parametrize(("size", "shards"), [(4, 3), (2, 4), (3, 2)])
def test_shards_that_do_not_divide_the_processes_are_refused_before_anyone_waits(
    monkeypatch, size, shards
):
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": size,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "here",
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        ValueError,
        match=f"data_parallel_shard_dim: {size} processes do not divide into groups of {shards}",
    ):
        World.join("cpu", timeout=1, shards=shards)


def seen_by(world):
    return (
        world.rank,
        world.size,
        world.is_rank_zero,
        str(world.device),
        world.mesh.mesh.tolist(),
        world.mesh.mesh_dim_names,
    )


def test_each_knows_its_place(processes):
    n = processes.size
    everyone = list(range(n))
    assert processes(seen_by) == [
        (rank, n, rank == 0, "cpu", everyone, ("shard",)) for rank in everyone
    ]


def test_with_shards_the_mesh_is_copies_by_shards(two_by_two_processes):
    mesh = [[0, 1], [2, 3]]
    for rank, seen in enumerate(two_by_two_processes(seen_by)):
        assert seen == (rank, 4, rank == 0, "cpu", mesh, ("replicate", "shard"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shards", "mesh", "names"), [(1, [[0], [1]], ("replicate", "shard")), (2, [0, 1], ("shard",))]
)
def test_a_copy_for_each_process_and_one_for_all(shards, mesh, names):
    started = Processes(2, shards=shards)
    assert [seen[4:] for seen in started(seen_by)] == [(mesh, names)] * 2
    started.stop()


def test_only_the_first_reports(two_processes):
    assert two_processes(infos) == [["told", "warned", "failed"], ["failed"]]


def infos(world):
    import logging

    log, told = logging.getLogger("test_only_the_first_reports"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.msg)
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.info("told")
    log.warning("warned")
    log.error("failed")
    log.removeHandler(handler)
    return told


def waits_in_vain(world):
    return world.gather(1) if world.is_rank_zero else "elsewhere"


@pytest.mark.slow
def test_who_waits_for_another_in_vain_gives_up():
    started = Processes(2, timeout=2)
    first, second = started.outcomes(waits_in_vain)
    assert isinstance(
        first, RuntimeError
    )  # gloo's, after two seconds and not after its own half hour
    assert "Timed out" in str(first)
    assert second == "elsewhere"
    started.stop()


def waits_for_work(world):
    """Rank 0 works for longer than the time-out, twice; the other process waits."""
    naps = (lambda: time.sleep(4) or "slept", lambda: "at once")
    answer = world.on_rank_zero(naps[0], "A nap")
    return answer, list(distribute_jobs([(2.0, naps[0]), (1.0, naps[1])], world))


@pytest.mark.slow
def test_who_waits_for_anothers_work_waits_longer_than_the_timeout():
    started = Processes(2, timeout=2)
    assert started(waits_for_work) == [("slept", ["slept", "at once"])] * 2
    started.stop()


def dies_at_work(world):
    with world.all_succeed("Working"):
        if world.rank:
            os._exit(1)


@pytest.mark.slow
def test_who_waits_for_the_work_of_one_that_dies_gives_up_at_once():
    started = Processes(2, timeout=2)
    with pytest.raises(AssertionError, match="rank 1 died"):  # and not: rank 0 hangs
        started.outcomes(dies_at_work)


def leaves(world):
    """Seconds that leaving takes; rank 1 comes later."""
    time.sleep(2 * world.rank)
    began = time.monotonic()
    world.leave()
    return time.monotonic() - began


@pytest.mark.slow
def test_none_leaves_before_all_are_done():
    started = Processes(2)
    first, last = started(leaves)
    assert first >= last + 1
    started.stop()


def dies(world):
    if world.rank:
        os._exit(1)
    return "lives"


@pytest.mark.slow
@pytest.mark.parametrize(("work", "what"), [(waits_in_vain, "rank 0 hangs"), (dies, "rank 1 died")])
def test_these_tests_end_when_a_process_does_not(work, what):
    started = Processes(2, done_within=3)
    with pytest.raises(AssertionError, match=what):
        started(work)
    assert [seen[0] for seen in started(seen_by)] == [0, 1]  # new ones
    started.stop()


# --------------------------------------------------------------------------------- agreeing


def gathered(world):
    return world.gather({"rank": world.rank, "tensor": torch.full((world.rank + 1,), 0.5)})


def test_gather_is_by_rank_everywhere(processes):
    for values in processes(gathered):
        assert [value["rank"] for value in values] == list(range(processes.size))
        assert [value["tensor"].tolist() for value in values] == [
            [0.5] * (n + 1) for n in range(processes.size)
        ]


def sums(world):
    return world.sum(2.0**53, world.rank, world.rank == 0, 0.1 * world.rank)


def test_sums_are_exact_beyond_float32(processes):
    n = processes.size
    expected = [n * 2.0**53, sum(range(n)), 1.0, sum(0.1 * rank for rank in range(n))]
    for found in processes(sums):
        assert found[:3] == expected[:3]
        assert found[3] == pytest.approx(expected[3], rel=1e-15)


ERRORS = {
    "with words": ValueError("the disk is full"),
    "without": ValueError(),
    "a failed assertion": AssertionError(),
    "several lines": RuntimeError("one\ntwo"),
    "no RuntimeError": KeyError("name"),
}


def fails_on(world, failing, error):
    with world.all_succeed("Reading the data"):
        if world.rank in failing:
            raise error
    return "went on"


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_who_fails_raises_its_own_error_and_the_others_name_it(processes, error):
    last = processes.size - 1
    *others, failed = processes.outcomes(fails_on, [last], error)
    assert (type(failed), failed.args) == (type(error), error.args)
    for other in others:
        assert isinstance(other, OtherRankError)
        assert str(other) == f"Reading the data failed on rank {last}; its message says why."
    assert (
        processes(fails_on, [], error) == ["went on"] * processes.size
    )  # and they can go on together


def test_if_all_fail_each_raises_its_own(processes):
    outcomes = processes.outcomes(fails_on, range(processes.size), ValueError("here too"))
    assert [(type(error), str(error)) for error in outcomes] == [
        (ValueError, "here too")
    ] * processes.size


def test_of_several_that_fail_the_first_is_named(processes):
    if processes.size > 2:
        outcomes = processes.outcomes(fails_on, [1, 2], ValueError("here"))
        assert "failed on rank 1" in str(outcomes[0])


def led(world, value, error=None):
    did = []

    def act():
        did.append(world.rank)
        if error:
            raise error
        return value

    return world.on_rank_zero(act, "Writing the file"), did


@pytest.mark.parametrize("value", ["a checksum", {"of": [1, 2.5, None]}, None, False])
def test_what_the_first_alone_does_all_know(processes, value):
    assert processes(led, value) == [(value, [0])] + [(value, [])] * (processes.size - 1)


def test_if_it_fails_there_all_stop(processes):
    first, *others = processes.outcomes(led, None, OSError("no space left"))
    assert (type(first), str(first)) == (OSError, "no space left")
    for other in others:
        assert isinstance(other, OtherRankError)
        assert str(other) == "Writing the file failed on rank 0; its message says why."


def checked(world, facts_by_rank):
    return world.check_same(facts_by_rank[world.rank])


@pytest.mark.parametrize("changed", ["config", "data"])
def test_what_differs_is_named_on_all_and_where(processes, changed):
    facts = {"config": "a", "data": "b", "base weights": ""}
    differing = [facts] * (processes.size - 1) + [facts | {changed: "c"}]
    for error in processes.outcomes(checked, differing):
        assert isinstance(error, ValueError)
        assert f"Rank {processes.size - 1} has another {changed} than rank 0." in str(error)
    assert processes(checked, [facts] * processes.size) == [None] * processes.size


def test_the_first_that_differs_is_named(processes):
    outcomes = processes.outcomes(
        checked, [{"data": str(min(rank, 1)), "seed": str(rank)} for rank in range(processes.size)]
    )
    assert all(str(error).startswith("Rank 1 has another data than rank 0.") for error in outcomes)


# --------------------------------------------------------------------------------- random state


def drawn():
    return torch.rand(3).tolist(), np.random.rand(), random.random()


def rng_round_trip(world, from_seed):
    torch.manual_seed(from_seed + world.rank)
    np.random.seed(world.rank)
    random.seed(world.rank)
    first, *others = world.gather(rng_state())
    after = drawn()
    world.set_rng_state(first | {"other_ranks": others})
    return after, drawn()


def test_as_many_processes_go_on_with_their_own_random_numbers(processes):
    found = processes(rng_round_trip, 5)
    assert all(again == after for after, again in found)
    for one, other in itertools.combinations([after for after, _ in found], 2):
        assert all(a != b for a, b in zip(one, other, strict=True))


def rng_of_another_number(world, saved_by):
    torch.manual_seed(7 + world.rank)
    first, *others = (
        {**rng_state(), "torch": torch.Generator().manual_seed(7 + n).get_state()} for n in saved_by
    )
    would_be = [
        torch.rand(3, generator=torch.Generator().manual_seed(7 + n)).tolist() for n in saved_by
    ]
    world.set_rng_state(first | ({"other_ranks": others} if others else {}))
    return torch.rand(3).tolist(), would_be


@pytest.mark.parametrize("more", [-1, 1])
def test_another_number_of_processes_draws_anew_and_differently_on_each(processes, more):
    found = processes(rng_of_another_number, range(processes.size + more))
    drawn_now = [tuple(now) for now, _ in found]
    assert len({*drawn_now}) == processes.size
    assert not {*drawn_now} & {tuple(before) for before in found[0][1]}
    assert [
        tuple(now) for now, _ in processes(rng_of_another_number, range(processes.size + more))
    ] == drawn_now


# --------------------------------------------------------------------------------- sharing out work


def spread_out(world, costs, failing=None, one_by_one=False):
    """Results, and which jobs this process did and how many inputs it held at most."""
    did = []

    def job(index):
        did.append(index)
        if index == failing:
            raise ValueError(f"job {index} is impossible")
        return index, torch.full((2,), index / 3)

    jobs = ((cost, partial(job, index)) for index, cost in enumerate(costs))
    return list(distribute_jobs(jobs, world)), did


def load_of(outcome, costs):
    return sum(costs[index] for index in outcome[1])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(costs=st.lists(st.floats(0.01, 100), max_size=9))
def test_each_job_is_done_once_and_all_have_the_results_in_order(processes, costs):
    outcomes = processes(spread_out, costs)
    for results, _ in outcomes:
        assert [index for index, _ in results] == list(range(len(costs)))
        assert all(torch.equal(tensor, torch.full((2,), index / 3)) for index, tensor in results)
    assert sorted(index for _, did in outcomes for index in did) == list(range(len(costs)))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(costs=st.lists(st.floats(0.01, 100), min_size=1, max_size=7), dear_first=st.booleans())
def test_loads_are_within_the_bounds_of_greedy_scheduling(processes, costs, dear_first):
    """Graham's: at most ``2 - 1/m`` times the best, and ``4/3 - 1/3m`` with the dear ones first (1966, 1969)."""
    costs, m = sorted(costs, reverse=True) if dear_first else costs, processes.size
    longest = max(load_of(outcome, costs) for outcome in processes(spread_out, costs))
    best = min(
        max(
            sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank)
            for rank in range(m)
        )
        for owners in itertools.product(range(m), repeat=len(costs))
    )
    assert longest <= (4 / 3 - 1 / (3 * m) if dear_first else 2 - 1 / m) * best * (1 + 1e-12)


def test_no_process_works_through_many_jobs_before_the_others_begin(processes):
    """Jobs of like cost are taken on a few at a time: a process that holds the inputs of all its jobs runs full."""
    assert processes(most_waiting, 60) == [2 * processes.size] * processes.size


def most_waiting(world, number):
    """How many jobs were drawn at most before their results came."""
    drawn, most, back = 0, 0, 0

    def jobs():
        nonlocal drawn
        for _ in range(number):
            drawn += 1
            yield 1.0, int

    for _ in distribute_jobs(jobs(), world):
        most, back = max(most, drawn - back), back + 1
    return most


def test_no_jobs_no_results(processes):
    assert processes(spread_out, []) == [([], [])] * processes.size


def test_a_single_job_is_done_by_one(processes):
    outcomes = processes(spread_out, [3.0])
    assert [did for _, did in outcomes] == [[0]] + [[]] * (processes.size - 1)
    assert all([index for index, _ in results] == [0] for results, _ in outcomes)


@pytest.mark.parametrize("failing", [0, 1, 10])
def test_a_job_that_fails_stops_all(processes, failing):
    outcomes = processes.outcomes(spread_out, [1.0] * 11, failing)
    raised = [outcome for outcome in outcomes if type(outcome) is ValueError]
    assert [str(error) for error in raised] == [f"job {failing} is impossible"]
    owner = outcomes.index(raised[0])
    others = [outcome for outcome in outcomes if outcome is not raised[0]]
    assert all(isinstance(other, OtherRankError) for other in others)
    assert {str(other) for other in others} == {
        f"A decomposition failed on rank {owner}; its message says why."
    }


# CorDA, and CorDA++ with a width whose rounds are taken together.
DECOMPOSITIONS = {
    "one round": {"rounds": 1, "dynamic_ranks": False, "max_selection_dim": None},
    "rounds, ranks and widths": {"rounds": 3, "dynamic_ranks": True, "max_selection_dim": 16},
}


def decomposed(world, options, folder):
    """Components and spectra of toy layers that have weights only while they are visited."""
    toy = test_corda.World(num_rounds=options["rounds"])
    cache = DecompositionCache(
        folder, {"base weights": "these"}, writes=not world or world.is_rank_zero
    )
    options = test_corda.OPTIONS | options
    compute = {"compute": partial(distribute_jobs, world=world)} if world else {}
    return decompose(
        toy.linears, toy.source, cache, method=METHODS["corda"], options=options, **compute
    )


@pytest.mark.parametrize("options", DECOMPOSITIONS.values(), ids=DECOMPOSITIONS)
def test_layers_decomposed_by_several_are_those_decomposed_in_turn(processes, options, tmp_path):
    components, spectra = decomposed(None, options, tmp_path / "one")
    for found, chosen_by in processes(decomposed, options, tmp_path / "several"):
        assert list(found) == list(components)
        assert list(chosen_by) == list(spectra)
        for name, component in components.items():
            for part in ("vectors", "singular_values", "projection"):
                assert torch.equal(getattr(found[name], part), getattr(component, part)), (
                    name,
                    part,
                )
        for name, spectrum in spectra.items():
            assert torch.equal(chosen_by[name].singular_values, spectrum.singular_values)
            assert (chosen_by[name].round, chosen_by[name].scores) == (
                spectrum.round,
                spectrum.scores,
            )
    files = sorted(path.name for path in (tmp_path / "several").iterdir())
    assert files == ["ipm.safetensors"] + ["spectra.safetensors"] * bool(spectra)
    for file in files:
        assert (tmp_path / "several" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


# --------------------------------------------------------------------------------- reading


def tensors_to_read():
    shapes = {
        "divides": (6, 2),
        "uneven": (7, 3),
        "fewer rows than processes": (1, 4),
        "vector": (5,),
        "cube": (4, 2, 3),
    }
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    columns = torch.randn(4, 5, generator=generator).T  # whose rows are not together in memory
    return tensors | {
        "half": tensors["uneven"].bfloat16(),
        "half vector": torch.ones(3).half(),
        "columns": columns,
    }


def read_together(world):
    weights = tensors_to_read()
    shared = SharedReading(weights, world)
    return dict(shared.items()), list(shared), len(shared), shapes_of(shared)


def test_what_all_read_together_is_what_each_would_have_read(processes):
    weights = tensors_to_read()
    for found, names, number, shapes in processes(read_together):
        assert names == list(weights)
        assert number == len(weights)
        assert shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for name, tensor in weights.items():
            assert_same_bits(found[name], tensor)


def read_spoilt(world):
    """Each process's tensor is right in its own rows alone."""
    rows = torch.arange(7.0)[:, None].expand(7, 2).clone()
    per_process = -(-7 // world.size)
    own = torch.arange(7) // per_process == world.rank
    return SharedReading({"w": rows.where(own[:, None], torch.nan)}, world)["w"]


def test_each_process_reads_no_rows_but_its_own(processes):
    for found in processes(read_spoilt):
        assert torch.equal(found, torch.arange(7.0)[:, None].expand(7, 2))


# --------------------------------------------------------------------------------- sharding


class Block(nn.Module):
    """Linears of all kinds one after the other, some frozen and plain, with a norm between."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.kasa = KaSALinear(width, hidden, rank=3, truncation_rank=2, edit_storage="factored")
        self.plain = nn.Linear(hidden, hidden, bias=False)
        self.corda = CorDALinear(hidden, width, rank=3)
        self.dora = LoRALinear(width, width, rank=1, use_dora=True)

    def forward(self, x):
        return x + self.dora(self.corda(torch.relu(self.plain(self.kasa(self.norm(x))))))


class Toy(nn.Module):
    """Two blocks of which the second's sizes divide by hardly anything, an embedding and an output projection."""

    def __init__(self, seed=0):
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, 8)
        self.layers = nn.ModuleList([Block(8, 24), Block(8, 5)])
        self.output = nn.Linear(8, 7, bias=False)
        randomized(self, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if hasattr(module, "weight") and ".lora_" not in name:
                module.weight.requires_grad_(False)
            if isinstance(module, KaSALinear):
                sides = module.lora_edit_out.shape, module.lora_edit_in.shape
                module.set_edit(
                    LowRank(*(torch.randn(side, generator=generator) / 4 for side in sides))
                )

    def forward(self, tokens):
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(h)


# With blocks of 4 and 8, weights of 24 rows have 6 or 18 scales of scales, with the others a single one; a weight of 8
# rows has 6, but its rows do not divide by three.
KINDS = {"plain": None, "NF4 that divides": (4, 8), "NF4 whose scales do not": (8, 72)}


def toy(kind):
    """A toy whose first block is in NF4, if any."""
    model = Toy()
    for module in (
        (model.layers[0].kasa, model.layers[0].plain, model.layers[0].corda) if KINDS[kind] else ()
    ):
        block_size, scaler_block_size = KINDS[kind]
        put_weight(
            module,
            quantize(module.weight, block_size=block_size, scaler_block_size=scaler_block_size),
        )
    return model


def left_whole(kind, processes):
    return {
        "plain": [],
        "NF4 that divides": ["corda"] if 8 % processes else [],
        "NF4 whose scales do not": ["corda", "kasa", "plain"],
    }[kind]


def rows_for(number):
    return torch.randint(7, (number, 4), generator=torch.Generator().manual_seed(1))


def losses_of(model, tokens):
    logits = model(tokens)
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )


def trained_of(model):
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def sharded_step(world, kind, number):
    """Losses of this process's rows, gradients of all, and what the process holds of each parameter."""
    model = toy(kind)
    for layer in model.layers:
        shard(layer, world)
    shard(model, world)
    tokens = rows_for(number)[world.rank :: world.size]
    losses = losses_of(model, tokens)
    (losses.sum() * world.size).backward()  # the mean over processes is taken of it
    gradients = {name: full_tensor(p.grad).clone() for name, p in trained_of(model).items()}
    held = {
        name: p.to_local().shape for name, p in model.named_parameters() if isinstance(p, DTensor)
    }
    uncut = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    return losses.detach().view(len(tokens), -1), gradients, held, uncut


def expected_step(kind, number):
    model = toy(kind)
    losses = losses_of(model, rows_for(number))
    losses.sum().backward()
    return losses.detach().view(number, -1), {name: p.grad for name, p in trained_of(model).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one_process(processes, kind):
    number = 2 * processes.size + 1  # more rows for the first
    losses, gradients = expected_step(kind, number)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    for rank, (own, summed, held, uncut) in enumerate(processes(sharded_step, kind, number)):
        torch.testing.assert_close(own, losses[rank :: processes.size], **MODEL_FP32)
        assert summed.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(summed[name], gradient, **MODEL_FP32)
        assert sorted(uncut) == [
            f"layers.0.{name}.weight" for name in left_whole(kind, processes.size)
        ]
        for name, parameter in toy(kind).named_parameters():
            if name in held:  # rows are cut into pieces of like size, the last ones smaller
                rows = -(-len(parameter) // processes.size)
                assert held[name][0] == max(0, min(rows, len(parameter) - rank * rows)), name


@pytest.mark.parametrize("kind", ["plain", "NF4 that divides"])
def test_copies_of_the_model_that_are_each_shared_by_two(two_by_two_processes, kind):
    losses, gradients = expected_step(kind, 9)
    for rank, (own, summed, held, uncut) in enumerate(two_by_two_processes(sharded_step, kind, 9)):
        assert uncut == []  # what two can share, though four could not
        torch.testing.assert_close(own, losses[rank::4], **MODEL_FP32)
        for name, gradient in gradients.items():
            torch.testing.assert_close(summed[name], gradient, **MODEL_FP32)
        assert held["output.weight"] == (4 - rank % 2, 8)  # 7 rows cut by two, not by four


def shard_mixed(world, dtypes):
    block = nn.Module()
    for name, dtype in zip("abc", dtypes, strict=False):
        setattr(block, name, nn.Parameter(torch.ones(2, dtype=dtype)))
    block.frozen = nn.Parameter(torch.ones(2, dtype=torch.float16), requires_grad=False)
    shard(block, world)
    return {name for name, parameter in block.named_parameters() if isinstance(parameter, DTensor)}


def test_parameters_that_cannot_be_cut_together_are_refused_with_what_to_set(two_processes):
    for error in two_processes.outcomes(shard_mixed, [torch.float32, torch.bfloat16]):
        assert isinstance(error, ValueError)
        assert "bfloat16 and float32 cannot be cut together: set adapter.dtype=fp32" in str(error)
    assert two_processes(shard_mixed, [torch.bfloat16] * 2) == [{"a", "b", "frozen"}] * 2


# --------------------------------------------------------------------------------- calibration


def covariance_sums(world, dtype):
    rows = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    own = rows[world.rank :: world.size]
    lower = (own.T @ own).tril().to(dtype)
    total = Covariance(("a",), 0, lower, num_tokens=len(own), num_samples=2 + world.rank)
    add_up(total, world)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_over_parts_are_the_sum_over_all(processes, dtype):
    rows = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for total in processes(covariance_sums, dtype):
        close = (
            FP64 if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
        )  # a handful of roundings
        torch.testing.assert_close(total.matrix.tril().double(), (rows.T @ rows).tril(), **close)
        assert total.matrix.dtype == dtype
        assert (total.num_tokens, total.num_samples) == (
            7,
            sum(2 + rank for rank in range(processes.size)),
        )
        assert all(type(number) is int for number in (total.num_tokens, total.num_samples))


LENGTHS = (
    (9, 4, 12, 7, 3),
    (5, 8, 2),
)  # of the rows of two rounds; the second leaves the last of three one, of length 2


def calibrated(world, per_sample, rounds_wanted):
    """Covariances by layer and round: of all rows where there is no world, else of all processes' parts."""
    family = FAMILIES["llama3"]
    options = {"apply_to_mlp": True, "rank": 1} | family.sizes
    make = partial(family.corda, ["q_proj", "output_proj"], **options)
    model, groups = (
        randomized(make()).eval().double(),
        shared_inputs(build_on_meta(make, dtype=torch.float32)),
    )
    generator = np.random.default_rng(0)
    rounds = [[{"tokens": generator.integers(0, VOCAB, n)} for n in lengths] for lengths in LENGTHS]
    rank, size = (world.rank, world.size) if world else (0, 1)
    parts = [
        batched(rows[rank::size], tokenizer=None, batch_size=2, device=torch.device("cpu"))
        for rows in rounds
    ]
    options = {"wanted": rounds_wanted, "dtype": torch.float64} | (
        {"combine": partial(add_up, world=world)} if world else {}
    )
    found = {
        (each.layers[0], each.round): (each.matrix, each.num_tokens)
        for each in covariances(model, groups, parts, per_sample=per_sample, **options)
    }
    settings = {"damping": 0.01, "damping_search": False, "progress": lambda turns: turns}
    settings |= {"normalization": "published" if per_sample else "unit_mean_diag"}
    damped = damped_covariances(model, groups, parts, **settings, **options)
    return found, {(layers[0], round): matrix for layers, round, matrix in damped}


def of_each_round(name, round):
    return round >= 0


def of_all_rounds(name, round):
    return round < 0


@pytest.mark.parametrize("wanted", [of_each_round, of_all_rounds])
@pytest.mark.parametrize("per_sample", [False, True], ids=["of tokens", "published"])
def test_covariances_of_rows_cut_over_processes_are_those_of_all_rows(
    processes, per_sample, wanted
):
    expected, expected_damped = calibrated(None, per_sample, wanted)
    assert len(expected) == (2 if wanted is of_each_round else 1) * 2 * 4  # rounds, blocks, inputs
    for found, damped in processes(calibrated, per_sample, wanted):
        assert found.keys() == expected.keys()
        for key, (matrix, num_tokens) in expected.items():
            assert found[key][1] == num_tokens
            torch.testing.assert_close(found[key][0], matrix, **FP64)
            torch.testing.assert_close(damped[key], expected_damped[key], **FP64)


def test_all_processes_have_the_same_bits(processes):
    first, *others = processes(calibrated, False, of_each_round)
    for other in others:
        for key, (matrix, _) in first[0].items():
            assert torch.equal(other[0][key][0], matrix)
