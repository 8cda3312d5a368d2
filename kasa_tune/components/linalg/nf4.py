"""Weights in 4-bit NormalFloat (NF4, arXiv 2305.14314), and optimizer states in 8 bits or less. No
other file reads torchao's internals; :mod:`kasa_tune.torchao_bridge` shows torchtune where they are.

What is stored names no module of torchao: a checkpoint that was written beside one version of it is
read beside another.

An NF4 weight holds 4-bit codes, one int8 scale for every block of weights, and one float scale for
every block of those scales. Dequantizing a weight and quantizing it again can give other codes. A
quantized weight is therefore stored as it is.

torchao's ``clone`` and ``deepcopy`` quantize again. To copy a quantized weight, clone the parts
that :func:`to_parts` returns and give the clones to :func:`from_parts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import signature
from typing import Any, TypeGuard

import torch
from torch import Tensor

try:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import (
        NF4Tensor,
        SubclassTensorArgs,
        to_nf4,
    )
except ModuleNotFoundError:  # torchao before 0.18
    from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs, to_nf4

BLOCK_SIZE, SCALER_BLOCK_SIZE = 64, 256

# Modules of torchao's quantized optimizer states, by the class name that checkpoints store. A
# module is imported only when a checkpoint holds its class.
_OPTIMIZER_STATES = {
    "OptimState8bit": "torchao.optim.subclass_8bit",
    "OptimState4bit": "torchao.optim.subclass_4bit",
    "OptimStateFp8": "torchao.optim.subclass_fp8",
}


def is_quantized(tensor: Tensor) -> TypeGuard[NF4Tensor]:
    """Tell whether a weight, of any shape, is stored in NF4."""
    return isinstance(tensor, NF4Tensor)


@torch.no_grad()
def quantize(
    weight: Tensor,
    *,
    block_size: int = BLOCK_SIZE,
    scaler_block_size: int = SCALER_BLOCK_SIZE,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantize a weight to NF4 on its device.

    Args:
        weight: ``(d_out, d_in)``. Give it in float32, because the codes are then the nearest ones
            to what was computed.
        block_size: number of weights that share a scale.
        scaler_block_size: number of scales that share a scale. If it does not divide the number of
            scales, the largest smaller divisor is used.
        dtype: dtype that a forward pass dequantizes the weight to. The default is that of
            ``weight``.

    Returns:
        The quantized weight, a tensor ``(d_out, d_in)`` of torchao's class ``NF4Tensor``.

    Raises:
        ValueError: the weight is quantized already, or its shape does not divide into blocks.
    """
    if is_quantized(weight):
        raise ValueError(
            "The weight is quantized already. Quantizing it again would change its values: "
            "quantize the original weight."
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
    """Return the values of a weight, quantized or not, as a plain tensor ``(d_out, d_in)``."""
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
            f"{name} ({' x '.join(map(str, shape))}) has {numel:,} elements, which do not fill "
            f"blocks of {block_size}: {remedy}."
        )


def fitting_scaler_block_size(numel: int, block_size: int, scaler_block_size: int) -> int:
    """The largest divisor of the number of blocks that is at most ``scaler_block_size``."""
    blocks = numel // block_size
    return next(size for size in range(min(scaler_block_size, blocks), 0, -1) if blocks % size == 0)


def divides(weight: NF4Tensor, pieces: int) -> bool:
    """Tell whether a quantized weight ``(d_out, d_in)`` can be cut along its rows into ``pieces``.
    The codes, the scales and the scales of the scales must each divide as well.
    """
    parts = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor)
    return len(weight) % pieces == 0 and all(part.numel() % pieces == 0 for part in parts)


def quantized_bytes(
    numel: int,
    block_size: int = BLOCK_SIZE,
    scaler_block_size: int = SCALER_BLOCK_SIZE,
    *,
    itemsize: int = 4,
) -> int:
    """Compute how many bytes an NF4 weight takes that was quantized from float32.

    They are the codes, the scales, the scales of the scales, their mean, and the 16 values of the
    codes.

    Args:
        numel: number of elements of the weight.
        block_size: number of weights that share a scale.
        scaler_block_size: number of scales that share a scale, as requested. It is reduced as in
            :func:`quantize`.
        itemsize: bytes of one element of the dtype that the weight is dequantized to.
    """
    blocks = numel // block_size
    scaler_blocks = blocks // fitting_scaler_block_size(numel, block_size, scaler_block_size)
    return numel // 2 + blocks + 4 * (scaler_blocks + 1) + 16 * itemsize


def dequantize_workspace(numel: int, itemsize: int, block_size: int = BLOCK_SIZE) -> int:
    """Compute the largest number of bytes that torchao uses while it dequantizes a weight, the
    result included.

    They are the 8-byte indices of all codes, their values, the scaled values, both halves joined,
    and the scales.

    Args:
        numel: number of elements of the weight.
        itemsize: bytes of one element of the result.
        block_size: number of weights that share a scale.
    """
    return numel * (8 + 3 * itemsize) + numel // block_size * itemsize


def quantize_workspace(numel: int, block_size: int = BLOCK_SIZE) -> int:
    """Compute the largest number of bytes that quantizing a float32 weight of ``numel`` elements
    takes.

    They are the weight itself, its residual, a scaled copy of the residual, and a byte for every
    code. The scales and the distances of 2^20 weights to all 16 values come on top.
    """
    return numel * (4 + 4 + 4 + 1) + 2 * 4 * 16 * 2**20 + 8 * (numel // block_size) + 2**10


def to_parts(tensor: Tensor) -> tuple[str, dict[str, Tensor], list[Any]] | None:
    """Take a quantized tensor apart into plain tensors. The opposite is :func:`from_parts`.

    Args:
        tensor: a tensor of any shape.

    Returns:
        The name of its class, its parts by name, and the sizes and dtypes that are needed to
        rebuild it. None for a plain tensor.

    Raises:
        TypeError: the tensor is of an unknown class.
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
        numbers = [_plain(number) for number in numbers]
    else:
        raise TypeError(f"{type(tensor).__module__}.{type(tensor).__qualname__} is not known")
    return kind, {name: getattr(tensor, name) for name in names}, numbers


def from_parts(kind: str, parts: Mapping[str, Tensor], numbers: Sequence[Any]) -> Tensor:
    """Rebuild the quantized tensor that :func:`to_parts` took apart, bit for bit and in its
    original shape.

    Args:
        kind: the name of its class.
        parts: its parts by name, of the shapes ``(n,)`` that torchao stores.
        numbers: the sizes and dtypes that belong to it.

    Raises:
        ValueError: the class is unknown.
    """
    if kind == NF4Tensor.__name__:
        block_size, scaler_block_size, shape, dtype = numbers
        size, like = torch.Size(shape), parts["quantized_data"]
        meta = SubclassTensorArgs(size, (size[1], 1), 0, _dtype(dtype), like.device, False)
        context = {
            "block_size": block_size,
            "scaler_block_size": scaler_block_size,
            "tensor_meta": meta,
        }
        return _assembled(parts, context | {"n_blocks": size.numel() // block_size})
    if kind not in _OPTIMIZER_STATES:
        raise ValueError(f"Unknown kind of quantized tensor: {kind!r}.")
    made = getattr(import_module(_OPTIMIZER_STATES[kind]), kind)
    given = [torch.Size(n) if isinstance(n, list) else n for n in numbers if not isinstance(n, str)]
    if "dtype" in signature(made.__init__).parameters:
        given += [_dtype(number) for number in numbers if isinstance(number, str)]
    return made.__tensor_unflatten__(dict(parts), given)


def _plain(number: Any) -> Any:
    """A number that belongs to a tensor, a size or a dtype, as JSON can hold it."""
    if isinstance(number, torch.Size):
        return list(number)
    return str(number) if isinstance(number, torch.dtype) else number


def _dtype(text: str) -> torch.dtype:
    """The dtype of a text such as ``torch.float32``."""
    dtype = getattr(torch, text.partition(".")[2], None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"Unknown dtype of a quantized tensor: {text!r}.")
    return dtype


def _assembled(parts: Mapping[str, Tensor], context: Mapping[str, Any]) -> Tensor:
    meta = context["tensor_meta"]
    return NF4Tensor.__tensor_unflatten__(
        dict(parts), context, meta.original_shape, meta.original_strides
    )
