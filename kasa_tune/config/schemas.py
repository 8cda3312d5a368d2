"""The schemas of our recipes: every key of a config, what it takes, its default and what it is for."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from kasa_tune import registry
from kasa_tune.config.entries import (
    Check,
    Component,
    Ignored,
    Key,
    OneOrMany,
    Schema,
    Section,
    above,
    at_least,
)
from kasa_tune.methods import METHODS

POSITIVE, NOT_NEGATIVE = at_least(1), at_least(0)
FRACTION = Check("at least 0 and below 1", lambda value: 0 <= value < 1)
RATIO = Check("between 0 and 1", lambda value: 0 <= value <= 1)
DEVICE = Check(
    "cpu, cuda or cuda:<index>", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None
)
DTYPE = Check(
    "bf16 or fp32",
    lambda value: value in ("bf16", "fp32"),
    dict.fromkeys(
        ("fp16", "float16", "half"),
        "fp16 needs gradient scaling, which the recipes do not do; use bf16 or fp32",
    ),
)
EVEN = Check("even and at least 2", lambda value: value >= 2 and value % 2 == 0)
TOLERANCE = Check("above 0 and below 1", lambda value: 0 < value < 1)
SHARD_SIZE = Check(
    "as 5GB or 500MB", lambda value: re.fullmatch(r"[1-9]\d*(KB|MB|GB)", value) is not None
)
BY_RESUME = Check("False: the top level's resume_from_checkpoint decides", lambda value: not value)

_ATTN_MODULES = Key(list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]])
_RANK = Key(int, check=POSITIVE)
_ALPHA = Key(float, check=above(0))
_DROPOUT = Key(float, check=FRACTION)

_TOKENIZER = Component(
    values={"max_seq_len": Key(int | None, check=POSITIVE)}, help="text to tokens"
)
_MODEL = Component(
    values={
        "attn_modules": _ATTN_MODULES,
        "apply_to_mlp": Key(bool | list[Literal["w1", "w2", "w3"]]),
        "rank": _RANK,
        "alpha": _ALPHA,
        "dropout": _DROPOUT,
        "truncation_rank": Key(int | None, check=NOT_NEGATIVE),
        "truncation": Key(Literal["paper", "published"]),
        "diag_init": Key(Literal["normal", "ones"]),
        "edit_storage": Key(Literal["auto", "folded", "factored"]),
        "use_dora": Key(bool),
        "lora_attn_modules": _ATTN_MODULES,  # torchtune's own LoRA builders
        "lora_rank": _RANK,
        "lora_alpha": _ALPHA,
        "lora_dropout": _DROPOUT,
    },
    help="the model, where its adapters go, and their rank, alpha and dropout",
)
_DTYPE_OF_ADAPTER = {"dtype": Key(str, "fp32", DTYPE, help="precision of the adapter's parameters")}
_REGULARIZERS = {
    "beta": Key(
        float, 1e-4, NOT_NEGATIVE, help="weight of the L2 term on the adapter's singular values"
    ),
    "gamma": Key(
        float, 1e-3, NOT_NEGATIVE, help="weight of the term that keeps A and B orthogonal"
    ),
    "orthogonal_gram": Key(Literal["thin", "full"], "thin"),
    "reduction": Key(Literal["mean", "sum"], "mean"),
}
_START = {
    "split": Key(
        Literal["balanced", "paper"], "balanced", help="how B and A share a component's size"
    ),
    "covariance_power": Key(
        float, 1.0, NOT_NEGATIVE, help="of the covariance: 1 is CorDA, 0 is PiSSA or MiLoRA"
    ),
    "damping": Key(
        float, 0.01, NOT_NEGATIVE, help="added to the covariance, as a share of its mean diagonal"
    ),
    "damping_search": Key(
        bool, False, help="double it until the inverse is accurate, as published"
    ),
    "normalization": Key(Literal["unit_mean_diag", "published"], "unit_mean_diag"),
    "dynamic_ranks": Key(
        bool, False, help="CorDA++: each layer its own rank, within the budget of model.rank"
    ),
    "min_rank": Key(int, 1, NOT_NEGATIVE),
    "max_rank": Key(int | None, None, POSITIVE),
    "lr_ratio": Key(float, 1.0, above(0), help="learning rate of B over that of A (LoRA+)"),
}
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
    f"{name} {method.quantization_iterations}"
    for name, method in METHODS.items()
    if method.quantization_iterations
)
_ADAPTER = Section({**_DTYPE_OF_ADAPTER, **_REGULARIZERS}, help="the regularizers")
_CORDA_ADAPTER = Section(
    {
        "method": _method(
            "corda_finetune_single_device", "what the adapters start from; lora: B = 0"
        ),
        "mode": Key(
            Literal["ipm", "kpm"],
            "ipm",
            help="corda: adapt the components that matter most to the data, or least",
        ),
        **_DTYPE_OF_ADAPTER,
        **_START,
    },
    help="what the adapters start from",
)
_QCORDA_ADAPTER = Section(
    {
        "method": _method(
            "qcorda_finetune_single_device", "what the adapters start from, and what is quantized"
        ),
        **_DTYPE_OF_ADAPTER,
        **_START,
        "quantization_iterations": Key(
            int | None,
            None,
            POSITIVE,
            help="times that quantization and component are found; null: " + _ITERATIONS,
        ),
        **_REGULARIZERS,
    },
    help="what the adapters start from; beta and what follows: of qkasa",
)
_QUANTIZATION = Section(
    {
        "block_size": Key(int, 64, EVEN, help="weights that share a scale"),
        "scaler_block_size": Key(
            int,
            256,
            POSITIVE,
            help="scales that share a scale; fewer where a layer's do not divide by it",
        ),
    },
    help="how the frozen linears of the transformer blocks are stored in four bits (NF4)",
)
_CHECKPOINTER = Component(
    values={
        "should_load_recipe_state": Key(bool, check=BY_RESUME),
        "resume_from_checkpoint": Key(bool, check=BY_RESUME),
    },
    help="reads the base model's weights",
)
_DATASET = Component(
    positional=1,
    own={
        "packed": Key(bool, False, help="several samples in one row"),
        "max_packs": Key(int | None, None, POSITIVE),
        "split_across_pack": Key(bool, False),
        "weight": Key(
            float,
            1.0,
            above(0),
            help="how often this dataset is drawn: its length times this, in an epoch",
        ),
    },
)
_DATASET_OR_NONE = replace(_DATASET, default=None)
_CALIBRATION = Section(
    {
        "dataset": OneOrMany(
            _DATASET_OR_NONE,
            help="ipm: the new task, ${dataset}; kpm: questions of the knowledge to keep",
        ),
        "concatenate": Key(
            bool, False, help="one stream of tokens cut into rows, instead of a sample a row"
        ),
        "num_samples": Key(int, 256, POSITIVE, help="rows of a round"),
        "max_seq_len": Key(int, 2048, POSITIVE, help="tokens of a row"),
        "rounds": Key(
            int, 1, POSITIVE, help="CorDA++: independent draws, of which each layer keeps its best"
        ),
        "batch_size": Key(int, 1, POSITIVE, help="rows in one forward pass"),
        "seed": Key(int, "${seed}", NOT_NEGATIVE),
        "accumulate": Key(
            Literal["fp32", "fp64"], "fp32", help="precision of the covariances' sums"
        ),
        "offload": Key(bool, False, help="hidden states wait in the host's memory"),
        "max_selection_dim": Key(
            int | None, None, POSITIVE, help="rounds: wider inputs pool their draws"
        ),
        "cache_dir": Key(
            str, "${output_dir}/decomposition", help="where the finished decomposition is kept"
        ),
    },
    help="the data that CorDA looks at before training",
)
_OPTIMIZER = Component(
    positional=1,
    values={
        "lr": Key(float, check=NOT_NEGATIVE),
        "weight_decay": Key(float, check=NOT_NEGATIVE),
        "eps": Key(float, check=NOT_NEGATIVE),
    },
)
_LR_SCHEDULER = Component(
    default=None,
    positional=1,
    runtime=("num_training_steps",),
    values={
        "warmup_ratio": Key(float | None, check=RATIO),
        "num_warmup_steps": Key(int | None, check=NOT_NEGATIVE),
    },
    help="null: a constant learning rate",
)
_LOSS = Component(default={"_component_": "kasa_tune.components.training.ChunkedCrossEntropy"})
_METRIC_LOGGER = Component(
    default={"_component_": "kasa_tune.components.training.JSONLLogger", "log_dir": "${output_dir}"}
)
_PROFILER = Component(
    default={
        "_component_": "torchtune.training.setup_torch_profiler",
        "enabled": False,
        "output_dir": "${output_dir}/profiler",
    }
)
_SEED = Key(int, 42, NOT_NEGATIVE, help="of every random choice; never null")
_DEVICE = Key(str, check=DEVICE)
_DTYPE = Key(str, "bf16", DTYPE, help="precision of the base model and of the computation")

FINETUNE: Schema = {
    "output_dir": Key(str, help="folder of checkpoints, logs and results"),
    "tokenizer": _TOKENIZER,
    "model": _MODEL,
    "adapter": _ADAPTER,
    "checkpointer": _CHECKPOINTER,
    "resume_from_checkpoint": Key(
        bool | str, False, help="True: the newest good one in output_dir; or the path of one"
    ),
    "adapter_checkpoint": Key(
        str | None,
        None,
        help="start from this adapter: a run's output_dir, a checkpoint or a native adapter",
    ),
    "dataset": OneOrMany(_DATASET, help="what to learn from"),
    "dataset_val": OneOrMany(_DATASET_OR_NONE, help="held-out samples; null: no validation"),
    "run_val_every_n_steps": Key(int | None, None, POSITIVE),
    "batch_size_val": Key(int, "${batch_size}", POSITIVE),
    "seed": _SEED,
    "shuffle": Key(bool, True),
    "batch_size": Key(int, 16, POSITIVE, help="samples (rows, when packed) in one forward pass"),
    "num_workers": Key(int, 0, NOT_NEGATIVE, help="processes that prepare batches"),
    "optimizer": _OPTIMIZER,
    "lr_scheduler": _LR_SCHEDULER,
    "loss": _LOSS,
    "epochs": Key(int, 1, POSITIVE),
    "max_steps": Key(
        int | None, None, POSITIVE, help="optimizer steps in all; null: what the epochs have"
    ),
    "max_steps_per_epoch": Key(int | None, None, POSITIVE),
    "gradient_accumulation_steps": Key(int, 1, POSITIVE, help="batches in one optimizer step"),
    "clip_grad_norm": Key(float | None, None, above(0)),
    "compile": Key(bool, False),
    "save_every_n_steps": Key(int | None, None, POSITIVE, help="null: at the end of each epoch"),
    "keep_last": Key(int, 2, POSITIVE, help="step checkpoints kept in output_dir"),
    "device": _DEVICE,
    "dtype": _DTYPE,
    "enable_activation_checkpointing": Key(bool, False),
    "enable_activation_offloading": Key(bool, False),
    "metric_logger": _METRIC_LOGGER,
    "log_every_n_steps": Key(int, 1, POSITIVE),
    "log_peak_memory_stats": Key(bool, True),
    "profiler": _PROFILER,
    "dry_run": Key(bool, False, help="print the byte budget and stop"),
    "world_size": Key(int | None, None, POSITIVE, help="dry_run: of a process of so many"),
    "data_parallel_shard_dim": Key(
        int | None,
        None,
        POSITIVE,
        help="processes that share a copy of the model; null: all of them",
    ),
    "fsdp_cpu_offload": Key(bool, False, help="weights wait on the host"),
    "timeout": Key(int, 600, POSITIVE, help="seconds a process waits for another"),
}


def _with_adapter(adapter: Section, **after: Section) -> Schema:
    """FINETUNE with another section `adapter`, and the sections `after` it."""
    schema: dict = {}
    for name, spec in FINETUNE.items():
        schema |= {"adapter": adapter, **after} if name == "adapter" else {name: spec}
    return schema


CORDA: Schema = _with_adapter(_CORDA_ADAPTER, calibration=_CALIBRATION)
QCORDA: Schema = _with_adapter(
    _QCORDA_ADAPTER, quantization=_QUANTIZATION, calibration=_CALIBRATION
)

GENERATE: Schema = {
    "output_dir": Key(str | None, None, help="where completions are written; null: only printed"),
    "tokenizer": _TOKENIZER,
    "model": _MODEL,
    "adapter": _ADAPTER,
    "checkpointer": _CHECKPOINTER,
    "adapter_checkpoint": Key(
        str | None, None, help="a run's output_dir or one of its checkpoints; null: the base model"
    ),
    "prompts": Key(list[str], [], help="texts to complete"),
    "dataset": OneOrMany(_DATASET_OR_NONE, help="samples whose prompts are completed"),
    "num_samples": Key(int, 8, POSITIVE, help="how many samples of the dataset"),
    "max_new_tokens": Key(int, 64, POSITIVE),
    "temperature": Key(float, 0.0, NOT_NEGATIVE, help="0: always the likeliest token"),
    "top_k": Key(int | None, None, POSITIVE),
    "seed": _SEED,
    "batch_size": Key(int, 8, POSITIVE),
    "device": _DEVICE,
    "dtype": _DTYPE,
}

EXPORT: Schema = {
    "format": Key(Literal["peft", "merged", "native"], help="what to write"),
    "adapter_checkpoint": Key(
        str, help="a run's output_dir, one of its checkpoints, or a native adapter"
    ),
    "output_dir": Key(str, help="a folder that does not exist yet"),
    "checkpoint_dir": Key(
        str | None, None, help="where the base model's files lie; null: where the run had them"
    ),
    "base_model": Key(
        str | None,
        None,
        help="what the adapter and the card call the base; null: its repository, or its folder",
    ),
    "dtype": Key(Literal["bf16", "fp32"], None, help="null: peft fp32, merged as the base's files"),
    "rank": Key(
        int | None,
        None,
        POSITIVE,
        help="peft: of every layer, filled up with zeros; null: what they need",
    ),
    "rank_pattern": Key(bool, False, help="peft: each layer its own rank"),
    "tolerance": Key(
        float | None,
        None,
        TOLERANCE,
        help="peft: singular values left out, as a share of the largest",
    ),
    "max_shard_size": Key(
        str, "5GB", SHARD_SIZE, help="merged: of a file, which is also what stands in memory"
    ),
}

_OF_IMPORT: Schema = {
    "peft_adapter": Key(str, help="folder of a LoRA saved by PEFT, with adapter_config.json"),
    "initial_adapter": Key(
        str | None,
        None,
        help="PiSSA, CorDA, OLoRA, LoRA-GA, LoftQ: the same adapter, saved before training",
    ),
    "output_dir": Key(str, help="a folder that does not exist yet"),
    "model": replace(
        _MODEL, help="of the base; where adapters go and their rank come from the adapter"
    ),
    "checkpointer": _CHECKPOINTER,
    "device": replace(_DEVICE, default="cpu", help="where weights are decomposed"),
    "dtype": replace(_DTYPE, help="of the base when the adapter was trained"),
}
# Of a base that has a training config, that one will do.
IMPORT: Schema = _OF_IMPORT | {name: Ignored() for name in QCORDA if name not in _OF_IMPORT}

_RECIPES: Mapping[str, Schema] = {
    "kasa_finetune_single_device": FINETUNE,
    "corda_finetune_single_device": CORDA,
    "qcorda_finetune_single_device": QCORDA,
    "generate_text": GENERATE,
    "export_adapter": EXPORT,
    "import_adapter": IMPORT,
}
# By the end of a config's name; `schema_of` also looks at its keys.
SCHEMAS: Mapping[str, Schema] = {
    suffix: schema
    for recipe, schema in _RECIPES.items()
    for suffix in registry.config_suffixes(recipe)
}


def schema_of(name: str, tree: Mapping[str, Any]) -> Schema:
    """The schema a config belongs to: that of its `adapter.method`, of its name, or of a key that no other has."""
    adapter = tree.get("adapter")
    if isinstance(adapter, dict) and (trains := _TRAINED_BY.get(str(adapter.get("method")))):
        return _RECIPES[trains]
    named = next((schema for ending, schema in SCHEMAS.items() if name.endswith(ending)), None)
    if named is not None:
        return named
    if "format" in tree:
        return EXPORT
    if "peft_adapter" in tree:
        return IMPORT
    if "quantization" in tree:
        return QCORDA
    if "calibration" in tree or (isinstance(adapter, dict) and "method" in adapter):
        return CORDA
    return (
        GENERATE
        if "optimizer" not in tree and tree.keys() & {"prompts", "adapter_checkpoint"}
        else FINETUNE
    )


def recipes_taking(key: str, value: Any) -> list[str]:
    """The recipes in whose configs `value` may stand at the dotted `key`, as far as the key itself tells."""
    return [recipe for recipe, schema in _RECIPES.items() if _takes(schema, key, value)]


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
