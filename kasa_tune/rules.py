"""Conditions a schema cannot state: between keys, and on the files and folders a config names.

Each rule takes the config as plain containers, holding only entries that are good in themselves, and yields what is wrong.
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
_READERS = (
    "arrow",
    "csv",
    "json",
    "pandas",
    "parquet",
    "text",
)  # `source` of files on disk; other sources are names on the hub


# --- between keys -------------------------------------------------------------------------------------------------------------


def offloading(cfg: dict[str, Any]) -> Iterator[Problem]:
    key = "enable_activation_offloading"
    if cfg.get(key):
        if not cfg.get("enable_activation_checkpointing"):
            yield Problem(key, "got True without enable_activation_checkpointing; set both, or this one to False")
        if cfg.get("device") == "cpu":
            yield Problem(key, "got True on device cpu, where there is nothing to offload to; set it to False")


def warmup(cfg: dict[str, Any]) -> Iterator[Problem]:
    node = cfg.get("lr_scheduler") or {}
    if node.get("warmup_ratio") is not None and node.get("num_warmup_steps") is not None:
        given = f"warmup_ratio {node['warmup_ratio']} and num_warmup_steps {node['num_warmup_steps']}"
        yield Problem("lr_scheduler.warmup_ratio", f"got {given}; give one of the two")


def validation(cfg: dict[str, Any]) -> Iterator[Problem]:
    if cfg.get("run_val_every_n_steps") and "dataset_val" in cfg and not cfg["dataset_val"]:
        yield Problem(
            "run_val_every_n_steps",
            f"got {cfg['run_val_every_n_steps']} without a dataset_val; set dataset_val, or this to null",
        )


def something_to_complete(cfg: dict[str, Any]) -> Iterator[Problem]:
    if "prompts" in cfg and "dataset" in cfg and not cfg["prompts"] and not cfg["dataset"]:
        yield Problem("prompts", "nothing to complete; give prompts or a dataset")


def model_type(cfg: dict[str, Any]) -> Iterator[Problem]:
    given = (cfg.get("checkpointer") or {}).get("model_type")
    if given is None:
        return
    try:
        known = signatures.members("torchtune.training.checkpointing._utils.ModelType")
    except (signatures.Unreadable, signatures.NoSuchName):
        return
    if given not in known:
        nearest = registry.did_you_mean(given, known) or f"Known are {', '.join(known)}."
        yield Problem("checkpointer.model_type", f"got {show(given)}, which torchtune does not know. {nearest}")


# --- files --------------------------------------------------------------------------------------------------------------------


def tokenizer_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    node = cfg.get("tokenizer") or {}
    for name in _TOKENIZER_FILES:
        if isinstance(node.get(name), str):
            yield from _missing(f"tokenizer.{name}", node[name])


def checkpoint_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    node = cfg.get("checkpointer") or {}
    folder = node.get("checkpoint_dir")
    if not isinstance(folder, str):
        return
    if not os.path.isdir(folder):
        yield from _missing(
            "checkpointer.checkpoint_dir", folder, "; `tune download <repo> --output-dir <folder>` fetches a model"
        )
        if os.path.isfile(folder):
            yield Problem(
                "checkpointer.checkpoint_dir", f"got {show(folder)}, which is a file; give the folder it lies in"
            )
        return
    if node.get("_component_", "").endswith("HFCheckpointer"):
        yield from _missing("checkpointer.checkpoint_dir", os.path.join(folder, "config.json"), " beside the weights")
    yield from _listed_files(folder, node.get("checkpoint_files"))


def _listed_files(folder: str, given: Any) -> Iterator[Problem]:
    key = "checkpointer.checkpoint_files"
    if isinstance(given, dict):
        pattern, last = given.get("filename_format"), given.get("max_filename")
        if set(given) != {"filename_format", "max_filename"}:
            yield Problem(
                key,
                f"got the keys {', '.join(map(str, given))}; expected filename_format and max_filename, or a list of files",
            )
        elif not isinstance(last, str) or not last.isdigit():
            yield Problem(
                f"{key}.max_filename",
                f"got {show(last)}; expected the digits of the last file's number, such as '00004'",
            )
        elif not isinstance(pattern, str) or pattern.count("{}") != 2:
            yield Problem(
                f"{key}.filename_format",
                f"got {show(pattern)}; expected two {{}}, such as 'model-{{}}-of-{{}}.safetensors'",
            )
        else:
            names = [pattern.format(str(i + 1).zfill(len(last)), last) for i in range(int(last))]
            yield from _missing_of(key, folder, names)
    elif isinstance(given, list):
        if not given:
            yield Problem(key, "got an empty list; name the files of the checkpoint")
        yield from _missing_of(key, folder, given)


def _missing_of(key: str, folder: str, names: list[str]) -> Iterator[Problem]:
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if len(missing) > 3:
        yield Problem(key, f"{len(missing)} of {len(names)} files are missing in {folder}, the first is {missing[0]}")
        return
    for name in missing:
        yield from _missing(key, os.path.join(folder, name))


def data_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    for name in ("dataset", "dataset_val"):
        nodes = cfg.get(name) or []
        for i, node in enumerate(nodes if isinstance(nodes, list) else [nodes]):
            key = f"{name}.{i}" if isinstance(nodes, list) else name
            source = node.get("source")
            local_path = isinstance(source, str) and source.startswith(("/", "./", "../", "~"))
            if local_path:
                yield from _missing(f"{key}.source", source)
            if source is None or source in _READERS or local_path:
                for file in _flat(node.get("data_files")):
                    if "://" not in file and not glob.glob(_under(node.get("data_dir"), file), recursive=True):
                        yield from _missing(f"{key}.data_files", _under(node.get("data_dir"), file))


def _flat(given: Any) -> Iterator[str]:
    """The file names in a string, a list, or a mapping of split to either."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (list, dict)):
        for item in given.values() if isinstance(given, dict) else given:
            yield from _flat(item)


def _under(folder: Any, file: str) -> str:
    return os.path.join(folder, file) if isinstance(folder, str) else file


def resumed_files(cfg: dict[str, Any]) -> Iterator[Problem]:
    for key in ("resume_from_checkpoint", "adapter_checkpoint"):
        if isinstance(cfg.get(key), str):
            yield from _missing(key, cfg[key])


def output_folder(cfg: dict[str, Any]) -> Iterator[Problem]:
    checkpointer = cfg.get("checkpointer") or {}
    base = checkpointer.get("checkpoint_dir")
    given = {"output_dir": cfg.get("output_dir"), "checkpointer.output_dir": checkpointer.get("output_dir")}
    if given["checkpointer.output_dir"] == given["output_dir"]:
        del given["checkpointer.output_dir"]
    for key, folder in given.items():
        if not isinstance(folder, str):
            continue
        if isinstance(base, str) and Path(folder).resolve().is_relative_to(Path(base).resolve()):
            yield Problem(
                key,
                f"got {show(folder)}, which lies in checkpoint_dir {base}; results may not be written among the base model's files",
            )
        reason = _unwritable(Path(folder).absolute())
        if reason:
            yield Problem(key, f"got {show(folder)}, which cannot be written: {reason}")


def _unwritable(folder: Path) -> str:
    """Why no file can be made in `folder`, or in the part of its path that exists; empty when one can. Leaves nothing behind."""
    try:
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            return f"{folder} is a file"
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder}: {error.strerror or error}"


def _missing(key: str, path: str, hint: str = "") -> Iterator[Problem]:
    """A problem when nothing lies at `path`, with the nearest name in its folder."""
    if os.path.exists(path):
        return
    folder, name = os.path.split(path)
    beside = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
    nearest = registry.did_you_mean(name, beside)
    yield Problem(key, f"got {show(path)}, which does not exist{hint}." + (f" {nearest}" if nearest else ""))


# --- this machine -------------------------------------------------------------------------------------------------------------


def device(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Asks torch, so only a recipe about to run applies it."""
    if str(cfg.get("device")).startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            yield Problem(
                "device",
                f"got {show(cfg['device'])}, but torch sees no CUDA device here; set device=cpu, or install a CUDA build of torch",
            )


KEY_RULES = (offloading, warmup, validation, something_to_complete, model_type)
FILE_RULES = (tokenizer_files, checkpoint_files, data_files, resumed_files, output_folder)
MACHINE_RULES = (device,)
