"""The components that schemas of training have: optimizer, schedule, loss, logger and profiler."""

from dataclasses import replace

from kasa_tune.config.bounds import (
    COUNT,
    FILE_NAME,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    TWO_FRACTIONS,
    WEIGHT,
)
from kasa_tune.config.entries import (
    Component,
    FilePath,
    Key,
    OneOrMany,
    Schema,
    Section,
    at_least,
)
from kasa_tune.config.evaluation import TASK

OPTIMIZER = Component(
    positional=1,
    values={
        "lr": Key(
            float,
            check=at_least(0, 1000),
            help="learning rate; with a schedule, its highest value",
        ),
        "weight_decay": Key(
            float,
            check=at_least(0, 1000),
            help="decoupled weight decay; torch's AdamW has 0.01, the paper's configs have 0",
        ),
        "eps": Key(
            float,
            check=RATIO,
            help="added to the denominator of the optimizer's update, to keep it finite",
        ),
        "betas": Key(
            tuple[float, float],
            check=TWO_FRACTIONS,
            help="Adam: how slowly the averages of gradients and of their squares change",
        ),
        "momentum": Key(float, check=FRACTION, help="SGD, RMSprop: share of the last update"),
        "dampening": Key(float, check=RATIO, help="SGD: share of the gradient that is left out"),
        "alpha": Key(float, check=RATIO, help="RMSprop, ASGD: how slowly their average changes"),
        "rho": Key(float, check=RATIO, help="Adadelta: how slowly its averages change"),
        "lr_decay": Key(float, check=at_least(0, 1000), help="Adagrad: decay of the learning rate"),
        "initial_accumulator_value": Key(
            float, check=WEIGHT, help="Adagrad: where its sum of squares starts"
        ),
        "momentum_decay": Key(float, check=RATIO, help="NAdam: decay of its momentum"),
    },
    help="any optimizer of torch that needs no closure",
)
LR_SCHEDULER = Component(
    default=None,
    positional=1,
    runtime=("num_training_steps",),
    values={
        "warmup_ratio": Key(
            float | None, check=RATIO, help="length of the warm-up as a share of all steps"
        ),
        "num_warmup_steps": Key(
            int | None,
            check=NOT_NEGATIVE,
            help="length of the warm-up in steps; set this or warmup_ratio",
        ),
        "min_lr_ratio": Key(
            float,
            check=RATIO,
            help="`cosine_schedule`: last learning rate as a share of the highest",
        ),
        "num_cycles": Key(
            float, check=at_least(0, 1000), help="torchtune's cosine: waves of the learning rate"
        ),
    },
    help="`cosine_schedule` or `linear_schedule` of `kasa_tune.components.training`, or one of "
    "torchtune's; null: a constant learning rate",
)
LOSS = Component(
    values={
        "chunk_size": Key(
            int, check=POSITIVE, help="most tokens whose logits are in memory at a time"
        ),
        "label_smoothing": Key(float, check=RATIO, help="share of the target given to all tokens"),
        "num_output_chunks": Key(
            int, check=COUNT, help="torchtune's losses: number of parts of the logits"
        ),
    },
    default={"_component_": "kasa_tune.components.training.ChunkedCrossEntropy"},
    help="the loss; of `ChunkedCrossEntropy`, `chunk_size` limits how many tokens have their logits "
    "in memory at a time, and `label_smoothing` is the usual one",
)
METRIC_LOGGER = OneOrMany(
    Component(
        values={
            "log_dir": Key(FilePath | None, help="folder of what the logger writes"),
            "filename": Key(FilePath | None, check=FILE_NAME, help="its file in that folder"),
        },
        default={
            "_component_": "kasa_tune.components.training.JSONLLogger",
            "log_dir": "${output_dir}",
        },
        help="where metrics are written besides the JSON lines and config.yaml that every run has: "
        "Trackio, or one of torchtune's loggers (TensorBoard, W&B, MLflow, Comet)",
    ),
    help="where metrics are written: a logger, or a list of them",
)
PROFILER = Component(
    values={
        "output_dir": Key(FilePath, help="folder of the profiler's traces"),
        **{
            name: Key(
                int | None, check=NOT_NEGATIVE, help="a phase of the schedule of torch.profiler"
            )
            for name in ("wait_steps", "warmup_steps", "num_cycles")
        },
        "active_steps": Key(int | None, check=POSITIVE, help="number of steps that are recorded"),
    },
    default={
        "_component_": "torchtune.training.setup_torch_profiler",
        "enabled": False,
        "output_dir": "${output_dir}/profiler",
    },
    help="torch's profiler; off unless `profiler.enabled=True`",
)

_VALIDATION = Section(
    {
        "tasks": OneOrMany(
            replace(TASK, default=None),
            help="tasks that the model does at every validation, as `evaluate_model` has them "
            "(docs/evaluation.md); logged as `val_<task>_<metric>`; null: only the loss is measured",
        ),
        "limit": Key(int, 64, COUNT, help="the most rows of each task"),
        "num_samples": Key(
            int,
            4,
            at_least(0, 1_000_000),
            help="how many answers of each task are written to `samples.jsonl` every time",
        ),
        "prompts": Key(
            list[str], [], help="texts that are completed every time, for `samples.jsonl`"
        ),
        "max_new_tokens": Key(int, 64, COUNT, help="the most tokens of a completion of `prompts`"),
        "batch_size": Key(
            int, "${batch_size_val}", COUNT, help="number of prompts in a forward pass"
        ),
    },
    help="what the model is asked at every validation besides its loss; answers are greedy",
)
_KEEP_BEST = Key(
    str | None,
    None,
    help="a validation metric, such as val_loss or `val_<task>_<metric>`: the checkpoint with its "
    "best value is kept besides the last ones, and `checkpoints/best` in `output_dir` leads to it",
)
_EARLY_STOPPING = Section(
    {
        "metric": Key(str | None, None, help="a validation metric; null: the run is not stopped"),
        "patience": Key(
            int, 3, COUNT, help="stop after so many validations in a row that are not better"
        ),
        "min_delta": Key(
            float,
            0.0,
            at_least(0, 1_000_000),
            help="a value is better if it beats the best one by more than this",
        ),
    },
    help="ends a run whose validation does not get better any more",
)
WHILE_TRAINING: Schema = {
    "validation": _VALIDATION,
    "keep_best": _KEEP_BEST,
    "early_stopping": _EARLY_STOPPING,
}
