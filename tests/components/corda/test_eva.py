"""EVA: the directions of a layer's inputs against an SVD of the inputs, ranks against hand and brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune.components.adapters import CorDALinear
from kasa_tune.components.corda.allocation import (
    LayerSpectrum,
    input_spectra,
    ranks_by_explained_variance,
)
from kasa_tune.components.corda.covariance import damped
from kasa_tune.components.corda.decompose import decompose
from kasa_tune.components.linalg.decomposition import input_component, split_component
from kasa_tune.components.models.loading import put_weight
from kasa_tune.methods import METHODS
from tests.components.corda.test_decompose import OPTIONS, RANK, World, cache, never
from tests.tolerances import FP64

FACTORS = 2e-6  # of float32 vectors of length one


def inputs_of(width, num_tokens=200, seed=0):
    """``[num_tokens, width]`` float64, with a mean and well separated singular values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    return (x + 0.5) * torch.arange(1, width + 1, dtype=torch.float64).pow(-1.0)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize(("d_out", "d_in"), [(12, 20), (20, 12)])
def test_a_is_the_leading_right_singular_vectors_of_the_inputs(d_out, d_in, damping):
    x = inputs_of(d_in)
    found = input_component(torch.empty(d_out, d_in), damped(x.T @ x, damping), 4)
    _, S, Vt = torch.linalg.svd(x, full_matrices=False)
    signs = (found.projection.double() * Vt[:4]).sum(dim=1).sign()
    torch.testing.assert_close(
        signs[:, None] * found.projection.double(), Vt[:4], atol=FACTORS, rtol=0
    )
    assert not found.vectors.any()
    if damping == 0:
        mean = (x.T @ x).diagonal().mean()
        torch.testing.assert_close(found.singular_values, S[:4] / mean.sqrt(), **FP64)


def test_a_diagonal_covariance_gives_its_largest_axes():
    found = input_component(torch.empty(3, 4), torch.diag(torch.tensor([1.0, 9.0, 0.0, 4.0])), 2)
    assert torch.equal(found.projection.abs(), torch.eye(4)[[1, 3]])
    assert found.singular_values.tolist() == [3.0, 2.0]


def test_rank_zero_is_nothing():
    found = input_component(torch.empty(3, 4), torch.eye(4), 0)
    assert (found.vectors.shape, found.projection.shape, found.rank) == ((3, 0), (0, 4), 0)


@pytest.mark.parametrize("edit_storage", ["folded", "factored"])
def test_nothing_is_taken_out_of_the_weight(edit_storage):
    torch.manual_seed(0)
    weight, x = torch.randn(6, 5), inputs_of(5).float()
    linear = CorDALinear(5, 6, rank=2, alpha=3.0, edit_storage=edit_storage)
    put_weight(linear, weight)
    component = input_component(weight, x.T @ x, 3)
    linear.start_from(split_component(component, linear.scaling, "unscaled"))
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.lora_a.weight, component.projection)
    assert linear.edit.rank == 0
    assert (linear.rank, linear.scaling, linear.folded) == (3, 1.5, False)
    assert torch.equal(linear(x), x @ weight.T)


def test_spectra_are_the_shares_of_the_variance():
    x = inputs_of(8)
    weights = {"wide": torch.empty(20, 8), "narrow": torch.empty(3, 8)}
    found = input_spectra(weights, damped(x.T @ x, 0.0), round=2)
    shares = torch.linalg.svdvals(x).square()
    shares /= shares.sum()
    torch.testing.assert_close(found["wide"].singular_values.square(), shares, **FP64)
    torch.testing.assert_close(found["narrow"].singular_values.square(), shares[:3], **FP64)
    assert {spectrum.round for spectrum in found.values()} == {2}


def spectra_of(**shares):
    return {
        name: LayerSpectrum(torch.tensor(values, dtype=torch.float64).sqrt(), 0.0, 0)
        for name, values in shares.items()
    }


BY_HAND = {
    "all": ({"min_rank": 0}, {"a": 3, "b": 1}),
    "bounded above": ({"min_rank": 0, "max_rank": 2}, {"a": 2, "b": 2}),
    "bounded below": ({"min_rank": 2}, {"a": 2, "b": 2}),
}


@pytest.mark.parametrize(("bounds", "ranks"), BY_HAND.values(), ids=BY_HAND)
def test_ranks_by_hand(bounds, ranks):
    spectra = spectra_of(a=[0.4, 0.3, 0.2, 0.1], b=[0.85, 0.08, 0.07])
    assert ranks_by_explained_variance(spectra, {}, rank=2, **bounds) == ranks


def test_of_equal_directions_the_earlier_layer_is_served():
    spectra = spectra_of(q=[0.5, 0.3, 0.2], k=[0.5, 0.3, 0.2])
    assert ranks_by_explained_variance(spectra, {}, rank=1, min_rank=0) == {"q": 1, "k": 1}
    spectra = spectra_of(q=[0.5, 0.3], k=[0.5, 0.3], v=[0.5, 0.3])
    assert list(ranks_by_explained_variance(spectra, {}, rank=1, min_rank=0).values()) == [1, 1, 1]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 9))
@settings(deadline=None)
def test_no_choice_within_the_budget_explains_more(widths, rank, seed):
    torch.manual_seed(seed)
    shares = [torch.rand(width).sort(descending=True).values for width in widths]
    spectra = spectra_of(**{str(i): (s / s.sum()).tolist() for i, s in enumerate(shares)})
    ranks = ranks_by_explained_variance(spectra, {}, rank=rank, min_rank=0)
    explained = [spectra[name].singular_values.square() for name in spectra]
    taken = sum(e[:r].sum().item() for e, r in zip(explained, ranks.values(), strict=True))
    best = torch.cat(explained).sort(descending=True).values[: rank * len(widths)].sum().item()
    assert taken == pytest.approx(best)
    assert sum(ranks.values()) == min(rank * len(widths), sum(widths))


def test_a_budget_below_the_least_rank_is_refused():
    with pytest.raises(ValueError, match=r"adapter\.min_rank 2 .*model\.rank 1"):
        ranks_by_explained_variance(spectra_of(a=[0.6, 0.4]), {}, rank=1, min_rank=2)


# --------------------------------------------------------------------------------- over all layers of a model


@pytest.mark.parametrize("dynamic_ranks", [False, True])
def test_every_layer_gets_the_directions_of_its_own_inputs(dynamic_ranks, tmp_path):
    world = World()
    options = OPTIONS | {
        "dynamic_ranks": dynamic_ranks,
        "max_rank": 2 * RANK * dynamic_ranks or None,
    }
    eva = {"method": METHODS["eva"], "options": options}
    found, spectra = decompose(world.linears, world.source, cache(tmp_path), **eva)
    assert list(found) == list(world.linears)
    assert sum(component.rank for component in found.values()) == RANK * len(found)
    assert bool(spectra) is dynamic_ranks
    for name, component in found.items():
        vectors = torch.linalg.eigh(world.covariances[name, 0].double()).eigenvectors
        leading = vectors[:, -component.rank :]
        rows = component.projection.double()
        torch.testing.assert_close(rows.T @ rows, leading @ leading.T, atol=1e-5, rtol=0)
    again, _ = decompose(world.linears, never, cache(tmp_path), **eva)
    for name, component in found.items():
        assert torch.equal(again[name].projection, component.projection)
