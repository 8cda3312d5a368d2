"""The processes that torchrun starts: how they agree, and how they share out work and weights."""

from kasa_tune.components.processes.sharding import (
    distribute_like,
    distribute_optimizer_state,
    full_tensor,
    full_tensors,
)
from kasa_tune.components.processes.world import OtherRankError, World, distribute_jobs, shard

__all__ = [
    "OtherRankError",
    "World",
    "distribute_jobs",
    "distribute_like",
    "distribute_optimizer_state",
    "full_tensor",
    "full_tensors",
    "shard",
]
