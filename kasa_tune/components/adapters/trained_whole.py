"""Modules that are trained whole, beside the adapters of a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class TrainedWhole(nn.Module):
    """Base class of a module that the base model lacks, such as the head of a classifier. Its
    parameters are kept with the adapter, trained or not.
    """

    def start(self, device: torch.device, dtype: torch.dtype) -> None:
        """Allocate and initialize the parameters of a module that was built on the meta device,
        and say which of them are trained.
        """
        raise NotImplementedError


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters of all :class:`TrainedWhole` modules, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, TrainedWhole):
            for inner, parameter in module.named_parameters():
                yield f"{name}.{inner}", parameter
