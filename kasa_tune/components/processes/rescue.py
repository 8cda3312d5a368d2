"""When a step fails on one process, all processes notice and save together what they had finished."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kasa_tune.components.processes.sharding import full_tensors, on_host
from kasa_tune.components.processes.world import SingleProcess, World

log = logging.getLogger(__name__)

EVERY = 0.5  # seconds between two looks at whether a step has failed elsewhere


@dataclass(frozen=True)
class Finished:
    """What a process has after a finished step.

    Args:
        step: number of finished steps.
        rng: state of this process's random generators.
        parts: a tree with tensors, of which each process may hold a part.
    """

    step: int
    rng: dict[str, Any]
    parts: dict[str, Any]


class Rescue:
    """Saves the finished steps of a single process when a step fails.

    Args:
        finished: returns what is to be saved. None if all is saved, or while a step changes it.
        write: writes it, given the random states of all processes.

    Attributes:
        saved: whether :meth:`after_failure` has saved something.
        failed_on: the first rank that failed, as soon as this process knows of it.
    """

    def __init__(
        self,
        finished: Callable[[], Finished | None],
        write: Callable[[Finished, list[dict[str, Any]]], None],
    ) -> None:
        self._finished, self._write, self.saved = finished, write, False
        self.failed_on: int | None = None

    def __enter__(self) -> Rescue:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def after_failure(self) -> int | None:
        """Save after an error. If that fails too, the first error is still the one to raise.

        Returns:
            The rank on which a step failed first. None if it is this one.
        """
        self._told(self._save)
        return None

    def _save(self) -> None:
        finished = self._finished()
        if finished:
            self._write(finished, [finished.rng])
            self.saved = True

    def _told(self, act: Callable[[], None]) -> None:
        """Do it. A failure becomes a warning, since the error of the step is still to be raised."""
        try:
            act()
        except Exception as failure:
            log.warning(
                f"The finished steps could not be saved: {type(failure).__name__}: {failure}"
            )


class SharedRescue(Rescue):
    """Saves the finished steps of several processes when a step fails on one of them.

    The other processes then wait in a collective that never ends, so that their main threads can do
    nothing. A thread in each process therefore looks at the store for a failure, and saves. It uses
    a gloo group of its own, and tensors that do not change before all processes agree to apply the
    next step. NCCL's collectives are aborted first, because copies from a GPU would wait for them.
    gloo's end when the process that failed does.

    Args:
        world: the processes.
        finished: see :class:`Rescue`. It is called in another thread.
        write: see :class:`Rescue`. It is called on rank 0, in another thread.
    """

    def __init__(
        self,
        world: World,
        finished: Callable[[], Finished | None],
        write: Callable[[Finished, list[dict[str, Any]]], None],
    ) -> None:
        super().__init__(finished, write)
        self._world, self._store = world, dist.PrefixStore("rescue", world.store)
        self._training_ended, self._main_failed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rescue", daemon=True)

    def __enter__(self) -> Rescue:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._training_ended.set()
        self._thread.join()

    def after_failure(self) -> int | None:
        """Tell the others of an error, and wait until the finished steps are saved."""
        self._main_failed.set()
        self._told(self._report)
        self._thread.join()
        return None if self.failed_on == self._world.rank else self.failed_on

    def _report(self) -> None:
        if self._store.add("failures", 1) == 1:
            self._store.set("failed on", str(self._world.rank))

    def _watch(self) -> None:
        self._told(self._wait_and_save)

    def _wait_and_save(self) -> None:
        while not self._store.check(["failed on"]):
            if self._training_ended.wait(EVERY):
                return
        self.failed_on = int(self._store.get("failed on"))
        finished = None
        try:
            self._free_devices()
            finished = self._unchanging()
        finally:  # the others wait for this process's word
            offered = (finished.step, finished.rng) if finished else None
            self._store.set(f"offer {self._world.rank}", pickle.dumps(offered).hex())
        words = [self._get(f"offer {rank}").decode() for rank in range(self._world.size)]
        offers = [pickle.loads(bytes.fromhex(word)) for word in words]
        steps = {offer and offer[0] for offer in offers}
        if finished and steps == {finished.step}:
            self._save_together(finished, [rng for _, rng in offers])

    def _get(self, key: str) -> bytes:
        """What a process has written, or writes within the time that one waits for another."""
        self._store.wait([key], timedelta(seconds=self._world.timeout))
        return self._store.get(key)

    def _free_devices(self) -> None:
        """Abort what GPUs wait for: kernels of NCCL, behind which nothing else would run."""
        world = self._world
        if world.device.type != "cuda":
            return
        torch.cuda.set_device(world.device)  # of this thread
        for group in {*world.mesh.get_all_groups(), dist.group.WORLD}:
            if group is not None:
                group._get_backend(world.device).abort()

    def _unchanging(self) -> Finished | None:
        """What is to be saved, copied to the host. If a step is just being applied here, this waits
        until that is done.
        """
        deadline = time.monotonic() + self._world.timeout
        while (finished := self._finished()) is None:
            if self._main_failed.is_set() or time.monotonic() > deadline:
                return None
            time.sleep(EVERY)
        return Finished(finished.step, finished.rng, on_host(finished.parts, self._world.host_mesh))

    def _save_together(self, finished: Finished, rngs: list[dict[str, Any]]) -> None:
        if not self._world.is_rank_zero:
            full_tensors(finished.parts)
            self.saved = self._get("outcome") == b"saved"
            return
        try:
            whole = Finished(finished.step, finished.rng, full_tensors(finished.parts))
            self._write(whole, rngs)
            self.saved = True
        finally:  # the others stay until this process has written
            self._store.set("outcome", "saved" if self.saved else "not saved")


def watch_steps(
    processes: World | SingleProcess,
    finished: Callable[[], Finished | None],
    write: Callable[[Finished, list[dict[str, Any]]], None],
) -> Rescue:
    """Watch for steps that fail, for as long as the returned context is active."""
    if isinstance(processes, World):
        return SharedRescue(processes, finished, write)
    return Rescue(finished, write)
