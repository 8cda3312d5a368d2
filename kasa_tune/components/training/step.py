"""One optimizer step of a run. :class:`~kasa_tune.components.training.steps.Steps` yields these
steps to a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import utils

from kasa_tune.components.data import Batch, move_batch
from kasa_tune.components.processes import full_tensor
from kasa_tune.components.training.phases import OPTIMIZER, PASSES

if TYPE_CHECKING:
    from kasa_tune.components.training.steps import Steps

log = utils.get_logger("INFO")  # prints on rank 0


class NonFiniteError(RuntimeError):
    """A loss or the gradient is NaN or infinite."""


class Step:
    """One optimizer step: its batches, the values it logs, and the update of the weights.

    Attributes:
        num_tokens: number of labelled tokens in the batches of all processes, at least 1. The loss
            of a step is the mean over these tokens.
        is_last_batch: whether the batch that ``batches`` yielded last is the last one of the step.
        metrics: values to log.
        applying: whether :meth:`apply` has begun to change weights.
        applied: whether :meth:`apply` has finished.
    """

    def __init__(self, steps: Steps, batches: list[Batch]) -> None:
        self._steps, self._batches = steps, batches
        self.num_tokens = max(1, steps.num_labelled)
        self.is_last_batch = self.applying = self.applied = False
        self.metrics: dict[str, Any] = {}
        self._loss = torch.zeros((), device=steps.device)
        self._logged: dict[str, Tensor] = {}

    @property
    def batches(self) -> Iterator[Batch]:
        """The batches of the step. Each has tensors ``[b, s]``, and is moved to the device when it
        is yielded, but for its labels, which stay on the host.
        """
        for number, batch in enumerate(self._batches, start=1):
            self.is_last_batch = number == len(self._batches)
            move_batch(batch, self._steps.device)
            yield batch

    def add_loss(self, loss: Tensor) -> None:
        """Add a batch's share of the step's loss, the scalar ``loss_sum / step.num_tokens``, to the
        logged loss.
        """
        self._loss += loss.detach()

    def log(self, **values: Tensor | float) -> None:
        """Log more scalars with the step, such as a regularizer. They must be finite, and the same
        on all processes.

        Raises:
            ValueError: a value has more than one element.
        """
        for name, value in values.items():
            scalar = torch.as_tensor(value).detach()
            if scalar.numel() != 1:
                raise ValueError(
                    f"step.log takes scalars, but {name} has the shape {tuple(scalar.shape)}."
                )
            self._logged[name] = scalar.reshape(())

    def apply(
        self,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None = None,
        *,
        clip_grad_norm: float | None = None,
    ) -> None:
        """Clip the gradient, check that it and the losses are finite, update the weights, and
        advance the schedule.

        Args:
            optimizer: the optimizer. Its gradients are cleared afterwards.
            lr_scheduler: the learning rate schedule. None for a constant rate.
            clip_grad_norm: largest allowed norm of the gradient of all trained parameters. None for
                no limit.

        Raises:
            NonFiniteError: a loss, another logged value or the gradient is not finite. No weight
                has been changed.
            RuntimeError: the step has been applied before.
        """
        if self.applying:
            raise RuntimeError(
                "step.apply was called twice in a step. Call it once, after the loop over the "
                "batches of the step."
            )
        steps = self._steps
        max_norm = math.inf if clip_grad_norm is None else clip_grad_norm
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(steps.trained, max_norm))
        values = self._agree({**self._logged, "grad_norm": grad_norm})
        steps.phases.done(PASSES)  # the values are here, so a GPU has done them
        self.applying, steps.saver.position = True, None
        # Some optimizers keep the rate as a tensor, which the scheduler changes in place.
        lr = float(optimizer.param_groups[0]["lr"])
        if steps.num_labelled:
            optimizer.step()
        else:
            log.warning(f"Step {steps.step + 1} has no labelled token, so it changes no weight.")
        optimizer.zero_grad(set_to_none=True)
        if lr_scheduler:
            lr_scheduler.step()
        steps.step += 1
        self.applied = True
        self.metrics |= values
        if not steps.num_labelled:
            del self.metrics["loss"]  # there was no token to take a mean over
        self.metrics |= {"lr": lr, "num_tokens": steps.num_labelled}
        steps.phases.done(OPTIMIZER)
        seconds = steps.phases.of_step()
        self.metrics |= {"tokens_per_second": steps.num_labelled / seconds, "seconds": seconds}
        steps.saver.mark_position()

    def _agree(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """Exchange the loss. It is the last exchange of a step: a process that has failed does not
        come here, so that the weights change on all processes or on none.

        Args:
            scalars: values to check and to log.

        Returns:
            The loss of all processes and the scalars, all finite.
        """
        steps = self._steps
        numbers = torch.stack([value.to(steps.device) for value in scalars.values()]).tolist()
        local = dict(zip(scalars, numbers, strict=True))
        num_bad = sum(not math.isfinite(number) for number in numbers)
        stop = steps.signals.received is not None
        loss, num_signals, num_bad_in_all = map(
            float, steps.processes.sum(self._loss, stop, num_bad)
        )
        steps.check_no_failure()
        steps.stopping |= num_signals > 0
        values = {"loss": loss, **local}
        if num_bad_in_all or not math.isfinite(loss):
            steps.all_fail = True
            self._raise_not_finite(values)
        return values

    def _raise_not_finite(self, values: dict[str, float]) -> NoReturn:
        found = ", ".join(
            f"{name} {value}"
            for name, value in values.items()
            if name in ("loss", "grad_norm") or not math.isfinite(value)
        )
        done = self._steps.step
        raise NonFiniteError(
            f"Step {done + 1}: {found}. The weights are still those of step {done}. "
            "Lower optimizer.lr, set clip_grad_norm, or check the data."
        )
