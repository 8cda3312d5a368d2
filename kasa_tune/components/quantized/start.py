"""How a quantized weight and its adapter are initialized. QCorDA, QPiSSA, LoftQ, QLoRA and QKaSA
differ only in this step.
"""

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
    """The initial weight and adapter of one linear.

    Args:
        weight: the quantized weight ``(d_out, d_in)``.
        update: initial factors ``B (d_out, r)`` and ``A (r, d_in)``. The weight was quantized
            without them. None if the update starts at zero.
        edit: the part that KaSA removes, of shape ``(d_out, d_in)``. The weight is quantized with
            it, and the forward pass subtracts it.
        component: the component that was split into the update.
    """

    weight: Tensor
    update: LowRank | None = None
    edit: LowRank | None = None
    component: Component | None = None

    def without_vectors(self) -> QuantizedStart:
        """Return a copy whose component has no factors. A report needs only its singular values,
        and the factors are in the update.
        """
        return replace(self, component=self.component.without_vectors() if self.component else None)

    def to(self, device: torch.device | str) -> QuantizedStart:
        """Return a copy on another device."""
        parts = (self.update, self.edit, self.component)
        return QuantizedStart(
            self.weight.to(device), *(part.to(device) if part else None for part in parts)
        )

    def put_into(self, linear: nn.Module) -> None:
        """Put the weight into a linear and, if the linear has an adapter, initialize the
        adapter.
        """
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
    """Quantize one weight after the initial update of its adapter has been subtracted.

    Args:
        weight: ``W (d_out, d_in)`` float32.
        linear: the linear that will hold the weight, which gives the ranks and the scaling. None
            for a linear without an adapter.
        method: a row of the table of methods with a quantized base.
        quantize: maps a float32 weight to a quantized one of the same shape.
        component: for a calibrated method, the component from
            :func:`~kasa_tune.components.corda.all_layers.decompose`.
        iterations: number of alternations of QPiSSA and LoftQ. None takes the method's default.
        split: see :func:`~kasa_tune.components.linalg.decomposition.split_component`.
        adapter_dtype: dtype of the adapter. What is subtracted is the product of A and B after
            rounding to this dtype.

    Returns:
        The quantized weight ``(d_out, d_in)`` and how its adapter starts.

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
    """Fit a low-rank component to the quantization error of a weight.

    Two steps alternate: ``Q = quantize(W - E)``, and E becomes the first ``rank`` singular triplets
    of ``W - Q``.

    LoftQ (arXiv 2310.08659, algorithm 1) starts without an E, and its base is the last Q. QPiSSA
    (arXiv 2404.02948, section 4) starts from the first triplets of W, and its base is
    ``quantize(W - E)`` of the last E.

    Args:
        weight: ``W (d_out, d_in)`` float32.
        start: the first E. None for zero.
        rank: rank of E, in the range that :func:`co_svd` takes.
        iterations: number of alternations. With 0, ``start`` and W itself are returned.
        quantize: maps a float32 weight to a quantized one of the same shape.

    Returns:
        The last E, of shape ``(d_out, d_in)`` and rank ``rank``, and the last Q ``(d_out, d_in)``.

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
