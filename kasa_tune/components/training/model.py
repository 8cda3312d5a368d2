"""The model that a recipe trains, as its config describes it, before any weight is read."""

from __future__ import annotations

from functools import partial

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import modules, training
from torchtune.config import instantiate

from kasa_tune.components.models.loading import build_on_meta, require_adapters
from kasa_tune.components.training.loss import return_hidden_states


def build_training_model(cfg: DictConfig, *, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, with adapters, ready to be trained once it has its weights.

    Its forward returns the last hidden states ``[b, s, d]``, since the loss projects what it needs. Its blocks keep
    their inputs alone where ``cfg.enable_activation_checkpointing`` is set.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        dtype: of the base weights.

    Raises:
        ValueError: the model has no adapters of ours.
    """
    model = build_on_meta(partial(instantiate, cfg.model), dtype=dtype)
    require_adapters(model, cfg.model._component_)
    return_hidden_states(model)
    if cfg.enable_activation_checkpointing:
        blocks = {modules.TransformerSelfAttentionLayer}
        training.set_activation_checkpointing(model, blocks)
    return model
