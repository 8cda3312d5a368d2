"""NF4 against torchao's own function and an independent blockwise one; quantized tensors through checkpoints, bit for
bit.
"""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from kasa_tune.components.checkpoints import check_saveable, load_part, save_checkpoint
from kasa_tune.components.linalg.nf4 import (
    check_quantizable,
    dequantize,
    dequantize_workspace,
    divides,
    fitting_scaler_block_size,
    from_parts,
    is_quantized,
    quantize,
    quantize_workspace,
    quantized_bytes,
    to_nf4,
    to_parts,
)
from tests.tolerances import assert_rounding_only, assert_same_bits

# QLoRA, arXiv 2305.14314, appendix E.
PUBLISHED = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
# torchao rounds the published values to four digits.
DIGITS = 5e-5

SHAPES = {
    "default": ((128, 128), 64, 256),
    "small": ((24, 16), 16, 256),
    "odd": ((6, 10), 4, 7),
    "wide": ((2, 96), 64, 2),
}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts_of(tensor):
    return to_parts(tensor)[1]


def codes_of(tensor):
    """The 4-bit codes ``(numel,)``, two to a byte, the first in the upper half."""
    packed = parts_of(tensor)["quantized_data"].numpy()
    return np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)


# --------------------------------------------------------------------------------- quantizing


@pytest.mark.parametrize("shape", [(128, 128), (256, 64), (64, 512)], ids=str)
def test_default_sizes_are_those_of_torchao(shape):
    weight = normal(*shape)
    assert_same_bits(quantize(weight), to_nf4(weight, 64, 256))
    assert torch.equal(dequantize(quantize(weight)), to_nf4(weight, 64, 256).get_original_weight())


@pytest.mark.parametrize(("shape", "block_size", "scaler_block_size"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_that_of_the_values_alone(dtype, shape, block_size, scaler_block_size):
    weight = normal(*shape)
    sizes = {"block_size": block_size, "scaler_block_size": scaler_block_size}
    full, cast = quantize(weight, **sizes), quantize(weight, **sizes, dtype=dtype)
    assert cast.dtype == dtype
    assert cast.shape == weight.shape
    for name, part in parts_of(cast).items():
        expected = parts_of(full)[name]
        assert torch.equal(part, expected.to(dtype) if name == "nf4" else expected), name
    # Dequantized in that dtype: the value and the scale are rounded to it, and their product.
    assert_rounding_only(
        dequantize(cast, dtype), dequantize(full).double(), dequantize(full).double().abs(), dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_dtype_is_by_default_that_of_the_weight(dtype):
    assert quantize(normal(64, 64, dtype=dtype)).dtype == dtype
    assert dequantize(quantize(normal(64, 64, dtype=dtype))).dtype == torch.float32
    assert dequantize(quantize(normal(64, 64, dtype=dtype)), dtype).dtype == dtype


def published_nf4(weight, block_size):
    """Nearest of the published values to every weight over the largest magnitude of its block: codes and scales."""
    blocks = weight.double().numpy().reshape(-1, block_size)
    scales = np.abs(blocks).max(axis=1)
    distances = np.abs((blocks / scales[:, None])[..., None] - PUBLISHED)
    nearest = np.sort(distances, axis=-1)
    return (
        distances.argmin(axis=-1).reshape(-1),
        scales,
        (nearest[..., 1] - nearest[..., 0]).reshape(-1),
    )


@pytest.mark.parametrize(("shape", "block_size", "scaler_block_size"), SHAPES.values(), ids=SHAPES)
def test_codes_are_those_of_the_paper_and_scales_are_8_bit_ones_of_them(
    shape, block_size, scaler_block_size
):
    weight = normal(*shape)
    quantized = quantize(weight, block_size=block_size, scaler_block_size=scaler_block_size)
    codes, scales, margin = published_nf4(weight, block_size)
    clear = margin > 4 * DIGITS
    assert clear.mean() > 0.98
    assert (codes_of(quantized) == codes)[clear].all()
    # Scales less their mean are held as 8-bit fractions of the largest in a group, +1 of which is cut to 127 / 128.
    group = fitting_scaler_block_size(weight.numel(), block_size, scaler_block_size)
    assert group <= scaler_block_size
    largest = np.abs(scales - scales.mean()).reshape(-1, group).max(axis=1).repeat(group)
    error = (largest / 128).repeat(block_size) + 1e-6
    expected = PUBLISHED[codes_of(quantized)] * scales.repeat(block_size)
    bound = error + DIGITS * scales.repeat(block_size)
    assert (np.abs(dequantize(quantized).double().numpy().reshape(-1) - expected) <= bound).all()


def test_the_error_is_that_of_the_paper():
    weight = normal(256, 256)
    codes, scales, _ = published_nf4(weight, 64)
    ideal = (PUBLISHED[codes] * scales.repeat(64)).reshape(256, 256) - weight.double().numpy()
    error = (dequantize(quantize(weight)) - weight).double().numpy()
    assert np.linalg.norm(error) == pytest.approx(np.linalg.norm(ideal), rel=0.01)
    assert 0.05 < np.linalg.norm(error) / np.linalg.norm(weight.numpy()) < 0.12


def test_smaller_blocks_are_more_accurate():
    weight = normal(64, 64)
    errors = [
        (dequantize(quantize(weight, block_size=size)) - weight).norm().item()
        for size in (8, 64, 512)
    ]
    assert errors == sorted(errors)


def test_a_transposed_weight_is_what_it_looks_like():
    weight = normal(16, 24).T
    quantized = quantize(weight, block_size=16)
    assert_same_bits(
        quantized, quantize(weight.clone(memory_format=torch.contiguous_format), block_size=16)
    )
    assert quantized.stride() == (16, 1)
    assert (dequantize(quantized) - weight).abs().max() < 0.5 * weight.abs().max()


def test_a_part_of_a_larger_tensor_starts_at_its_own_beginning():
    whole = normal(48, 16)
    quantized, alone = (
        quantize(whole[16:32], block_size=16),
        quantize(whole[16:32].clone(), block_size=16),
    )
    assert_same_bits(quantized, alone)
    assert quantized.__tensor_flatten__()[1] == alone.__tensor_flatten__()[1]


def test_a_quantized_weight_is_frozen_and_the_given_one_untouched():
    weight = nn.Parameter(normal(16, 16))
    before = weight.detach().clone()
    assert not quantize(weight, block_size=16).requires_grad
    assert weight.requires_grad
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_constant_weight_comes_back_exactly(value):
    """All scales are their mean, so what they deviate by is 0, which 8-bit fractions of it would divide by."""
    weight = torch.full((16, 16), value)
    assert torch.equal(dequantize(quantize(weight, block_size=16)), weight)


def test_quantizing_twice_is_refused():
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantize(normal(16, 16), block_size=16), block_size=16)


def test_which_weights_are_quantized():
    assert is_quantized(quantize(normal(16, 16), block_size=16))
    assert is_quantized(nn.Parameter(quantize(normal(16, 16), block_size=16), requires_grad=False))
    assert not is_quantized(nn.Parameter(normal(16, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantizing_a_plain_weight_casts_it(dtype):
    weight = normal(3, 5)
    assert torch.equal(dequantize(weight, dtype), weight.to(dtype))


# --------------------------------------------------------------------------------- shapes


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 600), st.integers(1, 300), st.integers(2, 64))
def test_the_group_of_scales_is_the_largest_that_divides_them(
    blocks, scaler_block_size, block_size
):
    found = fitting_scaler_block_size(blocks * block_size, block_size, scaler_block_size)
    assert blocks % found == 0
    assert found <= scaler_block_size
    assert not any(
        blocks % larger == 0 for larger in range(found + 1, min(scaler_block_size, blocks) + 1)
    )


@settings(max_examples=60, deadline=None)
@example(8, 4, 6, 1)  # 32 would fit too
@given(
    st.integers(1, 24), st.integers(1, 24), st.sampled_from([2, 4, 6, 16, 64]), st.integers(1, 40)
)
def test_a_shape_is_quantized_or_refused_with_a_size_that_works(
    d_out, d_in, block_size, scaler_block_size
):
    weight = normal(d_out, d_in)
    try:
        check_quantizable(weight.shape, block_size)
    except ValueError as error:
        assert d_out * d_in % block_size
        remedy = str(error).partition("set quantization.block_size=")[2].rstrip(".")
        assert remedy or d_out * d_in % 2
        if not remedy:
            return
        assert int(remedy) < block_size
        block_size = int(remedy)
    quantized = quantize(weight, block_size=block_size, scaler_block_size=scaler_block_size)
    assert codes_of(quantized).size == weight.numel()
    assert (dequantize(quantized) - weight).abs().max() <= 0.2 * weight.abs().max()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((40, 30), r"^layers\.0\.mlp\.w1 \(40 x 30\) has 1,200 elements, which do not fill blocks of 64: set "
                   r"quantization\.block_size=16\.$"),
        ((10, 3), r"\(10 x 3\) has 30 elements, .*block_size=2\.$"),
        ((5, 7), r"\(5 x 7\) has 35 elements, .* NF4 cannot hold it\.$"),
        ((0, 64), r"\(0 x 64\) has 0 elements, .* NF4 cannot hold it\.$"),
        ((64,), r"\(64\) has 64 elements, .* NF4 cannot hold it\.$"),
        ((2, 4, 8), r"\(2 x 4 x 8\) has 64 elements, .* NF4 cannot hold it\.$"),
    ],
    ids=str,
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_by_name(shape, words):
    with pytest.raises(ValueError, match=words):
        check_quantizable(shape, 64, "layers.0.mlp.w1")
    with pytest.raises(ValueError, match=r"^The weight \("):
        quantize(torch.zeros(shape))


# --------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "block_size", "scaler_block_size"), SHAPES.values(), ids=SHAPES)
def test_bytes_are_those_of_the_parts(shape, block_size, scaler_block_size, dtype):
    sizes = {"block_size": block_size, "scaler_block_size": scaler_block_size}
    parts = parts_of(quantize(normal(*shape), **sizes, dtype=dtype))
    actual = sum(part.nbytes for part in parts.values())
    assert quantized_bytes(normal(*shape).numel(), **sizes, itemsize=dtype.itemsize) == actual


def test_bytes_of_a_large_weight_are_a_little_over_half_a_byte_each():
    # 4 bits, 8 bits a block of 64 and 32 bits a group of 256 of these.
    assert quantized_bytes(4096 * 4096) == 4096 * 4096 * (4 + 8 / 64 + 32 / 64 / 256) / 8 + 4 + 64


def peak_bytes(work):
    """The most that ``work`` held at once beyond what was there, from the allocator's own events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return held.max(initial=0)


@pytest.mark.parametrize("shape", [(512, 512), (1536, 1024)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspaces_are_upper_bounds(dtype, shape):
    assert peak_bytes(lambda: torch.zeros(1000)) == 4000
    weight, numel = normal(*shape), shape[0] * shape[1]
    quantized = quantize(weight, dtype=dtype)
    dequantizing = peak_bytes(lambda: dequantize(quantized, dtype))
    assert 0.95 * dequantize_workspace(numel, dtype.itemsize) <= dequantizing
    assert dequantizing <= dequantize_workspace(numel, dtype.itemsize)
    x = normal(3, shape[1], dtype=dtype)
    assert (
        peak_bytes(lambda: F.linear(x, quantized))
        <= dequantize_workspace(numel, dtype.itemsize) + x.nbytes * 4
    )
    besides = 2 * weight.nbytes  # the weight as it is and its residual are there before
    quantizing = peak_bytes(lambda: quantize(weight, dtype=dtype)) + besides
    assert quantizing <= quantize_workspace(numel)
    if numel > 2**20:  # one full chunk
        assert quantizing >= 0.9 * quantize_workspace(numel)


# --------------------------------------------------------------------------------- taken apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "block_size", "scaler_block_size"), SHAPES.values(), ids=SHAPES)
def test_parts_are_plain_and_make_the_same_weight(
    shape, block_size, scaler_block_size, dtype, tmp_path
):
    sizes = {"block_size": block_size, "scaler_block_size": scaler_block_size}
    weight = nn.Parameter(quantize(normal(*shape), **sizes, dtype=dtype), requires_grad=False)
    kind, parts, numbers = to_parts(weight)
    assert all(type(part) is torch.Tensor for part in parts.values())
    stored = load_part(
        save_checkpoint(tmp_path, 1, {"part": {"weight": weight, "plain": parts["nf4"]}}), "part"
    )
    for again in (from_parts(kind, parts, numbers), stored["weight"]):
        assert is_quantized(again)
        assert (
            again.__tensor_flatten__()[1] == weight.__tensor_flatten__()[1]
        )  # shape, strides, dtype, sizes of blocks
        assert_same_bits(again, weight)
        assert torch.equal(dequantize(again), dequantize(weight))
        x = normal(3, shape[1], dtype=dtype)
        assert torch.equal(F.linear(x, again), F.linear(x, weight))
    assert type(stored["plain"]) is torch.Tensor


def test_plain_tensors_are_not_taken_apart():
    assert to_parts(torch.ones(2)) is None
    assert to_parts(nn.Parameter(torch.ones(2))) is None


def test_unknown_kinds_are_refused():
    class OptimState8bit(torch.Tensor):  # another class of a known name
        pass

    with pytest.raises(TypeError, match="OptimState8bit is not known"):
        to_parts(torch.ones(2).as_subclass(OptimState8bit))
    with pytest.raises(ValueError, match="Unknown kind of quantized tensor: 'Int4Tensor'"):
        from_parts("Int4Tensor", {}, [])


STATES = {
    "8 bit": lambda: OptimState8bit.zeros((32, 128), signed=True),
    "8 bit, unsigned": lambda: OptimState8bit.zeros((32, 128), signed=False),
    "4 bit": lambda: OptimState4bit.zeros((32, 128), signed=True, block_size=128),
    "4 bit, unsigned": lambda: OptimState4bit.zeros((16, 256), signed=False, block_size=128),
    "float8": lambda: OptimStateFp8.zeros((32, 128)),
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_optimizer_states_come_back_bit_for_bit(make, tmp_path):
    state = make()
    state.copy_(normal(*state.shape).abs())
    assert state.dequantize().any()
    check_saveable({0: state})
    again = load_part(save_checkpoint(tmp_path, 1, {"optimizer": {0: [state]}}), "optimizer")[0][0]
    assert type(again) is type(state)
    assert again.shape == state.shape
    assert_same_bits(again, state)
    assert torch.equal(again.dequantize(), state.dequantize())
    state.copy_(torch.zeros(state.shape))
    assert again.dequantize().any()  # a copy


@pytest.mark.parametrize("stored", [[], ["torch.float32"], ["torch.bfloat16"]], ids=str)
@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_optimizer_states_of_either_torchao_are_read(make, stored):
    """Since torchao 0.16 they have a dtype; an optimizer that loads them casts them to that of its parameters."""
    state = make()
    state.copy_(normal(*state.shape).abs())
    kind, parts, numbers = to_parts(state)
    numbers = [number for number in numbers if not isinstance(number, str)]
    again = from_parts(kind, parts, numbers + stored)
    assert torch.equal(again.dequantize(), state.dequantize())
    takes_dtype = "dtype" in inspect.signature(type(state).zeros).parameters
    bf16 = takes_dtype and stored == ["torch.bfloat16"]
    assert again.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert again.shape == state.shape


def test_a_dtype_is_nothing_else_of_torch():
    kind, parts, (*sizes, _) = to_parts(quantize(normal(128, 128)))
    with pytest.raises(ValueError, match=r"Unknown dtype of a quantized tensor: 'torch\.load'"):
        from_parts(kind, parts, [*sizes, "torch.load"])


def goes_on_bit_for_bit(optimizer_class, folder, dtype=torch.float32):
    """A run of four steps, and one stopped after two of them and continued from a checkpoint, end in the same bits."""

    def parameters():
        return [
            nn.Parameter(normal(32, 128, dtype=dtype)),
            nn.Parameter(normal(5, seed=1, dtype=dtype)),
        ]  # the second is too small to quantize

    def train(trained, optimizer, steps):
        for step in steps:
            for parameter in trained:
                parameter.grad = torch.sin(parameter.detach() * (step + 1))
            optimizer.step()

    whole = parameters()
    train(whole, optimizer_class(whole, lr=0.1), range(4))
    first = parameters()
    optimizer = optimizer_class(first, lr=0.1)
    train(first, optimizer, range(2))
    path = save_checkpoint(
        folder, 2, {"weights": [p.detach() for p in first], "optimizer": optimizer.state_dict()}
    )
    second = [nn.Parameter(weight) for weight in load_part(path, "weights")]
    optimizer = optimizer_class(second, lr=0.1)
    optimizer.load_state_dict(load_part(path, "optimizer"))
    assert type(optimizer.state[second[0]]["exp_avg"]).__name__.startswith("OptimState")
    train(second, optimizer, range(2, 4))
    assert not any(torch.equal(one, other) for one, other in zip(whole, first, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer_class", [AdamW8bit, AdamW4bit, AdamWFp8])
def test_low_bit_optimizers_go_on_bit_for_bit(optimizer_class, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: function
    )  # minutes of compiling for one step; tests/recipes/test_resume.py has a run with compiled ones
    goes_on_bit_for_bit(optimizer_class, tmp_path, dtype)


# --------------------------------------------------------------------------------- used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(3,), (2, 5)], ids=str)
def test_a_linear_is_that_of_the_dequantized_weight(batch, dtype):
    quantized = quantize(normal(24, 16), block_size=16, dtype=dtype)
    plain, bias = dequantize(quantized, dtype), normal(24, seed=1, dtype=dtype)
    x, upstream = normal(*batch, 16, seed=2, dtype=dtype), normal(*batch, 24, seed=3, dtype=dtype)
    for added in (None, bias):
        found = x.clone().requires_grad_()
        output = F.linear(found, quantized, added)
        output.backward(upstream)
        expected = x.double() @ plain.double().T + (0 if added is None else added.double())
        magnitude = x.double().abs() @ plain.double().abs().T + (
            0 if added is None else added.double().abs()
        )
        assert output.dtype == dtype
        assert_rounding_only(output, expected, magnitude, dtype)
        gradient, scale = (
            upstream.double() @ plain.double(),
            upstream.double().abs() @ plain.double().abs(),
        )
        assert_rounding_only(found.grad, gradient, scale, dtype)


def test_a_frozen_nf4_weight_is_kept_for_the_backward_and_not_its_dequantized_copy():
    quantized = nn.Parameter(quantize(normal(64, 64)), requires_grad=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        F.linear(normal(2, 64).requires_grad_(), quantized)
    assert [is_quantized(tensor) for tensor in kept] == [True]


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("block_size", [2, 8, 16])
@pytest.mark.parametrize("scaler_block_size", [1, 4, 16])
@pytest.mark.parametrize("shape", [(8, 16), (6, 16), (5, 32), (24, 24), (16, 4)])
def test_it_divides_where_every_part_does(shape, block_size, scaler_block_size, pieces):
    """By counting: two codes to a byte, a scale to a block, a scale of scales to a group of these."""
    numel = shape[0] * shape[1]
    blocks = numel // block_size
    groups = blocks // max(n for n in range(1, scaler_block_size + 1) if blocks % n == 0)
    expected = all(number % pieces == 0 for number in (shape[0], numel // 2, blocks, groups))
    assert (
        divides(
            quantize(normal(*shape), block_size=block_size, scaler_block_size=scaler_block_size),
            pieces,
        )
        is expected
    )


def test_a_weight_of_a_real_size_divides_into_the_processes_of_a_machine():
    weight = quantize(normal(1024, 1024))
    assert [pieces for pieces in range(1, 17) if divides(weight, pieces)] == [1, 2, 4, 8, 16]
