"""The step loop of a training run, as an iterator over optimizer steps.

    with Steps(cfg, model=model, data=data, loss_sum=loss_sum, ...) as steps:
        for step in steps:
            for batch in step.batches:                      # tokens, labels [b, s]
                loss = loss_sum(batch) / step.num_tokens
                loss.backward()
                step.add_loss(loss)
            step.apply(optimizer, lr_scheduler, clip_grad_norm=1.0)
    return steps.exit_status

The recipe does the mathematics: the forward and backward passes, the regularizers and the optimizer
step. The iterator locks the output folder, shows progress, resumes, validates, saves, logs, and
stops when a signal arrives.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import training, utils
from torchtune.config import instantiate
from torchtune.modules.peft import disable_adapter
from tqdm import tqdm

from kasa_tune.components.checkpoints import (
    Checkpoint,
    clean_up,
    resume_position,
    run_lock,
)
from kasa_tune.components.data import move_batch
from kasa_tune.components.data.training_data import Batch, TrainingData
from kasa_tune.components.processes import (
    OtherRankError,
    SingleProcess,
    World,
    distribute_optimizer_state,
    watch_steps,
)
from kasa_tune.components.training.loggers import RunLoggers, SilentLogger
from kasa_tune.components.training.phases import LOGGING, WAITING, Phases
from kasa_tune.components.training.saving import Saver
from kasa_tune.components.training.step import Step
from kasa_tune.components.training.stop_signals import StopSignals
from kasa_tune.components.training.validating import LOSS, Best, Validation

log = utils.get_logger("INFO")  # prints on rank 0

SHOWN = ("loss", "val_loss", "l2", "l3", "lr", "tokens_per_second", "peak_memory_gib")


class Steps:
    """All optimizer steps of a run, from the position of its checkpoint to the end of the run or to
    the first stop signal.

    Use it as a context manager, and iterate over it once.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        model: the model with weights and adapters, on its device.
        data: the training and validation batches.
        loss_sum: maps a batch with tokens ``[b, s]`` on the device, and labels ``[b, s]`` on the
            host, to the summed loss of its labelled tokens, a scalar with gradient. Validation uses
            it as well.
        optimizer: the optimizer of the trained parameters.
        lr_scheduler: the learning rate schedule, advanced once a step. None for a constant rate.
        checkpoint: the checkpoint that the run started from, if there is one.
        fingerprints: fingerprints of data and base weights and the base's architecture, stored in
            every checkpoint.
        device: device of the model.
        ignore_index: label of tokens that nothing is learned from.
        processes: the processes that train together. None for a single process.
        phases: the clock of the run, with what came before the first step. None starts one now.

    Attributes:
        step: number of optimizer steps done.
        epoch: number of epochs done.
        batches_done: number of batches done in the current epoch.

    Raises:
        ValueError: another run writes to the output folder. It is raised when the context is
            entered.
    """

    def __init__(
        self,
        cfg: DictConfig,
        *,
        model: nn.Module,
        data: TrainingData,
        loss_sum: Callable[[Batch], Tensor],
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None,
        checkpoint: Checkpoint | None,
        fingerprints: Mapping[str, Any],
        device: torch.device,
        ignore_index: float = -100,
        processes: World | SingleProcess | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.cfg, self.model, self.data, self.device = cfg, model, data, device
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.processes, self.phases = processes or SingleProcess(), phases or Phases()
        self.fingerprints, self.ignore_index = fingerprints, ignore_index
        self._loss_sum = loss_sum
        self.folder = Path(cfg.output_dir) / "checkpoints"
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.step = self.epoch = self.batches_done = 0
        self._current: Step | None = None
        self.stopping = False  # all processes agree on it
        self.all_fail = False  # all processes raise in the same place
        self.validation = Validation(cfg, model)
        self.best = Best(cfg.keep_best)
        self.stopper = Best(cfg.early_stopping.metric, cfg.early_stopping.min_delta)
        self.saver = Saver(self)
        self._resumed = checkpoint is not None and checkpoint.resumes
        if checkpoint is not None and checkpoint.resumes:
            self._restore(checkpoint)
        count = sum(p.numel() for p in self.trained)
        log.info(f"Parameters to train: {count:,}. Steps in all: {data.total_steps:,}.")

    # --- the life of a run

    def __enter__(self) -> Steps:
        cfg, is_rank_zero = self.cfg, self.processes.is_rank_zero
        with contextlib.ExitStack() as resources:
            with self.processes.all_succeed("Opening the output folder"):
                if is_rank_zero:
                    resources.enter_context(run_lock(self.folder))
                    clean_up(self.folder, keep_last=cfg.keep_last, best=self.best.step)
            self.signals = resources.enter_context(StopSignals())
            self._logger = RunLoggers(cfg) if is_rank_zero else SilentLogger()
            resources.callback(self._logger.close)
            enabled = cfg.profiler.enabled
            profiler = instantiate(cfg.profiler)[0] if enabled else training.DummyProfiler()
            self._profiler = resources.enter_context(profiler)
            options = {"unit": "step", "dynamic_ncols": True, "disable": not is_rank_zero}
            rescue = watch_steps(self.processes, self.saver.unsaved, self.saver.write_if_unsaved)
            self._rescue = resources.enter_context(rescue)
            self._bar = tqdm(total=self.data.total_steps, initial=self.step, **options)
            resources.callback(self._bar.close)
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        left_step = self._current if error is None else None
        with self._resources:
            if left_step:
                self._save_after_break(left_step)
            elif isinstance(error, Exception):
                self._save_after_failure(error)
        if error is not None:
            return
        if self.step < self.data.total_steps and (self.stopping or left_step):
            who = "A signal" if self.stopping else "The recipe"
            log.warning(
                f"{who} stopped the run after step {self.step}. Set resume_from_checkpoint=True "
                "to continue from here."
            )
        elif self.saver.path:
            if self._stops_early:
                since = f"since step {self.stopper.step}" if self.stopper.step else "at all"
                log.info(f"Stopped early: {self.stopper.metric} has not got better {since}.")
            log.info(self.phases.summary())
            log.info(f"Finished. Adapter: {self.saver.path / 'adapter.safetensors'}")

    def _save_after_break(self, step: Step) -> None:
        """Log and save after a ``break`` out of the loop, which all processes must do in the same
        step. A step that was not applied is done again when the run resumes.
        """
        if step.applied:
            self._finish_step(step)
        if self.saver.is_needed:
            self.save()

    def check_no_failure(self) -> None:
        """Check that what the processes have just exchanged came about.

        Raises:
            OtherRankError: another process failed, and so the exchange was aborted.
        """
        if self._rescue.failed_on is not None:
            raise OtherRankError("Another process failed.")

    def _save_after_failure(self, error: Exception) -> None:
        """After an error, save the finished steps, with the random state from before the step that
        failed.

        Raises:
            OtherRankError: the error is only what comes of another process's.
        """
        failed_on = self._rescue.after_failure()
        if self._rescue.saved:
            log.warning(f"The {self.step} finished steps are saved in {self.saver.path}.")
        elif self.step > self.saver.last_step:
            log.warning(f"The steps after step {self.saver.last_step} are lost.")
        if failed_on is not None and not self.all_fail:
            raise OtherRankError(
                f"Training failed on rank {failed_on}; its message says why."
            ) from error

    @property
    def exit_status(self) -> int:
        """Exit status of the run. It is 0 at its end, and 128 + the signal's number after
        a signal.
        """
        if self.stopping and self.step < self.data.total_steps:
            return 128 + (self.signals.received or signal.SIGTERM)
        return 0

    def __iter__(self) -> Iterator[Step]:
        self.model.train()
        self.phases.done("setting up")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # do not count loading
        self._open_log()
        save_every = self.cfg.save_every_n_steps
        self.saver.mark_position()
        while not self._done:
            for batches in self._batches_of_steps():
                self.phases.done(WAITING)
                self._current = step = Step(self, batches)
                yield step
                self._finish_step(step)
                self.phases.done(LOGGING)
                self.saver.mark_position()
                self._current = None
                due = save_every and self.step % save_every == 0
                if self._done or due or self.best.step == self.step:
                    self.save()
                if self._done:
                    return
            self.epoch, self.batches_done = self.epoch + 1, 0
            self.saver.mark_position()
            if not save_every:
                self.save()

    @property
    def _done(self) -> bool:
        if self.processes.size == 1:  # several processes agree on stopping at their next step
            self.stopping |= self.signals.received is not None
        return self.stopping or self._stops_early or self.step >= self.data.total_steps

    @property
    def _stops_early(self) -> bool:
        return self.stopper.validations_since >= self.cfg.early_stopping.patience

    def _batches_of_steps(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step of the current epoch.

        Here the processes exchange how many labelled tokens they have, and whether one of them
        failed or received a signal.
        """
        of_steps = self.data.steps(self.epoch, self.batches_done)
        while True:
            batches, failure = None, None
            try:
                batches = next(of_steps, None)
            except Exception as error:
                failure = error
            labelled = sum(self._num_labelled(batch) for batch in batches or ())
            signal_received = self.signals.received is not None
            labelled, failed, stopping = map(
                int, self.processes.sum(labelled, failure is not None, signal_received)
            )
            if failed:
                self.all_fail = True
                raise failure or OtherRankError(
                    "A batch could not be read on another rank; its message says why."
                )
            if batches is None:
                return
            self.stopping, self.num_labelled = stopping > 0, labelled
            self.batches_done += len(batches)
            yield batches

    def _num_labelled(self, batch: Batch) -> int:
        return int((batch["labels"] != self.ignore_index).sum())

    def _finish_step(self, step: Step) -> None:
        """Validate if this step is due for it, update the progress bar, and log."""
        if not step.applied:
            raise RuntimeError(
                "The recipe went to the next step without step.apply(optimizer). Call it once in "
                "each step, after the loop over its batches."
            )
        cfg, metrics = self.cfg, step.metrics
        self._profiler.step()
        if cfg.log_peak_memory_stats and self.device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        last, every = self.step == self.data.total_steps, cfg.get("run_val_every_n_steps")
        try:
            if every and (last or self.step % every == 0) and not self.stopping:
                metrics |= self._validation_metrics()
                self.phases.done("validation")
        finally:  # the step itself is done
            self._log(metrics, last=last)

    def _log(self, metrics: dict[str, Any], *, last: bool) -> None:
        shown = {name: f"{metrics[name]:.4g}" for name in SHOWN if name in metrics}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self.step % self.cfg.log_every_n_steps == 0 or LOSS in metrics or last:
            self._logger.log_dict(metrics, step=self.step)

    def _open_log(self) -> None:
        """Log the config and, before the first step, the validation losses. Remove the lines of
        steps that a resumed run does again.
        """
        self._logger.log_config(self.cfg)
        self._logger.rewind(self.step if self._resumed else -1)
        if self.step == 0 and self.cfg.get("run_val_every_n_steps"):
            with disable_adapter(self.model):
                base_loss = self.validate()
            metrics = {"val_loss_base": base_loss, **self._validation_metrics()}
            self.phases.done("validation")
            self._logger.log_dict(metrics, step=0)

    def _validation_metrics(self) -> dict[str, float]:
        """Compute the validation loss, do the tasks of the section ``validation``, and compare with the best so far.

        Raises:
            ValueError: no task measures a metric that the config names.
        """
        loss, asked = self.validate(), self.validation.ask(self.model, self.data.tokenizer)
        # Every process did the same tasks. The values of one decide, however the others rounded.
        found: dict[str, float] = self.processes.gather({LOSS: loss} | asked.metrics)[0]
        for best in (self.best, self.stopper):
            if best.metric is not None and best.metric not in found:
                raise ValueError(
                    f"{best.metric} is no metric of this run's validation. It measures "
                    f"{', '.join(found)}: set keep_best or early_stopping.metric to one of these."
                )
            if self.step:
                best.update(self.step, found, {LOSS} | asked.lower_is_better)
        self._logger.log_samples(asked.samples, step=self.step)
        return found

    @torch.no_grad()
    def validate(self) -> float:
        """Compute the mean loss per labelled token of the validation set."""
        self.model.eval()
        total, num_tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in self.data.validation():
            num_tokens += self._num_labelled(batch)
            move_batch(batch, self.device)
            total += self._loss_sum(batch)
        self.model.train()
        total_loss, all_tokens = self.processes.sum(total.item(), num_tokens)
        return total_loss / all_tokens

    # --- checkpoints

    def save(self) -> None:
        """Write a checkpoint that holds the adapter and everything that resuming bit for bit needs.
        All processes must call this, after a finished step.
        """
        self.saver.save()
        self.phases.done("saving")
        if self.processes.is_rank_zero:
            self.phases.write(self.folder.parent)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Restore the optimizer, the schedule, the position in the data and the random state."""
        run, data = checkpoint.run, self.data
        self.step, self.epoch, self.batches_done = resume_position(
            run, data.batches_per_step, data.num_batches
        )
        saved = checkpoint.part("optimizer")
        self.optimizer.load_state_dict(distribute_optimizer_state(self.optimizer, saved))
        if self.lr_scheduler:
            self.lr_scheduler.load_state_dict(run["lr_scheduler"])
            if run["total_steps"] != data.total_steps:
                log.warning(
                    f"The schedule now spans {data.total_steps} steps instead of "
                    f"{run['total_steps']}."
                )
        self.best.restore(run.get("best"))
        self.stopper.restore(run.get("early_stopping"))
        self.processes.set_rng_state(checkpoint.part("rng"))
        self.saver.last_step, self.saver.path = self.step, checkpoint.path
        self.phases.add_earlier(self.folder.parent)
