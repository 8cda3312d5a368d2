"""Processes that train one model together: how they meet, agree, and share out work and weights."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchtune.training import get_distributed_backend

from kasa_tune.components.checkpoints.random_state import restore_rng_state, set_rng_state

log = logging.getLogger(__name__)

T = TypeVar("T")

Job = tuple[float, Callable[[], Any]]  # what it costs, in any unit, and the work

# How long a process waits for one that works, such as a decomposition on a CPU. The wait ends at once when that one
# dies, since gloo sees its connection close.
PATIENCE = timedelta(days=7)
# Seconds that the threads of gloo get, when all is done, to let go of the last tensors.
LETTING_GO = 0.5


class OtherRankError(ValueError):
    """This process stops because another one had to; that one's message says why."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them.

    Args:
        rank: of this process, from 0.
        size: number of processes.
        device: of this process.
        mesh: of all processes: one dimension, or with hybrid sharding replicas by shards.
        patient: a gloo group of all processes, in which one waits for the others' work however long it takes.
        store: where processes leave each other word without waiting for an answer.
        host_mesh: one dimension, of the processes that share a copy of the model; its gloo group is used by nothing
            else, so that it works while others are stuck.
        timeout: seconds that a process waits for another in vain.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    patient: dist.ProcessGroup
    store: dist.Store
    host_mesh: DeviceMesh
    timeout: float

    @staticmethod
    def join(device: str, *, timeout: float, shards: int | None = None) -> World:
        """Meet the processes that torchrun started beside this one.

        Args:
            device: ``cpu`` (gloo) or ``cuda`` (NCCL), on which each process takes the GPU of its local rank.
            timeout: seconds after which a process that waits for another in vain gives up. Where it waits for
                another's work (:meth:`all_succeed`, :meth:`on_rank_zero`), it gives up when the other dies.
            shards: processes that share one copy of the model; default all of them.

        Raises:
            ValueError: torchrun did not start this process, or ``shards`` does not divide their number.
        """
        if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
            raise ValueError(
                "This recipe runs on several processes that torchrun starts: tune run --nproc_per_node <n> <recipe> "
                "--config <config>. On one device, use the recipe that ends in _single_device."
            )
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if shards and size % shards:
            raise ValueError(
                f"data_parallel_shard_dim: {size} processes do not divide into groups of {shards}."
            )
        kind = device.partition(":")[0]  # which GPU is the local rank's matter
        here = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(here)
        backend = get_distributed_backend(kind, offload_ops_to_cpu=kind != "cpu")
        wait = timedelta(seconds=timeout)
        store, *_ = next(dist.rendezvous("env://", timeout=wait))
        # torchrun keeps its store over restarts, and with it where the processes of the last attempt were to be found.
        attempt = dist.PrefixStore(
            f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=wait)
        if rank:
            logging.disable(logging.WARNING)  # one process reports
        shape = (size // shards, shards) if shards and shards < size else (size,)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        host_mesh = _host_mesh(rank, size, shards or size, wait)
        return World(rank, size, here, mesh, patient, attempt, host_mesh, timeout)

    def leave(self) -> None:
        """Part from the others, when all have come to this point.

        The pause keeps the interpreter from ending while a thread of gloo still drops the tensors of the last exchange.
        That takes the interpreter's lock, and a thread that asks for the lock at the interpreter's end aborts the
        process ("terminate called without an active exception", pytorch issue 190489).
        """
        self._gather(None, group=self.patient)
        dist.destroy_process_group()
        time.sleep(LETTING_GO)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """A small value of every process, by rank."""
        return self._gather(value, group=None)

    def _gather(self, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Sums over all processes, in float64."""
        numbers = [float(value) for value in values]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def set_rng_state(self, saved: Mapping[str, Any]) -> None:
        """Bring this process's random generators back; where others were saved than there are now, start anew.

        Args:
            saved: those of rank 0, and under ``other_ranks`` the list of the others'.
        """
        restore_rng_state(saved, rank=self.rank, world_size=self.size)

    @contextlib.contextmanager
    def all_succeed(self, what: str) -> Iterator[None]:
        """Work that every process does for itself: if it fails in one, it fails in all, and none waits for ever.

        However long the work takes in one, the others wait, unless that one dies.

        Raises:
            OtherRankError: here it went well, elsewhere it did not.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        did_fail = self._gather(failure is not None, group=self.patient)
        failed = [rank for rank, did in enumerate(did_fail) if did]
        if failure is not None:
            raise failure
        if failed:
            raise OtherRankError(f"{what} failed on rank {failed[0]}; its message says why.")

    def on_rank_zero(self, act: Callable[[], T], what: str) -> T:
        """What ``act`` returns on rank 0, on all ranks; it is done there alone.

        Raises:
            OtherRankError: it failed there; there, the failure itself.
        """
        result: list[Any] = [None]
        with self.all_succeed(what):
            if self.is_rank_zero:
                result[0] = act()
        dist.broadcast_object_list(result, src=0, device=self.device)
        return result[0]

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Refuse to go on with processes that were given different things.

        Args:
            facts: what it is to what it is here, or a digest of that.

        Raises:
            ValueError: they differ, on all processes; the message says what differs and where.
        """
        for name, values in (
            (name, [other[name] for other in self.gather(dict(facts))]) for name in facts
        ):
            differing = [rank for rank, value in enumerate(values) if value != values[0]]
            if differing:
                raise ValueError(
                    f"Rank {differing[0]} has another {name} than rank 0. All processes need the same config, files "
                    "and versions."
                )


def _host_mesh(rank: int, size: int, shards: int, wait: timedelta) -> DeviceMesh:
    """The processes that hold one copy of the model together, over gloo; every process takes part in making all."""
    groups = [
        dist.new_group(list(range(first, first + shards)), backend="gloo", timeout=wait)
        for first in range(0, size, shards)
    ]
    return DeviceMesh.from_group(groups[rank // shards], "cpu", mesh_dim_names=("shard",))


class SingleProcess:
    """The interface of :class:`World` for a run in one process: nothing is sent, and what fails fails here."""

    rank, size, is_rank_zero = 0, 1, True

    def gather(self, value: T) -> list[T]:
        """The value of this one process."""
        return [value]

    def sum(self, *values: Any) -> list[Any]:
        """The values themselves, numbers or tensors."""
        return list(values)

    def set_rng_state(self, saved: Mapping[str, Any]) -> None:
        """Bring the random generators back; of a run on several processes, those of rank 0."""
        set_rng_state(saved)

    @contextlib.contextmanager
    def all_succeed(self, what: str) -> Iterator[None]:
        """Work that this process does."""
        yield

    def on_rank_zero(self, act: Callable[[], T], what: str) -> T:
        """What ``act`` returns."""
        return act()


def distribute_jobs(jobs: Iterable[Job], world: World) -> Iterator[Any]:
    """Results of jobs, in their order and the same on all processes, each worked out by one of them.

    A job goes to the process with the least cost so far. As many are taken on as there are processes, or a few more,
    before all work at once; so a process holds the inputs of its own few jobs alone, and waits for no other while jobs
    are of like cost.

    Args:
        jobs: the same on all processes; drawing one may itself take all of them.
        world: the processes.

    Raises:
        OtherRankError: a job failed on another process; there, the failure itself.
    """
    loads, waiting = [0.0] * world.size, []
    for cost, work in jobs:
        owner = min(range(world.size), key=lambda rank: (loads[rank], rank))
        loads[owner] += cost
        waiting.append((owner, work if owner == world.rank else None))
        del work
        if len(waiting) >= 2 * world.size and len({owner for owner, _ in waiting}) == world.size:
            yield from _finish(waiting, world)
            waiting = []
    yield from _finish(waiting, world)


def _finish(waiting: list[tuple[int, Callable[[], Any] | None]], world: World) -> Iterator[Any]:
    mine: list[Any] = []
    with world.all_succeed("A decomposition"):
        for _, work in waiting:
            if work:
                mine.append(work())
    by_rank = [iter(results) for results in world.gather(mine)]
    yield from (next(by_rank[owner]) for owner, _ in waiting)
