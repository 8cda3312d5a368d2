"""One optimizer step of a run, as :class:`~kasa_tune.components.training.steps.Steps` gives it to a recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import utils

from kasa_tune.components.checkpoints import rng_state
from kasa_tune.components.data import Batch
from kasa_tune.components.processes import full_tensor

if TYPE_CHECKING:
    from kasa_tune.components.training.steps import Steps

log = utils.get_logger("INFO")  # prints on rank 0


class NonFiniteError(RuntimeError):
    """A loss or the gradient is NaN or infinite."""


class Step:
    """One optimizer step: its batches, what it logs, and the update at its end.

    Attributes:
        num_tokens: labelled tokens in the batches of all processes, at least 1; the loss is a mean over them.
        is_last_batch: whether the batch that was drawn from ``batches`` last is the step's last.
        metrics: what is logged.
        applying: whether :meth:`apply` has begun to change weights.
        applied: whether :meth:`apply` has finished.
        num_batches: of this process.
        rng: state of the random generators before the step.
    """

    def __init__(self, steps: Steps, batches: list[Batch]) -> None:
        self._steps, self._batches = steps, batches
        self.num_tokens = max(1, steps.num_labelled)
        self.is_last_batch = self.applying = self.applied = False
        self.num_batches, self.rng = len(batches), rng_state()
        self.metrics: dict[str, Any] = {}
        self._loss = torch.zeros((), device=steps.device)
        self._logged: dict[str, Tensor] = {}
        self._num_seen = sum(batch["tokens"].numel() for batch in batches)  # padding included
        self._started = time.perf_counter()

    @property
    def batches(self) -> Iterator[Batch]:
        """The step's batches, each moved to the device when it is drawn."""
        for number, batch in enumerate(self._batches, start=1):
            self.is_last_batch = number == len(self._batches)
            utils.batch_to_device(batch, self._steps.device)
            yield batch

    def add_loss(self, loss: Tensor) -> None:
        """Count a batch's part of the step's loss, for the log: ``loss_sum / step.num_tokens``."""
        self._loss += loss.detach()

    def log(self, **values: Tensor) -> None:
        """Log more scalars with the step, a regularizer for example. They must be finite, and
        equal on all processes.
        """
        self._logged |= {name: value.detach() for name, value in values.items()}

    def apply(
        self,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None = None,
        *,
        clip_grad_norm: float | None = None,
    ) -> None:
        """Clip the gradient, see that it and the losses are finite, update the weights, step the schedule.

        Args:
            optimizer: its gradients are cleared afterwards.
            lr_scheduler: None for a constant rate.
            clip_grad_norm: largest norm of the gradient of all trained parameters; None for no limit.

        Raises:
            NonFiniteError: a loss or the gradient is not finite. No weight has been touched.
        """
        steps = self._steps
        loss, heard = steps.processes.sum(self._loss, steps.signals.received is not None)
        steps.stopping |= heard > 0
        max_norm = math.inf if clip_grad_norm is None else clip_grad_norm
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(steps.trained, max_norm))
        checked = {"loss": torch.as_tensor(loss), **self._logged, "grad_norm": grad_norm}
        values = torch.stack([value.to(steps.device) for value in checked.values()]).tolist()
        if not all(map(math.isfinite, values)):
            raise NonFiniteError(
                f"Step {steps.step + 1}: loss {values[0]}, gradient norm {values[-1]}. Weights are "
                f"still those of step {steps.step}. Lower optimizer.lr, set clip_grad_norm, or look "
                "at the data."
            )
        self.applying = True
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
        self.metrics |= dict(zip(checked, values, strict=True))
        if not steps.num_labelled:
            del self.metrics["loss"]  # it is the mean of nothing
        self.metrics |= {"lr": lr, "num_tokens": steps.num_labelled}
        seconds = time.perf_counter() - self._started
        self.metrics["tokens_per_second"] = steps.processes.size * self._num_seen / seconds
