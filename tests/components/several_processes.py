"""Processes that have met as those of torchrun do, and do what a test asks of them."""

import faulthandler
import io
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from kasa_tune.components.processes import World

STARTED_WITHIN, DONE_WITHIN = (
    120,
    45,
)  # seconds; a loaded machine takes ten to start and one to answer
GIVES_UP_AFTER = 30  # seconds, of a process that waits for another; less than DONE_WITHIN, so that it says so itself

# Processes are forked from a server that has imported torch once, and of whose threads none is torch's.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torchtune",
        "torchao",
        "pytest",
        "hypothesis",
        "kasa_tune.components.training",
        __name__,
    ]
)


def torchrun_variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process that it starts on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


class Processes:
    """Some processes on this machine; called with a function of a module and its arguments, all do it at once.

    They are started by the first call. One that hangs costs the test that made it hang, and no other: all are killed,
    and the next call starts new ones.

    Args:
        size: how many.
        done_within: seconds after which one that has not answered hangs.
        options: of :meth:`World.join`.
    """

    def __init__(self, size: int, *, done_within: float = DONE_WITHIN, **options: Any) -> None:
        self.size, self.done_within, self.options = (
            size,
            done_within,
            {"timeout": GIVES_UP_AFTER} | options,
        )
        self._workers: list[multiprocessing.Process] = []

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``work(world, *args)`` returns, by rank; what it raises is raised."""
        outcomes = self.outcomes(work, *args)
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, Exception):
                raise AssertionError(f"{work.__name__} failed on rank {rank}") from outcome
        return outcomes

    def outcomes(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """As a call; an exception is returned in the place of the result."""
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send((work, args))
        return self._answers(self.done_within)

    def stop(self) -> None:
        """End them, gently if they answer."""
        for pipe in self._pipes if self._workers else ():
            pipe.send(None)
        for worker in self._workers:
            worker.join(5)
        self._kill()

    def _start(self) -> None:
        store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )  # on a free port, as torchrun's
        pairs = [CONTEXT.Pipe() for _ in range(self.size)]
        self._pipes = [own for own, _ in pairs]
        for rank, (_, theirs) in enumerate(pairs):
            settings = (rank, self.size, store.port, self.options, theirs)
            self._workers.append(CONTEXT.Process(target=_serve, args=settings, daemon=True))
        for worker in self._workers:
            worker.start()
        self._store = store
        assert self._answers(STARTED_WITHIN) == ["met"] * self.size

    def _answers(self, seconds: float) -> list[Any]:
        until, answers = time.monotonic() + seconds, []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, until - time.monotonic())):
                self._kill()
                raise AssertionError(f"rank {rank} hangs: no answer within {seconds} s")
            try:
                answers.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
            except EOFError:
                self._kill()
                raise AssertionError(f"rank {rank} died") from None
        return answers

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers = []


def _serve(rank: int, size: int, port: int, options: dict[str, Any], pipe: Any) -> None:
    """What each process does: meet the others, then one work after the other."""
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= torchrun_variables(rank, size, port)
    world = World.join("cpu", **options)
    answer: Any = "met"
    while True:
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        pipe.send_bytes(buffer.getvalue())
        asked = pipe.recv()
        if asked is None:
            return world.leave()
        work, args = asked
        try:
            answer = work(world, *args)
        except Exception as error:
            answer = error
