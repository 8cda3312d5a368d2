"""The processes that torchrun starts: how they agree, and how they share out work and weights."""

from kasa_tune.components.processes.rescue import Finished, watch_steps
from kasa_tune.components.processes.sharding import (
    distribute_like,
    distribute_optimizer_state,
    full_tensor,
    full_tensors,
    shard,
)
from kasa_tune.components.processes.world import (
    Job,
    OtherRankError,
    SingleProcess,
    World,
    distribute_jobs,
)

__all__ = [
    "Finished",
    "Job",
    "OtherRankError",
    "SingleProcess",
    "World",
    "distribute_jobs",
    "distribute_like",
    "distribute_optimizer_state",
    "full_tensor",
    "full_tensors",
    "shard",
    "watch_steps",
]
