"""The schemas of our recipes: every key of a config, what it takes, its default and what it is for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from kasa_tune import registry
from kasa_tune.config.bounds import COUNT, POSITIVE, SCALE, TEMPERATURE
from kasa_tune.config.classification import of_encoders
from kasa_tune.config.comparing import COMPARE
from kasa_tune.config.entries import (
    Check,
    FilePath,
    Ignored,
    Key,
    OneOrMany,
    Schema,
    Section,
    at_least,
)
from kasa_tune.config.evaluation import EVALUATE
from kasa_tune.config.exchange import EXPORT, OF_IMPORT
from kasa_tune.config.parts import (
    CALIBRATION,
    CHECKPOINT_DIR,
    CHECKPOINTER,
    DATASET,
    DATASET_OR_NONE,
    DEVICE,
    DTYPE,
    DTYPE_OF_ADAPTER,
    MODEL,
    QUANTIZATION,
    REGULARIZERS,
    SEED,
    START,
    TOKENIZER,
)
from kasa_tune.config.parts_of_training import (
    LOSS,
    LR_SCHEDULER,
    METRIC_LOGGER,
    OPTIMIZER,
    PROFILER,
    WHILE_TRAINING,
)
from kasa_tune.config.report import REPORT
from kasa_tune.config.services import JUDGE, SYNTHESIZE
from kasa_tune.gpus import PEAK_FLOPS
from kasa_tune.methods import METHODS

_TRAINED_BY = {  # adapter.method to the recipe that takes it; the kasa recipe has no such key
    method.setting: f"{method.recipe}_single_device"
    for method in METHODS.values()
    if method.setting
}


def _method(recipe: str, help: str) -> Key:
    """The key `adapter.method` of a recipe, which knows the methods of the others; the first is the default."""
    own = tuple(method for method, trains in _TRAINED_BY.items() if trains == recipe)
    others = {
        name: f"{row.recipe}_single_device" for name, row in METHODS.items() if not row.setting
    }
    because = {
        method: f"that is a method of {trains}" for method, trains in (others | _TRAINED_BY).items()
    }
    return Key(Literal[own], own[0], Check("", lambda value: True, because), help=help)


_ITERATIONS = ", ".join(
    f"{method.quantization_iterations} for {name}"
    for name, method in METHODS.items()
    if method.quantization_iterations
)
_ADAPTER = Section(
    {**DTYPE_OF_ADAPTER, **REGULARIZERS},
    help="precision of the adapters and KaSA's regularizers",
)
_CORDA_ADAPTER = Section(
    {
        "method": _method(
            "corda_finetune_single_device",
            "where the adapters start: in a part of the weight that is found with the calibration "
            "data (corda), in the largest (pissa) or smallest (milora) singular values of the "
            "weight, in its QR decomposition (olora), in the leading directions of the layer's "
            "inputs (eva), or at zero (lora)",
        ),
        "mode": Key(
            Literal["ipm", "kpm"],
            "ipm",
            help="CorDA: ipm adapts what the calibration data uses most, so calibrate on the new task; "
            "kpm adapts what it uses least, so calibrate on the knowledge to keep",
        ),
        **DTYPE_OF_ADAPTER,
        **START,
    },
    help="the method, and how its adapters start",
)
_QCORDA_ADAPTER = Section(
    {
        "method": _method(
            "qcorda_finetune_single_device",
            "where the adapters start, and what is frozen in four bits; see the table below",
        ),
        **DTYPE_OF_ADAPTER,
        **START,
        "quantization_iterations": Key(
            int | None,
            None,
            at_least(1, 1000),
            help="qpissa, loftq: how many times the start and the quantized weight are found in turn; "
            "null: " + _ITERATIONS,
        ),
        **REGULARIZERS,
    },
    help="the method, and how its adapters start; the regularizers belong to qkasa",
)
FINETUNE: Schema = {
    "checkpoint_dir": CHECKPOINT_DIR,
    "output_dir": Key(
        FilePath, help="folder for checkpoints, metrics and results (docs/running.md)"
    ),
    "tokenizer": TOKENIZER,
    "model": MODEL,
    "adapter": _ADAPTER,
    "checkpointer": CHECKPOINTER,
    "resume_from_checkpoint": Key(
        bool | Literal["restart"] | FilePath,
        False,
        help="True continues from the newest intact checkpoint in `output_dir`, or starts anew if "
        "there is none; a path continues from that checkpoint; restart starts anew and moves what "
        "an earlier run left in `output_dir` into a folder `restarted_<n>` there",
    ),
    "verify_base": Key(
        Literal["sampled", "full"],
        "sampled",
        help="how a resumed run and an export compare the base weights with those of training: "
        "a sample of every tensor, or all bytes",
    ),
    "adapter_checkpoint": Key(
        FilePath | None,
        None,
        help="start from this adapter instead of a new one: a run's `output_dir`, one of its "
        "checkpoints, or a native adapter, exported or imported (docs/import.md); its `model` "
        "section must be the same as this config's. A checkpoint to resume from has precedence",
    ),
    "dataset": OneOrMany(DATASET, help="the training data (docs/data.md)"),
    "dataset_val": OneOrMany(
        DATASET_OR_NONE,
        help="held-out samples to validate on, with the keys of `dataset`; null: no validation",
    ),
    "run_val_every_n_steps": Key(
        int | None,
        None,
        POSITIVE,
        help="validate before the first step, every n steps and after the last one; null: never",
    ),
    "batch_size_val": Key(
        int, "${batch_size}", COUNT, help="number of samples in a validation batch"
    ),
    **WHILE_TRAINING,
    "seed": SEED,
    "shuffle": Key(bool, True, help="draw a new order of the samples in every epoch"),
    "batch_size": Key(
        int,
        16,
        COUNT,
        help="number of samples (rows, when packed) in one forward pass, on each process",
    ),
    "num_workers": Key(
        int,
        0,
        at_least(0, 1024),
        help="number of processes that prepare batches; 0: the training process does it",
    ),
    "optimizer": OPTIMIZER,
    "lr_scheduler": LR_SCHEDULER,
    "loss": LOSS,
    "epochs": Key(int, 1, COUNT, help="how many times training goes through the data"),
    "max_steps": Key(
        int | None,
        None,
        POSITIVE,
        help="number of optimizer steps; null: as many as the epochs have",
    ),
    "max_steps_per_epoch": Key(
        int | None,
        None,
        POSITIVE,
        help="start the next epoch after this many steps; null: no limit",
    ),
    "gradient_accumulation_steps": Key(
        int,
        1,
        COUNT,
        help="number of batches in one optimizer step; the last step of an epoch may have fewer",
    ),
    "clip_grad_norm": Key(
        float | None, None, SCALE, help="upper bound of the gradient's norm; null: no bound"
    ),
    "compile": Key(
        bool, False, help="compile the model's layers: the first steps are slow, later ones faster"
    ),
    "save_every_n_steps": Key(
        int | None,
        None,
        POSITIVE,
        help="save a checkpoint every n steps, and after the last one; null: after each epoch",
    ),
    "keep_last": Key(
        int, 2, POSITIVE, help="number of checkpoints kept in `output_dir`; older ones are deleted"
    ),
    "device": DEVICE,
    "dtype": DTYPE,
    "enable_activation_checkpointing": Key(
        bool,
        False,
        help="recompute each layer in the backward pass: this takes far less memory and more time",
    ),
    "enable_activation_offloading": Key(
        bool,
        False,
        help="keep activations in the host's memory; needs a GPU and activation checkpointing",
    ),
    "metric_logger": METRIC_LOGGER,
    "log_every_n_steps": Key(int, 1, POSITIVE, help="write metrics every n steps"),
    "log_peak_memory_stats": Key(
        bool, True, help="on a GPU, write the peak memory with the metrics"
    ),
    "profiler": PROFILER,
    "dry_run": Key(
        bool,
        False,
        help="print how many parameters and bytes the run needs, without reading a weight, and stop",
    ),
    "device_flops": Key(
        Literal[tuple(PEAK_FLOPS)] | None,
        None,
        help="with `dry_run`: print how long a step may take on this GPU",
    ),
    "world_size": Key(
        int | None,
        None,
        COUNT,
        help="with `dry_run` of a distributed recipe: count what one of this many processes "
        "needs; a real run takes its number from `--nproc_per_node`",
    ),
    "data_parallel_shard_dim": Key(
        int | None,
        None,
        COUNT,
        help="distributed recipes: number of processes that share one copy of the model; each group "
        "has its own copy; must divide the number of processes; null: all share one copy",
    ),
    "fsdp_cpu_offload": Key(
        bool,
        False,
        help="distributed recipes: keep each process's part of the weights in the host's memory "
        "and run the optimizer there; needs a GPU",
    ),
    "timeout": Key(
        int,
        600,
        at_least(1, 10_000_000),
        help="distributed recipes: seconds that a process waits for the others before it gives up",
    ),
}


def _with_adapter(adapter: Section, **after: Section) -> Schema:
    """FINETUNE with another section `adapter`, and the sections `after` it."""
    schema: dict = {}
    for name, spec in FINETUNE.items():
        schema |= {"adapter": adapter, **after} if name == "adapter" else {name: spec}
    return schema


CORDA: Schema = _with_adapter(_CORDA_ADAPTER, calibration=CALIBRATION)
QCORDA: Schema = _with_adapter(_QCORDA_ADAPTER, quantization=QUANTIZATION, calibration=CALIBRATION)

CLASSIFY: Schema = of_encoders(CORDA)

_OF_RUN = " Null: as the run of `adapter_checkpoint` says"
GENERATE: Schema = {
    "checkpoint_dir": CHECKPOINT_DIR,
    "output_dir": Key(
        FilePath | None,
        None,
        help="folder for `completions.jsonl`; null: completions are only printed",
    ),
    "tokenizer": replace(TOKENIZER, default=None, help=f"{TOKENIZER.help}.{_OF_RUN}"),
    "model": replace(MODEL, default=None, help=f"a model builder, as in training.{_OF_RUN}"),
    "adapter": _ADAPTER,
    "checkpointer": replace(CHECKPOINTER, default=None, help=f"{CHECKPOINTER.help}.{_OF_RUN}"),
    "adapter_checkpoint": Key(
        FilePath | None,
        None,
        help="the trained adapter: a run's `output_dir` or one of its checkpoints; "
        "null: only the base model generates",
    ),
    "prompts": Key(list[str], [], help="the texts to complete"),
    "dataset": OneOrMany(
        DATASET_OR_NONE,
        help="samples whose prompts are completed; each is shown with its reference",
    ),
    "num_samples": Key(
        int, 8, COUNT, help="how many different prompts of the dataset are completed"
    ),
    "max_new_tokens": Key(int, 64, COUNT, help="the most tokens of a completion"),
    "temperature": Key(
        float,
        0.0,
        TEMPERATURE,
        help="temperature of the sampling; 0 always takes the likeliest token",
    ),
    "top_k": Key(
        int | None, None, POSITIVE, help="sample from the k likeliest tokens; null: from all tokens"
    ),
    "seed": SEED,
    "batch_size": Key(int, 8, COUNT, help="number of prompts completed together"),
    "device": DEVICE,
    "dtype": replace(
        DTYPE, default=None, help="precision of the base model; null: that of the run, or bf16"
    ),
}
# Of a base that has a training config, that one will do.
IMPORT: Schema = {
    **OF_IMPORT,
    **{name: Ignored() for name in {**QCORDA, **CLASSIFY} if name not in OF_IMPORT},
}

RECIPES: Mapping[str, Schema] = {
    "kasa_finetune_single_device": FINETUNE,
    "corda_finetune_single_device": CORDA,
    "qcorda_finetune_single_device": QCORDA,
    "classify_finetune_single_device": CLASSIFY,
    "generate_text": GENERATE,
    "evaluate_model": EVALUATE,
    "compare_methods": COMPARE,
    "export_adapter": EXPORT,
    "import_adapter": IMPORT,
    "report_run": REPORT,
    "synthesize_data": SYNTHESIZE,
    "judge_responses": JUDGE,
}
# By the end of a config's name; `schema_of` also looks at its keys.
SCHEMAS: Mapping[str, Schema] = {
    suffix: schema
    for recipe, schema in RECIPES.items()
    for suffix in registry.config_suffixes(recipe)
}

_BY_KEY: Mapping[str, Schema] = {
    "format": EXPORT, "peft_adapter": IMPORT, "run": REPORT, "runs": REPORT, "methods": COMPARE,
    "seeds": SYNTHESIZE, "evaluations": JUDGE, "tasks": EVALUATE, "quantization": QCORDA,
}  # fmt: skip


def schema_of(name: str, tree: Mapping[str, Any]) -> Schema:
    """The schema a config belongs to: that of its `adapter.method`, of its name, or of a key that no other has."""
    if "metric" in tree:
        return CLASSIFY
    adapter = tree.get("adapter")
    if isinstance(adapter, dict) and (trains := _TRAINED_BY.get(str(adapter.get("method")))):
        return RECIPES[trains]
    named = next(
        (schema for ending, schema in SCHEMAS.items() if f"_{name}".endswith(ending)), None
    )
    if named is not None:
        return named
    for key, schema in _BY_KEY.items():
        if key in tree:
            return schema
    if "calibration" in tree or (isinstance(adapter, dict) and "method" in adapter):
        return CORDA
    return (
        GENERATE
        if "optimizer" not in tree and tree.keys() & {"prompts", "adapter_checkpoint"}
        else FINETUNE
    )


def recipes_taking(key: str, value: Any) -> list[str]:
    """The recipes in whose configs `value` may stand at the dotted `key`, as far as the key itself tells."""
    return [recipe for recipe, schema in RECIPES.items() if _takes(schema, key, value)]


def _takes(schema: Schema, key: str, value: Any) -> bool:
    name, _, rest = key.partition(".")
    spec = schema.get(name)
    if rest:
        return isinstance(spec, Section) and _takes(spec.keys, rest, value)
    if not isinstance(spec, Key) or isinstance(spec, Ignored):
        return spec is not None and not isinstance(spec, Ignored)
    try:
        spec.accept(value)
    except ValueError:
        return False
    return True
