"""Configs whose model is what the folder of its checkpoint says: its key ``checkpoint_dir``, and checks of the folder.

A rule is called as those of rules.py are.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kasa_tune import registry
from kasa_tune.architectures import (
    Architecture,
    UnsupportedArchitectureError,
    read_architecture,
)
from kasa_tune.architectures.encoder import read_encoder
from kasa_tune.architectures.files import check_folder, weight_files
from kasa_tune.config.entries import Problem, show
from kasa_tune.config.file_kinds import kind_of

SECTIONS = ("model", "tokenizer", "checkpointer")
_READERS = ("_from_checkpoint", ".CheckpointFolder", ".EncoderFolder", ".encoder_tokenizer")
_DOCS = "docs/checkpoints.md"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spm.model")


def name_of(path: str | None) -> str:
    """The name of a folder for a path in a config: ``${name_of:${checkpoint_dir}}``."""
    return Path(path).resolve().name or "root" if path else "model"


def _register(name: str, function: Callable[..., Any]) -> None:
    """Let configs call a function. OmegaConf 2.4 renamed the method that does it."""
    newer = getattr(OmegaConf, "register_resolver", None)
    if newer is not None and "replace" in inspect.signature(newer).parameters:
        newer(name, function, replace=True)
    else:
        OmegaConf.register_new_resolver(name, function, replace=True)


_register("name_of", name_of)


def put_folder(tree: dict[str, Any]) -> None:
    """Let every section read its files from the folder of the top-level key ``checkpoint_dir``, in place.

    Files of a tokenizer that are named one by one move if they lie where the checkpoint did.
    """
    before = str((tree.get("checkpointer") or {}).get("checkpoint_dir"))
    for name in SECTIONS:
        node = tree.get(name)
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "checkpoint_dir":
                    node[key] = "${checkpoint_dir}"
                elif isinstance(value, str) and value.startswith(f"{before}/"):
                    node[key] = "${checkpoint_dir}" + value.removeprefix(before)


def reads_folder(node: Any) -> bool:
    """Whether a section's component reads config.json of the folder in its ``checkpoint_dir``."""
    return isinstance(node, dict) and str(node.get("_component_")).endswith(_READERS)


def architecture_of(node: dict[str, Any]) -> Architecture | None:
    """The architecture of a section that reads a folder; None where there is none to read, which `checkpoint_folder`
    reports.
    """
    folder = node.get("checkpoint_dir")
    if not reads_folder(node) or not isinstance(folder, str):
        return None
    try:
        return read_architecture(folder)
    except (ValueError, OSError):
        return None


# --- rules ------------------------------------------------------------------------------------------------------------


def folder_given(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Sections that read a folder have one."""
    lacking = [name for name in SECTIONS if reads_folder(cfg.get(name)) and not _folder(cfg[name])]
    if lacking and "checkpoint_dir" in cfg and not cfg["checkpoint_dir"]:
        yield Problem(
            "checkpoint_dir",
            "missing; give the folder of the model, such as checkpoint_dir=/models/Qwen3-8B "
            f"({_DOCS})",
        )


def told_by_run(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Generation and evaluation know their model: from their own sections, from a run, or from a folder."""
    run = "adapter_checkpoint" if "max_new_tokens" in cfg else "adapters"
    if run == "adapters" and (not {"tasks", "adapters"} <= cfg.keys() or "protocol" in cfg):
        return
    lacking = [name for name in SECTIONS if not cfg.get(name)]
    if len(lacking) == len(SECTIONS):
        if not cfg.get(run) and not cfg.get("checkpoint_dir"):
            yield Problem(
                run,
                "missing; give a run's output_dir, or the folder of a model alone with checkpoint_dir",
            )
    else:
        for name in lacking:
            yield Problem(name, f"missing; give all of {', '.join(SECTIONS)}, or none of them")


def report_of_runs(cfg: dict[str, Any]) -> Iterator[Problem]:
    """A report is of one run, or of several."""
    if "calibrate" not in cfg or "runs" not in cfg:
        return
    if not cfg["run"] and not cfg["runs"]:
        yield Problem(
            "run", "missing; give a run's output_dir, or several with runs={name: folder}"
        )
    elif cfg["run"] and cfg["runs"]:
        yield Problem("run", f"got {show(cfg['run'])} beside runs; give one of them")


def checkpoint_folder(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Every folder that a section reads holds a supported model, its weights and its tokenizer. A dry run needs
    config.json alone.
    """
    places: dict[str, list[str]] = {}
    for name in SECTIONS:
        if reads_folder(cfg.get(name)) and (folder := _folder(cfg[name])):
            places.setdefault(folder, []).append(name)
    for folder, names in places.items():
        of_encoder = any("encoder" in cfg[name]["_component_"].lower() for name in names)
        read = read_encoder if of_encoder else read_architecture
        if wrong := _fault(Path(folder), [] if cfg.get("dry_run") else names, read):
            own = f"{names[0]}.checkpoint_dir"
            yield Problem("checkpoint_dir" if folder == cfg.get("checkpoint_dir") else own, wrong)


def _fault(folder: Path, sections: list[str], read: Callable[[Path], Any]) -> str | None:
    """What is wrong with a folder that these sections read besides config.json."""
    try:
        check_folder(folder)
        read(folder)
        if "checkpointer" in sections:
            weight_files(folder)
    except UnsupportedArchitectureError as error:
        return f"{str(error).partition(' Supported are')[0]} docs/families.md lists those that are"
    except (ValueError, OSError) as error:
        return str(error) + _nearest(folder)
    return _tokenizer_fault(folder) if "tokenizer" in sections else None


def _nearest(folder: Path) -> str:
    """The nearest names of folders beside one that is missing."""
    if folder.exists() or not folder.parent.is_dir():
        return ""
    beside = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    return f" {registry.did_you_mean(folder.name, beside)}".rstrip()


def _tokenizer_fault(folder: Path) -> str | None:
    path = next((folder / name for name in _TOKENIZERS if (folder / name).is_file()), None)
    if path is None:
        return f"{show(str(folder))} holds no tokenizer.json, which belongs beside the weights"
    kind = kind_of(str(path))
    if kind is None or kind in ("a tokenizer.json of Hugging Face", "a SentencePiece model"):
        return None
    return f"{show(str(path))} is {kind}; a tokenizer.json of Hugging Face is expected there"


def _folder(node: dict[str, Any]) -> str | None:
    folder = node.get("checkpoint_dir")
    return folder if isinstance(folder, str) else None
