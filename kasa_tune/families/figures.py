"""What a dry run of a config counts, for the header of that config: without its tokenizer, its data or a weight.

The blocks of a model are alike, so every purpose of a budget either grows by the same number of bytes with each block
or does not grow. Two shallow models therefore give the budget of the whole one exactly. They differ by two blocks,
since Gemma 2 alternates between two kinds of attention.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchtune import training
from torchtune.modules import TransformerDecoder

from kasa_tune import config as configs
from kasa_tune.components.corda import shared_inputs
from kasa_tune.components.quantized import quantized_linears
from kasa_tune.components.training import (
    build_training_model,
    dry_run_budget,
    longest_rows,
    peaks,
    summed_loss,
)
from kasa_tune.config.schemas import SCHEMAS
from kasa_tune.families.combining import TrainingConfig
from kasa_tune.families.headers import Figures
from kasa_tune.families.writing import training_text
from kasa_tune.methods import METHODS, method_of

PERIOD = 2  # blocks after which a model repeats itself
_TRAINED = "trained parameters"
# The keys of a config that its budget depends on.
_COUNTED = (
    "tokenizer",
    "model",
    "adapter",
    "quantization",
    "calibration",
    "batch_size",
    "optimizer",
    "loss",
    "dtype",
    "enable_activation_checkpointing",
)


def figures_of(config: TrainingConfig) -> Figures:
    """What ``dry_run=true`` counts for a config, with every row, of calibration too, as long as it may be."""
    cfg = checked(config)
    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    counted = {key: tree[key] for key in _COUNTED if key in tree}
    counted["tokenizer"] = {"max_seq_len": counted["tokenizer"]["max_seq_len"]}
    if config.method.calibrated:
        counted["calibration"]["dataset"] = None
    else:
        counted.pop("calibration", None)
    return _figures(OmegaConf.to_yaml(OmegaConf.create(counted)))


def checked(config: TrainingConfig) -> DictConfig:
    """The config as its recipe gets it, with the defaults of all keys, whether or not it is written already."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{config.name}.yaml")
        path.write_text(training_text(config), encoding="utf-8")
        return configs.load(path, schema=SCHEMAS[config.method.suffix], check_files=False)


@cache
def _figures(text: str) -> Figures:
    """Of the keys that are counted, as YAML: tasks that differ in their data share what is counted."""
    budget = budget_of(DictConfig(OmegaConf.create(text)))
    trained = budget.pop(_TRAINED)
    set_up, step = peaks(budget)
    base = budget["base weights"] + budget.get("base weights in NF4", 0)
    return Figures(trained, step, set_up, base)


def budget_of(cfg: DictConfig, *, shallow: bool = True) -> dict[str, int]:
    """Bytes by purpose of a run, and the number of trained parameters.

    Args:
        cfg: a checked config.
        shallow: count two shallow models in place of the whole one; the result is the same.
    """
    dtype = training.get_dtype(cfg.dtype, device=torch.device("cpu"))
    model = build_training_model(cfg, dtype=dtype)
    assert isinstance(model.layers, nn.ModuleList)
    depth = len(model.layers)
    lower = PERIOD + depth % PERIOD
    upper = lower + PERIOD
    if not shallow or depth <= upper:
        return _budget(cfg, model)
    more = _budget(cfg, _cut(model, upper))
    less = _budget(cfg, _cut(model, lower))
    periods = (depth - lower) // PERIOD
    return {key: less[key] + periods * (more[key] - less[key]) for key in less}


def _cut(model: TransformerDecoder, depth: int) -> TransformerDecoder:
    """The model with its first blocks alone, in place."""
    model.layers = nn.ModuleList([*model.layers][:depth])
    return model


def _budget(cfg: DictConfig, model: TransformerDecoder) -> dict[str, int]:
    method = METHODS["lora"] if ".lora_" in cfg.model._component_ else method_of(cfg.adapter)
    quantized = "quantization" in cfg
    budget = dry_run_budget(
        cfg,
        model,
        seq_len=cfg.tokenizer.max_seq_len,
        loss=summed_loss(configs.instantiate(cfg.loss), model.tok_embeddings.num_embeddings),
        quantized=quantized_linears(model, cfg.quantization.block_size) if quantized else None,
        calibration=(shared_inputs(model), [longest_rows(cfg)]) if method.calibrated else None,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**budget, _TRAINED: trained}


def figures_of_all(configs_to_count: Iterable[TrainingConfig]) -> dict[str, Figures]:
    """The figures of configs that train on a GPU, by name."""
    return {
        config.name: figures_of(config)
        for config in configs_to_count
        if config.task.device == "cuda" and not config.model.is_any
    }
