"""CorDA++ against its hand cases and against its algorithm written as the loop that the paper gives."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune.components.corda import allocation
from kasa_tune.components.corda.allocation import (
    POOLED,
    LayerSpectrum,
    allocate_ranks,
    layer_spectra,
    log_compactness,
    more_compact,
    selection_score,
    singular_values,
)
from kasa_tune.components.corda.covariance import damped, extreme_eigenvalues
from kasa_tune.components.linalg.decomposition import co_svd

MODES = ("ipm", "kpm")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(values, log_pi=1.0, round=0, scores=()):
    return LayerSpectrum(torch.tensor(values, dtype=torch.float64), log_pi, round, scores)


# --------------------------------------------------------------------------------- compactness


def test_compactness_by_hand():
    smallest, largest = extreme_eigenvalues(torch.diag(torch.tensor([4.0, 1.0, 0.25])))
    assert math.exp(log_compactness(smallest, largest, 5)) == pytest.approx(
        math.sqrt(5 * 4) / 0.25
    )  # 17.8885


@pytest.mark.parametrize("num_tokens", [3, 30, 300])
def test_compactness_of_a_normalized_covariance_is_at_least_one(num_tokens):
    for d_out in (2, 50):
        covariance = damped(normal(20, num_tokens) @ normal(20, num_tokens).T)
        assert log_compactness(*extreme_eigenvalues(covariance), d_out) >= 0


def shift_and_bound(weight, inputs, covariance, k):
    """How far dropping the last k components moves the outputs, in the Frobenius norm, and what CorDA++ promises."""
    dropped = co_svd(weight, covariance, k, "kpm")
    shift = torch.linalg.vector_norm(
        dropped.vectors.double() @ (dropped.projection.double() @ inputs)
    ).item()
    pi = math.exp(log_compactness(*extreme_eigenvalues(covariance), len(weight)))
    return shift, pi * dropped.singular_values[-1].item()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99), st.data())
def test_dropping_components_moves_the_outputs_no_further_than_promised(d_out, d_in, seed, data):
    k = data.draw(st.integers(1, min(d_out, d_in)))
    weight, inputs = normal(d_out, d_in, seed=seed), normal(d_in, 3 * d_in, seed=seed + 1)
    inputs *= torch.arange(1, d_in + 1, dtype=torch.float64)[:, None] ** -1.5
    shift, bound = shift_and_bound(
        weight, inputs, damped(inputs @ inputs.T, 0.01, normalize=False), k
    )
    assert shift <= bound * (1 + 1e-5)


@pytest.mark.parametrize("width", [1, 4])
def test_where_all_directions_are_alike_the_promise_is_exact(width):
    # W = w I and C = c I: dropping everything moves the outputs by w ‖X‖_F = w √(d c), and π σ = √(d c) / c · w c.
    weight, inputs = 3.0 * torch.eye(width).double(), 5.0 * torch.eye(width).double()
    shift, bound = shift_and_bound(weight, inputs, inputs @ inputs.T, width)
    assert shift == pytest.approx(15.0 * math.sqrt(width), rel=1e-6)
    assert bound == pytest.approx(shift, rel=1e-6)


# --------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_singular_values_are_all_of_w_c(shape, power):
    weight = normal(*shape).float()
    covariance = damped(normal(shape[1], 60) @ normal(shape[1], 60).T)
    values, vectors = torch.linalg.eigh(covariance)
    exact = torch.linalg.svdvals(weight.double() @ (vectors * values**power) @ vectors.T)
    found = singular_values(weight, covariance, power)
    assert found.shape == (min(shape),)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7 * exact[0].item())


def test_singular_values_without_a_covariance_are_the_weights():
    weight = normal(7, 9)
    torch.testing.assert_close(
        singular_values(weight, None), torch.linalg.svdvals(weight), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("round", [0, 3, POOLED])
def test_layers_that_share_an_input_share_pi_but_for_their_outputs(round):
    weights, covariance = (
        {"q": normal(6, 10), "up": normal(30, 10)},
        damped(normal(10, 50) @ normal(10, 50).T),
    )
    found = layer_spectra(weights, covariance, round)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert list(found) == ["q", "up"]
    for name, weight in weights.items():
        pi = math.sqrt(len(weight) * eigenvalues[-1]) / eigenvalues[0].item()
        values = torch.linalg.svdvals(weight @ covariance)
        assert found[name].log_compactness == pytest.approx(math.log(pi))
        torch.testing.assert_close(found[name].singular_values, values, rtol=1e-7, atol=1e-8)
        assert found[name].round == round
        score = math.log(pi) * (values.sum() / values[0]).item()
        assert found[name].scores == (() if round == POOLED else (pytest.approx(score, rel=1e-6),))


def test_a_full_gpu_is_answered_by_the_cpu_and_logged(monkeypatch, caplog):
    compute, calls = allocation.gram_matrix, []

    def full_the_first_time(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return compute(matrix)

    monkeypatch.setattr(allocation, "gram_matrix", full_the_first_time)
    with caplog.at_level(logging.WARNING, logger="kasa_tune.components.linalg"):
        found = singular_values(torch.diag(torch.tensor([2.0, 5.0])), None)
    torch.testing.assert_close(found, torch.tensor([5.0, 2.0], dtype=torch.float64))
    (record,) = caplog.records
    assert "(2, 2)" in record.getMessage()
    assert "doing it on the CPU" in record.getMessage()


# --------------------------------------------------------------------------------- covariance selection


def test_the_selection_score_by_hand():
    assert selection_score(torch.tensor([4.0, 2.0, 1.0, 1.0]), 3.0) == pytest.approx(3.0 * 8 / 4)


def test_of_a_zero_weight_every_round_is_as_good():
    assert selection_score(torch.zeros(3, dtype=torch.float64), 2.0) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6))
def test_keeping_the_better_of_two_keeps_the_best_of_all(scores):
    best = None
    for round, score in enumerate(scores):
        best = more_compact(
            best, spectrum([float(round + 1)], log_pi=10.0 * round, round=round, scores=(score,))
        )
    chosen = min(range(len(scores)), key=scores.__getitem__)  # of equal ones the first
    assert best.round == chosen
    assert best.scores == tuple(scores)
    assert best.log_compactness == 10.0 * chosen
    assert best.singular_values.tolist() == [chosen + 1.0]


def test_an_excluded_layer_has_its_rounds_pooled_and_nothing_to_choose():
    pooled = spectrum([1.0], round=POOLED)
    assert more_compact(None, pooled) is pooled


# --------------------------------------------------------------------------------- rank allocation

HAND = {"0": spectrum([4.0, 2, 1, 1]), "1": spectrum([8.0, 1, 0.5, 0.5])}
HAND_SIZES = {"0": 10, "1": 20}


@pytest.mark.parametrize(
    ("mode", "rank", "min_rank", "ranks"),
    [
        # Filtered, in this order: both their last, then 1, 1 (scores .5/9.5 and .5/9), 1 (1/8), 0 (1/7), 0 (1/6), ...
        ("kpm", 2, 1, [1, 3]),
        ("kpm", 2, 0, [1, 3]),  # every layer starts with one filtered
        ("ipm", 2, 0, [3, 1]),
        ("ipm", 2, 1, [3, 1]),
        ("ipm", 1, 0, [2, 0]),
    ],
)
def test_the_hand_case(mode, rank, min_rank, ranks):
    found = allocate_ranks(HAND, HAND_SIZES, rank=rank, mode=mode, min_rank=min_rank)
    assert list(found.items()) == [("0", ranks[0]), ("1", ranks[1])]


def score_of(spectrum, k):
    """Of a layer with its last k components filtered: ``log π · σ_-k / Σ_{j ≤ R-k} σ_j``."""
    values = spectrum.singular_values.tolist()
    numerator = spectrum.log_compactness * values[-k]
    kept = sum(values[: len(values) - k])
    return numerator / kept if kept else math.inf


def allocate_by_the_loop(spectra, sizes, rank, mode, min_rank, max_rank):
    """Algorithm 1 of CorDA++: filter in the layer of the least score, one by one, until the budget says stop.

    Bounds: a layer whose rank may not move any further is no candidate, and starts at the nearest rank it may have.
    """
    names, budget = list(spectra), rank * sum(sizes.values())
    full = {name: len(spectra[name].singular_values) for name in names}
    most = {name: min(full[name], max_rank or full[name]) for name in names}
    least = {name: min(min_rank, full[name]) for name in names}
    if mode == "kpm":
        filtered = {name: min(max(1, least[name]), most[name]) for name in names}
    else:
        filtered = {
            name: full[name] - max(least[name], min(most[name], full[name] - 1)) for name in names
        }
    while True:
        adapted = {
            name: filtered[name] if mode == "kpm" else full[name] - filtered[name] for name in names
        }
        spent = sum(sizes[name] * adapted[name] for name in names)
        if spent > budget if mode == "kpm" else spent < budget:
            return adapted
        open_ones = [
            n for n in names if (adapted[n] < most[n] if mode == "kpm" else adapted[n] > least[n])
        ]
        if not open_ones:
            return adapted
        filtered[min(open_ones, key=lambda name: score_of(spectra[name], filtered[name]))] += 1


@st.composite
def allocations(draw):
    """Spectra of a few layers, their sizes, a budget and bounds that it can pay."""
    count = draw(st.integers(1, 4))
    spectra, sizes = {}, {}
    for index in range(count):
        full = draw(st.integers(1, 7))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
        values = torch.rand(full, generator=generator, dtype=torch.float64) ** draw(
            st.sampled_from([1, 4])
        )
        log_pi = draw(st.sampled_from([0.1, 1.0, 3.0])) * (
            1 + torch.rand(1, generator=generator).item()
        )
        spectra[f"layer {index}"] = LayerSpectrum(values.sort(descending=True).values, log_pi, 0)
        sizes[f"layer {index}"] = draw(st.sampled_from([10, 20, 33]))
    rank = draw(st.integers(1, 6))
    min_rank = draw(st.integers(0, rank))
    max_rank = draw(st.one_of(st.none(), st.integers(max(1, rank), 8)))
    return spectra, sizes, rank, min_rank, max_rank


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(case=allocations())
def test_one_sort_is_the_papers_loop(mode, case):
    spectra, sizes, rank, min_rank, max_rank = case
    found = allocate_ranks(
        spectra, sizes, rank=rank, mode=mode, min_rank=min_rank, max_rank=max_rank
    )
    assert found == allocate_by_the_loop(spectra, sizes, rank, mode, min_rank, max_rank)
    for name, value in found.items():
        full = len(spectra[name].singular_values)
        assert min(min_rank, full) <= value <= min(full, max_rank or full)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(
    case=allocations(),
    signs=st.lists(st.booleans(), min_size=4, max_size=4),
    min_rank=st.integers(0, 1),
)
def test_one_sort_is_the_loop_for_a_compactness_below_one_too(mode, case, signs, min_rank):
    """Scores then fall with every filtering, and the loop stays in a layer until nothing of it is left."""
    spectra, sizes, rank, _, _ = case
    spectra = {
        name: LayerSpectrum(
            found.singular_values, -found.log_compactness if negative else found.log_compactness, 0
        )
        for (name, found), negative in zip(spectra.items(), signs)
    }
    found = allocate_ranks(spectra, sizes, rank=rank, mode=mode, min_rank=min_rank)
    assert found == allocate_by_the_loop(spectra, sizes, rank, mode, min_rank, None)


@pytest.mark.parametrize("mode", MODES)
def test_equal_layers_get_equal_ranks_to_within_one(mode):
    spectra = {str(i): spectrum([5.0, 4, 3, 2, 1]) for i in range(6)}
    found = allocate_ranks(spectra, dict.fromkeys(spectra, 7), rank=2, mode=mode)
    assert max(found.values()) - min(found.values()) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_the_budget_is_used_to_within_one_component(mode):
    generator = torch.Generator().manual_seed(0)
    spectra, sizes = {}, {}
    for index in range(12):
        values = (
            torch.rand(64, generator=generator, dtype=torch.float64).sort(descending=True).values
        )
        spectra[str(index)] = LayerSpectrum(values, 2.0, 0)
        sizes[str(index)] = 128 if index % 3 else 200
    found = allocate_ranks(spectra, sizes, rank=8, mode=mode)
    spent, budget = (
        sum(sizes[name] * value for name, value in found.items()),
        8 * sum(sizes.values()),
    )
    assert abs(spent - budget) <= max(sizes.values())
    assert spent > budget if mode == "kpm" else spent < budget


def test_scores_of_nothing_are_ordered_last():
    spectra = {"zero": spectrum([0.0, 0, 0, 0]), "full": spectrum([8.0, 4, 2, 1])}
    for mode in MODES:
        found = allocate_ranks(spectra, {"zero": 10, "full": 10}, rank=2, mode=mode, min_rank=0)
        assert found == allocate_by_the_loop(spectra, {"zero": 10, "full": 10}, 2, mode, 0, None)


@pytest.mark.parametrize("mode", MODES)
def test_bounds_of_the_rank_itself_leave_no_choice(mode):
    assert allocate_ranks(HAND, HAND_SIZES, rank=2, mode=mode, min_rank=2, max_rank=2) == {
        "0": 2,
        "1": 2,
    }


@pytest.mark.parametrize("mode", MODES)
def test_narrow_layers_take_no_more_than_they_have(mode):
    spectra = {"narrow": spectrum([2.0, 1.0]), "wide": spectrum([float(9 - i) for i in range(8)])}
    found = allocate_ranks(spectra, {"narrow": 10, "wide": 10}, rank=4, mode=mode, min_rank=4)
    assert found["narrow"] == 2
    assert found["wide"] >= 4


@pytest.mark.parametrize("mode", MODES)
def test_a_budget_that_cannot_pay_the_least_is_refused_with_the_numbers(mode):
    with pytest.raises(ValueError, match=r"adapter\.min_rank 3 alone takes 90 .*model\.rank 2, 60"):
        allocate_ranks(HAND, HAND_SIZES, rank=2, mode=mode, min_rank=3)
