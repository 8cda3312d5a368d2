"""Building the model that a recipe trains, before any weight is read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torchtune import modules, training
from torchtune.config import instantiate

from kasa_tune.architectures.comparing import FOLDER
from kasa_tune.components.models.agreement import check_base
from kasa_tune.components.models.base_weights import read_base
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.components.models.encoder_folder import check_encoder
from kasa_tune.components.models.llava import Llava
from kasa_tune.components.models.loading import (
    OTHER_CONFIG,
    build_on_meta,
    check_shapes,
    require_adapters,
)
from kasa_tune.components.training.loss import return_hidden_states
from kasa_tune.components.training.validating import Validation


def build_training_model(cfg: DictConfig, *, dtype: torch.dtype) -> nn.Module:
    """Build the config's model with its adapters on the meta device, and compare it with the
    config.json of its checkpoint, if that is there.

    Its forward pass returns the last hidden states ``[b, s, d]``, because the loss does the output
    projection. With ``cfg.enable_activation_checkpointing`` each block stores only its input and
    computes the rest again in the backward pass.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        dtype: dtype of the base weights.

    Raises:
        ValueError: the model has no adapters of this package, or config.json describes another
            model than this one or than the weights of its folder. Or a task of the section
            ``validation`` cannot be done.
    """
    model = build_on_meta(partial(instantiate, cfg.model), dtype=dtype)
    require_adapters(model, cfg.model._component_)
    _check_supported(model)
    if "validation" in cfg and not cfg.dry_run:
        Validation(cfg, model)  # its data is looked at before any weight
    check_base(model, cfg)
    base = cfg.get("checkpointer")  # a config whose bytes are counted has none
    if base and base._component_ == FOLDER and not cfg.dry_run:
        check_shapes(model, read_base(base), OTHER_CONFIG)  # of which the headers are read
    return_hidden_states(model)
    if cfg.enable_activation_checkpointing:
        blocks = {modules.TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(model, blocks)
    return model


def _check_supported(model: nn.Module) -> None:
    """Refuse a model that also sees where its tower is not dealt with.

    Raises:
        ValueError: it would be held by several processes.
    """
    if isinstance(model, Llava) and dist.is_initialized():
        raise ValueError(
            "checkpointer.checkpoint_dir holds a LLaVA model. Such models are trained by the "
            "recipes for a single device; the distributed ones do not take them yet."
        )


def build_classifier(cfg: DictConfig, *, dtype: torch.dtype) -> Encoder:
    """Build the config's encoder with its adapters and its head on the meta device, and compare it
    with the config.json of its checkpoint. A dry run goes on without that.

    Args:
        cfg: the checked config of a classification recipe.
        dtype: dtype of the base weights.

    Raises:
        ValueError: the model is no encoder with adapters of this package, or config.json describes
            another one than this or than the weights of its folder.
    """
    model = build_on_meta(partial(instantiate, cfg.model), dtype=dtype)
    require_adapters(model, cfg.model._component_)
    if not isinstance(model, Encoder):
        raise ValueError(
            f"model._component_: {cfg.model._component_} builds no encoder. Use one of "
            "kasa_tune.components.models, such as kasa_encoder_from_checkpoint."
        )
    folder = Path(cfg.checkpointer.checkpoint_dir)
    if not cfg.dry_run or (folder / "config.json").is_file():
        check_encoder(model, folder)
    if not cfg.dry_run:
        check_shapes(model, read_base(cfg.checkpointer), OTHER_CONFIG)  # of which headers are read
    return model
