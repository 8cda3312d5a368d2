"""Which configs there are: a model, a task and a method make one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kasa_tune.families.settings import Calibration, Setting, Task
from kasa_tune.families.table import MODELS, Model
from kasa_tune.families.tasks import TASKS
from kasa_tune.methods import METHODS, Method

# Keys of `model` that one method alone has.
MODEL_KEYS = {"dora": ("use_dora: True",)}


@dataclass(frozen=True)
class TrainingConfig:
    """One config for fine-tuning."""

    model: Model
    task: Task
    method: Method

    @property
    def prefix(self) -> str:
        """How the names of all configs of this model and task begin."""
        return f"{self.model.name}{self.task.suffix}"

    @property
    def name(self) -> str:
        """Its name, as `tune run --config` takes it."""
        return f"{self.prefix}{self.method.suffix}".lstrip("_")

    @property
    def recipe(self) -> str:
        """The recipe that its header names."""
        return f"{self.method.recipe}_single_device"

    @property
    def setting(self) -> Setting:
        """Its hyper-parameters: those of KaSA's paper for adapters that start at zero, else those of CorDA's."""
        return self.task.corda if self.method.builders[0] == "corda" else self.task.kasa

    @property
    def accumulation(self) -> int:
        """Batches of an optimizer step."""
        return (self.setting.samples or self.model.family.samples) // self.model.batch_size

    @property
    def has_corda_ranks(self) -> bool:
        """Whether CorDA++'s two additions apply."""
        return self.method.calibrated and self.method.decomposition == "co_svd"

    @property
    def calibration(self) -> Calibration | None:
        """What it looks at before training, if it does."""
        if not self.method.calibrated:
            return None
        if self.method.mode == "kpm":
            return self.task.kept
        draws = "  # CorDA++: 5, of which each layer keeps its best" if self.has_corda_ranks else ""
        return Calibration(
            dataset=" ${dataset}  # samples of the new task",
            concatenate="False",
            num_samples=256,
            max_seq_len=self.task.max_seq_len,
            batch_size=self.task.calibration_batch,
            rounds=f"1{draws}",
            rounds_to_try=5,
        )


def training_configs() -> Iterator[TrainingConfig]:
    """Every config for fine-tuning. A model's first task has the model's methods, the others their own."""
    for model in MODELS.values():
        for index, task in enumerate(model.tasks):
            for method in TASKS[task].methods if index else model.methods:
                yield TrainingConfig(model, TASKS[task], METHODS[method])


# Models that have a config to let them write after a run, and the methods whose run it takes as it stands.
GENERATED = {"tiny": ("kasa", "lora", "corda", "qcorda"), "stories260k": ("kasa",)}


def generation_of(config: TrainingConfig) -> tuple[str, list[str]] | None:
    """The config that completes prompts with the adapter of a run, and the overrides it needs; None without one."""
    shipped, method = GENERATED.get(config.model.name, ()), config.method
    linear = method.builders[0]
    nearest = "qcorda" if method.quantized and linear == "corda" else linear
    if method.name not in shipped and nearest not in shipped:
        return None
    if method.name in shipped:
        return f"{config.name}_generate", []
    keys = [f"model.{key.replace(': ', '=')}" for key in MODEL_KEYS.get(method.name, ())]
    return (
        f"{config.prefix}_{nearest}_generate",
        [*keys, f"adapter_checkpoint=/tmp/kasa_tune/{config.name}"],
    )
