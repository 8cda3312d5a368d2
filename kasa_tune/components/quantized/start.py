"""What a quantized weight and its adapter start as in QCorDA, QPiSSA, LoftQ, QLoRA and QKaSA; else they are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kasa_tune.components.adapters import AdapterLinear
from kasa_tune.components.linalg.decomposition import (
    Component,
    co_svd,
    smallest_triplets,
    split_component,
)
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import dequantize
from kasa_tune.components.models.loading import put_weight
from kasa_tune.methods import Method


@dataclass(frozen=True)
class QuantizedStart:
    """Where one linear starts from.

    Args:
        weight: quantized.
        update: ``B (d_out, r)``, ``A (r, d_in)`` that have been taken out of it; None where the update starts at zero.
        edit: KaSA's, which stays beside the weight.
        component: what the update was split from.
    """

    weight: Tensor
    update: LowRank | None = None
    edit: LowRank | None = None
    component: Component | None = None

    def without_vectors(self) -> QuantizedStart:
        """The same, of the component only what is worth a report: its factors are in the update."""
        return replace(self, component=self.component.without_vectors() if self.component else None)

    def to(self, device: torch.device | str) -> QuantizedStart:
        """The same on a device."""
        parts = (self.update, self.edit, self.component)
        return QuantizedStart(
            self.weight.to(device), *(part.to(device) if part else None for part in parts)
        )

    def put_into(self, linear: nn.Module) -> None:
        """Give a linear its weight and, if it has an adapter, that its start."""
        put_weight(linear, self.weight)
        if self.update:
            linear.start_from(self.update, taken_out=True)
        elif isinstance(linear, AdapterLinear):
            if self.edit:
                linear.set_edit(self.edit)
            linear.reset_update()


@torch.no_grad()
def quantized_start(
    weight: Tensor,
    linear: AdapterLinear | None,
    method: Method,
    *,
    quantize: Callable[[Tensor], Tensor],
    component: Component | None = None,
    iterations: int | None = None,
    split: str = "balanced",
    adapter_dtype: torch.dtype = torch.float32,
) -> QuantizedStart:
    """Quantize one weight, without what its adapter starts as.

    Args:
        weight: ``W (d_out, d_in)`` float32.
        linear: that will hold it, for ranks and scaling; None for one without an adapter.
        method: a row of the table, of those with a quantized base.
        quantize: float32 to a quantized weight.
        component: of a calibrated method, see :func:`~kasa_tune.components.corda.all_layers.decompose`.
        iterations: of QPiSSA and LoftQ; None for the method's own.
        split: see :func:`~kasa_tune.components.linalg.decomposition.split_component`.
        adapter_dtype: of the adapter; what is taken out is what A and B hold after rounding to it.

    Raises:
        ValueError: the weight is damaged, or an argument is out of its range.
    """
    if linear is None:
        return QuantizedStart(quantize(weight))
    if method.decomposition is None:
        edit = smallest_triplets(weight, linear.edit.rank)[0] if linear.edit.rank else None
        return QuantizedStart(quantize(weight), edit=edit)
    turns, quantized = iterations or method.quantization_iterations or 0, None
    if method.decomposition == "co_svd" and not method.calibrated:
        component, turns = co_svd(weight, None, linear.rank, method.mode), turns - 1
    if turns:
        component, quantized = fit_quantization(
            weight, component, linear.rank, turns, quantize=quantize
        )
    update = split_component(component.to(weight.device), linear.scaling, split).to(adapter_dtype)
    if method.decomposition != "quantization_error":
        taken_out = LowRank(update.out.float() * linear.scaling, update.into.float())
        quantized = quantize(torch.addmm(weight, taken_out.out, taken_out.into, alpha=-1.0))
    return QuantizedStart(quantized, update=update, component=component)


@torch.no_grad()
def fit_quantization(
    weight: Tensor,
    start: Component | None,
    rank: int,
    iterations: int,
    *,
    quantize: Callable[[Tensor], Tensor],
) -> tuple[Component, Tensor]:
    """Let a low-rank component take up what quantization loses: ``Q = quantize(W - E)``, then E the first ``rank``
    singular triplets of ``W - Q``, in turns.

    From no E this is LoftQ (arXiv 2310.08659, algorithm 1), whose base is the last Q; from W's own first triplets it is
    QPiSSA (arXiv 2404.02948, section 4), whose base is ``quantize(W - E)`` of the last E.

    Args:
        weight: ``W (d_out, d_in)`` float32.
        start: the first E; None for zero.
        rank: of E, as :func:`co_svd`.
        iterations: turns; after none, ``start`` and W itself come back.
        quantize: float32 to a quantized weight.

    Returns:
        The last E and the last Q.

    Raises:
        ValueError: as :func:`co_svd` and ``quantize``.
    """
    component, quantized = start, weight
    for _ in range(iterations):
        residual = (
            weight if component is None else weight - component.vectors @ component.projection
        )
        quantized = quantize(residual)
        component = co_svd(weight - dequantize(quantized), None, rank, "ipm")
    return component, quantized
