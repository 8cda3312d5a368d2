"""OLoRA's decomposition against what defines it, and against a weight whose QR is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune.components.linalg.decomposition import qr_component, split_component
from tests.tolerances import FP64

FACTORS = 2e-6  # float32 factors, of weights with entries of size one


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_triangular_weight_is_its_own_r():
    weight = torch.tensor([[3.0, 1.0, 2.0], [0.0, 2.0, 5.0], [0.0, 0.0, 4.0]])
    found = qr_component(weight, 2)
    signs = found.vectors.diagonal()
    assert signs.abs().tolist() == [1.0, 1.0]
    assert torch.equal(found.vectors, torch.eye(3, 2) * signs)
    assert torch.equal(signs[:, None] * found.projection, weight[:2])
    torch.testing.assert_close(
        found.singular_values, torch.tensor([14.0, 29.0]).double().sqrt(), **FP64
    )


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.data())
@settings(deadline=None, max_examples=40)
def test_q_is_orthonormal_r_is_triangular_and_they_give_the_first_columns(d_out, d_in, seed, data):
    """Which defines both up to the signs of their vectors, for a weight of full rank."""
    rank = data.draw(st.integers(0, min(d_out, d_in)))
    weight = normal(d_out, d_in, seed=seed)
    found = qr_component(weight, rank)
    q, r = found.vectors.double(), found.projection.double()
    assert (q.shape, r.shape, found.rank) == ((d_out, rank), (rank, d_in), rank)
    assert (q.T @ q - torch.eye(rank)).abs().amax(dim=(0, 1)) < FACTORS if rank else True
    assert not r.tril(-1).any()
    torch.testing.assert_close(q @ r[:, :rank], weight[:, :rank], atol=2e-5, rtol=0)
    torch.testing.assert_close(r, q.T @ weight, atol=2e-5, rtol=0)


def test_a_smaller_rank_is_the_start_of_a_larger():
    weight = normal(9, 7)
    small, cut = qr_component(weight, 2), qr_component(weight, 5).first(2)
    torch.testing.assert_close(small.vectors, cut.vectors)
    torch.testing.assert_close(small.projection, cut.projection)


def test_unscaled_leaves_q_and_r_as_they_are():
    found = qr_component(normal(6, 8), 3)
    for scaling in (0.25, 2.0):
        start = split_component(found, scaling, "unscaled")
        assert torch.equal(start.out, found.vectors)
        assert torch.equal(start.into, found.projection)


def test_a_damaged_weight_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        qr_component(torch.tensor([[1.0, float("nan")]]), 1)
