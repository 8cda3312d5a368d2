"""Conditions between the keys of a config, which a schema cannot state. Those on files stand in rules_of_files.py.

A rule takes the config as plain containers, with only such entries as are good in themselves, and yields what is wrong.
"""

from collections.abc import Callable, Iterator
from typing import Any

from kasa_tune import registry
from kasa_tune.config import folders, signatures
from kasa_tune.config.entries import Problem, show
from kasa_tune.methods import METHODS, Method

_COLUMNS = {  # datasets to the names in their column_map; Alpaca's `input` may be left out
    "alpaca_dataset": ("instruction", "input", "output"),
    "alpaca_cleaned_dataset": ("instruction", "input", "output"),
    "instruct_dataset": ("input", "output"),
    "input_output_dataset": ("input", "output"),
}


def _settings(chosen: Callable[[Method], Any]) -> tuple[str | None, ...]:
    """The values of adapter.method whose methods are chosen."""
    return tuple(method.setting for method in METHODS.values() if chosen(method))


_CALIBRATED = _settings(lambda method: method.calibrated)
# A key, the values of adapter.method that read it, and what the others leave it.
_OF_METHODS: tuple[tuple[str, tuple[str | None, ...], Any], ...] = (
    ("adapter.split", _settings(lambda method: method.split is None), "balanced"),
    ("adapter.dynamic_ranks", _CALIBRATED, False),
    ("calibration.rounds", _settings(lambda method: method.calibrated and method.mode), 1),
    ("adapter.quantization_iterations", _settings(lambda m: m.quantization_iterations), None),
)


_OF_ENCODERS = "classify_finetune_single_device"


def _builders() -> dict[str, dict[str | None, tuple[str, ...]]]:
    """Recipe to adapter.method to how the names of the builders begin whose adapters it trains."""
    table: dict[str, dict[str | None, tuple[str, ...]]] = {}
    for method in METHODS.values():
        of_recipe = table.setdefault(f"{method.recipe}_single_device", {})
        known = of_recipe.get(method.setting, ())
        of_recipe[method.setting] = tuple(dict.fromkeys(known + method.builders))
    table[_OF_ENCODERS] = {"kasa": ("kasa",), **table["corda_finetune_single_device"]}
    return table


_BUILDERS = _builders()

# --- between keys -----------------------------------------------------------------------------------------------------


def _method(cfg: dict[str, Any]) -> tuple[str | None, dict[str | None, tuple[str, ...]]]:
    """`adapter.method`, and the entry of its recipe in the table; an empty one where the method is none of them."""
    method = (cfg.get("adapter") or {}).get("method")
    if method is None and "calibration" in cfg:  # the value given has a problem of its own
        return None, {}
    if "metric" in cfg:
        return method, _BUILDERS[_OF_ENCODERS]
    return method, next((methods for methods in _BUILDERS.values() if method in methods), {})


def adapted(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Some linear gets an adapter."""
    node = cfg.get("model") or {}
    if (
        node.get("attn_modules") == []
        and not node.get("apply_to_mlp")
        and not node.get("apply_to_output")
    ):
        yield Problem(
            "model.attn_modules",
            "nothing to adapt; set attn_modules, apply_to_mlp or apply_to_output",
        )


def builder(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The model has the adapters that the recipe trains; generation takes any."""
    given, (method, methods) = (cfg.get("model") or {}).get("_component_"), _method(cfg)
    if given is None or "max_new_tokens" in cfg or method not in methods:
        return
    kind, _, name = given.rpartition(".")[2].partition("_")
    known = [recipe for recipe, others in _BUILDERS.items() if kind in next(iter(others.values()))]
    if kind in methods[method] or (
        method is None and not known
    ):  # the kasa recipe tries what it does not know
        return
    mine = " or ".join(f"{own}_{name}" for own in methods[method]) if known else "one"
    besides = next((other for other, kinds in methods.items() if kind in kinds), None)
    if known and not besides:
        wrong = f"which {known[0]} trains; use that recipe, or {mine} in this one"
    else:
        needed = " or ".join(f"{own}_<model>" for own in methods[method])
        wrong = f"but adapter.method {method} needs a {needed} builder; use {mine}"
        wrong += f", or adapter.method={besides}" if besides else ""
    yield Problem("model._component_", f"got {given!r}, {wrong}")


def calibrated(cfg: dict[str, Any]) -> Iterator[Problem]:
    """CorDA has data to look at."""
    (method, _), node = _method(cfg), cfg.get("calibration") or {}
    if method in _CALIBRATED and "dataset" in node and not node["dataset"]:
        of_kpm = ", a set of questions of the knowledge to keep for mode kpm"
        either = f"{method}_kpm" in METHODS
        what = "${dataset}" + (f" for mode ipm{of_kpm}" if either else ", the new task")
        yield Problem(
            "calibration.dataset",
            f"missing, and adapter.method {method} needs it; set it to {what}",
        )


def of_other_methods(cfg: dict[str, Any]) -> Iterator[Problem]:
    """What only some methods do is asked of them alone."""
    method, methods = _method(cfg)
    for key, readers, unset in _OF_METHODS:
        section, _, name = key.partition(".")
        value = (cfg.get(section) or {}).get(name, unset)
        if method in methods and method not in readers and value != unset:
            belongs = " or ".join(other for other in methods if other and other in readers)
            wrong = (
                f"got {value} with adapter.method {method}; it belongs to adapter.method {belongs}"
            )
            yield Problem(key, f"{wrong}, set it to {show(unset)}")


def quantized(cfg: dict[str, Any]) -> Iterator[Problem]:
    """What is learnt or taken out of a weight in four bits goes with it."""
    if not cfg.get("quantization"):
        return
    node, (method, _) = cfg.get("model") or {}, _method(cfg)
    if node.get("use_dora"):
        wrong = "got True, but DoRA needs the lengths of rows that are quantized here"
        yield Problem(
            "model.use_dora",
            f"{wrong}; set it to False, or train with corda_finetune_single_device",
        )
    if node.get("apply_to_output"):
        wrong = "got True, but the output projection keeps its precision here and takes no adapter"
        yield Problem("model.apply_to_output", f"{wrong}; set it to False")
    storage, reason, row = node.get("edit_storage"), None, METHODS.get(method or "")
    if row and storage == "folded" and row.builders == ("kasa",):
        reason = "quantizing would round the small edit away; set auto or factored"
    elif row and storage == "factored" and row.decomposition:
        reason = f"{method} quantizes the weight without the edit; set auto or folded"
    if reason:
        yield Problem(
            "model.edit_storage", f"got {show(storage)} with adapter.method {method}, but {reason}"
        )


def rank_bounds(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Per-layer ranks have room, and the budget's mean rank lies in it."""
    node, rank = cfg.get("adapter") or {}, (cfg.get("model") or {}).get("rank")
    least, most = node.get("min_rank"), node.get("max_rank")
    if least is not None and most is not None and least > most:
        yield Problem("adapter.min_rank", f"got {least}, which is more than max_rank {most}")
    elif node.get("dynamic_ranks") and rank is not None:
        budget = f"but the layers share the budget of model.rank {rank}"
        if least is not None and least > rank:
            yield Problem("adapter.min_rank", f"got {least}, {budget}; set at most {rank}")
        if most is not None and most < rank:
            yield Problem("adapter.max_rank", f"got {most}, {budget}; set at least {rank}")
    elif not node.get("dynamic_ranks"):
        for key, given, unset in (("min_rank", least, 1), ("max_rank", most, None)):
            if given not in (unset, None):
                yield Problem(
                    f"adapter.{key}",
                    f"got {given} without dynamic_ranks=True, which it bounds; set both",
                )


def lora_plus(cfg: dict[str, Any]) -> Iterator[Problem]:
    """A multiple of a learning rate has one to be a multiple of."""
    ratio = (cfg.get("adapter") or {}).get("lr_ratio", 1)
    if ratio != 1 and "lr" not in (cfg.get("optimizer") or {"lr": None}):
        yield Problem(
            "adapter.lr_ratio",
            f"got {ratio} without optimizer.lr, which it is a multiple of; set it",
        )


def offloading(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Activations and weights are offloaded from a GPU, the former only where they are checkpointed."""
    key = "enable_activation_offloading"
    if cfg.get(key):
        if not cfg.get("enable_activation_checkpointing"):
            yield Problem(
                key,
                "got True without enable_activation_checkpointing; set both, or this one to False",
            )
        if cfg.get("device") == "cpu":
            yield Problem(
                key, "got True on device cpu, which has nothing to offload to; set it to False"
            )
    if cfg.get("fsdp_cpu_offload") and cfg.get("device") == "cpu":
        yield Problem(
            "fsdp_cpu_offload",
            "got True on device cpu, where weights are on the host; set it to False",
        )


def warmup(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The warm-up is given once."""
    node = cfg.get("lr_scheduler") or {}
    ratio, steps = node.get("warmup_ratio"), node.get("num_warmup_steps")
    if ratio is not None and steps is not None:
        given = f"got warmup_ratio {ratio} and num_warmup_steps {steps}"
        yield Problem("lr_scheduler.warmup_ratio", f"{given}; give one of the two")


def prompt_template(cfg: dict[str, Any]) -> Iterator[Problem]:
    """A prompt template given by its dotted path is there."""
    given = (cfg.get("tokenizer") or {}).get("prompt_template")
    if not isinstance(given, str):
        return
    try:
        signatures.static(given)
    except signatures.UnreadableError:
        return  # only an import could tell
    except (signatures.NoSuchNameError, ValueError) as error:
        near = getattr(error, "names", [])
        hint = registry.did_you_mean(getattr(error, "name", ""), near)
        wrong = f"got {show(given)}, but {error}. {hint}"
        yield Problem("tokenizer.prompt_template", wrong.strip())


def columns(cfg: dict[str, Any]) -> Iterator[Problem]:
    """`column_map` has the names that its dataset knows, and all of them."""
    calibrated = (cfg.get("calibration") or {}).get("dataset")
    places = {"dataset": cfg.get("dataset"), "dataset_val": cfg.get("dataset_val")}
    for place, nodes in (places | {"calibration.dataset": calibrated}).items():
        for node in nodes if isinstance(nodes, list) else [nodes or {}]:
            builder, given = str(node.get("_component_")).rpartition(".")[2], node.get("column_map")
            known = _COLUMNS.get(builder)
            if (
                known
                and isinstance(given, dict)
                and not {*known} - {"input"} <= {*given} <= {*known}
            ):
                wrong = f"got {show(given)}; {builder} has the columns {', '.join(known)}"
                yield Problem(f"{place}.column_map", wrong)


def closure(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The optimizer needs no closure."""
    path = (cfg.get("optimizer") or {}).get("_component_")
    if path in ("torch.optim.LBFGS", "torch.optim.lbfgs.LBFGS"):
        yield Problem(
            "optimizer._component_",
            f"got {path}, which needs a closure that computes the loss several times a step; the recipes give none. "
            "Use another optimizer, such as torch.optim.AdamW",
        )


def validation(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Whoever wants validation has something to validate on."""
    key = "run_val_every_n_steps"
    if cfg.get(key) and "dataset_val" in cfg and not cfg["dataset_val"]:
        yield Problem(
            key, f"got {cfg[key]} without a dataset_val; set dataset_val, or this to null"
        )


def validation_metrics(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Metrics that decide are measured, and tasks in training answer greedily."""
    section = cfg.get("validation") or {}
    tasks = section.get("tasks") or []
    tasks = tasks if isinstance(tasks, list) else [tasks]
    for i, task in enumerate(tasks):
        if task.get("decoding"):
            yield Problem(
                f"validation.tasks.{i}.decoding",
                f"got {show(task['decoding'])}; answers in training are greedy, leave it out",
            )
    early = (cfg.get("early_stopping") or {}).get("metric")
    begins = tuple(f"val_{task.get('name')}_" for task in tasks)
    for key, metric in (("keep_best", cfg.get("keep_best")), ("early_stopping.metric", early)):
        if metric is None:
            continue
        if not cfg.get("run_val_every_n_steps"):
            yield Problem(key, f"got {show(metric)} without validation; set run_val_every_n_steps")
        elif metric != "val_loss" and not metric.startswith(begins):
            known = ", ".join(["val_loss", *(f"{begin}<metric>" for begin in begins)])
            yield Problem(key, f"got {show(metric)}, which no validation measures; it is {known}")


def something_to_complete(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Generation has prompts."""
    if "prompts" in cfg and "dataset" in cfg and not cfg["prompts"] and not cfg["dataset"]:
        yield Problem("prompts", "nothing to complete; give prompts or a dataset")


def data_given(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Data that is read by its columns is the user's own, so it has no default."""
    for place in ("dataset", "dataset_val"):
        nodes = cfg.get(place) or []
        for i, node in enumerate(nodes if isinstance(nodes, list) else [nodes]):
            of_files = node.get("source") in (None, "json", "csv", "parquet", "text", "arrow")
            by_columns = str(node.get("_component_")).endswith(".by_columns_dataset")
            given = node.get("data_files") or node.get("data_dir")
            if by_columns and of_files and not given and not cfg.get("dry_run"):
                key = f"{place}.{i}" if isinstance(nodes, list) else place
                yield Problem(
                    f"{key}.data_files",
                    f"missing; give your data, such as {key}.data_files=/data/mine.jsonl (docs/data.md)",
                )


def model_type(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The checkpoint's layout is one that torchtune converts."""
    given = (cfg.get("checkpointer") or {}).get("model_type")
    if given is None:
        return
    try:
        known = signatures.members("torchtune.training.checkpointing._utils.ModelType")
    except (signatures.UnreadableError, signatures.NoSuchNameError):
        return
    if given not in known:
        hint = registry.did_you_mean(str(given), known) or f"Known are {', '.join(known)}."
        yield Problem(
            "checkpointer.model_type", f"got {show(given)}, which torchtune does not know. {hint}"
        )


BETWEEN_KEYS = (
    adapted,
    builder,
    calibrated,
    of_other_methods,
    quantized,
    rank_bounds,
    lora_plus,
    offloading,
    warmup,
    prompt_template,
    columns,
    closure,
    validation,
    validation_metrics,
    something_to_complete,
    folders.folder_given,
    folders.told_by_run,
    folders.report_of_runs,
    data_given,
    model_type,
)
