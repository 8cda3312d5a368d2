"""What a config may contain: the entries a schema is made of, and the schemas of our recipes.

A schema is a plain dict from key to `Key`, `Section`, `Component` or `OneOrMany`, so a copied recipe adds its own keys
with `config.FINETUNE | {"my_key": config.Key(int, default=3)}`. Types are ordinary annotations: `int | None`,
`list[str]`, `Literal["a", "b"]`. A default may refer to another key: `"${batch_size}"`. Nothing here imports torch.
"""

import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()

# --- values -----------------------------------------------------------------------------------------------------------

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class Check:
    """A condition on a value.

    Args:
        allowed: completes the sentence "expected an integer, ...".
        holds: the condition.
        because: the reason against single values that people try often.
    """

    allowed: str
    holds: Callable[[Any], bool]
    because: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, value: Any) -> bool:
        return self.holds(value)


def at_least(bound: float) -> Check:
    """A finite number, `bound` or more."""
    return Check(f"at least {bound}", lambda value: bound <= value < math.inf)


def above(bound: float) -> Check:
    """A finite number, more than `bound`."""
    return Check(f"greater than {bound}", lambda value: bound < value < math.inf)


def describe(kind: Any) -> str:
    """The type `kind` in words: `int | None` is "an integer or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(arg) for arg in args)
    if origin is list and args[0] is not Any:
        return f"a list, each {describe(args[0])}"
    return _NAMES.get(origin or kind, "a value")


def convert(value: Any, kind: Any) -> Any:
    """`value` as the type `kind`.

    Integers become floats where a float is wanted, and so do strings like 2e-4, which is how plain YAML 1.1 and
    environment variables give them. Nothing else is converted: True is no integer, 1.0 neither.

    Raises:
        TypeError: it is of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return convert(value, arg)
            except TypeError:
                continue
    elif origin is Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [convert(item, args[0]) for item in value]
    elif kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number or (isinstance(value, str) and _SCIENTIFIC.fullmatch(value)):
            return float(value)
    elif isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise TypeError(f"expected {describe(kind)}")


def show(value: Any) -> str:
    """`value` as it stands in a message, shortened."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- entries ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One value of a config.

    Args:
        type: an annotation; a default of None allows null besides.
        default: the value when absent; REQUIRED when it must be given.
        check: a condition that every value but null meets: a `Check`, or any function that returns True or False.
        help: one line.
    """

    type: Any
    default: Any = REQUIRED
    check: Check | Callable[[Any], bool] | None = None
    help: str = ""

    @property
    def allowed(self) -> str:
        """What the key takes, in words."""
        extra = getattr(self.check, "allowed", "one its check accepts") if self.check else ""
        return ", ".join(filter(None, (describe(self._kind), extra)))

    @property
    def _kind(self) -> Any:
        return Union[self.type, None] if self.default is None else self.type  # noqa: UP007 (type may be any annotation)

    def accept(self, value: Any) -> Any:
        """`value`, converted to the key's type.

        Raises:
            ValueError: it is not allowed; the message says what is.
        """
        try:
            value = convert(value, self._kind)
            good = value is None or self.check is None or self.check(value)
        except TypeError:
            good = False
        if good:
            return value
        reason = getattr(self.check, "because", {}).get(str(value))
        raise ValueError(f"expected {self.allowed}" + (f" ({reason})" if reason else ""))


@dataclass(frozen=True)
class Section:
    """A mapping with a schema of its own; absent, every key takes its default."""

    keys: Mapping[str, Key]
    help: str = ""


@dataclass(frozen=True)
class Component:
    """A node with a `_component_`, called with the node's other keys.

    Args:
        default: the node when absent; its keys also complete a node of the same component. None allows null.
        positional: how many leading parameters of the target the recipe supplies.
        runtime: keyword parameters the recipe supplies, which the target must take.
        own: keys the recipe reads from the node and takes out before the call.
        values: what parameters may be, where that is more than the target's annotations say.
        help: one line.
    """

    default: Any = REQUIRED
    positional: int = 0
    runtime: tuple[str, ...] = ()
    own: Mapping[str, Key] = field(default_factory=dict)
    values: Mapping[str, Key] = field(default_factory=dict)
    help: str = ""


@dataclass(frozen=True)
class OneOrMany:
    """One such entry, or a list of them."""

    entry: Component
    help: str = ""

    @property
    def default(self) -> Any:
        return self.entry.default


Schema = Mapping[str, Key | Section | Component | OneOrMany]


class Problem(NamedTuple):
    """What is wrong with the value at dotted `key`: what was given, what is allowed."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


class ConfigError(ValueError):
    """Everything that is wrong with a config, in `problems`."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


# --- tables -----------------------------------------------------------------------------------------------------------

POSITIVE, NOT_NEGATIVE = at_least(1), at_least(0)
FRACTION = Check("at least 0 and below 1", lambda value: 0 <= value < 1)
RATIO = Check("between 0 and 1", lambda value: 0 <= value <= 1)
DEVICE = Check("cpu, cuda or cuda:<index>", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None)
DTYPE = Check(
    "bf16 or fp32",
    lambda value: value in ("bf16", "fp32"),
    dict.fromkeys(
        ("fp16", "float16", "half"), "fp16 needs gradient scaling, which the recipes do not do; use bf16 or fp32"
    ),
)
BY_RESUME = Check("False: the top level's resume_from_checkpoint decides", lambda value: not value)

_ATTN_MODULES = Key(list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]])
_RANK = Key(int, check=POSITIVE)
_ALPHA = Key(float, check=above(0))
_DROPOUT = Key(float, check=FRACTION)

_TOKENIZER = Component(values={"max_seq_len": Key(int | None, check=POSITIVE)}, help="text to tokens")
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
        "lora_attn_modules": _ATTN_MODULES,  # torchtune's own LoRA builders
        "lora_rank": _RANK,
        "lora_alpha": _ALPHA,
        "lora_dropout": _DROPOUT,
    },
    help="the model, where its adapters go, and their rank, alpha and dropout",
)
_ADAPTER = Section(
    {
        "dtype": Key(str, "fp32", DTYPE, help="precision of the adapter's parameters"),
        "beta": Key(float, 1e-4, NOT_NEGATIVE, help="weight of the L2 term on the adapter's singular values"),
        "gamma": Key(float, 1e-3, NOT_NEGATIVE, help="weight of the term that keeps A and B orthogonal"),
        "orthogonal_gram": Key(Literal["thin", "full"], "thin"),
        "reduction": Key(Literal["mean", "sum"], "mean"),
    },
    help="the regularizers",
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
        "weight": Key(float, 1.0, above(0), help="how often this dataset is drawn: its length times this, in an epoch"),
    },
)
_DATASET_OR_NONE = replace(_DATASET, default=None)
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
_LOSS = Component(default={"_component_": "kasa_tune.components.loss.ChunkedCrossEntropy"})
_METRIC_LOGGER = Component(
    default={"_component_": "kasa_tune.components.metrics.JSONLLogger", "log_dir": "${output_dir}"}
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
    "max_steps": Key(int | None, None, POSITIVE, help="optimizer steps in all; null: what the epochs have"),
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
}

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

# Which schema a config belongs to: the first whose key ends the config's name.
SCHEMAS: Mapping[str, Schema] = {"_generate": GENERATE, "": FINETUNE}
