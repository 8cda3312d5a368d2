"""The report of a dry run: what a config will train and what memory that takes, without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch import nn
from torchtune import training
from torchtune.config import instantiate
from torchtune.modules import TransformerDecoder

from kasa_tune.components.corda import calibration_bytes, shared_inputs
from kasa_tune.components.quantized import base_bytes
from kasa_tune.components.training.base_line import base_line
from kasa_tune.components.training.costs import step_flops, time_line
from kasa_tune.components.training.memory import budget_report, memory_budget, per_process
from kasa_tune.methods import method_of

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def dry_run_report(
    cfg: DictConfig,
    model: TransformerDecoder,
    *,
    tokenizer: Any,
    loss: Any,
    quantized: Mapping[str, nn.Module] | None = None,
    calibration: tuple[Any, Any] | None = None,
    shards: int = 1,
) -> list[str]:
    """Lines to print: trained parameters, bytes by purpose, and what was compared with the base's
    files.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        model: on the meta device.
        tokenizer: its ``max_seq_len`` is the length of the longest row; None stands for the model's.
        loss: its ``chunk_size`` is the number of tokens whose logits are alive at once; all of a batch without one.
            None for a classifier, which has no logits of tokens.
        quantized: linears that will be held in NF4, by name.
        calibration: of a run that calibrates, the groups of linears that share an input, and the rounds of batches.
        shards: processes that hold the model together; the report is of one of them.
    """
    seq_len = tokenizer.max_seq_len or model.max_seq_len
    budget = dry_run_budget(
        cfg, model, seq_len=seq_len, loss=loss, quantized=quantized, calibration=calibration
    )
    report = budget_report(model, per_process(budget, model, shards))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    report += [f"Parameters of the base: {frozen:,}", base_line(cfg, model)]
    if cfg.get("device_flops") is not None:
        times = cfg.gradient_accumulation_steps
        flops = times * step_flops(model, batch_size=cfg.batch_size, seq_len=seq_len)
        num_tokens = times * cfg.batch_size * seq_len
        report.append(time_line(flops, num_tokens=num_tokens, gpu=cfg.device_flops))
    return report


def rows_at_hand(cfg: DictConfig) -> bool:
    """Whether a config names its data, and its tokenizer is there, so that a dry run can look at
    the rows.

    Args:
        cfg: the checked config of a fine-tuning recipe.
    """
    folder = cfg.tokenizer.get("checkpoint_dir")
    if folder and not any((Path(folder) / name).is_file() for name in _TOKENIZERS):
        return False
    nodes = cfg.dataset if isinstance(cfg.dataset, ListConfig) else [cfg.dataset]
    return all(
        node.get("data_files") or not node._component_.endswith(".by_columns_dataset")
        for node in nodes
    )


def report_without_rows(
    cfg: DictConfig,
    model: TransformerDecoder,
    *,
    loss: Any,
    quantized: Mapping[str, nn.Module] | None = None,
) -> list[str]:
    """Lines to print of a dry run whose tokenizer or data are not there: every row is counted as
    long as it may be. Arguments as of :func:`dry_run_report`.
    """
    given = cfg.tokenizer.get("max_seq_len")
    seq_len = min(given or model.max_seq_len, model.max_seq_len)
    calibration = None
    if method_of(cfg.adapter).calibrated and not cfg.adapter_checkpoint:
        calibration = (shared_inputs(model), [longest_rows(cfg)] * cfg.calibration.rounds)
    report = dry_run_report(
        cfg,
        model,
        tokenizer=SimpleNamespace(max_seq_len=seq_len),
        loss=loss,
        quantized=quantized,
        calibration=calibration,
    )
    return [*report, f"Without a tokenizer and data, each row was counted as {seq_len:,} tokens."]


def longest_rows(cfg: DictConfig) -> list[Mapping[str, torch.Tensor]]:
    """The batches of one round of calibration on meta, each row of the greatest length."""
    size = cfg.calibration.batch_size
    tokens = torch.empty(size, cfg.calibration.max_seq_len, dtype=torch.long, device="meta")
    return [{"tokens": tokens}] * -(-cfg.calibration.num_samples // size)


def dry_run_budget(
    cfg: DictConfig,
    model: TransformerDecoder,
    *,
    seq_len: int,
    loss: Any,
    quantized: Mapping[str, nn.Module] | None = None,
    calibration: tuple[Any, Any] | None = None,
) -> dict[str, int]:
    """Bytes by purpose of a run on one device. Arguments as of :func:`dry_run_report`; ``seq_len`` in tokens."""
    budget = memory_budget(
        model,
        partial(instantiate, cfg.optimizer),
        batch_size=cfg.batch_size,
        seq_len=seq_len,
        vocab_size=model.tok_embeddings.num_embeddings,
        loss_chunk=getattr(loss, "chunk_size", cfg.batch_size * seq_len) if loss else 0,
        adapter_dtype=training.get_dtype(cfg.adapter.dtype, device=torch.device("cpu")),
    )
    if quantized:
        base = base_bytes(model, quantized, **cfg.quantization)
        budget = (
            base | budget | base
        )  # first in the report, and in place of the unquantized weights
    if calibration:
        adapter, options = cfg.adapter, cfg.calibration
        budget |= calibration_bytes(
            model,
            *calibration,
            dtype=training.get_dtype(options.accumulate),  # fp32 or fp64
            offload=options.offload,
            covariance_power=adapter.covariance_power,
            damping_search=adapter.damping_search,
            spectra=options.rounds > 1 or adapter.dynamic_ranks,
            pooled_above=options.max_selection_dim,
            of_inputs=method_of(adapter).decomposition == "input_svd",
        )
    return budget
