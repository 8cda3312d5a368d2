"""Step checkpoints: writing and verifying them, and finding where a run resumes. A crash never
leaves a checkpoint that is half written under its final name.
"""

from kasa_tune.components.checkpoints.allowed import build_allowed, check_allowed
from kasa_tune.components.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_part,
    read_manifest,
    verify_checkpoint,
)
from kasa_tune.components.checkpoints.locking import run_lock
from kasa_tune.components.checkpoints.random_state import rng_state, set_rng_state
from kasa_tune.components.checkpoints.resuming import (
    adapter_start,
    resume_point,
    resume_position,
    starting_checkpoint,
)
from kasa_tune.components.checkpoints.writing import check_saveable, clean_up, save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "adapter_start",
    "build_allowed",
    "check_allowed",
    "check_saveable",
    "clean_up",
    "find_checkpoint",
    "latest_checkpoint",
    "list_checkpoints",
    "load_part",
    "read_manifest",
    "resume_point",
    "resume_position",
    "rng_state",
    "run_lock",
    "save_checkpoint",
    "set_rng_state",
    "starting_checkpoint",
    "verify_checkpoint",
]
