"""How far from an exact value the tests let a computed one be, in one place, with the reasons.

A sum of n products computed in a dtype with machine epsilon ``eps`` is off by about ``eps`` times the sum of the
products' magnitudes: the worst case is n times that, kernels that add in blocks and errors that cancel keep it near 1.
So a comparison is made against ``ROUNDINGS * eps(dtype) * magnitude``: the magnitude is the formula on absolute values.
"""

import torch
from torch import Tensor

from kasa_tune.components.linalg.nf4 import to_parts

# A forward rounds the input of each of its three products, the product and the sum: under eight roundings that add up.
ROUNDINGS = 8

# An edit's factors are float32 whatever the weight's dtype, so a float64 layer with an edit is only that accurate.
EDIT_DTYPE = torch.float32

# Central differences with torch's default step of 1e-6 in float64 lose half of the 16 digits.
GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-4}

# Two float32 models of a few layers that add the same numbers in another order: sums of up to some hundred terms,
# several layers, normalizations that divide by small numbers. Measured differences are below a tenth of it.
MODEL_FP32 = {"rtol": 1e-4, "atol": 1e-5}

# A scalar that float32 accumulates over up to some thousand terms, against float64.
SCALAR_FP32 = {"rtol": 1e-5, "atol": 1e-6}

# The same formula in float64 written differently.
FP64 = {"rtol": 1e-10, "atol": 1e-12}


def assert_rounding_only(
    actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype
) -> None:
    """``actual`` differs from the float64 value ``expected`` by rounding in ``dtype`` alone.

    Args:
        actual: any dtype.
        expected: float64, same shape.
        magnitude: float64, the formula of ``expected`` on absolute values.
        dtype: that ``actual`` was computed in.
    """
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    bound = ROUNDINGS * torch.finfo(dtype).eps * magnitude + 1e-30
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1.0, f"{worst:.3g} times the rounding error of {dtype}"


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    """Two quantized tensors are equal in kind, in numbers and in every bit of every part; plain ones in every bit."""
    (kind, parts, numbers), (other_kind, other_parts, other_numbers) = (
        to_parts(tensor) or ("plain", {"itself": tensor.detach()}, []) for tensor in (left, right)
    )
    assert (kind, numbers, parts.keys()) == (other_kind, other_numbers, other_parts.keys())
    for name, part in parts.items():
        assert (part.dtype, part.shape) == (other_parts[name].dtype, other_parts[name].shape), name
        bits, other_bits = (
            torch.clone(t, memory_format=torch.contiguous_format).view(-1)
            for t in (part, other_parts[name])
        )
        assert torch.equal(bits.view(torch.uint8), other_bits.view(torch.uint8)), name
