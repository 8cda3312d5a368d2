"""The report of a dry run: what a config will train and what memory that takes, without reading a weight."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import training
from torchtune.config import instantiate
from torchtune.modules import TransformerDecoder

from kasa_tune.architectures.comparing import FOLDER
from kasa_tune.components.corda import calibration_bytes
from kasa_tune.components.models.base_files import listed_files, weight_files
from kasa_tune.components.models.base_weights import read_base
from kasa_tune.components.models.loading import check_shapes
from kasa_tune.components.quantized import base_bytes
from kasa_tune.components.training.memory import budget_report, memory_budget, per_process
from kasa_tune.methods import method_of


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
        quantized: linears that will be held in NF4, by name.
        calibration: of a run that calibrates, the groups of linears that share an input, and the rounds of batches.
        shards: processes that hold the model together; the report is of one of them.
    """
    seq_len = tokenizer.max_seq_len or model.max_seq_len
    budget = dry_run_budget(
        cfg, model, seq_len=seq_len, loss=loss, quantized=quantized, calibration=calibration
    )
    report = budget_report(model, per_process(budget, model, shards))
    return [*report, base_line(cfg, model)]


def base_line(cfg: DictConfig, model: nn.Module) -> str:
    """Compare the shapes of a model with the headers of its base's files, if they are there.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        model: on the meta device.

    Returns:
        A line that says what was compared. A dry run goes on without the files.

    Raises:
        ValueError: names or shapes differ, or the files are no weights or not all of them.
    """
    node = cfg.checkpointer
    folder = Path(node.checkpoint_dir)
    if not folder.is_dir():
        return f"Base: {folder} is not there, so the model was not compared with it."
    if node._component_ == FOLDER:
        try:
            names = weight_files(folder)
        except FileNotFoundError as error:
            return f"Base: {error} Shapes were not compared."
    elif str(node._component_).endswith("FullModelHFCheckpointer"):
        names = listed_files(node.checkpoint_files)
    else:
        return f"Base: {folder} is no checkpoint of Hugging Face's kind: shapes were not compared."
    missing = [name for name in ("config.json", *names) if not (folder / name).is_file()]
    if missing:
        return f"Base: {folder} lacks {missing[0]}, so shapes were not compared."
    if not all(name.endswith(".safetensors") for name in names):
        return f"Base: shapes in {names[0]} were not compared, because that would read it whole."
    with tempfile.TemporaryDirectory() as unused:  # torchtune makes the output_dir it is told
        more = {} if node._component_ == FOLDER else {"output_dir": unused}
        count = check_shapes(model, read_base(node, **more))
    return f"Base: config.json and {count} shapes in {folder} are those of the model."


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
        loss_chunk=getattr(loss, "chunk_size", cfg.batch_size * seq_len),
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
