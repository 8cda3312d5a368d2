"""A matrix held as two thin factors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune.components.linalg.low_rank import LowRank
from tests.tolerances import FP64


@settings(deadline=None)
@given(d_out=st.integers(1, 6), d_in=st.integers(1, 6), k=st.integers(0, 4))
def test_dense_is_the_sum_of_outer_products(d_out, d_in, k):
    torch.manual_seed(0)
    out, into = (
        torch.randn(d_out, k, dtype=torch.float64),
        torch.randn(k, d_in, dtype=torch.float64),
    )
    matrix = LowRank(out, into)
    expected = torch.zeros(d_out, d_in, dtype=torch.float64)
    for i in range(k):
        expected += torch.outer(out[:, i], into[i])
    assert matrix.shape == (d_out, d_in)
    assert matrix.rank == k
    torch.testing.assert_close(matrix.dense(), expected, **FP64)


def test_empty_is_the_zero_matrix_of_rank_zero():
    matrix = LowRank.empty(3, 5, dtype=torch.float64)
    assert (matrix.rank, matrix.shape) == (0, (3, 5))
    assert torch.equal(matrix.dense(), torch.zeros(3, 5, dtype=torch.float64))


def test_to_converts_both_factors():
    matrix = LowRank(torch.ones(2, 1), torch.ones(1, 3)).to(torch.bfloat16)
    assert matrix.out.dtype == matrix.into.dtype == torch.bfloat16
    assert LowRank.empty(2, 3).to("meta").out.is_meta


@pytest.mark.parametrize(
    ("out", "into"),
    [((2, 3), (2, 3)), ((2,), (2, 3)), ((2, 1, 1), (1, 3)), ((2, 1), (3,))],
    ids=str,
)
def test_factors_that_do_not_fit_are_refused(out, into):
    with pytest.raises(ValueError, match="needs out"):
        LowRank(torch.zeros(out), torch.zeros(into))


# --------------------------------------------------------------------------------- balanced factors


def random_low_rank(d_out, d_in, k, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return LowRank(torch.randn(d_out, k, dtype=dtype), torch.randn(k, d_in, dtype=dtype))


def of_singular_values(values, d_out=12, d_in=9):
    """A matrix of these singular values, its factors far from balanced."""
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(d_out, len(values), dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(d_in, len(values), dtype=torch.float64))[0]
    return LowRank(1e3 * u * torch.tensor(values, dtype=torch.float64), 1e-3 * v.T)


@settings(deadline=None)
@given(d_out=st.integers(1, 6), d_in=st.integers(1, 6), k=st.integers(0, 9), seed=st.integers(0, 9))
def test_balanced_factors_hold_the_same_matrix_each_with_the_roots_of_its_singular_values(
    d_out, d_in, k, seed
):
    matrix = random_low_rank(d_out, d_in, k, seed=seed)
    balanced = matrix.balanced()
    rank = min(d_out, d_in, k)
    assert (balanced.rank, balanced.shape) == (rank, (d_out, d_in))
    torch.testing.assert_close(balanced.dense(), matrix.dense(), **FP64)
    singular_values = torch.from_numpy(
        np.linalg.svd(matrix.dense().numpy(), compute_uv=False)[:rank]
    )
    for gram in (balanced.out.T @ balanced.out, balanced.into @ balanced.into.T):
        torch.testing.assert_close(gram, torch.diag(singular_values), **FP64)


def test_balancing_is_done_in_float64():
    matrix = random_low_rank(8, 6, 3, torch.float32)
    balanced = matrix.balanced()
    assert balanced.out.dtype == balanced.into.dtype == torch.float64
    exact = matrix.out.double() @ matrix.into.double()
    torch.testing.assert_close(balanced.dense(), exact, **FP64)


def test_products_that_cancel_become_factors_as_small_as_what_is_left():
    """``B A - B0 A0`` of a training that moved little: large factors of a small matrix."""
    start, change = random_low_rank(40, 30, 4), random_low_rank(40, 30, 4, seed=1)
    now = LowRank(start.out + 1e-4 * change.out, start.into + 1e-4 * change.into)
    difference = LowRank(torch.cat((now.out, -start.out), dim=1), torch.cat((now.into, start.into)))
    balanced = difference.balanced()
    exact = now.dense() - start.dense()
    torch.testing.assert_close(balanced.dense(), exact, rtol=0, atol=1e-12)
    assert balanced.out.norm() < 0.1 * difference.out.norm()
    rounded, plain = (
        low_rank.to(torch.bfloat16).to(torch.float64).dense() for low_rank in (balanced, difference)
    )
    assert (rounded - exact).norm() < 2**-8 * exact.norm()
    assert (plain - exact).norm() > exact.norm()


@pytest.mark.parametrize(
    ("tolerance", "kept"), [(0.0, 5), (1e-3, 4), (0.03, 3), (0.3, 1), (0.9, 1)]
)
def test_a_tolerance_leaves_out_what_is_small_beside_the_largest_singular_value(tolerance, kept):
    values = [5.0, 1.0, 0.2, 0.02, 0.001]
    matrix = of_singular_values(values)
    balanced = matrix.balanced(tolerance)
    assert balanced.rank == kept
    error = torch.linalg.matrix_norm(balanced.dense() - matrix.dense()).item()
    assert error == pytest.approx(np.linalg.norm(values[kept:]), rel=1e-9, abs=1e-12)


def test_of_a_zero_matrix_a_tolerance_leaves_nothing():
    matrix = LowRank(torch.zeros(4, 2), torch.ones(2, 3))
    assert matrix.balanced(1e-3).rank == 0
    assert matrix.balanced().rank == 2
    assert not matrix.balanced().dense().any()
    assert LowRank.empty(4, 3).balanced(1e-3).shape == (4, 3)


@settings(deadline=None)
@given(d_out=st.integers(1, 6), d_in=st.integers(1, 6), k=st.integers(0, 9))
def test_norm_is_that_of_the_dense_matrix(d_out, d_in, k):
    matrix = random_low_rank(d_out, d_in, k, torch.float32)
    exact = np.linalg.norm(matrix.out.double().numpy() @ matrix.into.double().numpy())
    assert matrix.norm() == pytest.approx(exact, rel=1e-10, abs=1e-12)


def test_norm_of_a_small_difference_of_large_products():
    start, change = random_low_rank(40, 30, 4), random_low_rank(40, 30, 4, seed=1)
    now = LowRank(start.out + 1e-4 * change.out, start.into)
    difference = LowRank(torch.cat((now.out, -start.out), dim=1), torch.cat((now.into, start.into)))
    exact = 1e-4 * torch.linalg.matrix_norm(change.out @ start.into).item()
    assert difference.norm() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_padding_appends_zeros(rank):
    matrix = random_low_rank(5, 4, rank)
    padded = matrix.padded(7)
    assert (padded.rank, padded.shape) == (7, (5, 4))
    assert torch.equal(padded.out[:, :rank], matrix.out)
    assert torch.equal(padded.into[:rank], matrix.into)
    assert not padded.out[:, rank:].any()
    assert not padded.into[rank:].any()
    torch.testing.assert_close(padded.dense(), matrix.dense(), **FP64)
