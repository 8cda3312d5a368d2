"""Step checkpoints that are whole or absent, and where a run resumes."""

from kasa_tune.components.checkpoints.checkpoint import (
    CheckpointError,
    StopSignals,
    find_checkpoint,
    list_checkpoints,
    load_part,
    run_lock,
    save_checkpoint,
    verify_checkpoint,
    weights_fingerprint,
)
from kasa_tune.components.checkpoints.resuming import resume_point, start_point

__all__ = [
    "CheckpointError",
    "StopSignals",
    "find_checkpoint",
    "list_checkpoints",
    "load_part",
    "resume_point",
    "run_lock",
    "save_checkpoint",
    "start_point",
    "verify_checkpoint",
    "weights_fingerprint",
]
