"""Learning-rate schedules whose warm-up is given in steps or as a share of the run."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune import utils

log = utils.get_logger("INFO")  # prints on rank 0


def cosine_schedule(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then half a cosine down to ``min_lr_ratio`` of it.

    Args:
        optimizer: its groups' ``lr`` is the peak.
        num_training_steps: optimizer steps of the whole run.
        num_warmup_steps: steps of the warm-up; or
        warmup_ratio: the warm-up as a share of ``num_training_steps``, rounded up. Neither means none.
        min_lr_ratio: final rate as a share of the peak.

    Raises:
        ValueError: both forms of warm-up are given, or one is out of range.
    """
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ValueError(f"min_lr_ratio must lie in [0, 1]; got {min_lr_ratio}.")
    warmup = _warmup_steps(num_training_steps, num_warmup_steps, warmup_ratio)

    def factor(step: int) -> float:
        progress = _progress(step, warmup, num_training_steps)
        decay = min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return step / warmup if step < warmup else decay

    return LambdaLR(optimizer, factor)


def linear_schedule(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then linearly down to zero; arguments as :func:`cosine_schedule`."""
    warmup = _warmup_steps(num_training_steps, num_warmup_steps, warmup_ratio)

    def factor(step: int) -> float:
        return step / warmup if step < warmup else 1.0 - _progress(step, warmup, num_training_steps)

    return LambdaLR(optimizer, factor)


def _warmup_steps(total: int, steps: int | None, ratio: float | None) -> int:
    if steps is not None and ratio is not None:
        raise ValueError("Give the warm-up as num_warmup_steps or as warmup_ratio, not both.")
    if ratio is not None and not 0.0 <= ratio <= 1.0:
        raise ValueError(f"warmup_ratio must lie in [0, 1]; got {ratio}.")
    if steps is not None and steps < 0:
        raise ValueError(f"num_warmup_steps must not be negative; got {steps}.")
    warmup = steps if steps is not None else math.ceil(total * (ratio or 0.0))
    if warmup >= total:
        log.warning(
            f"Steps of warm-up: {warmup}, of the run: {total}. So the learning rate rises to the "
            "end and never reaches its highest value. Lower num_warmup_steps or warmup_ratio."
        )
    return warmup


def _progress(step: int, warmup: int, total: int) -> float:
    """Share of the decay that lies behind ``step``, in [0, 1]."""
    return min(1.0, (step - warmup) / max(1, total - warmup)) if step >= warmup else 0.0
