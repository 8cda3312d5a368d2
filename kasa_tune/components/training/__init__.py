"""What a training run is made of besides its mathematics: loss, schedules, loggers and memory budget."""

from kasa_tune.components.training.loggers import (
    JSONLLogger,
    SilentLogger,
    TrackioLogger,
    read_metrics,
)
from kasa_tune.components.training.loss import ChunkedCrossEntropy, return_hidden_states
from kasa_tune.components.training.lr_schedules import cosine_schedule, linear_schedule
from kasa_tune.components.training.memory import (
    allow_graphs,
    budget_report,
    check_optimizer,
    memory_budget,
    per_process,
)

__all__ = [
    "ChunkedCrossEntropy",
    "JSONLLogger",
    "SilentLogger",
    "TrackioLogger",
    "allow_graphs",
    "budget_report",
    "check_optimizer",
    "cosine_schedule",
    "linear_schedule",
    "memory_budget",
    "per_process",
    "read_metrics",
    "return_hidden_states",
]
