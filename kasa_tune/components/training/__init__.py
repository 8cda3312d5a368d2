"""The parts of a training run besides its mathematics: the step loop, losses, learning rate
schedules, loggers, and the memory budget.
"""

from kasa_tune.components.training.dry_run import (
    dry_run_budget,
    dry_run_report,
    longest_rows,
    report_without_rows,
    rows_at_hand,
)
from kasa_tune.components.training.loggers import (
    JSONLLogger,
    SilentLogger,
    TrackioLogger,
    read_metrics,
)
from kasa_tune.components.training.loss import (
    ChunkedCrossEntropy,
    LossOnLogits,
    return_hidden_states,
    summed_loss,
)
from kasa_tune.components.training.lr_schedules import cosine_schedule, linear_schedule
from kasa_tune.components.training.memory import (
    allow_graphs,
    budget_report,
    check_optimizer,
    memory_budget,
    peaks,
    per_process,
)
from kasa_tune.components.training.model import build_classifier, build_training_model
from kasa_tune.components.training.optimizers import MuonWithAdamW
from kasa_tune.components.training.phases import Phases
from kasa_tune.components.training.step import NonFiniteError, Step
from kasa_tune.components.training.steps import Steps

__all__ = [
    "ChunkedCrossEntropy",
    "JSONLLogger",
    "LossOnLogits",
    "MuonWithAdamW",
    "NonFiniteError",
    "Phases",
    "SilentLogger",
    "Step",
    "Steps",
    "TrackioLogger",
    "allow_graphs",
    "budget_report",
    "build_classifier",
    "build_training_model",
    "check_optimizer",
    "cosine_schedule",
    "dry_run_budget",
    "dry_run_report",
    "linear_schedule",
    "longest_rows",
    "memory_budget",
    "peaks",
    "per_process",
    "read_metrics",
    "report_without_rows",
    "return_hidden_states",
    "rows_at_hand",
    "summed_loss",
]
