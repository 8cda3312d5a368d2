"""The checkpoints of a run: what they hold, and how they are written in its steps or after an error."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from kasa_tune.components.adapters import adapter_tensors
from kasa_tune.components.checkpoints import rng_state, save_checkpoint
from kasa_tune.components.processes import Finished, full_tensors

if TYPE_CHECKING:
    from kasa_tune.components.training.steps import Steps


@dataclass(frozen=True)
class Position:
    """Where a run is after a finished step, and the state of the random generators there."""

    step: int
    epoch: int
    batches_done: int
    rng: dict[str, Any]


class Saver:
    """Writes the checkpoints of a run.

    Args:
        steps: the steps of the run.

    Attributes:
        position: where the run can be continued from. None while a step changes the weights.
        path: the newest checkpoint of this run, known on rank 0. None if there is none.
        last_step: the last step that needs no saving.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._adapter = adapter_tensors(steps.model)
        self._lock = threading.Lock()
        self.position: Position | None = None
        self.path: Path | None = None
        self.last_step = 0

    def mark_position(self) -> None:
        """Remember that the run can be continued from here."""
        steps = self._steps
        self.position = Position(steps.step, steps.epoch, steps.batches_done, rng_state())

    @property
    def is_needed(self) -> bool:
        """Whether there are finished steps to save."""
        return self.position is not None and self.position.step > self.last_step

    def save(self) -> None:
        """Write a checkpoint of the position. All processes must call this.

        Raises:
            RuntimeError: a step is being applied.
        """
        if self.position is None:
            raise RuntimeError("A step is being applied. Save after it.")
        processes, state = self._steps.processes, self._state(self.position)
        rngs = processes.gather(state.rng)
        whole = Finished(state.step, state.rng, full_tensors(state.parts))
        processes.on_rank_zero(lambda: self._write(whole, rngs), "Saving")
        self.last_step = state.step

    def unsaved(self) -> Finished | None:
        """What a checkpoint of the position holds, if one is needed. Of tensors that are cut it has
        this process's part.
        """
        position = self.position
        if position is None or position.step <= self.last_step:
            return None
        return self._state(position)

    def write_if_unsaved(self, whole: Finished, rngs: list[dict[str, Any]]) -> None:
        """Write a checkpoint, unless another thread is just doing so."""
        with self._lock:
            is_saved = whole.step <= self.last_step
        if not is_saved:
            self._write(whole, rngs)

    def _state(self, position: Position) -> Finished:
        steps = self._steps
        scheduler = steps.lr_scheduler
        run = {
            "step": position.step,
            "epoch": position.epoch,
            "batches_done": position.batches_done,
            "total_steps": steps.data.total_steps,
            **steps.fingerprints,
            "lr_scheduler": scheduler.state_dict() if scheduler else None,
            "config": OmegaConf.to_container(steps.cfg, resolve=True),
            "world_size": steps.processes.size,
            "best": steps.best.state(),
            "early_stopping": steps.stopper.state(),
        }
        adapter = {name: tensor.detach() for name, tensor in self._adapter.items()}
        parts = {"adapter": adapter, "optimizer": steps.optimizer.state_dict(), "run": run}
        return Finished(position.step, position.rng, parts)

    def _write(self, whole: Finished, rngs: list[dict[str, Any]]) -> None:
        first, *others = rngs
        rng = first | ({"other_ranks": others} if others else {})
        parts, keep_last = whole.parts | {"rng": rng}, self._steps.cfg.keep_last
        with self._lock:
            folder = self._steps.folder
            best = self._steps.best.step
            self.path = save_checkpoint(folder, whole.step, parts, keep_last=keep_last, best=best)
            self.last_step = whole.step
