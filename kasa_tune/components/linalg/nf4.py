"""Weights in 4-bit NormalFloat (NF4, arXiv 2305.14314) and optimizer states in 8 bits or less: all that is known of
torchao here.

An NF4 weight holds 4-bit codes, one int8 scale for every block of weights, and one float scale for every block of those
scales. Quantizing what was dequantized does not give the same codes again, so a quantized weight is kept and stored as
it is. To copy one, ``from_parts(*to_parts(weight))`` with cloned parts: torchao's ``clone``, and with it ``deepcopy``,
quantizes again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs, to_nf4

BLOCK_SIZE, SCALER_BLOCK_SIZE = 64, 256

# Names in files to torchao's classes of quantized optimizer states; imported when met.
_OPTIMIZER_STATES = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}


def is_quantized(tensor: Tensor) -> TypeGuard[NF4Tensor]:
    """Whether a weight is NF4."""
    return isinstance(tensor, NF4Tensor)


@torch.no_grad()
def quantize(
    weight: Tensor,
    *,
    block_size: int = BLOCK_SIZE,
    scaler_block_size: int = SCALER_BLOCK_SIZE,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A weight in NF4, on its device.

    Args:
        weight: ``(d_out, d_in)``; float32 gives the codes nearest to what was computed.
        block_size: weights that share a scale.
        scaler_block_size: scales that share a scale; a divisor of the number of scales is taken, the largest up to
            this.
        dtype: that the weight is dequantized to in a forward pass; default that of ``weight``.

    Raises:
        ValueError: the weight is quantized already, or its shape does not divide into blocks.
    """
    if is_quantized(weight):
        raise ValueError(
            "The weight is quantized already; doing it again would move it. Quantize the original weight."
        )
    check_quantizable(weight.shape, block_size)
    scalers = fitting_scaler_block_size(weight.numel(), block_size, scaler_block_size)
    quantized = to_nf4(weight.detach().contiguous(), block_size, scalers)
    dtype = dtype or weight.dtype
    parts, context = quantized.__tensor_flatten__()
    inner = {name: getattr(quantized, name) for name in parts}
    inner["nf4"] = inner["nf4"].to(dtype)  # the values of the 16 codes
    meta = dataclasses.replace(
        context["tensor_meta"], dtype=dtype, storage_offset=0, requires_grad=False
    )
    return _assembled(inner, context | {"tensor_meta": meta})


@torch.no_grad()
def dequantize(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The plain tensor ``(d_out, d_in)`` that a weight, quantized or not, stands for."""
    return weight.get_original_weight().to(dtype) if is_quantized(weight) else weight.to(dtype)


def check_quantizable(shape: Sequence[int], block_size: int, name: str = "The weight") -> None:
    """Raise ValueError for a shape that does not divide into blocks of ``block_size`` weights."""
    numel = torch.Size(shape).numel()
    if len(shape) != 2 or not numel or numel % block_size:
        fitting = [
            size
            for size in (32, 16, 8, 4, 2)
            if size < block_size and len(shape) == 2 and not numel % size
        ]
        remedy = (
            f"set quantization.block_size={fitting[0]}"
            if numel and fitting
            else "NF4 cannot hold it"
        )
        raise ValueError(
            f"{name} ({' x '.join(map(str, shape))}) has {numel:,} elements, which do not fill blocks of {block_size}: "
            f"{remedy}."
        )


def fitting_scaler_block_size(numel: int, block_size: int, scaler_block_size: int) -> int:
    """The largest divisor of the number of blocks that is at most ``scaler_block_size``."""
    blocks = numel // block_size
    return next(size for size in range(min(scaler_block_size, blocks), 0, -1) if blocks % size == 0)


def divides(weight: NF4Tensor, pieces: int) -> bool:
    """Whether a quantized weight can be cut along its rows: its codes, its scales and their scales into as many."""
    parts = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor)
    return len(weight) % pieces == 0 and all(part.numel() % pieces == 0 for part in parts)


def quantized_bytes(
    numel: int,
    block_size: int = BLOCK_SIZE,
    scaler_block_size: int = SCALER_BLOCK_SIZE,
    *,
    itemsize: int = 4,
) -> int:
    """Bytes of an NF4 weight that was quantized from float32: codes, scales, their scales and mean, 16 values.

    Args:
        numel: elements of the weight.
        block_size: weights that share a scale.
        scaler_block_size: scales that share a scale, before it is fitted.
        itemsize: of the dtype that it is dequantized to.
    """
    blocks = numel // block_size
    scaler_blocks = blocks // fitting_scaler_block_size(numel, block_size, scaler_block_size)
    return numel // 2 + blocks + 4 * (scaler_blocks + 1) + 16 * itemsize


def dequantize_workspace(numel: int, itemsize: int, block_size: int = BLOCK_SIZE) -> int:
    """Bytes that torchao takes at most while it dequantizes a weight of ``numel`` elements of ``itemsize`` bytes, the
    result included: 8-byte indices of all codes, their values, the scaled values, both halves joined, and the scales.
    """
    return numel * (8 + 3 * itemsize) + numel // block_size * itemsize


def quantize_workspace(numel: int, block_size: int = BLOCK_SIZE) -> int:
    """Bytes that quantizing a float32 weight takes at most: the weight as it is, its residual, the latter's scaled
    copy, a byte for every code, the distances of a chunk of 2^20 weights to all 16 values, and the scales.
    """
    return numel * (4 + 4 + 4 + 1) + 2 * 4 * 16 * 2**20 + 8 * (numel // block_size) + 2**10


def to_parts(tensor: Tensor) -> tuple[str, dict[str, Tensor], list[Any]] | None:
    """A quantized tensor as plain ones: the name of its kind, its parts, and numbers. None for a plain tensor.

    Raises:
        TypeError: it is of a kind that is not known.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return None
    kind = type(tensor).__name__
    inner: Any = tensor  # torchao's classes declare no types
    if is_quantized(tensor):
        names, context = inner.__tensor_flatten__()
        numbers = [
            context["block_size"],
            context["scaler_block_size"],
            list(tensor.shape),
            str(tensor.dtype),
        ]
    elif _OPTIMIZER_STATES.get(kind) == type(tensor).__module__:
        names, numbers = inner.__tensor_flatten__()
        numbers = [list(number) if isinstance(number, torch.Size) else number for number in numbers]
    else:
        raise TypeError(f"{type(tensor).__module__}.{type(tensor).__qualname__} is not known")
    return kind, {name: getattr(tensor, name) for name in names}, numbers


def from_parts(kind: str, parts: Mapping[str, Tensor], numbers: Sequence[Any]) -> Tensor:
    """The quantized tensor that :func:`to_parts` took apart, bit for bit.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == NF4Tensor.__name__:
        block_size, scaler_block_size, shape, dtype = numbers
        size, like = torch.Size(shape), parts["quantized_data"]
        meta = SubclassTensorArgs(
            size, (size[1], 1), 0, getattr(torch, dtype.partition(".")[2]), like.device, False
        )
        context = {
            "block_size": block_size,
            "scaler_block_size": scaler_block_size,
            "tensor_meta": meta,
        }
        return _assembled(parts, context | {"n_blocks": size.numel() // block_size})
    if kind not in _OPTIMIZER_STATES:
        raise ValueError(f"Unknown kind of quantized tensor: {kind!r}.")
    made = getattr(import_module(_OPTIMIZER_STATES[kind]), kind)
    shapes = [torch.Size(number) if isinstance(number, list) else number for number in numbers]
    return made.__tensor_unflatten__(dict(parts), shapes)


def _assembled(parts: Mapping[str, Tensor], context: Mapping[str, Any]) -> Tensor:
    meta = context["tensor_meta"]
    return NF4Tensor.__tensor_unflatten__(
        dict(parts), context, meta.original_shape, meta.original_strides
    )
