"""Caches of rotary embeddings, which a model built on the meta device lacks."""

from __future__ import annotations

import torch
from torch import nn


def build_rotary_caches(model: nn.Module) -> None:
    """Llama 3.1's rotary embedding leaves its cache unbuilt on meta and then refuses to run: give it one."""
    for module in model.modules():
        if getattr(module, "is_cache_built", True) is False:
            with torch.device("cpu"):
                module.rope_init()
            module.to("meta")
