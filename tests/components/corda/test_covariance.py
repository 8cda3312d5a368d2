"""Damping and extreme eigenvalues of covariances against their definitions."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune.components.corda import covariance as module
from kasa_tune.components.corda.covariance import (
    ALL_BELOW,
    Covariance,
    damped,
    extreme_eigenvalues,
    shortage,
)
from kasa_tune.components.linalg.decomposition import co_svd

DTYPES = (torch.float32, torch.float64)
# Wide covariances' eigenvalues come from a search that is accurate to some 1e-3; they enter π, and from there scores.
SEARCHED = 2e-3


def covariance_of(width, num_tokens, seed=0, dtype=torch.float64, decay=0.0):
    """``X Xᵀ`` of random inputs whose k-th direction is ``k^-decay`` strong."""
    x = torch.randn(
        width, num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x *= torch.arange(1, width + 1, dtype=torch.float64)[:, None] ** -decay
    return (x @ x.T).to(dtype)


# --------------------------------------------------------------------------------- damping


def test_by_hand():
    covariance = torch.tensor([[6.0, 1.0], [1.0, 2.0]])  # mean diagonal 4
    torch.testing.assert_close(damped(covariance, 0.1), torch.tensor([[1.6, 0.25], [0.25, 0.6]]))
    torch.testing.assert_close(
        damped(covariance, 0.1, normalize=False), torch.tensor([[6.4, 1.0], [1.0, 2.4]])
    )
    torch.testing.assert_close(damped(covariance), torch.tensor([[1.51, 0.25], [0.25, 0.51]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 9),
    num_tokens=st.integers(1, 12),
    damping=st.floats(0.0, 1.0),
    scale=st.floats(1e-6, 1e6),
)
def test_the_mean_diagonal_is_one_and_the_damping_a_share_of_it(
    dtype, width, num_tokens, damping, scale
):
    covariance = (scale * covariance_of(width, num_tokens)).to(dtype)
    before = covariance.clone()
    result = damped(covariance, damping)
    assert result.dtype == dtype
    assert result.diagonal().mean().item() == pytest.approx(1 + damping, rel=1e-5)
    kept = damped(covariance, damping, normalize=False)
    assert kept.diagonal().mean().item() == pytest.approx(
        (1 + damping) * before.diagonal().mean().item(), rel=1e-5
    )
    off_diagonal = ~torch.eye(width, dtype=torch.bool)
    assert torch.equal(kept[off_diagonal], before[off_diagonal])
    assert torch.equal(covariance, before)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_tokens", [3, 100])
def test_damping_makes_every_covariance_positive_definite(num_tokens, normalize):
    covariance = covariance_of(40, num_tokens)
    least = torch.linalg.eigvalsh(damped(covariance, 0.01, normalize=normalize))[0]
    unit = 1.0 if normalize else covariance.diagonal().mean()
    exact = torch.linalg.eigvalsh(covariance)[0] * unit / covariance.diagonal().mean() + 0.01 * unit
    torch.testing.assert_close(least, exact, rtol=1e-9, atol=0)
    assert least > 0


def test_inputs_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="zero"):
        damped(torch.zeros(4, 4))


def published_search(covariance, damping):
    """The published code's loop, in its float32: double until ``‖C_ C_⁻¹ - I‖_F < 0.05``."""
    while True:
        lifted = covariance + damping * covariance.diagonal().mean() * torch.eye(len(covariance))
        if torch.dist(lifted @ torch.linalg.inv(lifted), torch.eye(len(covariance))) < 0.05:
            return lifted
        damping *= 2


@pytest.mark.parametrize("damping", [1e-9, 1e-7, 0.01])
def test_the_search_doubles_the_damping_as_published(damping):
    covariance = covariance_of(
        128, 60, dtype=torch.float32
    )  # singular: all there is to invert is the damping
    expected = published_search(covariance, damping)
    found = damped(covariance, damping, normalize=False, search=True)
    torch.testing.assert_close(found, expected)
    normalized = damped(covariance, damping, search=True)
    torch.testing.assert_close(
        normalized, expected / covariance.diagonal().mean(), rtol=1e-5, atol=1e-7
    )
    plain = damped(covariance, damping, normalize=False)
    assert torch.equal(plain, found) is (damping == 0.01)  # there is something to search for below


def test_the_search_gets_away_from_no_damping_at_all():
    covariance = covariance_of(
        30, 5, dtype=torch.float32
    )  # of rank 5: without damping there is no inverse
    found = damped(covariance, 0.0, search=True)
    error = torch.dist(found @ torch.linalg.inv(found), torch.eye(30))
    assert error < 0.05
    added = found.diagonal() - damped(covariance, 0.0).diagonal()
    assert (added >= 0).all()
    assert added.max() < 1e-3


# --------------------------------------------------------------------------------- eigenvalues


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.sampled_from(DTYPES))
def test_narrow_covariances(width, num_tokens, dtype):
    covariance = damped(covariance_of(width, num_tokens, dtype=dtype))
    exact = torch.linalg.eigvalsh(covariance.double())
    smallest, largest = extreme_eigenvalues(covariance)
    assert smallest == pytest.approx(exact[0].item(), rel=1e-9)
    assert largest == pytest.approx(exact[-1].item(), rel=1e-9)


WIDE = 80


@pytest.fixture
def searched(monkeypatch):
    """The search that wide covariances take, on ones narrow enough for a test."""
    assert ALL_BELOW >= WIDE
    monkeypatch.setattr(module, "ALL_BELOW", WIDE - 1)
    monkeypatch.setattr(module, "LANCZOS_STEPS", 60)


def check_searched(covariance):
    exact = torch.linalg.eigvalsh(covariance.double())
    smallest, largest = extreme_eigenvalues(covariance)
    assert smallest == pytest.approx(exact[0].item(), rel=SEARCHED)
    assert largest == pytest.approx(exact[-1].item(), rel=SEARCHED)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_wide_covariances_are_searched(decay, dtype):
    check_searched(damped(covariance_of(WIDE, 500, dtype=dtype, decay=decay)))


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("num_tokens", [1, 2, 20, 59])
def test_wide_covariances_of_few_tokens(num_tokens):
    check_searched(
        damped(covariance_of(WIDE, num_tokens))
    )  # one eigenvalue, the damping, is repeated many times


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("values", [[1.01], [1.0, 2.0], [0.01, 0.02, 50.0]], ids=str)
def test_wide_covariances_with_few_distinct_eigenvalues(values):
    # The search meets an invariant subspace after as many steps as there are values and must not go on from rounding.
    check_searched(torch.diag(torch.tensor((values * WIDE)[:WIDE], dtype=torch.float64)))


def test_a_width_that_is_searched_without_being_told_to():
    covariance = damped(covariance_of(ALL_BELOW + 1, 100, decay=0.5, dtype=torch.float32))
    check_searched(covariance)


@pytest.mark.usefixtures("searched")
@pytest.mark.parametrize("width", [10, WIDE])
def test_singular_covariances_are_refused_with_the_key_to_set(width):
    with pytest.raises(ValueError, match=r"not positive definite.*adapter\.damping"):
        extreme_eigenvalues(torch.diag(torch.tensor([1.0] * (width - 1) + [-0.1])))


def test_a_full_gpu_is_answered_by_the_cpu_and_logged(monkeypatch, caplog):
    compute, calls = module._extreme_eigenvalues, []

    def full_the_first_time(covariance):
        calls.append(covariance)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return compute(covariance)

    monkeypatch.setattr(module, "_extreme_eigenvalues", full_the_first_time)
    with caplog.at_level(logging.WARNING, logger="kasa_tune.components.linalg"):
        assert extreme_eigenvalues(torch.diag(torch.tensor([2.0, 3.0, 5.0]))) == pytest.approx(
            (2.0, 5.0)
        )
    assert len(calls) == 2
    (record,) = caplog.records
    assert "doing it on the CPU" in record.getMessage()


# --------------------------------------------------------------------------------- a full card

# What is computed, and the operation that finds no room.
COMPUTED = {
    "damped": (damped, torch.Tensor, "__truediv__"),
    "searched": (lambda c: damped(c, search=True), torch.linalg, "inv_ex"),
    "rank": (lambda c: shortage(Covariance(("w",), 0, c, 9, 1)), torch.linalg, "cholesky_ex"),
    "eigenvalues": (extreme_eigenvalues, torch.linalg, "cholesky_ex"),
    "half": (
        lambda c: co_svd(torch.eye(3, 6), c, 2, "ipm", covariance_power=0.5).vectors,
        torch.linalg,
        "eigh",
    ),
}


@pytest.mark.parametrize("words", ["CUDA out of memory", "CUSOLVER_STATUS_INTERNAL_ERROR"])
@pytest.mark.parametrize(("compute", "owner", "name"), COMPUTED.values(), ids=COMPUTED)
def test_all_that_needs_room_beside_a_covariance_falls_back_to_the_cpu(
    compute, owner, name, words, monkeypatch, caplog
):
    covariance = covariance_of(6, 40, dtype=torch.float32)
    expected, real, calls = compute(covariance), getattr(owner, name), []

    def full_the_first_time(*args, **options):
        calls.append(name)
        if len(calls) == 1:
            raise RuntimeError(words)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, full_the_first_time)
    with caplog.at_level(logging.WARNING, logger="kasa_tune.components.linalg"):
        found = compute(covariance)
    assert len(calls) > 1
    assert any("doing it on the CPU" in record.getMessage() for record in caplog.records)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected
