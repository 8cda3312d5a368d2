"""CorDA (arXiv 2406.05223) and CorDA++ (arXiv 2506.13187) over all layers of a model: covariances chosen, ranks given
out, weights decomposed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor
from torchtune import utils

from kasa_tune.components.adapters import AdapterLinear
from kasa_tune.components.corda.allocation import (
    POOLED,
    LayerSpectrum,
    allocate_ranks,
    input_spectra,
    layer_spectra,
    more_compact,
    ranks_by_explained_variance,
)
from kasa_tune.components.corda.cache import DecompositionCache, Unfinished
from kasa_tune.components.corda.calibration import Wanted
from kasa_tune.components.linalg.decomposition import (
    Component,
    co_svd,
    input_component,
    qr_component,
)
from kasa_tune.components.processes.world import Job
from kasa_tune.methods import Method

log = utils.get_logger("INFO")  # prints on rank 0

# Yields layers that share an input, a round, and the covariance (d_in, d_in) of that input in that round, or None for
# a method without calibration. It is given which layers want which round, and a title for its progress bar. The
# layers' weights need be in memory only until the next covariance is asked for.
CovarianceSource = Callable[[Wanted, str], Iterable[tuple[list[str], int, Tensor | None]]]

Compute = Callable[[Iterable[Job]], Iterator[Any]]  # results of jobs, in their order


def run_in_order(jobs: Iterable[Job]) -> Iterator[Any]:
    """Do each job when it comes."""
    return (work() for _, work in jobs)


@dataclass(frozen=True)
class Decomposition:
    """How a method finds what the updates of all layers start from.

    Args:
        component: of a weight ``(d_out, d_in)``, the covariance of its inputs ``(d_in, d_in)`` or None, and a rank.
        spectra: by which :func:`~kasa_tune.components.corda.allocation.more_compact` chooses among rounds and
            ``allocate`` gives out ranks, of the weights by name that share an input, its covariance and the round;
            None for a method that does neither.
        allocate: the rank of every layer, from the spectra and the sizes of one component; options ``rank``,
            ``min_rank`` and ``max_rank``.
    """

    component: Callable[[Tensor, Tensor | None, int], Component]
    spectra: Callable[[Mapping[str, Tensor], Tensor, int], dict[str, LayerSpectrum]] | None = None
    allocate: Callable[..., dict[str, int]] | None = None


def _co_svd(method: Method, covariance_power: float) -> Decomposition:
    return Decomposition(
        partial(co_svd, mode=method.mode, covariance_power=covariance_power),
        partial(layer_spectra, covariance_power=covariance_power),
        partial(allocate_ranks, mode=method.mode),
    )


# By a method's `decomposition`; each takes the method and adapter.covariance_power.
DECOMPOSITIONS: dict[str, Callable[[Method, float], Decomposition]] = {
    "co_svd": _co_svd,
    "input_svd": lambda method, power: Decomposition(
        input_component, input_spectra, ranks_by_explained_variance
    ),
    "qr": lambda method, power: Decomposition(lambda weight, _, rank: qr_component(weight, rank)),
}


def decompose(
    linears: Mapping[str, AdapterLinear],
    covariances: CovarianceSource,
    cache: DecompositionCache,
    *,
    method: Method,
    options: Mapping[str, Any],
    compute: Compute = run_in_order,
) -> tuple[dict[str, Component], dict[str, LayerSpectrum]]:
    """The component of every layer that its adapter starts from, found or read from the cache.

    Args:
        linears: adapted linears by name.
        covariances: gives those of the layers' inputs. It is called once, and for CorDA++ once before that.
        cache: is read, and written when something was found.
        method: a row of the table with a ``decomposition``.
        options: of the adapter and calibration sections ``covariance_power``; ``rounds``, of which each layer keeps
            the one whose covariance makes its weight most compact, and ``max_selection_dim``, beyond which an input
            takes them all together; ``dynamic_ranks`` within the budget of the linears' ranks, ``min_rank``,
            ``max_rank``.
        compute: does the work; :func:`~kasa_tune.components.processes.distribute_jobs` shares it out.

    What is found is kept in the cache layer by layer, so a decomposition that is stopped goes on at the layer where it
    was stopped.

    Returns:
        Components on the CPU, and the spectra they were chosen by; none where nothing was to choose.

    Raises:
        ValueError: a weight or covariance is damaged, or the bounds leave no room.
        CacheError: a file of the cache is damaged or of another run.
    """
    assert method.decomposition
    how = DECOMPOSITIONS[method.decomposition](method, options["covariance_power"])
    spectra, ranks = {}, {name: linear.rank for name, linear in linears.items()}
    if options["rounds"] > 1 or options["dynamic_ranks"]:
        limit = options["max_selection_dim"] or sys.maxsize
        choose = partial(_choose_covariances, linears, covariances, compute, limit, how.spectra)
        spectra = cache.spectra(otherwise=partial(choose, cache.unfinished("spectra")))
    if options["dynamic_ranks"]:
        sizes = {name: linear.in_dim + linear.out_dim for name, linear in linears.items()}
        bounds = {"min_rank": options["min_rank"], "max_rank": options["max_rank"]}
        ranks = how.allocate(spectra, sizes, rank=max(ranks.values()), **bounds)
    find = partial(_find_components, linears, covariances, compute, spectra, ranks, how.component)
    name = method.mode or method.decomposition
    found = cache.components(name, ranks, otherwise=partial(find, cache.unfinished(name)))
    return found, spectra


def _choose_covariances(
    linears: Mapping[str, AdapterLinear],
    covariances: CovarianceSource,
    compute: Compute,
    limit: int,
    spectra: Callable[[Mapping[str, Tensor], Tensor, int], dict[str, LayerSpectrum]],
    unfinished: Unfinished,
) -> dict[str, LayerSpectrum]:
    """Of every layer the spectrum in the round that makes it most compact; wider inputs than ``limit`` are pooled."""
    before = unfinished.spectra()
    seen = {(name, s.round) for found in before for name, s in found.items()}
    _say_what_is_there(len({name for name, _ in seen}), len(linears))
    best: dict[str, LayerSpectrum] = {}

    def wanted(name: str, round: int) -> bool:
        fits = (round == POOLED) == (linears[name].in_dim > limit)
        return fits and (name, round) not in seen

    def jobs() -> Iterator[Job]:
        for layers, round, covariance in covariances(wanted, "Selecting covariances"):
            weights = {name: linears[name].weight for name in layers}
            cost = sum(_cost(weight) for weight in weights.values())
            yield cost, partial(spectra, weights, covariance, round)
            del weights, covariance  # whoever does the job holds them

    def new() -> Iterator[dict[str, LayerSpectrum]]:
        for found in compute(jobs()):
            unfinished.keep_spectra(found)
            yield found

    for found in chain(before, new()):
        for name, newest in found.items():
            best[name] = more_compact(best.get(name), newest)
    return {name: best[name] for name in linears}


def _find_components(
    linears: Mapping[str, AdapterLinear],
    covariances: CovarianceSource,
    compute: Compute,
    spectra: Mapping[str, LayerSpectrum],
    ranks: Mapping[str, int],
    component: Callable[[Tensor, Tensor | None, int], Component],
    unfinished: Unfinished,
) -> dict[str, Component]:
    """The component of every layer, under the covariance of its chosen round."""
    order: list[str] = []
    found = {
        name: before.first(ranks[name])
        for name, before in unfinished.components().items()
        if before.rank >= ranks[name]
    }
    _say_what_is_there(len(found), len(linears))

    def wanted(name: str, round: int) -> bool:
        return name not in found and round == (spectra[name].round if spectra else 0)

    def find(name: str, weight: Tensor, covariance: Tensor | None) -> Component:
        return component(weight, covariance, ranks[name]).to("cpu")

    def jobs() -> Iterator[Job]:
        for layers, _, covariance in covariances(wanted, "Decomposing"):
            for name in (name for name in layers if name not in found):
                order.append(name)
                yield (
                    _cost(linears[name].weight),
                    partial(find, name, linears[name].weight, covariance),
                )
            del covariance

    new = compute(jobs())  # fills `order` as well, so it comes first
    for result, name in zip(new, order, strict=True):
        unfinished.keep_component(name, result)
        found[name] = result
    return found


def _say_what_is_there(done: int, num_layers: int) -> None:
    if done:
        log.info(
            f"A decomposition that was stopped goes on: {done} of {num_layers} layers were begun or done before."
        )


def _cost(weight: Tensor) -> float:
    return weight.numel() * min(weight.shape)
