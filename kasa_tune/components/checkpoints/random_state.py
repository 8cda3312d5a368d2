"""Saving and restoring the state of the random generators that a run draws from."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """Return the state of the global generators of Python, NumPy, torch, and all CUDA devices."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore all global generators. CUDA generators are restored only on as many devices as were
    saved. Otherwise a warning is logged.
    """
    random.setstate(state["python"])
    numpy_state = dict(state["numpy"], state=dict(state["numpy"]["state"]))
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    else:
        log.warning(
            f"The random state of {len(state['cuda'])} CUDA devices was saved, and this machine "
            f"has {found}. It is not restored, so that random numbers drawn on these devices, such "
            "as dropout, will differ from an uninterrupted run."
        )


def restore_rng_state(saved: Mapping[str, Any], *, rank: int, world_size: int) -> None:
    """Restore one process's generators from a checkpoint. If another number of processes saved it,
    seed the generators anew.

    Args:
        saved: the part ``rng`` of a checkpoint: the state of rank 0, and under ``other_ranks`` the
            list of the others' states.
        rank: rank of this process.
        world_size: present number of processes.
    """
    states = [saved, *saved.get("other_ranks", [])]
    if len(states) == world_size:
        return set_rng_state(states[rank])
    log.warning(
        f"The checkpoint was saved by {len(states)} processes and is resumed by {world_size}. "
        "Random numbers, such as dropout, will differ from an uninterrupted run."
    )
    torch.manual_seed(torch.initial_seed() + len(states) * world_size)
