"""The processes that torchrun starts: how they agree, and how they share out work and weights."""

from kasa_tune.components.processes.sharding import cut_optimizer_state, part_of, whole, whole_tree
from kasa_tune.components.processes.world import OtherRankError, World, shard, spread

__all__ = [
    "OtherRankError",
    "World",
    "cut_optimizer_state",
    "part_of",
    "shard",
    "spread",
    "whole",
    "whole_tree",
]
