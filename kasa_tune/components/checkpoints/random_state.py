"""State of the random generators that a run draws from."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

log = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """State of Python's, NumPy's and torch's global generators, CUDA devices included."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Bring all global generators back; CUDA ones where as many devices exist as were saved, else a warning is
    logged.
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
            f"The random state of {len(state['cuda'])} CUDA devices was saved and there are {found}: it is not "
            "restored, and what these devices draw, dropout say, will differ from an uninterrupted run."
        )


def restore_rng_state(saved: Mapping[str, Any], *, rank: int, world_size: int) -> None:
    """Bring one process's generators back from a checkpoint; where other processes saved it, seed them anew.

    Args:
        saved: the part ``rng``: the state of rank 0, and under ``other_ranks`` the list of the others' states.
        rank: of this process.
        world_size: number of processes now.
    """
    states = [saved, *saved.get("other_ranks", [])]
    if len(states) == world_size:
        return set_rng_state(states[rank])
    log.warning(
        f"Saved by {len(states)} processes and resumed by {world_size}: what is random, dropout for "
        "example, is drawn anew."
    )
    torch.manual_seed(torch.initial_seed() + len(states) * world_size)
