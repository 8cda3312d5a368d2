"""Conditions on what a config names outside itself: files, folders, packages and the device.

A rule is called as those of rules.py are.
"""

import glob
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kasa_tune import registry
from kasa_tune.config.entries import Problem, shortened, show
from kasa_tune.config.file_kinds import tokenizer_kind, weights_files
from kasa_tune.config.folders import checkpoint_folder, reads_folder
from kasa_tune.config.parts import TOKENIZER
from kasa_tune.config.rules_of_architecture import numbers_of_heads

_TOKENIZER_FILES = tuple(name for name in TOKENIZER.values if name.endswith(("path", "_file")))
_TRACKERS = {  # metric loggers to the packages they import
    "WandBLogger": "wandb",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
    "TensorBoardLogger": "tensorboard",
    "TrackioLogger": "trackio",
}
_READERS = (
    "arrow",
    "csv",
    "json",
    "pandas",
    "parquet",
    "text",
)  # `source` of files; other sources are the hub's


# Keys that name a run, a checkpoint or an adapter.
_RESULTS = (
    "resume_from_checkpoint",
    "adapter_checkpoint",
    "peft_adapter",
    "initial_adapter",
    "run",
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
    if cfg.get("dry_run") or not isinstance(folder, str) or reads_folder(node):
        return
    if os.path.isfile(folder):
        yield Problem(key, f"got {show(folder)}, which is a file; give the folder it lies in")
    elif not os.path.isdir(folder):
        yield from _missing(
            key, folder, "; `tune download <repo> --output-dir <folder>` fetches a model"
        )
    else:
        if node.get("_component_", "").endswith("HFCheckpointer"):
            yield from _model_settings(key, os.path.join(folder, "config.json"))
        yield from _listed_files(folder, node.get("checkpoint_files"))


def _model_settings(key: str, path: str) -> Iterator[Problem]:
    """config.json is there, with what torchtune reads from it."""
    if os.path.exists(path):
        yield from numbers_of_heads(key, path)
    else:
        yield from _missing(key, path, ", and belongs beside the weights")


def _listed_files(folder: str, given: Any) -> Iterator[Problem]:
    key = "checkpointer.checkpoint_files"
    if given == []:
        yield Problem(key, "got an empty list; name the files of the checkpoint")
    if isinstance(given, list):
        yield from _weights(key, folder, given)
    if not isinstance(given, dict):
        return
    pattern, last = given.get("filename_format"), given.get("max_filename")
    if set(given) != {"filename_format", "max_filename"}:
        keys = ", ".join(map(str, given))
        yield Problem(
            key,
            f"got the keys {keys}; expected filename_format and max_filename, or a list of files",
        )
    elif not isinstance(last, str) or not re.fullmatch(r"[0-9]{1,5}", last) or int(last) < 1:
        wrong = f"got {show(last)}; expected the digits of the last file's number, such as '00004'"
        yield Problem(f"{key}.max_filename", wrong)
    elif not isinstance(pattern, str) or pattern.count("{}") != 2:
        wrong = f"got {show(pattern)}; expected two pairs of braces, such as 'model-{{}}-of-{{}}.safetensors'"
        yield Problem(f"{key}.filename_format", wrong)
    else:
        numbers = [str(number).zfill(len(last)) for number in range(1, int(last) + 1)]
        try:
            names = [pattern.format(number, last) for number in numbers]
        except (ValueError, LookupError) as error:
            yield Problem(f"{key}.filename_format", f"got {show(pattern)}: {error}")
            return
        yield from _weights(key, folder, names)


def _weights(key: str, folder: str, names: list[str]) -> Iterator[Problem]:
    """The listed files are in the folder, and are the weights."""
    for name in names:
        path = os.path.normpath(name)
        if not name.isprintable() or os.path.isabs(path) or path.startswith("..") or path == ".":
            yield Problem(key, f"got {show(name)}; expected names of files in checkpoint_dir")
            return
    problems = list(_missing_of(key, folder, names))
    yield from problems or weights_files(folder, names, key)


def _missing_of(key: str, folder: str, names: list[str]) -> Iterator[Problem]:
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if len(missing) > 3:
        yield Problem(
            key,
            f"{len(missing)} of {len(names)} files are not in {show(folder)}; the first is "
            f"{show(missing[0])}. Configs without a model in their name, such as kasa, read any "
            "model's folder (docs/checkpoints.md)",
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
            yield from _local_data(f"{name}.{i}" if isinstance(nodes, list) else name, node)


def _local_data(key: str, node: dict[str, Any]) -> Iterator[Problem]:
    """The folder and the files of one dataset."""
    source: Any = node.get("source")
    folder = node.get("data_dir") or ""
    is_path = isinstance(source, str) and source.startswith(("/", "./", "../"))
    if is_path:
        yield from _missing(f"{key}.source", source)
        if os.path.isdir(source) and glob.has_magic(source):
            wrong = f"got {show(source)}, of which the reader takes characters for a pattern"
            yield Problem(f"{key}.source", f"{wrong}; set source: json and data_dir to this folder")
    is_default = source is None and node["_component_"].startswith("kasa_tune.")  # then local
    if not (is_default or is_path or source in _READERS):
        return
    base = os.path.join(source if is_path and os.path.isdir(source) else "", folder)
    for file in _flat(node.get("data_files")):
        if "://" not in file:
            yield from _unmatched(f"{key}.data_files", base, file)


def _unmatched(key: str, base: str, given: str) -> Iterator[Problem]:
    """A problem when no file in the folder `base` has the name or the pattern `given`, see the room of data."""
    path = os.path.join(base, given)
    if os.path.isdir(path):
        wrong = f"got {show(given)}, which is a folder"
        yield Problem(key, f"{wrong}; set data_dir to it, or name its files, such as *.jsonl there")
    elif not os.path.exists(path):
        folder, name = os.path.split(path)
        pattern = os.path.join(glob.escape(folder) if os.path.isdir(folder) else folder, name)
        if not glob.glob(pattern, recursive=True):
            yield from _missing(key, path)


def _flat(given: Any) -> Iterator[str]:
    """The file names in a string, a list, or a mapping of split to either."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (list, dict)):
        for item in given.values() if isinstance(given, dict) else given:
            yield from _flat(item)


def task_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The data of tasks is there, and adapters to evaluate are."""
    in_training = _nodes(cfg.get("validation") or {}, "tasks", "validation.")
    for key, node in (*_nodes(cfg, "tasks"), *in_training):
        if isinstance(node, dict) and isinstance(node.get("data_file"), str):
            yield from _missing(f"{key}.data_file", node["data_file"])
    for name, path in (cfg.get("adapters") or {}).items():
        yield from _missing(f"adapters.{name}", path)


def _nodes(
    tree: dict[str, Any], name: str, prefix: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The components at a key that takes one or many, each with its dotted key."""
    given = tree.get(name) or []
    if isinstance(given, list):
        yield from ((f"{prefix}{name}.{i}", node) for i, node in enumerate(given))
    else:
        yield f"{prefix}{name}", given


def asked_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    """What a model behind an address is asked with is there."""
    if "endpoint" not in cfg:
        return
    for key in ("seeds", "tests", "template", "templates", "questions", "references"):
        if isinstance(cfg.get(key), str):
            yield from _missing(key, cfg[key])
    for i, path in enumerate(cfg.get("evaluations") or []):
        yield from _missing(f"evaluations.{i}", path)


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
    for key in _RESULTS:
        if isinstance(cfg.get(key), str) and (key, cfg[key]) != (
            "resume_from_checkpoint",
            "restart",
        ):
            choices = "; it may be True, False, restart or the folder of a run or a checkpoint"
            yield from _missing(key, cfg[key], choices if key == "resume_from_checkpoint" else "")


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
                f"got {show(folder)}, which lies in checkpoint_dir {base}; choose a folder outside it",
            )
        yield from _unwritable(key, folder)
    cache = (cfg.get("calibration") or {}).get("cache_dir")
    if cache is not None:
        yield from _unwritable("calibration.cache_dir", cache)


def tracker(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The package of every metric logger is installed."""
    for key, node in _nodes(cfg, "metric_logger"):
        name = str(node.get("_component_")).rpartition(".")[2]
        package = _TRACKERS.get(name)
        if package and importlib.util.find_spec(package) is None:
            wrong = f"{name} needs the package {package}, which is not installed"
            yield Problem(f"{key}._component_", f"{wrong}; `pip install {package}`")


def _unwritable(key: str, given: str) -> Iterator[Problem]:
    """A problem when no file can be made in the folder `given`, or in the part of its path that exists."""
    folder = Path(given).absolute()
    try:
        while not folder.exists():
            if folder.is_symlink():
                raise OSError(f"it is a link to {os.readlink(folder)}, which does not exist")
            folder = folder.parent
        if folder.is_dir():
            with tempfile.TemporaryFile(dir=folder):
                return
        reason = f"{folder} is a file"
    except OSError as error:
        reason = f"{folder}: {error.strerror or error}"
    yield Problem(key, f"got {show(given)}, where nothing can be written: {shortened(reason, 160)}")


def _missing(key: str, path: str, hint: str = "") -> Iterator[Problem]:
    """A problem when nothing lies at `path`, with the nearest names in its folder."""
    if os.path.exists(path):
        return
    folder, name = os.path.split(path)
    beside = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
    yield Problem(
        key,
        f"got {show(path)}, which does not exist{hint}. {registry.did_you_mean(name, beside)}".rstrip(),
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


FILES = (
    tokenizer_files,
    tokenizer_kind,
    checkpoint_files,
    checkpoint_folder,
    data_files,
    task_files,
    asked_files,
    results_to_load,
    output_folder,
    tracker,
)
MACHINE = (device,)
