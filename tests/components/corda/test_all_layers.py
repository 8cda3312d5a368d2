"""Decomposing all layers of a model: each as if it were alone, chosen as brute force chooses, found once."""

import math
from functools import partial

import pytest
import torch

from kasa_tune.components.adapters import CorDALinear
from kasa_tune.components.corda import cache_files
from kasa_tune.components.corda.all_layers import decompose
from kasa_tune.components.corda.allocation import POOLED, LayerSpectrum
from kasa_tune.components.corda.cache import CacheError, DecompositionCache
from kasa_tune.components.corda.covariance import damped
from kasa_tune.components.linalg.decomposition import co_svd
from kasa_tune.components.models.loading import put_weight
from kasa_tune.methods import METHODS
from tests.components.corda.test_allocation import allocate_by_the_loop

# Linears by the input they share: their names, d_in, and d_out of each.
GROUPS = [
    (("layers.0.q", "layers.0.k"), 12, (12, 6)),
    (("layers.0.w2",), 20, (12,)),
    (("layers.1.q",), 12, (12,)),
]
NUM_ROUNDS, RANK = 3, 3
OF_MODE = {"ipm": METHODS["corda"], "kpm": METHODS["corda_kpm"]}
OPTIONS = {
    "covariance_power": 1.0, "rounds": 1, "dynamic_ranks": False, "max_selection_dim": None, "min_rank": 1,
    "max_rank": None,
}  # fmt: skip


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class World:
    """Linears with random weights, their inputs' covariances, and a source of those like a model's: block by block, a
    layer has its weight only while it is visited.
    """

    def __init__(self, num_rounds=1):
        self.linears, self.weights, self.covariances = {}, {}, {}
        for index, (names, d_in, widths) in enumerate(GROUPS):
            for offset, (name, d_out) in enumerate(zip(names, widths, strict=True)):
                self.linears[name] = CorDALinear(d_in, d_out, RANK).to("meta")
                self.weights[name] = normal(d_out, d_in, seed=10 * index + offset)
            inputs = [normal(d_in, 30, seed=100 * index + r) for r in range(num_rounds)]
            inputs = [
                x * torch.arange(1, d_in + 1)[:, None] ** -(0.2 + 0.8 * ((r + index) % 3))
                for r, x in enumerate(inputs)
            ]
            sums = [x @ x.T for x in inputs]
            for round, total in [*enumerate(sums), (POOLED, sum(sums))]:
                for name in names:
                    self.covariances[name, round] = damped(total)
        self.rounds, self.titles, self.visits = num_rounds, [], []

    def source(self, wanted, title):
        self.titles.append(title)
        for names, _, _ in GROUPS:
            for name in names:
                put_weight(self.linears[name], self.weights[name].clone())
            for round in (*range(self.rounds), POOLED):
                if layers := [name for name in names if wanted(name, round)]:
                    self.visits.append((title, tuple(layers), round))
                    yield layers, round, self.covariances[layers[0], round]
            for name in names:
                put_weight(self.linears[name], torch.empty_like(self.weights[name], device="meta"))


def cache(folder, **key):
    return DecompositionCache(folder, {"base weights": "these", **key})


def score_of(weight, covariance):
    """``log π(C) Σ σ_k / σ_1`` in float64, from full decompositions; and the singular values and ``log π``."""
    eigenvalues = torch.linalg.eigvalsh(covariance.double())
    log_pi = math.log(math.sqrt(len(weight) * eigenvalues[-1].item()) / eigenvalues[0].item())
    values = torch.linalg.svdvals(weight.double() @ covariance.double())
    return log_pi * (values.sum() / values[0]).item(), values, log_pi


def assert_component(found, weight, covariance, rank, mode, power=1.0):
    alone = co_svd(weight, covariance, rank, mode, covariance_power=power)
    for part in ("vectors", "singular_values", "projection"):
        assert getattr(found, part).device.type == "cpu"
        assert torch.equal(getattr(found, part), getattr(alone, part)), part


# --------------------------------------------------------------------------------- CorDA


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_every_layer_is_decomposed_as_if_it_were_alone(mode, power, tmp_path):
    world = World()
    options = OPTIONS | {"covariance_power": power}
    found, spectra = decompose(
        world.linears, world.source, cache(tmp_path), method=OF_MODE[mode], options=options
    )
    assert list(found) == list(world.linears)
    assert spectra == {}
    assert len(world.titles) == 1
    for name, component in found.items():
        assert_component(
            component, world.weights[name], world.covariances[name, 0], RANK, mode, power
        )


def test_ranks_are_those_of_the_linears(tmp_path):
    world = World()
    for rank, linear in enumerate(world.linears.values()):
        linear.rank = rank + 1
    found, _ = decompose(
        world.linears, world.source, cache(tmp_path), method=METHODS["corda"], options=OPTIONS
    )
    assert [component.rank for component in found.values()] == [1, 2, 3, 4]


def test_where_there_is_no_covariance_the_walk_gives_none(tmp_path):
    world = World()

    def covariances(wanted, title):
        for layers, round, _ in world.source(wanted, title):
            yield layers, round, None

    found, _ = decompose(
        world.linears, covariances, cache(tmp_path), method=METHODS["corda"], options=OPTIONS
    )
    for name, component in found.items():
        assert_component(component, world.weights[name], None, RANK, "ipm")


# --------------------------------------------------------------------------------- CorDA++


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("limit", [None, 12, 11, 20])
def test_each_layer_keeps_its_most_compact_round_and_wide_ones_take_all(limit, power, tmp_path):
    world = World(NUM_ROUNDS)
    options = OPTIONS | {
        "rounds": NUM_ROUNDS,
        "max_selection_dim": limit,
        "covariance_power": power,
    }
    found, spectra = decompose(
        world.linears, world.source, cache(tmp_path), method=METHODS["corda"], options=options
    )
    assert list(found) == list(spectra) == list(world.linears)
    chosen = set()
    for name, weight in world.weights.items():
        pooled = limit is not None and weight.shape[1] > limit
        # With another power the singular values are those of W C^p.
        scores = []
        for round in range(NUM_ROUNDS):
            covariance = world.covariances[name, round].double()
            eigenvalues, vectors = torch.linalg.eigh(covariance)
            values = torch.linalg.svdvals(
                weight.double() @ (vectors * eigenvalues**power) @ vectors.T
            )
            scores.append(score_of(weight, covariance)[2] * (values.sum() / values[0]).item())
        best = POOLED if pooled else min(range(NUM_ROUNDS), key=scores.__getitem__)
        assert spectra[name].round == best
        assert spectra[name].scores == (() if pooled else pytest.approx(tuple(scores), rel=1e-6))
        assert_component(found[name], weight, world.covariances[name, best], RANK, "ipm", power)
        chosen.add(best)
    assert len(chosen) > 1 or limit == 11  # otherwise nothing was chosen
    assert len(world.titles) == 2


def test_the_second_walk_asks_for_the_chosen_rounds_alone(tmp_path):
    world = World(NUM_ROUNDS)
    options = OPTIONS | {"rounds": NUM_ROUNDS}
    _, spectra = decompose(
        world.linears, world.source, cache(tmp_path), method=METHODS["corda"], options=options
    )
    first, second = world.titles
    asked = [(layers, round) for title, layers, round in world.visits if title == first]
    assert asked == [(names, round) for names, _, _ in GROUPS for round in range(NUM_ROUNDS)]
    visits = [
        (name, round) for title, layers, round in world.visits for name in layers if title == second
    ]
    assert sorted(visits) == sorted((name, spectrum.round) for name, spectrum in spectra.items())


def test_what_is_found_is_in_the_order_of_the_linears_whatever_that_of_the_covariances(tmp_path):
    world = World(NUM_ROUNDS)
    linears = dict(reversed(world.linears.items()))
    options = OPTIONS | {"rounds": NUM_ROUNDS, "dynamic_ranks": True}
    found, spectra = decompose(
        linears, world.source, cache(tmp_path), method=METHODS["corda"], options=options
    )
    assert list(found) == list(spectra) == list(linears)


def ranks_by_the_loop(world, mode, min_rank, max_rank):
    """CorDA++'s algorithm 1 as written, on spectra from whole decompositions."""
    scores = {
        name: score_of(weight, world.covariances[name, 0]) for name, weight in world.weights.items()
    }
    spectra = {
        name: LayerSpectrum(values, log_pi, 0) for name, (_, values, log_pi) in scores.items()
    }
    sizes = {name: sum(weight.shape) for name, weight in world.weights.items()}
    return allocate_by_the_loop(spectra, sizes, RANK, mode, min_rank, max_rank)


@pytest.mark.parametrize(("min_rank", "max_rank"), [(1, None), (2, 5)], ids=str)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_ranks_are_those_of_the_papers_loop(mode, min_rank, max_rank, tmp_path):
    world = World()
    options = OPTIONS | {"dynamic_ranks": True, "min_rank": min_rank, "max_rank": max_rank}
    found, spectra = decompose(
        world.linears, world.source, cache(tmp_path), method=OF_MODE[mode], options=options
    )
    ranks = {name: component.rank for name, component in found.items()}
    assert ranks == ranks_by_the_loop(world, mode, min_rank, max_rank)
    assert len(set(ranks.values())) > 1
    assert {spectrum.round for spectrum in spectra.values()} == {0}
    for name, component in found.items():
        assert_component(
            component, world.weights[name], world.covariances[name, 0], ranks[name], mode
        )


def test_the_budget_is_that_of_the_linears_rank(tmp_path):
    few, many = World(), World()
    for linear in many.linears.values():
        linear.rank = RANK + 2
    options = OPTIONS | {"dynamic_ranks": True}
    totals = [
        sum(
            c.rank
            for c in decompose(
                w.linears,
                w.source,
                cache(tmp_path / str(i)),
                method=METHODS["corda"],
                options=options,
            )[0].values()
        )
        for i, w in enumerate((few, many))
    ]
    assert totals[1] > totals[0] + 4


def test_bounds_that_leave_no_room_are_refused(tmp_path):
    world = World()
    options = OPTIONS | {"dynamic_ranks": True, "min_rank": RANK + 1}
    with pytest.raises(ValueError, match=r"adapter\.min_rank 4 alone"):
        decompose(
            world.linears, world.source, cache(tmp_path), method=METHODS["corda"], options=options
        )


def test_a_damaged_weight_is_refused(tmp_path):
    world = World()
    world.weights["layers.0.w2"][3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        decompose(
            world.linears, world.source, cache(tmp_path), method=METHODS["corda"], options=OPTIONS
        )


# --------------------------------------------------------------------------------- found once


def never(wanted, title):
    raise AssertionError("walked over the model again")


@pytest.mark.parametrize(
    "changes", [{}, {"rounds": NUM_ROUNDS, "dynamic_ranks": True}], ids=["CorDA", "CorDA++"]
)
def test_what_was_found_is_not_looked_for_again(changes, tmp_path):
    world, options = World(NUM_ROUNDS), OPTIONS | changes
    found, spectra = decompose(
        world.linears, world.source, cache(tmp_path), method=METHODS["corda"], options=options
    )
    again, read = decompose(
        world.linears, never, cache(tmp_path), method=METHODS["corda"], options=options
    )
    assert list(again) == list(found)
    for name, component in again.items():
        assert torch.equal(component.vectors, found[name].vectors)
        assert torch.equal(component.projection, found[name].projection)
        assert torch.equal(component.singular_values, found[name].singular_values)
    assert {name: s.round for name, s in read.items()} == {
        name: s.round for name, s in spectra.items()
    }


def test_another_mode_or_budget_needs_no_second_look_at_the_spectra(tmp_path):
    world, options = World(NUM_ROUNDS), OPTIONS | {"rounds": NUM_ROUNDS, "dynamic_ranks": True}
    decompose(
        world.linears, world.source, cache(tmp_path), method=METHODS["corda"], options=options
    )
    assert len(world.titles) == 2
    decompose(
        world.linears, world.source, cache(tmp_path), method=METHODS["corda_kpm"], options=options
    )
    assert len(world.titles) == 3
    for linear in world.linears.values():
        linear.rank = 2
    decompose(
        world.linears,
        never,
        cache(tmp_path),
        method=METHODS["corda"],
        options=options | {"max_rank": 3, "dynamic_ranks": False},
    )


def test_what_was_found_for_others_is_refused(tmp_path):
    world = World()
    decompose(
        world.linears, world.source, cache(tmp_path), method=METHODS["corda"], options=OPTIONS
    )
    with pytest.raises(CacheError, match="base weights: stored these, now those"):
        decompose(
            world.linears,
            never,
            DecompositionCache(tmp_path, {"base weights": "those"}),
            method=METHODS["corda"],
            options=OPTIONS,
        )


# --------------------------------------------------------------------------------- stopped and gone on


class Stopped(BaseException):
    """The process ends here; like a kill, it is no Exception."""


def counted(jobs, *, done, limit):
    """Do each job when it comes, until ``limit`` are done; note what was found."""
    for _, work in jobs:
        if len(done) == limit:
            raise Stopped
        done.append(work())
        yield done[-1]


def decompose_until(limit, folder, options, *, writes=True):
    """A new process: its linears, and a cache that knows the folder alone. Returns what it found, or None, and the
    number of jobs it did.
    """
    world, done = World(options["rounds"]), []
    store = DecompositionCache(folder, {"base weights": "these"}, writes=writes)
    try:
        found = decompose(
            world.linears,
            world.source,
            store,
            method=METHODS["corda"],
            options=options,
            compute=partial(counted, done=done, limit=limit),
        )
    except Stopped:
        found = None
    return found, len(done)


def assert_same(found, expected):
    assert list(found[0]) == list(expected[0])
    for name, component in found[0].items():
        for part in ("vectors", "singular_values", "projection"):
            assert torch.equal(getattr(component, part), getattr(expected[0][name], part)), part
    assert list(found[1]) == list(expected[1])
    for name, spectrum in found[1].items():
        assert torch.equal(spectrum.singular_values, expected[1][name].singular_values)
        assert (spectrum.round, spectrum.scores) == (
            expected[1][name].round,
            expected[1][name].scores,
        )


@pytest.mark.parametrize(
    "changes",
    [{}, {"rounds": NUM_ROUNDS, "dynamic_ranks": True, "max_selection_dim": 15}],
    ids=["CorDA", "CorDA++"],
)
def test_a_decomposition_that_is_stopped_anywhere_goes_on_there(changes, tmp_path):
    options = OPTIONS | changes
    undisturbed, total = decompose_until(None, tmp_path / "undisturbed", options)
    left = sorted(path.name for path in (tmp_path / "undisturbed").iterdir())
    assert left == (["ipm.safetensors", "spectra.safetensors"] if changes else ["ipm.safetensors"])
    for limit in range(1, total):
        folder = tmp_path / f"stopped after {limit}"
        stopped, first = decompose_until(limit, folder, options)
        found, rest = decompose_until(None, folder, options)
        assert stopped is None
        assert first + rest == total  # no layer twice
        assert_same(found, undisturbed)
        assert sorted(path.name for path in folder.iterdir()) == left


def test_a_damaged_part_is_decomposed_again_and_another_decompositions_is_not_looked_at(
    tmp_path, caplog
):
    undisturbed, total = decompose_until(None, tmp_path / "undisturbed", OPTIONS)
    folder = tmp_path / "stopped"
    decompose_until(2, folder, OPTIONS)
    (parts,) = folder.iterdir()
    one, _ = sorted(parts.iterdir())
    one.write_bytes(one.read_bytes()[:-1] + b"x")
    other = folder / "ipm.unfinished-000000000000"
    other.mkdir()
    (other / "layers.0.q.safetensors").write_bytes(b"of another run")
    found, rest = decompose_until(None, folder, OPTIONS)
    assert rest == total - 1
    assert f"{one} is damaged" in caplog.text
    assert_same(found, undisturbed)
    assert sorted(path.name for path in folder.iterdir()) == ["ipm.safetensors", other.name]


def test_a_larger_rank_is_not_cut_from_smaller_parts(tmp_path, monkeypatch):
    decompose_until(2, tmp_path, OPTIONS)
    monkeypatch.setitem(globals(), "RANK", 4)
    found, rest = decompose_until(None, tmp_path, OPTIONS)
    assert {component.rank for component in found[0].values()} == {4}
    assert rest == sum(len(names) for names, _, _ in GROUPS)


def test_a_full_disk_while_parts_are_kept_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    undisturbed, _ = decompose_until(None, tmp_path / "undisturbed", OPTIONS)
    monkeypatch.setattr(cache_files, "write_synced", full)
    found, _ = decompose_until(None, tmp_path / "full", OPTIONS)
    assert_same(found, undisturbed)
    assert caplog.text.count("if the run is stopped now, it starts over") == 1  # not once a layer


def test_who_does_not_write_keeps_no_parts(tmp_path):
    decompose_until(2, tmp_path / "reader", OPTIONS, writes=False)
    assert not (tmp_path / "reader").exists()
