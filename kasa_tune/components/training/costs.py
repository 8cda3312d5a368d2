"""What a step will cost in arithmetic, counted on the meta device, and how long a GPU may take for it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchtune.modules import TransformerDecoder

from kasa_tune.components.models.rotary import build_rotary_caches
from kasa_tune.gpus import PEAK_FLOPS, SHARE_REACHED


def _addmm_flops(
    _sum: tuple[int, int], left: tuple[int, int], right: tuple[int, int], **_: object
) -> int:
    return 2 * left[0] * left[1] * right[1]


# The product of an adapter is added in place, which torch's counter does not know.
_IN_PLACE = {torch.ops.aten.addmm_: _addmm_flops}


def step_flops(model: TransformerDecoder, *, batch_size: int, seq_len: int) -> int:
    """Count the floating-point operations of all matrix products and of attention in the forward
    and backward of one micro-batch, a multiplication and an addition as two.

    What activation checkpointing computes again is included. Attention is counted over all pairs of
    tokens, as is usual, although a causal kernel skips half of them. Element-wise operations, the
    optimizer and the dequantization of NF4 weights are left out.

    Args:
        model: on the meta device, with its adapters there, and with checkpointing applied if it
            will be.
        batch_size: number of sequences in the micro-batch.
        seq_len: number of tokens in each of them.
    """
    build_rotary_caches(model)
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        output = model(tokens)  # [b, s, d], or logits [b, s, v]
        if model.__dict__.get("unembed") is not None:  # the loss applies the output projection
            output = model.output(output)
        output.sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def time_line(flops: int, *, num_tokens: int, gpu: str) -> str:
    """A line to print: how long an optimizer step may take.

    Args:
        flops: of an optimizer step on one device.
        num_tokens: of that step, padding included.
        gpu: a name of :data:`~kasa_tune.gpus.PEAK_FLOPS`.
    """
    seconds = flops / (SHARE_REACHED * PEAK_FLOPS[gpu])
    return (
        f"A step: {_short(flops / 1e12)} TFLOP for {num_tokens:,} tokens; on {gpu} about {_short(seconds)} s, "
        f"{_short(num_tokens / seconds)} tokens/s, if {SHARE_REACHED:.0%} of its peak is reached "
        "(an assumption; communication and waiting for data are left out)"
    )


def _short(number: float) -> str:
    """Three digits that count, and no exponent."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"
