"""CorDA++ (arXiv 2506.13187): how compact a layer's knowledge is, and which covariance and rank it gets for that.

Shapes: R = min(d_out, d_in) singular values of W C, N rounds of calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kasa_tune.components.corda.covariance import extreme_eigenvalues
from kasa_tune.components.linalg.decomposition import oriented_matrix
from kasa_tune.components.linalg.fallback import on_cpu_if_no_room
from kasa_tune.components.linalg.solvers import gram_matrix

POOLED = -1  # in place of a round: the covariance over all of them


@dataclass(frozen=True)
class LayerSpectrum:
    """What one calibration round tells of a layer.

    Args:
        singular_values: of ``W C``, ``(R,)`` float64 on the CPU, descending; for EVA see :func:`input_spectra`.
        log_compactness: ``log π(C)``; 0 for EVA.
        round: the round it is of, or POOLED.
        scores: of every round seen so far, the smallest is the chosen one's; empty for POOLED and EVA.
    """

    singular_values: Tensor
    log_compactness: float
    round: int
    scores: tuple[float, ...] = ()


def log_compactness(smallest: float, largest: float, d_out: int) -> float:
    """``log π(C)``, ``π(C) = sqrt(d_out · λ_max(C)) / λ_min(C)``: discarding the last k components of the CO-SVD moves
    the outputs by at most ``π(C) σ_-k(W C)`` (CorDA++, theorem 1).

    Args:
        smallest: eigenvalue of the damped covariance.
        largest: eigenvalue of the damped covariance.
        d_out: outputs of the layer.
    """
    return 0.5 * math.log(d_out * largest) - math.log(smallest)


@torch.no_grad()
def singular_values(
    weight: Tensor, covariance: Tensor | None, covariance_power: float = 1.0
) -> Tensor:
    """All R singular values of ``W C^p``, float64 on the CPU, descending, without vectors.

    From the Gram matrix of the short side: values below 1e-8 of the largest are rounding, which no score can tell from
    zero.
    """

    def work(weight: Tensor, covariance: Tensor | None) -> Tensor:
        gram = gram_matrix(oriented_matrix(weight, covariance, covariance_power))
        return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).cpu()

    return on_cpu_if_no_room(
        work, weight, covariance, what=f"the spectrum of a {tuple(weight.shape)} weight"
    )


@torch.no_grad()
def layer_spectra(
    weights: Mapping[str, Tensor], covariance: Tensor, round: int, covariance_power: float = 1.0
) -> dict[str, LayerSpectrum]:
    """The spectra of layers that share their input.

    Args:
        weights: name to ``(d_out, d_in)``.
        covariance: damped, ``(d_in, d_in)``.
        round: which it is of.
        covariance_power: see :func:`~kasa_tune.components.linalg.decomposition.co_svd`.
    """
    smallest, largest = extreme_eigenvalues(covariance)
    spectra = {}
    for name, weight in weights.items():
        values = singular_values(weight, covariance, covariance_power)
        compactness = log_compactness(smallest, largest, len(weight))
        scores = () if round == POOLED else (selection_score(values, compactness),)
        spectra[name] = LayerSpectrum(values, compactness, round, scores)
    return spectra


@torch.no_grad()
def input_spectra(
    weights: Mapping[str, Tensor], covariance: Tensor, round: int
) -> dict[str, LayerSpectrum]:
    """The spectra of the inputs themselves (EVA, arXiv 2410.07170), of layers that share them.

    A ``singular_value`` here is the square root of the share of the inputs' variance that its direction explains, so
    that the squares of all ``d_in`` would sum to one. The first ``R`` are kept.

    Args:
        weights: name to ``(d_out, d_in)``, of which only the shapes count.
        covariance: ``(d_in, d_in)``.
        round: which it is of.
    """

    def work(covariance: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(covariance.double()).clamp_min(0).flip(0).cpu()

    what = f"the eigenvalues of a covariance of {len(covariance)} inputs"
    eigenvalues = on_cpu_if_no_room(work, covariance, what=what)
    values = (eigenvalues / eigenvalues.sum()).sqrt()  # [d_in]
    return {
        name: LayerSpectrum(values[: min(weight.shape)].clone(), 0.0, round)
        for name, weight in weights.items()
    }


def selection_score(singular_values: Tensor, log_compactness: float) -> float:
    """``log π(C) · Σ_k σ_k / σ_1`` (CorDA++, equation 9): the less, the more of the layer's output a few components
    carry.
    """
    return log_compactness * (singular_values.sum() / singular_values[0].clamp_min(1e-300)).item()


def more_compact(best: LayerSpectrum | None, newest: LayerSpectrum) -> LayerSpectrum:
    """The one of the smaller score; dynamic covariance selection is this, round after round, with two in memory."""
    if best is None:
        return newest
    scores = best.scores + newest.scores
    chosen = newest if newest.scores[0] < min(best.scores) else best
    return LayerSpectrum(chosen.singular_values, chosen.log_compactness, chosen.round, scores)


def allocate_ranks(
    spectra: Mapping[str, LayerSpectrum],
    sizes: Mapping[str, int],
    *,
    rank: int,
    mode: str,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Dynamic rank allocation (CorDA++, algorithm 1): filter, over all layers, the component whose loss matters least,
    and again.

    Every layer starts with its last component filtered; one with k of them filtered has the score
    ``log π · σ_-k / Σ_{j ≤ R-k} σ_j``, and the layer of the least score loses its next. The scores of a layer do not
    decrease with k, so the whole order is one sort. KPM adapts what is filtered, and stops once that exceeds the budget
    ``τ = rank · Σ (d_in + d_out)``; IPM adapts what remains, and stops once that is below it.

    Args:
        spectra: a layer's singular values and ``log π``.
        sizes: a layer's ``d_in + d_out``, the parameters of one component.
        rank: the rank of every layer that the same budget would buy.
        mode: ``ipm`` or ``kpm``.
        min_rank: every layer gets at least this (at most R); 0 is the bare algorithm.
        max_rank: and at most this; None for R.

    Returns:
        Layer to rank, in the order of ``spectra``.

    Raises:
        ValueError: the budget cannot buy ``min_rank`` everywhere.
    """
    names = list(spectra)
    full = np.array([len(spectra[name].singular_values) for name in names])
    size = np.array([sizes[name] for name in names])
    budget = rank * size.sum()
    lowest = np.minimum(min_rank, full)
    highest = np.minimum(full if max_rank is None else max_rank, full)
    if mode == "kpm":  # every layer starts with one component filtered
        lowest = np.minimum(np.maximum(lowest, 1), highest)
    else:
        highest = np.maximum(np.minimum(highest, full - 1), lowest)
    if (lowest * size).sum() > budget:
        raise ValueError(
            f"adapter.min_rank {min_rank} alone takes {(lowest * size).sum():,} parameters, more than the budget of "
            f"model.rank {rank}, {budget:,}. Lower min_rank or raise model.rank."
        )
    layer, count = _filtering_order([spectra[name] for name in names])
    # KPM's rank is the number filtered, IPM's what is left of R; outside lowest..highest a filtering changes no rank.
    if mode == "kpm":
        counts = (count > lowest[layer]) & (count <= highest[layer])
        spent = (lowest * size).sum() + np.cumsum(np.where(counts, size[layer], 0))
        taken = counts & (np.concatenate(([(lowest * size).sum()], spent[:-1])) <= budget)
        ranks = lowest + np.bincount(layer[taken], minlength=len(names))
    else:
        left = full[layer] - count
        counts = (left < highest[layer]) & (left >= lowest[layer])
        before = np.concatenate(([0], np.cumsum(np.where(counts, size[layer], 0))[:-1]))
        taken = counts & ((highest * size).sum() - before >= budget)
        ranks = highest - np.bincount(layer[taken], minlength=len(names))
    return {name: int(value) for name, value in zip(names, ranks, strict=True)}


def _filtering_order(spectra: list[LayerSpectrum]) -> tuple[np.ndarray, np.ndarray]:
    """Layer index and k of every filtering in the order they happen; ties by layer, then by k."""
    scores, layers, counts = [], [], []
    for index, spectrum in enumerate(spectra):
        values = spectrum.singular_values.numpy()
        kept = np.cumsum(values)[::-1]  # Σ_{j <= R-k} σ_j for k = 0 .. R-1
        with np.errstate(divide="ignore", invalid="ignore"):
            # The layer's score with k = 1 .. R-1 filtered, by which the next one is; 0/0 where nothing is left.
            score = spectrum.log_compactness * values[::-1][:-1] / kept[1:]
        score = np.nan_to_num(
            np.concatenate(([-np.inf], score)), nan=np.inf, posinf=np.inf, neginf=-np.inf
        )
        # The least score is taken first, and one that falls after a filtering is taken at once: a running maximum.
        scores.append(np.maximum.accumulate(score))
        layers.append(np.full(len(values), index))
        counts.append(np.arange(1, len(values) + 1))
    layer, count = np.concatenate(layers), np.concatenate(counts)
    order = np.lexsort((count, layer, np.concatenate(scores)))
    return layer[order], count[order]


def ranks_by_explained_variance(
    spectra: Mapping[str, LayerSpectrum],
    sizes: Mapping[str, int],
    *,
    rank: int,
    min_rank: int = 1,
    max_rank: int | None = None,
) -> dict[str, int]:
    """EVA's redistribution of ranks (arXiv 2410.07170, section 3.3): the directions that explain most, of all layers.

    The budget is ``rank`` times the number of layers, counted in ranks and not in parameters.

    Args:
        spectra: from :func:`input_spectra`.
        sizes: not used; EVA counts ranks.
        rank: the mean rank of a layer.
        min_rank: every layer gets at least this (at most R); the paper has 0.
        max_rank: and at most this; the paper has ``rho · rank`` with ``rho`` 2. None for R.

    Returns:
        Layer to rank, in the order of ``spectra``. Of directions that explain the same, as those of layers that share
        their inputs, the earlier layer's is taken first.

    Raises:
        ValueError: the budget cannot buy ``min_rank`` everywhere.
    """
    ranks = {name: min(min_rank, len(each.singular_values)) for name, each in spectra.items()}
    left = rank * len(ranks) - sum(ranks.values())
    if left < 0:
        raise ValueError(
            f"adapter.min_rank {min_rank} is more than the mean rank of a layer, model.rank {rank}. Lower min_rank or "
            "raise model.rank."
        )
    directions = [
        (-value, name)
        for name, each in spectra.items()
        for value in each.singular_values[ranks[name] : max_rank].tolist()
    ]
    for _, name in sorted(directions, key=lambda direction: direction[0])[:left]:
        ranks[name] += 1
    return ranks
