"""What a config may contain: the entries a schema is made of, and the schemas of our recipes.

A schema is a plain dict from key to `Key`, `Section`, `Component` or `OneOrMany`, so a copied recipe adds its own keys with
`config.FINETUNE | {"my_key": config.Key(int, default=3)}`. Types are ordinary annotations: `int | None`, `list[str]`, `Literal["a", "b"]`.
A default may refer to another key: `"${batch_size}"`. Nothing here imports torch.
"""

import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "required"})()

# --- values -------------------------------------------------------------------------------------------------------------------

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_SCIENTIFIC = re.compile(
    r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"
)  # what YAML 1.1 and environment variables leave as a string: 2e-4


@dataclass(frozen=True)
class Check:
    """A condition on a value. `allowed` completes the sentence "expected an integer, ..."; `because` explains values people try often."""

    allowed: str
    holds: Callable[[Any], bool]
    because: Mapping[Any, str] = field(default_factory=dict)

    def __call__(self, value: Any) -> bool:
        return self.holds(value)


def at_least(bound: float) -> Check:
    return Check(f"at least {bound}", lambda value: value >= bound)


def above(bound: float) -> Check:
    return Check(f"greater than {bound}", lambda value: value > bound)


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
    """`value` as `kind` (integers become floats where a float is wanted); TypeError when it is of another type."""
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
        number = not isinstance(value, bool) and isinstance(value, (int, float))
        if number or (isinstance(value, str) and _SCIENTIFIC.fullmatch(value)):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise TypeError(f"expected {describe(kind)}")


# --- entries ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One value: its type, the default (REQUIRED when it must be given), a condition that holds for every value but null, one line of help."""

    type: Any
    default: Any = REQUIRED
    check: Check | Callable[[Any], bool] | None = None
    help: str = ""

    @property
    def allowed(self) -> str:
        extra = getattr(self.check, "allowed", "one its check accepts") if self.check else ""
        return ", ".join(filter(None, (describe(self.type), extra)))

    def accept(self, value: Any) -> Any:
        """`value`, converted to the key's type; ValueError saying what is allowed."""
        try:
            value = convert(value, self.type)
            good = value is None or self.check is None or self.check(value)
        except TypeError:
            good = False
        if good:
            return value
        because = getattr(self.check, "because", {})
        reason = because.get(value) if isinstance(value, str) else None
        raise ValueError(f"expected {self.allowed}" + (f" ({reason})" if reason else ""))


@dataclass(frozen=True)
class Section:
    """A mapping with a schema of its own; absent, every key takes its default."""

    keys: Mapping[str, Key]
    help: str = ""


@dataclass(frozen=True)
class Component:
    """A node with a `_component_`, called with the node's other keys.

    default:    node used when absent (None: may be null)
    positional: how many leading parameters of the target the recipe supplies
    runtime:    keyword parameters the recipe supplies
    own:        keys the recipe reads from the node and takes out before the call
    values:     conditions on parameters beyond what the target's annotations say
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
    """Everything that is wrong with a config; `problems` in the order of the schema."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source, self.problems = source, list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in self.problems)]))


def show(value: Any) -> str:
    """`value` as it stands in a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- tables -------------------------------------------------------------------------------------------------------------------

POSITIVE, NOT_NEGATIVE = at_least(1), at_least(0)
DTYPE = Check(
    "bf16 or fp32",
    lambda value: value in ("bf16", "fp32"),
    dict.fromkeys(
        ("fp16", "float16", "half"), "fp16 needs gradient scaling, which these recipes do not do; use bf16 or fp32"
    ),
)
DEVICE = Check("cpu, cuda or cuda:<index>", lambda value: re.fullmatch(r"cpu|cuda(:\d+)?", value) is not None)
FRACTION = Check("at least 0 and below 1", lambda value: 0 <= value < 1)
RATIO = Check("between 0 and 1", lambda value: 0 <= value <= 1)

# The arguments our builders add to those of the plain model.
LORA_ARGUMENTS = {
    "attn_modules": Key(
        list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]],
        check=Check("not empty", lambda value: len(value) > 0),
        help="linears of attention that get an adapter",
    ),
    "apply_to_mlp": Key(bool, False, help="adapters on the MLP's linears"),
    "apply_to_output": Key(bool, False, help="an adapter on the output projection"),
    "rank": Key(int, 8, POSITIVE),
    "alpha": Key(float, 16.0, above(0), help="the adapter is scaled by alpha / rank"),
    "dropout": Key(float, 0.0, FRACTION),
}
KASA_ARGUMENTS = LORA_ARGUMENTS | {
    "truncation_rank": Key(
        int | None, None, NOT_NEGATIVE, help="singular components taken out of the base weight; null: rank"
    ),
    "truncation": Key(Literal["paper", "published"], "paper"),
    "diag_init": Key(Literal["normal", "ones"], "normal"),
    "edit_storage": Key(Literal["auto", "folded", "factored"], "auto"),
}
# torchtune's own LoRA builders have the same arguments under other names.
_TORCHTUNE_LORA = {
    theirs: LORA_ARGUMENTS[ours]
    for theirs, ours in (
        ("lora_rank", "rank"),
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
        ("lora_attn_modules", "attn_modules"),
    )
}

ADAPTER = {
    "dtype": Key(str, "fp32", DTYPE, help="precision of the adapter's parameters"),
    "beta": Key(float, 1e-4, NOT_NEGATIVE, help="weight of the singular values' L2 term"),
    "gamma": Key(float, 1e-3, NOT_NEGATIVE, help="weight of the orthogonality term"),
    "orthogonal_gram": Key(Literal["thin", "full"], "thin"),
    "reduction": Key(Literal["mean", "sum"], "mean"),
}

_TOKENIZER = Component(help="text to tokens", values={"max_seq_len": Key(int | None, None, POSITIVE)})
_MODEL = Component(help="the model and where its adapters go", values=KASA_ARGUMENTS | _TORCHTUNE_LORA)
_CHECKPOINTER = Component(runtime=("should_load_recipe_state",), help="reads the base model's weights")
_DATASET = dict(
    positional=1,
    own={
        "packed": Key(bool, False, help="several samples in one row"),
        "weight": Key(float, 1.0, above(0), help="how often this dataset is drawn, against the others"),
        "max_packs": Key(int | None, None, POSITIVE),
    },
)
_DEVICE = Key(str, check=DEVICE, help="where to run")
_DTYPE = Key(str, "bf16", DTYPE, help="precision of the base model and of the computation")
_SEED = Key(int, 42, NOT_NEGATIVE, help="seed of every random choice; never null")

FINETUNE: Schema = {
    "output_dir": Key(str, help="folder of checkpoints, logs and results"),
    "tokenizer": _TOKENIZER,
    "model": _MODEL,
    "adapter": Section(ADAPTER, help="options of the method"),
    "checkpointer": _CHECKPOINTER,
    "resume_from_checkpoint": Key(
        bool | str, False, help="True: the newest good checkpoint in output_dir; or the path of one"
    ),
    "dataset": OneOrMany(Component(**_DATASET), help="what to learn from"),
    "dataset_val": OneOrMany(Component(default=None, **_DATASET), help="held-out samples; null: no validation"),
    "run_val_every_n_steps": Key(int | None, None, POSITIVE),
    "batch_size_val": Key(int, "${batch_size}", POSITIVE),
    "seed": _SEED,
    "shuffle": Key(bool, True),
    "batch_size": Key(int, 16, POSITIVE, help="samples (rows, when packed) in one forward pass"),
    "num_workers": Key(int, 0, NOT_NEGATIVE, help="processes that prepare batches"),
    "optimizer": Component(
        positional=1,
        values={
            "lr": Key(float, 1e-3, NOT_NEGATIVE),
            "weight_decay": Key(float, 0.0, NOT_NEGATIVE),
            "eps": Key(float, 1e-8, NOT_NEGATIVE),
        },
    ),
    "lr_scheduler": Component(
        default=None,
        positional=1,
        runtime=("num_training_steps",),
        values={
            "warmup_ratio": Key(float | None, None, RATIO),
            "num_warmup_steps": Key(int | None, None, NOT_NEGATIVE),
        },
        help="null: a constant learning rate",
    ),
    "loss": Component(default={"_component_": "kasa_tune.components.loss.ChunkedCrossEntropy"}),
    "epochs": Key(int, 1, POSITIVE),
    "max_steps": Key(int | None, None, POSITIVE, help="optimizer steps in all; null: as many as the epochs have"),
    "max_steps_per_epoch": Key(int | None, None, POSITIVE),
    "gradient_accumulation_steps": Key(int, 1, POSITIVE),
    "clip_grad_norm": Key(float | None, None, above(0)),
    "compile": Key(bool, False),
    "save_every_n_steps": Key(int | None, None, POSITIVE, help="null: at the end of each epoch"),
    "keep_last": Key(int, 2, POSITIVE, help="step checkpoints kept in output_dir"),
    "device": _DEVICE,
    "dtype": _DTYPE,
    "enable_activation_checkpointing": Key(bool, False),
    "enable_activation_offloading": Key(bool, False),
    "metric_logger": Component(
        default={"_component_": "kasa_tune.components.metrics.JSONLLogger", "log_dir": "${output_dir}"}
    ),
    "log_every_n_steps": Key(int, 1, POSITIVE),
    "log_peak_memory_stats": Key(bool, True),
    "profiler": Component(default={"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}),
    "dry_run": Key(bool, False, help="print the byte budget and stop"),
}

GENERATE: Schema = {
    "output_dir": Key(str | None, None, help="where completions are written; null: only printed"),
    "tokenizer": _TOKENIZER,
    "model": _MODEL,
    "adapter": Section(ADAPTER, help="options of the method, as in the run"),
    "checkpointer": _CHECKPOINTER,
    "adapter_checkpoint": Key(
        str | None, None, help="a run's output_dir or one of its checkpoints; null: the base model alone"
    ),
    "prompts": Key(list[str], [], help="texts to complete"),
    "dataset": OneOrMany(Component(default=None, **_DATASET), help="samples whose prompts are completed"),
    "num_samples": Key(int, 8, POSITIVE, help="how many samples of the dataset"),
    "max_new_tokens": Key(int, 64, POSITIVE),
    "temperature": Key(float, 0.0, NOT_NEGATIVE, help="0: the likeliest token"),
    "top_k": Key(int | None, None, POSITIVE),
    "seed": _SEED,
    "batch_size": Key(int, 8, POSITIVE),
    "device": _DEVICE,
    "dtype": _DTYPE,
}

# Which schema a config belongs to, by the end of its name; the first that fits.
SCHEMAS: Mapping[str, Schema] = {"_generate": GENERATE, "": FINETUNE}
