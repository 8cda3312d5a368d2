"""Linears with an adapter: their classes, how they get into a model, their regularizers, and their
state.
"""

from kasa_tune.components.adapters.attach import attach, builders
from kasa_tune.components.adapters.corda import CorDALinear
from kasa_tune.components.adapters.kasa import KaSALinear
from kasa_tune.components.adapters.linear import AdapterLinear
from kasa_tune.components.adapters.lora import LoRALinear
from kasa_tune.components.adapters.regularization import kasa_regularization
from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_state_dict,
    adapter_tensors,
    adapter_update,
    check_adapter_fits,
    load_adapter,
    load_adapter_state_dict,
    load_whole,
    lora_plus_groups,
)
from kasa_tune.components.adapters.whole import TrainedWhole, whole_parameters

__all__ = [
    "AdapterLinear",
    "CorDALinear",
    "KaSALinear",
    "LoRALinear",
    "TrainedWhole",
    "adapter_linears",
    "adapter_state_dict",
    "adapter_tensors",
    "adapter_update",
    "attach",
    "builders",
    "check_adapter_fits",
    "kasa_regularization",
    "load_adapter",
    "load_adapter_state_dict",
    "load_whole",
    "lora_plus_groups",
    "whole_parameters",
]
