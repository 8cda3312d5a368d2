"""The table of models, and the shipped configs that are written from it.

Nothing here needs torch but :mod:`~kasa_tune.families.figures`.
"""

from kasa_tune.families.combining import TrainingConfig, training_configs
from kasa_tune.families.headers import Figures
from kasa_tune.families.settings import Task
from kasa_tune.families.table import MODELS, Family, Model
from kasa_tune.families.tasks import TASKS
from kasa_tune.families.writing import training_text

__all__ = [
    "MODELS",
    "TASKS",
    "Family",
    "Figures",
    "Model",
    "Task",
    "TrainingConfig",
    "training_configs",
    "training_text",
]
