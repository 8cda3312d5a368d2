"""Linears of a module that read the module's own input, and so share the work on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kasa_tune.components.adapters.linear import AdapterLinear, SharedInput

READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("w1", "w3"))


def share_inputs(model: nn.Module) -> None:
    """Let the adapter linears of each attention, and those of each MLP, compute their outputs
    together where they are given the same tensor. The outputs are the same to rounding.
    """
    for module in model.modules():
        for names in READ_THE_SAME:
            if sum(isinstance(getattr(module, name, None), AdapterLinear) for name in names) > 1:
                module.register_forward_pre_hook(_open)
                module.register_forward_hook(_close, always_call=True)


def _readers(module: nn.Module) -> list[AdapterLinear]:
    names = (name for names in READ_THE_SAME for name in names)
    children = (getattr(module, name, None) for name in names)
    return [child for child in children if isinstance(child, AdapterLinear)]


def _open(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor):
        return
    joining = [linear for linear in _readers(module) if linear.is_plain]
    if len(joining) > 1:
        shared = SharedInput(args[0], joining)
        for linear in joining:
            linear.shared_input = shared


def _close(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for linear in _readers(module):
        linear.shared_input = None
