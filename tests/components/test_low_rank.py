"""A matrix held as two thin factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune.components.low_rank import LowRank
from tests.tolerances import FP64


@settings(deadline=None)
@given(d_out=st.integers(1, 6), d_in=st.integers(1, 6), k=st.integers(0, 4))
def test_dense_is_the_sum_of_outer_products(d_out, d_in, k):
    torch.manual_seed(0)
    out, into = torch.randn(d_out, k, dtype=torch.float64), torch.randn(k, d_in, dtype=torch.float64)
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
    ("out", "into"), [((2, 3), (2, 3)), ((2,), (2, 3)), ((2, 1, 1), (1, 3)), ((2, 1), (3,))], ids=str
)
def test_factors_that_do_not_fit_are_refused(out, into):
    with pytest.raises(ValueError, match="needs out"):
        LowRank(torch.zeros(out), torch.zeros(into))
