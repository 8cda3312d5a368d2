"""The config of a finished run, for recipes that are given the run alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kasa_tune.components.checkpoints import Checkpoint, check_allowed, find_checkpoint
from kasa_tune.components.exchange.prompting import moved_files
from kasa_tune.components.exchange.trained_run import check_state

SECTIONS = ("model", "tokenizer", "checkpointer")
_MODELS, _DATA = "kasa_tune.components.models", "kasa_tune.components.data"


def complete_config(cfg: DictConfig) -> DictConfig:
    """Fill in what the config of ``generate_text`` or ``evaluate_model`` leaves to a run, or,
    without a run, to the folder ``checkpoint_dir``. The run is that of ``adapter_checkpoint``, or
    the first of ``adapters``.

    Args:
        cfg: the checked config. One that has the sections model, tokenizer and checkpointer keeps
            them.

    Raises:
        CheckpointError: there is no whole checkpoint.
        ValueError: the run names no tokenizer, or something to call that a data file may not name.
    """
    told: dict[str, Any] = {}
    if cfg.get("model") is None:
        runs = [cfg.get("adapter_checkpoint"), *(cfg.get("adapters") or {}).values()]
        if run := next(filter(None, runs), None):
            checkpoint = find_checkpoint(Path(run))
            told = config_of_run(checkpoint, cfg.get("checkpoint_dir"))
            told = {key: told[key] for key in (*SECTIONS, "dtype")}
        else:
            told = _of_folder(cfg.checkpoint_dir)
    told["dtype"] = cfg.dtype or told.get("dtype", "bf16")
    return DictConfig(OmegaConf.merge(cfg, OmegaConf.create(told)))


def config_of_run(checkpoint: Checkpoint, checkpoint_dir: str | None = None) -> dict[str, Any]:
    """The config of a run, once it is clear that it names nothing to call that it may not name.

    Args:
        checkpoint: of the run.
        checkpoint_dir: where the base's files lie now; None for where the run had them.

    Returns:
        Plain containers, in which every ``${`` is escaped.

    Raises:
        ValueError: it does name such a thing, or no tokenizer.
    """
    check_state(checkpoint)
    config: dict[str, Any] = {**checkpoint.config}
    if not isinstance(config.get("tokenizer"), Mapping):
        raise ValueError(
            f"{checkpoint} names no tokenizer, as an imported adapter: give a config with the "
            f"sections {', '.join(SECTIONS)}."
        )
    check_allowed(config["tokenizer"], "tokenizer", checkpoint)
    folder = checkpoint_dir or config["checkpointer"]["checkpoint_dir"]
    for name in SECTIONS:
        if checkpoint_dir and "checkpoint_dir" in config[name]:
            config[name] = {**config[name], "checkpoint_dir": checkpoint_dir}
    config["tokenizer"] = moved_files(config["tokenizer"], Path(folder))
    return _escaped(config)


def _of_folder(folder: str) -> dict[str, Any]:
    """The sections of a base model by itself. Its adapters start at zero and change nothing."""
    component = {
        "model": f"{_MODELS}.lora_from_checkpoint",
        "tokenizer": f"{_DATA}.tokenizer_from_checkpoint",
        "checkpointer": f"{_MODELS}.CheckpointFolder",
    }
    sections: dict[str, Any] = {
        name: {"_component_": component[name], "checkpoint_dir": folder} for name in SECTIONS
    }
    sections["model"] |= {"attn_modules": ["q_proj"], "rank": 1}
    return _escaped(sections)


def _escaped(tree: Any) -> Any:
    """Containers whose texts stand for themselves."""
    if isinstance(tree, Mapping):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_escaped(value) for value in tree]
    return tree.replace("${", r"\${") if isinstance(tree, str) else tree
