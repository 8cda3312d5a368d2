"""CorDA (arXiv 2406.05223) and CorDA++ (arXiv 2506.13187) over all layers of a model: covariances chosen, ranks given
out, weights decomposed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from kasa_tune.components.adapters.linear import AdapterLinear
from kasa_tune.components.corda.allocation import (
    POOLED,
    LayerSpectrum,
    allocate_ranks,
    layer_spectra,
    more_compact,
)
from kasa_tune.components.corda.cache import DecompositionCache
from kasa_tune.components.corda.calibration import Wanted
from kasa_tune.components.linalg.decomposition import Component, co_svd
from kasa_tune.components.processes.world import Job

# A walk over the model's blocks, given which layers want the covariance of which round, and a title for its progress:
# layers that share an input, the round, the covariance (d_in, d_in) or None where the method has none. The layers'
# weights need be there only until the next is asked for.
Walk = Callable[[Wanted, str], Iterable[tuple[list[str], int, Tensor | None]]]

Compute = Callable[[Iterable[Job]], Iterator[Any]]  # results of jobs, in their order


def run_in_order(jobs: Iterable[Job]) -> Iterator[Any]:
    """Do each job when it comes."""
    return (work() for _, work in jobs)


def decompose(
    linears: Mapping[str, AdapterLinear],
    walk: Walk,
    cache: DecompositionCache,
    *,
    mode: str,
    options: Mapping[str, Any],
    compute: Compute = run_in_order,
) -> tuple[dict[str, Component], dict[str, LayerSpectrum]]:
    """The component of every layer's weight that its adapter starts from, found or read from the cache.

    Args:
        linears: adapted linears by name.
        walk: visits them with their covariances; once for CorDA, once more before it for CorDA++.
        cache: is read, and written when something was found.
        mode: ``ipm`` the components of largest singular values, ``kpm`` the smallest.
        options: of the adapter and calibration sections ``covariance_power``; ``rounds``, of which each layer keeps
            the one whose covariance makes its weight most compact, and ``max_selection_dim``, beyond which an input
            takes them all together; ``dynamic_ranks`` within the budget of the linears' ranks, ``min_rank``,
            ``max_rank``.
        compute: does the work; :func:`~kasa_tune.components.processes.distribute_jobs` shares it out.

    Returns:
        Components on the CPU, and the spectra they were chosen by; none where nothing was to choose.

    Raises:
        ValueError: a weight or covariance is damaged, or the bounds leave no room.
        CacheError: a file of the cache is damaged or of another run.
    """
    power, spectra, ranks = (
        options["covariance_power"],
        {},
        {name: linear.rank for name, linear in linears.items()},
    )
    if options["rounds"] > 1 or options["dynamic_ranks"]:
        limit = options["max_selection_dim"] or sys.maxsize
        spectra = cache.spectra(
            otherwise=partial(_choose_covariances, linears, walk, compute, limit, power)
        )
    if options["dynamic_ranks"]:
        sizes = {name: linear.in_dim + linear.out_dim for name, linear in linears.items()}
        bounds = {"min_rank": options["min_rank"], "max_rank": options["max_rank"]}
        ranks = allocate_ranks(spectra, sizes, rank=max(ranks.values()), mode=mode, **bounds)
    find = partial(_find_components, linears, walk, compute, spectra, ranks, mode, power)
    return cache.components(mode, ranks, otherwise=find), spectra


def _choose_covariances(
    linears: Mapping[str, AdapterLinear], walk: Walk, compute: Compute, limit: int, power: float
) -> dict[str, LayerSpectrum]:
    """Of every layer the spectrum in the round that makes it most compact; wider inputs than ``limit`` are pooled."""
    best: dict[str, LayerSpectrum] = {}

    def wanted(name: str, round: int) -> bool:
        return (round == POOLED) == (linears[name].in_dim > limit)

    def jobs() -> Iterator[Job]:
        for layers, round, covariance in walk(wanted, "Selecting covariances"):
            weights = {name: linears[name].weight for name in layers}
            cost = sum(_cost(weight) for weight in weights.values())
            yield cost, partial(layer_spectra, weights, covariance, round, power)
            del weights, covariance  # whoever does the job holds them

    for found in compute(jobs()):
        for name, newest in found.items():
            best[name] = more_compact(best.get(name), newest)
    return {name: best[name] for name in linears}


def _find_components(
    linears: Mapping[str, AdapterLinear],
    walk: Walk,
    compute: Compute,
    spectra: Mapping[str, LayerSpectrum],
    ranks: Mapping[str, int],
    mode: str,
    power: float,
) -> dict[str, Component]:
    """The CO-SVD of every layer's weight, under the covariance of its chosen round."""
    order: list[str] = []

    def wanted(name: str, round: int) -> bool:
        return round == (spectra[name].round if spectra else 0)

    def find(name: str, weight: Tensor, covariance: Tensor | None) -> Component:
        return co_svd(weight, covariance, ranks[name], mode, covariance_power=power).to("cpu")

    def jobs() -> Iterator[Job]:
        for layers, _, covariance in walk(wanted, "Decomposing"):
            for name in layers:
                order.append(name)
                yield (
                    _cost(linears[name].weight),
                    partial(find, name, linears[name].weight, covariance),
                )
            del covariance

    found = list(compute(jobs()))  # fills `order` as well
    return dict(zip(order, found, strict=True))


def _cost(weight: Tensor) -> float:
    return weight.numel() * min(weight.shape)
