"""CorDA's decomposition against closed forms, explicit inverses and full float64 SVDs."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune.components.corda.covariance import damped
from kasa_tune.components.linalg import decomposition, solvers
from kasa_tune.components.linalg.decomposition import (
    Component,
    co_svd,
    co_svd_workspace,
    oriented_matrix,
    split_component,
)
from kasa_tune.components.linalg.solvers import extreme_singular_subspace
from tests.tolerances import FP64

MODES = ("ipm", "kpm")
SHAPES = {"square": (24, 24), "wide": (16, 40), "tall": (40, 16)}

# U and its projection are held in float32; the products of some ten of their entries are this accurate.
FACTORS = 2e-6
# The search stops at residuals of 1e-6; what is found is off by about that over the relative gap to the next value.
SEARCHED = 1e-4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy_tailed(width, num_tokens, seed=0):
    """Inputs ``[width, num_tokens]`` like a language model's: a few directions hundreds of times as strong as most."""
    rotation = torch.linalg.qr(normal(width, width, seed=77)).Q
    strengths = torch.arange(1, width + 1, dtype=torch.float64).pow(-1.2)
    return rotation @ (strengths[:, None] * normal(width, num_tokens, seed=seed)) * 30


def covariance_of(width, seed=0):
    """Well away from singular, and of a scale that is not 1."""
    inputs = heavy_tailed(width, 4 * width, seed)
    covariance = inputs @ inputs.T
    return covariance + 0.01 * covariance.diagonal().mean() * torch.eye(width, dtype=torch.float64)


def part_by_the_inverse(weight, covariance, rank, mode):
    """``U_r S_r V_rᵀ C⁻¹`` as the paper writes it, in float64: the whole SVD of W C and an explicit inverse."""
    U, S, Vt = torch.linalg.svd(weight @ covariance, full_matrices=False)
    chosen = slice(0, rank) if mode == "ipm" else slice(len(S) - rank, None)
    return (U[:, chosen] * S[chosen]) @ Vt[chosen] @ torch.linalg.inv(covariance)


def part(component):
    """``U Uᵀ W`` ``(d_out, d_in)`` float64."""
    return component.vectors.double() @ component.projection.double()


def relative_error(actual, exact):
    return (torch.linalg.vector_norm(actual - exact) / torch.linalg.vector_norm(exact)).item()


# --------------------------------------------------------------------------------- by hand


def test_the_context_decides_which_direction_is_principal():
    weight, covariance = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([9.0, 1.0]))
    found = co_svd(
        weight, covariance, 1, "ipm"
    )  # W C = diag(9, 2), where W alone would have chosen e_2
    torch.testing.assert_close(found.vectors.abs(), torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(found.singular_values, torch.tensor([9.0], dtype=torch.float64))
    start = split_component(found, 1.0, "paper")
    torch.testing.assert_close(start.out.abs(), torch.tensor([[3.0], [0.0]]))
    torch.testing.assert_close(start.into.abs(), torch.tensor([[1 / 3, 0.0]]))
    torch.testing.assert_close(start.dense(), torch.diag(torch.tensor([1.0, 0.0])))


def test_the_other_end_of_the_same_hand_case():
    weight, covariance = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([9.0, 1.0]))
    found = co_svd(weight, covariance, 1, "kpm")
    torch.testing.assert_close(found.singular_values, torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(part(found), torch.diag(torch.tensor([0.0, 2.0])).double())


def test_a_tall_weight_gives_its_own_last_component_and_not_the_null_space():
    weight = torch.tensor([[5.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    found = co_svd(
        weight, torch.eye(2), 1, "kpm"
    )  # e_3 and e_4 carry nothing: training from there keeps everything
    torch.testing.assert_close(found.singular_values, torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(found.vectors.abs(), torch.tensor([[0.0], [1.0], [0.0], [0.0]]))
    torch.testing.assert_close(found.projection.abs(), torch.tensor([[0.0, 2.0]]))


# --------------------------------------------------------------------------------- against the inverse


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_part_is_the_papers_without_its_inverse(shape, mode, dtype):
    weight, covariance = normal(*shape).to(dtype), covariance_of(shape[1])
    found = co_svd(weight, covariance, 5, mode)
    assert found.vectors.dtype == found.projection.dtype == torch.float32
    assert (found.vectors.shape, found.projection.shape) == ((shape[0], 5), (5, shape[1]))
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(5), rtol=0, atol=1e-6)
    # The explicit inverse costs the condition of C, about 1e4, in its own accuracy.
    assert (
        relative_error(part(found), part_by_the_inverse(weight.double(), covariance, 5, mode))
        < FACTORS
    )
    values = torch.linalg.svdvals(weight.double() @ covariance)
    expected = values[:5] if mode == "ipm" else values.flip(0)[:5]
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-9, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(MODES), st.integers(0, 99), st.data())
def test_any_shape_and_rank(d_out, d_in, mode, seed, data):
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    weight, covariance = normal(d_out, d_in, seed=seed), covariance_of(d_in, seed)
    found = co_svd(weight, covariance, rank, mode)
    exact = part_by_the_inverse(weight, covariance, rank, mode)
    values = torch.linalg.svdvals(weight @ covariance)
    values = values if mode == "ipm" else values.flip(0)
    if rank < len(values) and (values[rank - 1] / values[rank] - 1).abs() < 1e-3:
        return  # no clear-cut set
    torch.testing.assert_close(part(found), exact, rtol=0, atol=1e-5 * weight.abs().max().item())
    if rank == min(d_out, d_in):
        torch.testing.assert_close(
            part(found), weight, rtol=0, atol=1e-5 * weight.abs().max().item()
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_smaller_rank_is_the_first_vectors_of_a_larger_one(mode):
    weight, covariance = normal(24, 30), covariance_of(30)
    large, small = (co_svd(weight, covariance, rank, mode) for rank in (7, 3))
    cut = large.first(3)
    torch.testing.assert_close(cut.singular_values, small.singular_values, **FP64)
    torch.testing.assert_close(part(cut), part(small), rtol=0, atol=1e-6)
    assert (cut.vectors.shape, cut.projection.shape, cut.solver) == ((24, 3), (3, 30), large.solver)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ipm_and_kpm_of_all_ranks_share_the_weight_out(shape, mode):
    weight, covariance, full = normal(*shape), covariance_of(shape[1]), min(shape)
    one, rest = (
        co_svd(weight, covariance, 5, mode),
        co_svd(weight, covariance, full - 5, MODES[mode == "ipm"]),
    )
    torch.testing.assert_close(part(one) + part(rest), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rotating_the_inputs_leaves_the_left_vectors(shape, mode):
    weight, covariance = normal(*shape), covariance_of(shape[1])
    rotation = torch.linalg.qr(normal(shape[1], shape[1], seed=5)).Q
    found = co_svd(weight, covariance, 4, mode)
    turned = co_svd(weight @ rotation.T, rotation @ covariance @ rotation.T, 4, mode)
    projector, turned_projector = (c.vectors @ c.vectors.T for c in (found, turned))
    torch.testing.assert_close(turned_projector, projector, rtol=0, atol=1e-5)
    torch.testing.assert_close(part(turned), part(found) @ rotation.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_scale_of_the_covariance_changes_nothing_but_the_singular_values(mode):
    weight, covariance = normal(24, 30), covariance_of(30)
    found, scaled = co_svd(weight, covariance, 4, mode), co_svd(weight, 1e4 * covariance, 4, mode)
    torch.testing.assert_close(
        scaled.singular_values, 1e4 * found.singular_values, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(part(scaled), part(found), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------- PiSSA and MiLoRA


@pytest.mark.parametrize(
    "covariance", [None, torch.eye(40) * 7.0], ids=["none", "a multiple of the identity"]
)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_of_no_direction_give_pissa_and_milora(mode, covariance):
    weight, scaling = normal(16, 40), 0.75
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    chosen = slice(0, 4) if mode == "ipm" else slice(12, 16)
    found = co_svd(weight, covariance, 4, mode)
    assert relative_error(part(found), U[:, chosen] * S[chosen] @ Vt[chosen]) < FACTORS
    # As PiSSA (equations 2 and 3) and MiLoRA (equation 4) split it: U √S and √S Vᵀ, up to a vector's sign.
    start = split_component(found, scaling, "balanced")
    root = (S[chosen] / scaling).sqrt()
    order = slice(None) if mode == "ipm" else torch.arange(3, -1, -1)
    torch.testing.assert_close(
        start.out.abs().double(), (U[:, chosen] * root).abs()[:, order], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        start.into.abs().double(), (root[:, None] * Vt[chosen]).abs()[order], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_power_zero_is_no_covariance(mode):
    weight, covariance = normal(20, 20), covariance_of(20)
    without, zero = (
        co_svd(weight, None, 3, mode),
        co_svd(weight, covariance, 3, mode, covariance_power=0.0),
    )
    assert torch.equal(zero.vectors, without.vectors)
    assert torch.equal(zero.projection, without.projection)


# --------------------------------------------------------------------------------- the power


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
def test_singular_values_are_those_of_w_c_to_the_power(power):
    for shape in SHAPES.values():
        weight, covariance = normal(*shape), covariance_of(shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        exact = torch.linalg.svdvals(weight @ (vectors * values**power) @ vectors.T)
        oriented = torch.linalg.svdvals(oriented_matrix(weight, covariance, power))
        torch.testing.assert_close(oriented, exact, rtol=1e-9, atol=1e-12 * exact[0].item())
        found = co_svd(weight, covariance, 3, "ipm", covariance_power=power)
        torch.testing.assert_close(found.singular_values, exact[:3], rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_power_one_half_leaves_the_least_output_error_there_is(shape):
    weight, inputs = normal(*shape), heavy_tailed(shape[1], 5 * shape[1])
    outputs = weight @ inputs
    # Eckart, Young, Mirsky: no matrix of rank 4 is nearer to the outputs than this.
    least = torch.linalg.svdvals(outputs)[4:].square().sum().sqrt()
    error = {}
    for power in (0.0, 0.5, 1.0):
        found = co_svd(weight, inputs @ inputs.T, 4, "ipm", covariance_power=power)
        error[power] = torch.linalg.vector_norm((weight - part(found)) @ inputs)
    assert error[0.5].item() == pytest.approx(least.item(), rel=1e-5)
    assert error[0.5] <= error[1.0] * (1 + 1e-6)
    assert error[1.0] < error[0.0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_on_new_inputs_of_the_same_kind_the_context_keeps_more(shape, seed):
    """KPM takes out less of what the context uses than MiLoRA; IPM leaves less of it in the weight than PiSSA."""
    weight = normal(*shape, seed=seed)
    seen, unseen = (
        heavy_tailed(shape[1], 400, seed=10 + seed),
        heavy_tailed(shape[1], 400, seed=20 + seed),
    )
    covariance = damped((seen @ seen.T).float())
    taken = {}
    for context in (covariance, None):
        for mode in MODES:
            taken[mode, context is not None] = part(co_svd(weight, context, 4, mode))
    length = torch.linalg.vector_norm
    assert length(taken["kpm", True] @ unseen) < 0.9 * length(taken["kpm", False] @ unseen)
    residual = {
        context: length((weight - taken["ipm", context]) @ unseen) for context in (True, False)
    }
    assert residual[True] < 0.9 * residual[False]


# --------------------------------------------------------------------------------- the split


def component_of(shape=(20, 28), rank=5, mode="kpm", scale=1.0):
    return co_svd(normal(*shape), scale * covariance_of(shape[1]), rank, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["balanced", "paper"])
def test_the_product_of_any_split_is_the_part(split, mode):
    found, scaling = component_of(mode=mode), 16 / 5
    start = split_component(found, scaling, split)
    assert start.out.dtype == start.into.dtype == torch.float32
    assert relative_error(scaling * start.out.double() @ start.into.double(), part(found)) < FACTORS


@pytest.mark.parametrize("mode", MODES)
def test_balanced_factors_are_of_equal_length_whatever_the_covariances_scale(mode):
    start, scaled = (
        split_component(component_of(mode=mode, scale=scale), 0.3) for scale in (1.0, 1e3)
    )
    lengths = torch.linalg.vector_norm(start.into, dim=1)
    torch.testing.assert_close(
        torch.linalg.vector_norm(start.out, dim=0), lengths, rtol=1e-5, atol=0
    )
    assert (lengths > 0).all()
    torch.testing.assert_close(
        torch.linalg.vector_norm(scaled.into, dim=1), lengths, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        torch.linalg.vector_norm(scaled.out, dim=0), lengths, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_papers_split_is_its_formula(mode):
    weight, covariance, scaling = normal(20, 28), covariance_of(28), 1.7
    found = co_svd(weight, covariance, 5, mode)
    start = split_component(found, scaling, "paper")
    U, S, Vt = torch.linalg.svd(weight @ covariance)
    chosen = range(5) if mode == "ipm" else range(19, 14, -1)
    for i, j in enumerate(chosen):  # B = U √(S / s), A = √(S / s) Vᵀ C⁻¹
        root = (S[j] / scaling).sqrt()
        sign = torch.sign(found.vectors[:, i].double() @ U[:, j])
        column, row = sign * root * U[:, j], sign * root * Vt[j] @ torch.linalg.inv(covariance)
        torch.testing.assert_close(
            start.out[:, i].double(), column, rtol=1e-5, atol=1e-6 * column.abs().max().item()
        )
        torch.testing.assert_close(
            start.into[i].double(), row, rtol=1e-4, atol=1e-5 * row.abs().max().item()
        )


@pytest.mark.parametrize("split", ["balanced", "paper"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_rank_deficient_weight_starts_finite_and_able_to_move(shape, split):
    weight = normal(shape[0], 3) @ normal(3, shape[1], seed=1)
    for mode in MODES:
        found = co_svd(
            weight, covariance_of(shape[1]), 5, mode
        )  # of ipm's five two, of kpm's all carry nothing
        assert (found.vectors.T @ found.vectors - torch.eye(5)).abs().max() < 1e-6
        start = split_component(found, 2.0, split)
        assert start.out.isfinite().all()
        assert start.into.isfinite().all()
        assert (
            torch.linalg.vector_norm(start.out, dim=0) > 0
        ).all()  # A's gradient is B's multiple
        exact = weight if mode == "ipm" else torch.zeros(shape, dtype=torch.float64)
        torch.testing.assert_close(2.0 * start.dense().double(), exact, rtol=0, atol=1e-5)


def test_a_zero_weight_starts_at_zero():
    found = co_svd(torch.zeros(6, 8), torch.eye(8), 2, "ipm")
    for split in ("balanced", "paper"):
        start = split_component(found, 1.0, split)
        assert start.out.isfinite().all()
        assert not start.dense().any()


# --------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("d_out", "d_in"), [(5, 7), (7, 5)])
def test_rank_zero_is_nothing(d_out, d_in):
    found = co_svd(normal(d_out, d_in), covariance_of(d_in), 0, "kpm")
    assert (found.vectors.shape, found.singular_values.shape, found.projection.shape) == (
        (d_out, 0),
        (0,),
        (0, d_in),
    )
    start = split_component(found, 1.0)
    assert (start.shape, start.rank) == ((d_out, d_in), 0)


@pytest.mark.parametrize(
    ("rank", "mode", "message"),
    [
        (1, "top", "Unknown mode 'top'.*ipm or kpm"),
        (-1, "ipm", "between 0 and .* = 3; got -1"),
        (4, "kpm", "between 0 and .* = 3; got 4"),
    ],
)
def test_impossible_requests_are_refused(rank, mode, message):
    with pytest.raises(ValueError, match=message):
        co_svd(torch.ones(3, 5), None, rank, mode)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused(bad, rank):
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        co_svd(weight, torch.eye(4), rank, "ipm")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"Unknown split 'even'.*balanced, paper or unscaled"):
        split_component(component_of(), 1.0, "even")


def test_what_is_given_stays_as_it_is():
    weight, covariance = normal(12, 9).float(), covariance_of(9).float()
    before = weight.clone(), covariance.clone()
    for power in (0.5, 1.0):
        split_component(co_svd(weight, covariance, 3, "kpm", covariance_power=power), 2.0, "paper")
    assert torch.equal(weight, before[0])
    assert torch.equal(covariance, before[1])


# --------------------------------------------------------------------------------- what can go wrong on a machine


def test_a_full_gpu_is_answered_by_the_cpu_and_logged(monkeypatch, caplog):
    search, calls = extreme_singular_subspace, []

    def full_the_first_time(matrix, *args, **options):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return search(matrix, *args, **options)

    monkeypatch.setattr(decomposition, "extreme_singular_subspace", full_the_first_time)
    weight, covariance = normal(12, 20), covariance_of(20)
    with caplog.at_level(logging.WARNING, logger="kasa_tune.components.linalg"):
        found = co_svd(weight, covariance, 3, "kpm")
    assert len(calls) == 2
    (record,) = caplog.records
    assert "12 x 20" in record.getMessage()
    assert "doing it on the CPU" in record.getMessage()
    assert relative_error(part(found), part_by_the_inverse(weight, covariance, 3, "kpm")) < FACTORS


def test_a_search_that_does_not_converge_is_answered_by_the_whole_svd_and_logged(
    monkeypatch, caplog
):
    monkeypatch.setattr(solvers, "MAX_STEPS", 1)
    weight, covariance = normal(64, 64), covariance_of(64)
    for mode in MODES:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="kasa_tune.components.linalg"):
            found = co_svd(weight, covariance, 3, mode, solver="krylov")
        assert found.solver == "svd"
        (record,) = caplog.records
        assert "64 x 64" in record.getMessage()
        assert "no convergence" in record.getMessage()
        assert (
            relative_error(part(found), part_by_the_inverse(weight, covariance, 3, mode)) < FACTORS
        )


def test_the_workspace_holds_what_the_svd_takes():
    float64 = 8
    for d_out, d_in in SHAPES.values():
        n = min(d_out, d_in)
        # At the least: the weight, the covariance, their product, and U, S and V of it.
        needed = d_out * d_in + d_in * d_in + n * d_in + n * n + n + n * d_in
        assert co_svd_workspace(d_out, d_in) >= float64 * needed * 0.9
        assert co_svd_workspace(d_out, d_in) <= float64 * needed * 4


def test_a_component_moves_whole():
    moved = component_of().to("meta")
    assert isinstance(moved, Component)
    assert moved.vectors.is_meta
    assert moved.singular_values.is_meta
    assert moved.projection.is_meta


# --------------------------------------------------------------------------------- the solver


def with_spectrum(n, m, values, seed=0):
    """A float64 ``(n, m)`` matrix with the given n singular values, and its left vectors in the same order."""
    left, right = (
        torch.linalg.qr(normal(n, n, seed=seed)).Q,
        torch.linalg.qr(normal(m, n, seed=seed + 1)).Q,
    )
    return (left * torch.as_tensor(values, dtype=torch.float64)) @ right.T, left


@st.composite
def spectra(draw):
    """``(n, m, k, values)``, values descending: flat, power-law and exponential ones over up to nine decades."""
    k = draw(st.integers(1, 3))
    n = draw(st.integers(4 * (k + solvers.OVERSAMPLING), 60))
    m = n + draw(st.sampled_from([0, 1, n]))
    index = torch.arange(n, dtype=torch.float64)
    kind = draw(st.sampled_from(["linear", "power", "exponential"]))
    values = {
        "linear": 1.0 + (n - index) / n,
        "power": (index + 1) ** -draw(st.floats(0.5, 4.0)),
        "exponential": 10 ** (-index / n * draw(st.floats(1.0, 9.0))),
    }[kind]
    return n, m, k, values * draw(st.sampled_from([1e-4, 1.0, 1e3]))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("solver", ["svd", "krylov"])
@settings(max_examples=15, deadline=None)
@given(case=spectra())
def test_values_and_vectors_are_the_extreme_ones(solver, largest, case):
    n, m, k, values = case
    matrix, left = with_spectrum(n, m, values)
    found = extreme_singular_subspace(matrix, k, largest=largest, solver=solver)
    order = slice(0, k) if largest else torch.arange(n - 1, n - 1 - k, -1)
    assert found.solver == solver
    # float64 leaves 1e-16 of the largest value in every other one.
    rounding = 1e-14 * values[0].item()
    torch.testing.assert_close(found.singular_values, values[order], rtol=1e-6, atol=rounding)
    torch.testing.assert_close(
        found.vectors.T @ found.vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10
    )
    inside = (left[:, order].T @ found.vectors).square().sum(dim=0)
    gap = (values[k - 1] / values[k] if largest else values[n - k - 1] / values[n - k]).item() - 1
    if gap > 0.05 and rounding < 1e-4 * values[-1]:
        torch.testing.assert_close(
            inside, torch.ones(k, dtype=torch.float64), rtol=0, atol=SEARCHED
        )


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("solver", ["svd", "krylov"])
@pytest.mark.parametrize(("m", "deficiency"), [(96, 1), (96, 5), (200, 2), (200, 40)])
def test_of_a_singular_matrix_no_other_subspace_carries_less_or_more(
    solver, largest, m, deficiency
):
    values = torch.cat((torch.linspace(5, 1, 96 - deficiency), torch.zeros(deficiency))).double()
    matrix, _ = with_spectrum(96, m, values)
    found = extreme_singular_subspace(matrix, 4, largest=largest, solver=solver)
    expected = values[:4] if largest else values.flip(0)[:4]
    energy = (found.vectors.T @ matrix).square().sum().item()
    assert energy == pytest.approx(expected.square().sum().item(), rel=1e-6, abs=1e-20)
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("solver", ["svd", "krylov"])
def test_a_zero_matrix_has_zero_values(solver):
    found = extreme_singular_subspace(
        torch.zeros(64, 64, dtype=torch.float64), 3, largest=False, solver=solver
    )
    assert not found.singular_values.any()
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(96, 96), (64, 120), (120, 64)], ids=SHAPES)
def test_the_search_gives_what_the_svd_gives(shape, mode):
    weight, covariance = normal(*shape), covariance_of(shape[1])
    searched, exact = (
        co_svd(weight, covariance, 6, mode, solver=solver) for solver in ("krylov", "svd")
    )
    assert (searched.solver, exact.solver) == ("krylov", "svd")
    torch.testing.assert_close(searched.singular_values, exact.singular_values, rtol=1e-6, atol=0)
    assert relative_error(part(searched), part(exact)) < SEARCHED


@pytest.mark.parametrize("mode", MODES)
def test_the_search_is_chosen_for_large_weights(mode):
    inputs, weight = heavy_tailed(640, 1000), normal(660, 640)
    covariance = damped(inputs @ inputs.T)
    searched, exact = (
        co_svd(weight, covariance, 8, mode, solver=solver) for solver in ("auto", "svd")
    )
    assert (searched.solver, exact.solver) == ("krylov", "svd")
    torch.testing.assert_close(searched.singular_values, exact.singular_values, rtol=1e-6, atol=0)
    assert relative_error(part(searched), part(exact)) < SEARCHED


def test_the_solver_is_chosen_by_shape(monkeypatch):
    monkeypatch.setattr(solvers, "EXACT_BELOW", 50)
    matrix = normal(64, 64)
    assert extreme_singular_subspace(matrix, 4, largest=True).solver == "krylov"
    assert (
        extreme_singular_subspace(matrix, 5, largest=True).solver == "svd"
    )  # more than a sixteenth of 64
    assert extreme_singular_subspace(matrix[:49], 1, largest=False).solver == "svd"


def test_the_same_matrix_gives_the_same_vectors_whatever_the_random_state():
    matrix = normal(64, 100)
    first = extreme_singular_subspace(matrix, 3, largest=False, solver="krylov")
    torch.randn(5)
    state = torch.get_rng_state()
    second = extreme_singular_subspace(matrix, 3, largest=False, solver="krylov")
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("shape", "k", "solver", "message"),
    [
        ((4, 3), 1, "auto", "n <= m"),
        ((3, 4), 0, "auto", "k <= n"),
        ((3, 4), 4, "auto", "k <= n"),
        ((3, 4), 1, "gram_eigh", "Unknown solver 'gram_eigh'"),
        ((40, 40), 3, "krylov", "Use svd"),
    ],
)
def test_impossible_subspaces_are_refused(shape, k, solver, message):
    with pytest.raises(ValueError, match=message):
        extreme_singular_subspace(
            torch.ones(shape, dtype=torch.float64), k, largest=True, solver=solver
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", ["svd", "krylov"])
def test_cuda_gives_what_the_cpu_gives(solver, mode):
    weight, covariance = normal(64, 100), covariance_of(100)
    found = co_svd(weight.cuda(), covariance.cuda(), 3, mode, solver=solver)
    assert found.vectors.is_cuda
    assert found.projection.is_cuda
    expected = co_svd(weight, covariance, 3, mode, solver="svd")
    assert relative_error(part(found.to("cpu")), part(expected)) < SEARCHED
