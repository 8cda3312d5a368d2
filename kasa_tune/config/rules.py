"""Conditions a schema cannot state: between keys, and on the files and folders that a config names.

A rule takes the config as plain containers, with only such entries as are good in themselves, and yields what is wrong.
"""

import glob
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kasa_tune import registry
from kasa_tune.config import signatures
from kasa_tune.config.entries import Problem, show
from kasa_tune.methods import METHODS, Method

_TOKENIZER_FILES = (
    "path",
    "merges_file",
    "special_tokens_path",
    "tokenizer_json_path",
    "tokenizer_config_json_path",
)
_READERS = (
    "arrow",
    "csv",
    "json",
    "pandas",
    "parquet",
    "text",
)  # `source` of files; other sources are the hub's


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


def _builders() -> dict[str, dict[str | None, tuple[str, ...]]]:
    """Recipe to adapter.method to how the names of the builders begin whose adapters it trains."""
    table: dict[str, dict[str | None, tuple[str, ...]]] = {}
    for method in METHODS.values():
        of_recipe = table.setdefault(f"{method.recipe}_single_device", {})
        known = of_recipe.get(method.setting, ())
        of_recipe[method.setting] = tuple(dict.fromkeys(known + method.builders))
    return table


_BUILDERS = _builders()

# --- between keys -----------------------------------------------------------------------------------------------------


def _method(cfg: dict[str, Any]) -> tuple[str | None, dict[str | None, tuple[str, ...]]]:
    """`adapter.method`, and the entry of its recipe in the table; an empty one where the method is none of them."""
    method = (cfg.get("adapter") or {}).get("method")
    if method is None and "calibration" in cfg:  # the value given has a problem of its own
        return None, {}
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


def validation(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Whoever wants validation has something to validate on."""
    key = "run_val_every_n_steps"
    if cfg.get(key) and "dataset_val" in cfg and not cfg["dataset_val"]:
        yield Problem(
            key, f"got {cfg[key]} without a dataset_val; set dataset_val, or this to null"
        )


def something_to_complete(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Generation has prompts."""
    if "prompts" in cfg and "dataset" in cfg and not cfg["prompts"] and not cfg["dataset"]:
        yield Problem("prompts", "nothing to complete; give prompts or a dataset")


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


# --- files ------------------------------------------------------------------------------------------------------------


def tokenizer_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The tokenizer's files are there."""
    node = cfg.get("tokenizer") or {}
    for name in _TOKENIZER_FILES:
        if isinstance(node.get(name), str):
            yield from _missing(f"tokenizer.{name}", node[name])


def checkpoint_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The base model's folder and files are there. A dry run reads no weights."""
    node = cfg.get("checkpointer") or {}
    key, folder = "checkpointer.checkpoint_dir", node.get("checkpoint_dir")
    if cfg.get("dry_run") or not isinstance(folder, str):
        return
    if os.path.isfile(folder):
        yield Problem(key, f"got {folder!r}, which is a file; give the folder it lies in")
    elif not os.path.isdir(folder):
        yield from _missing(
            key, folder, "; `tune download <repo> --output-dir <folder>` fetches a model"
        )
    else:
        if node.get("_component_", "").endswith("HFCheckpointer"):
            yield from _missing(
                key, os.path.join(folder, "config.json"), ", and belongs beside the weights"
            )
        yield from _listed_files(folder, node.get("checkpoint_files"))


def _listed_files(folder: str, given: Any) -> Iterator[Problem]:
    key = "checkpointer.checkpoint_files"
    if given == []:
        yield Problem(key, "got an empty list; name the files of the checkpoint")
    if isinstance(given, list):
        yield from _missing_of(key, folder, given)
    if not isinstance(given, dict):
        return
    pattern, last = given.get("filename_format"), given.get("max_filename")
    if set(given) != {"filename_format", "max_filename"}:
        keys = ", ".join(map(str, given))
        yield Problem(
            key,
            f"got the keys {keys}; expected filename_format and max_filename, or a list of files",
        )
    elif not isinstance(last, str) or not last.isdigit() or int(last) < 1:
        wrong = f"got {show(last)}; expected the digits of the last file's number, such as '00004'"
        yield Problem(f"{key}.max_filename", wrong)
    elif not isinstance(pattern, str) or pattern.count("{}") != 2:
        wrong = f"got {show(pattern)}; expected two pairs of braces, such as 'model-{{}}-of-{{}}.safetensors'"
        yield Problem(f"{key}.filename_format", wrong)
    else:
        numbers = [str(number).zfill(len(last)) for number in range(1, int(last) + 1)]
        yield from _missing_of(key, folder, [pattern.format(number, last) for number in numbers])


def _missing_of(key: str, folder: str, names: list[str]) -> Iterator[Problem]:
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if len(missing) > 3:
        yield Problem(
            key,
            f"{len(missing)} of {len(names)} files are not in {folder}; the first is {missing[0]}",
        )
        return
    for name in missing:
        yield from _missing(key, os.path.join(folder, name))


def data_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Local data is there; names on the hub and addresses are not looked up."""
    calibrated = (cfg.get("calibration") or {}).get("dataset")
    datasets = {
        "dataset": cfg.get("dataset"),
        "dataset_val": cfg.get("dataset_val"),
        "calibration.dataset": calibrated,
    }
    for name, nodes in datasets.items():
        nodes = nodes or []
        for i, node in enumerate(nodes if isinstance(nodes, list) else [nodes]):
            key = f"{name}.{i}" if isinstance(nodes, list) else name
            source, folder = node.get("source"), node.get("data_dir")
            is_path = isinstance(source, str) and source.startswith(("/", "./", "../"))
            if is_path:
                yield from _missing(f"{key}.source", source)
            is_default = source is None and node["_component_"].startswith(
                "kasa_tune."
            )  # then data_files are local
            for file in (
                _flat(node.get("data_files")) if is_default or is_path or source in _READERS else ()
            ):
                path = os.path.join(folder if isinstance(folder, str) else "", file)
                if "://" not in path and not glob.glob(path, recursive=True):
                    yield from _missing(f"{key}.data_files", path)


def _flat(given: Any) -> Iterator[str]:
    """The file names in a string, a list, or a mapping of split to either."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (list, dict)):
        for item in given.values() if isinstance(given, dict) else given:
            yield from _flat(item)


def results_to_load(cfg: dict[str, Any]) -> Iterator[Problem]:
    """What is to be resumed or generated from is there, and a run does not write into what it starts from."""
    start, output = cfg.get("adapter_checkpoint"), cfg.get("output_dir")
    if (
        "optimizer" in cfg
        and start
        and output
        and os.path.abspath(start) == os.path.abspath(output)
    ):
        yield Problem(
            "output_dir", f"got {show(output)}, which is adapter_checkpoint: choose another folder"
        )
    for key in ("resume_from_checkpoint", "adapter_checkpoint", "peft_adapter", "initial_adapter"):
        if isinstance(cfg.get(key), str):
            yield from _missing(key, cfg[key])


def output_folder(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Results can be written, and checkpoints not among the base model's files."""
    checkpointer = cfg.get("checkpointer") or {}
    base = checkpointer.get("checkpoint_dir")
    folders = {
        "checkpointer.output_dir": checkpointer.get("output_dir"),
        "output_dir": cfg.get("output_dir"),
    }
    for folder, key in {
        folder: key for key, folder in folders.items() if isinstance(folder, str)
    }.items():
        if isinstance(base, str) and Path(folder).resolve().is_relative_to(Path(base).resolve()):
            yield Problem(
                key,
                f"got {folder!r}, which lies in checkpoint_dir {base}; choose a folder outside it",
            )
        yield from _unwritable(key, folder)
    cache = (cfg.get("calibration") or {}).get("cache_dir")
    if cache is not None:
        yield from _unwritable("calibration.cache_dir", cache)


def _unwritable(key: str, given: str) -> Iterator[Problem]:
    """A problem when no file can be made in the folder `given`, or in the part of its path that exists."""
    folder = Path(given).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        if folder.is_dir():
            with tempfile.TemporaryFile(dir=folder):
                return
        reason = f"{folder} is a file"
    except OSError as error:
        reason = f"{folder}: {error.strerror or error}"
    yield Problem(key, f"got {given!r}, where nothing can be written: {reason}")


def _missing(key: str, path: str, hint: str = "") -> Iterator[Problem]:
    """A problem when nothing lies at `path`, with the nearest names in its folder."""
    if os.path.exists(path):
        return
    folder, name = os.path.split(path)
    beside = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
    yield Problem(
        key,
        f"got {path!r}, which does not exist{hint}. {registry.did_you_mean(name, beside)}".rstrip(),
    )


# --- this machine -----------------------------------------------------------------------------------------------------


def device(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The device is there; a dry run needs none. Imports torch."""
    if not cfg.get("dry_run") and str(cfg.get("device")).startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            wrong = (
                "but torch sees no CUDA device; set device=cpu, or install a CUDA build of torch"
            )
            yield Problem("device", f"got {show(cfg['device'])}, {wrong}")


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
    validation,
    something_to_complete,
    model_type,
)
FILES = (tokenizer_files, checkpoint_files, data_files, results_to_load, output_folder)
MACHINE = (device,)
