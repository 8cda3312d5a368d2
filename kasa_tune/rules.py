"""Conditions a schema cannot state: between keys, and on the files and folders that a config names.

A rule takes the config as plain containers, with only such entries as are good in themselves, and yields what is wrong.
"""

import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kasa_tune import registry, signatures
from kasa_tune.schema import Problem, show

_TOKENIZER_FILES = ("path", "merges_file", "special_tokens_path", "tokenizer_json_path", "tokenizer_config_json_path")
_READERS = ("arrow", "csv", "json", "pandas", "parquet", "text")  # `source` of files; other sources are the hub's

# --- between keys -----------------------------------------------------------------------------------------------------


def adapted(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Some linear gets an adapter."""
    node = cfg.get("model") or {}
    if node.get("attn_modules") == [] and not node.get("apply_to_mlp") and not node.get("apply_to_output"):
        yield Problem("model.attn_modules", "nothing to adapt; set attn_modules, apply_to_mlp or apply_to_output")


def builder(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The model has the adapters that the recipe trains; generation takes any."""
    given = (cfg.get("model") or {}).get("_component_")
    if given is None or "adapter_checkpoint" in cfg:
        return
    kind, _, name = given.rpartition(".")[2].partition("_")
    method = (cfg.get("adapter") or {}).get("method")
    of_corda = method is not None or "calibration" in cfg
    wrong = None
    if of_corda and kind == "kasa":
        wrong = f"which kasa_finetune_single_device trains; use that recipe, or corda_{name} or lora_{name} in this one"
    elif not of_corda and kind == "corda":
        wrong = f"which corda_finetune_single_device trains; use that recipe, or kasa_{name} or lora_{name} in this one"
    elif method in ("corda", "pissa", "milora") and kind != "corda":
        wrong = f"but adapter.method {method} needs a corda_<model> builder; use one, or adapter.method=lora"
    elif method == "lora" and kind not in ("corda", "lora"):
        wrong = "but adapter.method lora needs a lora_<model> or corda_<model> builder; use one"
    if wrong:
        yield Problem("model._component_", f"got {given!r}, {wrong}")


def calibration(cfg: dict[str, Any]) -> Iterator[Problem]:
    """CorDA has data to look at, and what only CorDA does is asked of CorDA."""
    method, node = (cfg.get("adapter") or {}).get("method"), cfg.get("calibration") or {}
    if method == "corda" and "dataset" in node and not node["dataset"]:
        what = "${dataset} for mode ipm, a set of questions of the knowledge to keep for mode kpm"
        yield Problem("calibration.dataset", f"missing, and adapter.method corda needs it; set it to {what}")
    if method in ("pissa", "milora", "lora"):
        only = f"with adapter.method {method}; it belongs to adapter.method corda"
        if cfg["adapter"].get("dynamic_ranks"):
            yield Problem("adapter.dynamic_ranks", f"got True {only}, set it to False")
        if node.get("rounds", 1) > 1:
            yield Problem("calibration.rounds", f"got {node['rounds']} {only}, set it to 1")


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
                yield Problem(f"adapter.{key}", f"got {given} without dynamic_ranks=True, which it bounds; set both")


def lora_plus(cfg: dict[str, Any]) -> Iterator[Problem]:
    """A multiple of a learning rate has one to be a multiple of."""
    ratio = (cfg.get("adapter") or {}).get("lr_ratio", 1)
    if ratio != 1 and "lr" not in (cfg.get("optimizer") or {"lr": None}):
        yield Problem("adapter.lr_ratio", f"got {ratio} without optimizer.lr, which it is a multiple of; set it")


def offloading(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Activations are offloaded from a GPU, and only where they are checkpointed."""
    key = "enable_activation_offloading"
    if cfg.get(key):
        if not cfg.get("enable_activation_checkpointing"):
            yield Problem(key, "got True without enable_activation_checkpointing; set both, or this one to False")
        if cfg.get("device") == "cpu":
            yield Problem(key, "got True on device cpu, which has nothing to offload to; set it to False")


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
        yield Problem(key, f"got {cfg[key]} without a dataset_val; set dataset_val, or this to null")


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
        yield Problem("checkpointer.model_type", f"got {show(given)}, which torchtune does not know. {hint}")


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
        yield from _missing(key, folder, "; `tune download <repo> --output-dir <folder>` fetches a model")
    else:
        if node.get("_component_", "").endswith("HFCheckpointer"):
            yield from _missing(key, os.path.join(folder, "config.json"), ", and belongs beside the weights")
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
        yield Problem(key, f"got the keys {keys}; expected filename_format and max_filename, or a list of files")
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
        yield Problem(key, f"{len(missing)} of {len(names)} files are not in {folder}; the first is {missing[0]}")
        return
    for name in missing:
        yield from _missing(key, os.path.join(folder, name))


def data_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Local data is there; names on the hub and addresses are not looked up."""
    calibrated = (cfg.get("calibration") or {}).get("dataset")
    datasets = {"dataset": cfg.get("dataset"), "dataset_val": cfg.get("dataset_val"), "calibration.dataset": calibrated}
    for name, nodes in datasets.items():
        nodes = nodes or []
        for i, node in enumerate(nodes if isinstance(nodes, list) else [nodes]):
            key = f"{name}.{i}" if isinstance(nodes, list) else name
            source, folder = node.get("source"), node.get("data_dir")
            is_path = isinstance(source, str) and source.startswith(("/", "./", "../"))
            if is_path:
                yield from _missing(f"{key}.source", source)
            is_default = source is None and node["_component_"].startswith("kasa_tune.")  # then data_files are local
            for file in _flat(node.get("data_files")) if is_default or is_path or source in _READERS else ():
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
    """What is to be resumed or generated from is there."""
    for key in ("resume_from_checkpoint", "adapter_checkpoint"):
        if isinstance(cfg.get(key), str):
            yield from _missing(key, cfg[key])


def output_folder(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Results can be written, and checkpoints not among the base model's files."""
    checkpointer = cfg.get("checkpointer") or {}
    base = checkpointer.get("checkpoint_dir")
    folders = {"checkpointer.output_dir": checkpointer.get("output_dir"), "output_dir": cfg.get("output_dir")}
    for folder, key in {folder: key for key, folder in folders.items() if isinstance(folder, str)}.items():
        if isinstance(base, str) and Path(folder).resolve().is_relative_to(Path(base).resolve()):
            yield Problem(key, f"got {folder!r}, which lies in checkpoint_dir {base}; choose a folder outside it")
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
    yield Problem(key, f"got {path!r}, which does not exist{hint}. {registry.did_you_mean(name, beside)}".rstrip())


# --- this machine -----------------------------------------------------------------------------------------------------


def device(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The device is there; a dry run needs none. Imports torch."""
    if not cfg.get("dry_run") and str(cfg.get("device")).startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            wrong = "but torch sees no CUDA device; set device=cpu, or install a CUDA build of torch"
            yield Problem("device", f"got {show(cfg['device'])}, {wrong}")


BETWEEN_KEYS = (
    adapted,
    builder,
    calibration,
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
