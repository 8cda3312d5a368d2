"""KaSA's truncation, and what takes up quantization's loss, against closed forms and float64 SVDs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kasa_tune.components.linalg import decomposition, solvers
from kasa_tune.components.linalg.decomposition import (
    Component,
    co_svd,
    num_truncated,
    smallest_triplets,
)
from kasa_tune.components.linalg.nf4 import dequantize, is_quantized, quantize
from kasa_tune.components.quantized.start import fit_quantization
from tests.tolerances import assert_same_bits

# E is held in float32 factors of up to a few dozen entries per product; vectors are accurate to 1e-6 over the gap.
EDIT = 1e-5


def smallest_part(weight, k):
    """``Σ σ_i u_i v_iᵀ`` over the k smallest singular values, and those values with the next larger one, in float64."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    first = len(s) - k
    return u[:, first:] * s[first:] @ vt[first:], s[max(0, first - 1) :]


def relative_error(actual, exact):
    return (
        torch.linalg.vector_norm(actual.double() - exact) / torch.linalg.vector_norm(exact)
    ).item()


def random_weight(d_out, d_in, seed=0):
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


def test_diagonal_matrix():
    edit, _ = smallest_triplets(torch.diag(torch.tensor([5.0, 4, 3, 2, 1])), 2)
    torch.testing.assert_close(
        edit.dense(), torch.diag(torch.tensor([0.0, 0, 0, 2, 1])), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("transpose", [False, True], ids=["wide", "tall"])
def test_two_by_three(transpose):
    weight, kept = torch.tensor([[3.0, 0, 0], [0, 1, 0]]), torch.tensor([[3.0, 0, 0], [0, 0, 0]])
    weight, kept = (weight.T, kept.T) if transpose else (weight, kept)
    edit, subspace = smallest_triplets(weight, 1)
    torch.testing.assert_close(weight - edit.dense(), kept, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(subspace.singular_values, torch.tensor([1.0], dtype=torch.float64))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.data())
def test_any_shape_and_rank_is_what_the_svd_says(d_out, d_in, data):
    k = data.draw(st.integers(1, min(d_out, d_in)))
    weight = random_weight(d_out, d_in, data.draw(st.integers(0, 999)))
    exact, values = smallest_part(weight, k)
    assume(
        k == min(d_out, d_in) or values[0] > 1.05 * values[1]
    )  # where the k smallest are a clear-cut set
    edit, subspace = smallest_triplets(weight, k)
    assert edit.shape == (d_out, d_in)
    assert edit.rank == k
    assert edit.out.dtype == edit.into.dtype == torch.float32
    # The smallest value of a square matrix may be 1e-4 of the largest: float64 rounding of G is squared into it.
    torch.testing.assert_close(
        edit.dense().double(), exact, rtol=0, atol=EDIT * values.max().item()
    )
    torch.testing.assert_close(
        subspace.singular_values.flip(0),
        values[-k:],
        rtol=1e-6,
        atol=1e-7 * torch.linalg.matrix_norm(weight, 2).item(),
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)])
@pytest.mark.parametrize("solver", ["gram_eigh", "inverse_krylov"])
def test_both_solvers_on_every_dtype(solver, shape, dtype):
    weight = random_weight(*shape).double()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    s[-8:] *= 0.8  # a gap
    weight = ((u * s) @ vt).to(dtype)
    edit, subspace = smallest_triplets(weight, 8, solver=solver)
    assert subspace.solver == solver
    assert relative_error(edit.dense(), smallest_part(weight, 8)[0]) < EDIT


@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)])
def test_the_rest_of_the_weight_is_orthogonal_to_what_is_removed(shape):
    weight = random_weight(*shape).double()
    edit, _ = smallest_triplets(weight, 8, solver="inverse_krylov")
    removed = edit.out.double() @ edit.into.double()
    kept = weight - removed
    scale = torch.linalg.vector_norm(weight) * torch.linalg.vector_norm(removed)
    assert torch.linalg.vector_norm(kept @ removed.T) < EDIT * scale
    assert torch.linalg.vector_norm(kept.T @ removed) < EDIT * scale
    assert torch.linalg.matrix_rank(kept, rtol=1e-5) == min(shape) - 8


def test_transposing_and_scaling():
    weight = random_weight(20, 33)
    edit = smallest_triplets(weight, 4)[0].dense()
    torch.testing.assert_close(smallest_triplets(weight.T, 4)[0].dense(), edit.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        smallest_triplets(-1e-3 * weight, 4)[0].dense(), -1e-3 * edit, rtol=0, atol=1e-8
    )


def test_columns_are_converted_in_chunks_without_a_seam():
    weight = random_weight(8, 9000)  # more columns than a chunk has
    edit, _ = smallest_triplets(weight, 2)
    exact, _ = smallest_part(weight, 2)
    assert (
        relative_error(edit.dense(), exact) < 1e-3 * 0.1
    )  # the two values differ from the next by under a per cent
    u = edit.out.double()
    torch.testing.assert_close(
        u @ (u.T @ weight.double()), edit.dense().double(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_rank_deficient_and_zero_weights_lose_nothing(shape):
    low = random_weight(shape[0], 3) @ random_weight(3, shape[1], seed=1)
    for weight in (low, torch.zeros(shape)):
        edit, _ = smallest_triplets(weight, 4)
        assert torch.isfinite(edit.out).all()
        assert edit.dense().abs().max() < 1e-6


def test_nothing_to_remove():
    edit, subspace = smallest_triplets(random_weight(5, 7), 0)
    assert (edit.shape, edit.rank, subspace) == ((5, 7), 0, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_damaged_weight_is_refused(bad, dtype):
    weight = torch.ones(6, 6, dtype=dtype)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        smallest_triplets(weight, 1)
    weight[4, 4] = -bad  # two that would cancel
    with pytest.raises(ValueError, match="NaN or infinity"):
        smallest_triplets(weight, 1)


def test_large_half_precision_weights_are_not_taken_for_damaged():
    edit, _ = smallest_triplets(
        torch.full((64, 64), 60000.0, dtype=torch.float16), 1
    )  # their sum overflows float16
    assert torch.isfinite(edit.dense()).all()


def test_more_triplets_than_there_are_is_refused():
    with pytest.raises(ValueError, match="k <= n"):
        smallest_triplets(random_weight(4, 3), 4)


def test_a_failed_search_still_gives_the_exact_part(monkeypatch, caplog):
    monkeypatch.setattr(solvers, "MAX_STEPS", 1)
    weight = random_weight(60, 130)
    edit, subspace = smallest_triplets(weight, 1, solver="inverse_krylov")
    assert subspace.solver == "gram_eigh"
    assert "no convergence" in caplog.text
    assert relative_error(edit.dense(), smallest_part(weight, 1)[0]) < EDIT


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.data())
def test_number_truncated(d_out, d_in, data):
    full_rank = min(d_out, d_in)
    rank = data.draw(st.integers(0, full_rank - 1))
    assert num_truncated(d_out, d_in, rank) == rank
    values = list(range(full_rank))
    kept = values[: d_in - rank]  # the published code slices all singular values so
    assert num_truncated(d_out, d_in, rank, "published") == full_rank - len(kept)


def test_the_published_code_skips_what_grouped_queries_make_wide():
    llama_3_8b = {
        "q_proj": (4096, 4096),
        "v_proj": (1024, 4096),
        "down_proj": (4096, 14336),
        "up_proj": (14336, 4096),
    }
    published = {name: num_truncated(*shape, 8, "published") for name, shape in llama_3_8b.items()}
    assert published == {"q_proj": 8, "v_proj": 0, "down_proj": 0, "up_proj": 8}
    assert (
        num_truncated(1000, 1004, 8, "published") == 4
    )  # partly, when the sides differ by less than the rank


@pytest.mark.parametrize(
    ("rank", "truncation", "message"),
    [
        (-1, "paper", "at least 0"),
        (5, "paper", "below min"),
        (5, "published", "5 x 9"),
        (1, "Paper", "paper, published"),
    ],
)
def test_impossible_truncations_are_refused(rank, truncation, message):
    with pytest.raises(ValueError, match=message):
        num_truncated(5, 9, rank, truncation)


def test_a_solver_can_be_named():
    assert (
        decomposition.smallest_triplets(random_weight(4, 4), 1, solver="gram_eigh")[1].solver
        == "gram_eigh"
    )
    with pytest.raises(ValueError, match="Unknown solver"):
        smallest_triplets(random_weight(4, 4), 1, solver="qr")


# --------------------------------------------------------------------------------- what quantization loses


def nf4(weight):
    return quantize(weight, block_size=32)


def part(component):
    return component.vectors @ component.projection


def first_triplets(matrix, rank):
    """Of the largest singular values, float64."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def left_over(weight, component, quantized):
    return (weight - dequantize(quantized) - part(component)).norm().item()


@pytest.mark.parametrize("shape", [(48, 48), (32, 64), (64, 32)], ids=str)
def test_one_turn_of_loftq_is_the_svd_of_the_error(shape):
    weight = random_weight(*shape)
    component, quantized = fit_quantization(weight, None, 5, 1, quantize=nf4)
    assert_same_bits(quantized, nf4(weight))
    assert component.rank == 5
    error = weight - dequantize(nf4(weight))
    assert relative_error(part(component), first_triplets(error, 5)) < 1e-4
    torch.testing.assert_close(
        component.singular_values, torch.linalg.svdvals(error.double())[:5], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("start_rank", [None, 3, 5])
def test_every_turn_quantizes_what_the_last_left_and_takes_up_its_error(start_rank):
    weight = random_weight(48, 64)
    start = None if start_rank is None else co_svd(weight, None, start_rank, "ipm")
    last = start
    for turns in range(1, 5):
        component, quantized = fit_quantization(weight, start, 5, turns, quantize=nf4)
        assert_same_bits(quantized, nf4(weight if last is None else weight - part(last)))
        assert (
            relative_error(part(component), first_triplets(weight - dequantize(quantized), 5))
            < 1e-4
        )
        last = component


def test_without_a_turn_the_start_comes_back():
    weight = random_weight(32, 32)
    start = co_svd(weight, None, 4, "ipm")
    component, quantized = fit_quantization(weight, start, 4, 0, quantize=nf4)
    assert component is start
    assert torch.equal(quantized, weight)
    assert not is_quantized(quantized)


def test_what_quantization_keeps_whole_leaves_nothing_to_take_up():
    weight = random_weight(24, 40)
    component, quantized = fit_quantization(weight, None, 4, 3, quantize=lambda matrix: matrix)
    assert torch.equal(quantized, weight)
    assert part(component).abs().max() < 1e-6
    start = co_svd(weight, None, 4, "ipm")
    component, quantized = fit_quantization(weight, start, 4, 3, quantize=lambda matrix: matrix)
    torch.testing.assert_close(part(component), part(start), rtol=0, atol=1e-4)
    torch.testing.assert_close(quantized, weight - part(start), rtol=0, atol=1e-4)


def test_more_turns_leave_less_of_most_weights():
    steps = []
    for seed in range(6):
        weight = random_weight(48, 64, seed)
        errors = [
            left_over(weight, *fit_quantization(weight, None, 6, turns, quantize=nf4))
            for turns in range(1, 6)
        ]
        assert errors[0] < (weight - dequantize(nf4(weight))).norm()
        assert errors[-1] < 0.95 * errors[0]
        steps += [after <= before for before, after in pairwise(errors)]
    assert sum(steps) > 0.9 * len(
        steps
    )  # alternating is not guaranteed to descend: quantizing is no projection


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_the_order_of_the_papers_on_a_decaying_spectrum(norm):
    """What is taken out before quantization (QPiSSA, arXiv 2404.02948) leaves least, then what is fitted to its error
    (LoftQ, arXiv 2310.08659), then QLoRA's nothing; and more turns help both.
    """
    n, rank = 96, 8
    u, v = (torch.linalg.qr(random_weight(n, n, seed)).Q for seed in (1, 2))
    weight = (u * torch.arange(1, n + 1).pow(-0.7)) @ v.T

    def error(component, quantized):
        return torch.linalg.matrix_norm(
            weight - dequantize(quantized) - part(component), norm
        ).item()

    nothing = Component(
        torch.zeros(n, 0), torch.zeros(0, dtype=torch.float64), torch.zeros(0, n), "none"
    )
    largest = co_svd(weight, None, rank, "ipm")
    fitted, _ = fit_quantization(weight, largest, rank, 4, quantize=nf4)
    errors = [
        error(fitted, nf4(weight - part(fitted))),  # QPiSSA, five iterations
        error(largest, nf4(weight - part(largest))),  # QPiSSA, one
        error(*fit_quantization(weight, None, rank, 5, quantize=nf4)),
        error(*fit_quantization(weight, None, rank, 1, quantize=nf4)),
        error(nothing, nf4(weight)),  # QLoRA
    ]
    assert errors == sorted(errors)
    assert errors[1] < 0.8 * errors[2]
    assert errors[2] < 0.9 * errors[4]


def test_a_damaged_weight_is_not_fitted():
    weight = random_weight(32, 32)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_quantization(weight, None, 2, 1, quantize=nf4)


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["random", "power law"])
@pytest.mark.parametrize("shape", [(700, 700), (700, 1500), (1500, 700)])
def test_sizes_where_the_search_is_chosen(shape, spectrum):
    """The crowded lower edge of a random matrix, and a power law with 1e5 between the ends of a square one."""
    weight = random_weight(*shape)
    if spectrum == "power law":
        n = min(shape)
        rotation = torch.linalg.qr(random_weight(n, n, seed=1)).Q * torch.arange(1, n + 1).pow(-1.0)
        weight = rotation @ weight if shape[0] == n else weight @ rotation.T
    exact, values = smallest_part(weight, 8)
    edit, subspace = smallest_triplets(weight, 8)
    assert subspace.solver == "inverse_krylov"
    assert relative_error(edit.out.double() @ edit.into.double(), exact) < EDIT
    torch.testing.assert_close(subspace.singular_values.flip(0), values[-8:], rtol=1e-6, atol=0)
