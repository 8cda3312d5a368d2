"""The outputs of adapter linears that read the same input, with the least work around the products
with their weights.

One thin product computes ``A x`` and ``E_in x`` of all of them, and each output is finished in
place. The backward pass adds all gradients of the input in one tensor, in place too. Autograd would
make a tensor as large as the input for each of them, and a sum of any two.

Shapes: n tokens, r rank of an update, k rank of an edit, m linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kasa_tune.components.linalg.nf4 import dequantize


class Parts(NamedTuple):
    """The tensors of an adapter linear: ``y = W x + bias - E_out (E_in x) + s · B (d ⊙ (A x))``.

    Args:
        weight: ``(d_out, d_in)``, frozen, quantized or not.
        bias: ``(d_out,)``, frozen.
        a: ``(r, d_in)``, trained.
        b: ``(d_out, r)``, trained.
        diag: ``d (r,)``, trained. None for ones.
        edit_out: ``(d_out, k)``. None where there is no edit to subtract.
        edit_in: ``(k, d_in)``.
        scaling: ``s``.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    diag: Tensor | None
    edit_out: Tensor | None
    edit_in: Tensor | None
    scaling: float

    @property
    def scale(self) -> Tensor | float:
        """``s · d``."""
        return self.scaling if self.diag is None else self.scaling * self.diag

    @property
    def down(self) -> list[Tensor]:
        """What the input is multiplied by, ``(r, d_in)`` and ``(k, d_in)``."""
        return [self.a] if self.edit_in is None else [self.a, self.edit_in]

    @property
    def width(self) -> int:
        """``r + k``."""
        return sum(map(len, self.down))

    def up(self, dtype: torch.dtype) -> Tensor:
        """Make ``[s · B diag(d) | -E_out] (d_out, r + k)``, rounded once."""
        rank = len(self.a)
        up = self.b.new_empty(len(self.b), self.width, dtype=dtype)
        wide = self.b.to(torch.promote_types(self.b.dtype, dtype))
        torch.mul(wide, self.scale, out=up[:, :rank])
        if self.edit_out is not None:
            torch.mul(self.edit_out, -1.0, out=up[:, rank:])
        return up


def products(x: Tensor, linears: Sequence[Parts]) -> tuple[Tensor, ...]:
    """Map ``x [..., d_in]`` to the outputs ``y [..., d_out]`` of all linears."""
    return _Products.apply(x, *(tensor for parts in linears for tensor in parts))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        size = len(Parts._fields)
        linears = [Parts(*tensors[i : i + size]) for i in range(0, len(tensors), size)]
        widths = [parts.width for parts in linears]
        down = [factor for parts in linears for factor in parts.down]
        stacked = (torch.cat(down) if len(down) > 1 else down[0]).to(x.dtype)  # [Σ (r + k), d_in]
        rows = x.reshape(-1, x.shape[-1])  # [n, d_in]
        h = rows @ stacked.T  # [n, Σ (r + k)]
        ups = [parts.up(x.dtype) for parts in linears]
        outputs = []
        for parts, up, own_h in zip(linears, ups, h.split(widths, dim=1), strict=True):
            y = F.linear(rows, dequantize(parts.weight, x.dtype), parts.bias).addmm_(own_h, up.T)
            # No view, which autograd would not let be modified in place afterwards.
            outputs.append(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(up)]))
        used = (tensor for parts in linears for tensor in (parts.weight, parts.b, parts.diag))
        trains = any(len(parts.a) for parts in linears)  # or no gradient needs x
        ctx.save_for_backward(x if trains else None, h, stacked, *ups, *used)
        ctx.shape, ctx.widths = x.shape, widths
        ctx.scalings = [parts.scaling for parts in linears]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, h, stacked, *saved = ctx.saved_tensors
        ups, saved = saved[: len(by_outputs)], saved[len(by_outputs) :]
        by_h, by_x = torch.empty_like(h), None
        by_updates = []
        of_each = zip(
            by_outputs, ups, h.split(ctx.widths, 1), by_h.split(ctx.widths, 1), strict=True
        )
        for number, (by_y, up, own_h, by_own_h) in enumerate(of_each):
            weight, b, diag = saved[3 * number : 3 * number + 3]
            by_y = by_y.reshape(-1, len(b))  # [n, d_out]
            torch.mm(by_y, up, out=by_own_h)
            by_up = by_y.T @ own_h[:, : b.shape[1]]  # [d_out, r]
            by_updates.append(_by_update(by_up, b, diag, ctx.scalings[number]))
            if ctx.needs_input_grad[0]:
                weight = dequantize(weight, stacked.dtype)
                by_x = by_y @ weight if by_x is None else by_x.addmm_(by_y, weight)
        if by_x is not None:
            by_x = by_x.addmm_(by_h, stacked).view(ctx.shape)
        if x is None:
            return by_x, *[None] * (len(Parts._fields) * len(by_outputs))
        by_down = (by_h.T @ x.reshape(-1, x.shape[-1])).split(ctx.widths)
        gradients: list[Tensor | None] = []
        for own, (by_b, by_diag) in zip(by_down, by_updates, strict=True):
            rank = by_b.shape[1]
            by_a = own[:rank].to(by_b.dtype, copy=len(own) > rank)  # or the edit's rows stay, too
            gradients += [None, None, by_a, by_b, by_diag, None, None, None]  # of Parts
        return by_x, *gradients


def _by_update(
    by_up: Tensor, b: Tensor, diag: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """The gradients of B and d from that of ``s · B diag(d) (d_out, r)``."""
    if diag is None:
        return by_up.to(b.dtype).mul_(scaling), None
    by_b = (by_up * (scaling * diag)).to(b.dtype)
    return by_b, ((by_up * b).sum(0) * scaling).to(diag.dtype)
