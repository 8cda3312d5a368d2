"""Modules that are trained whole, beside the adapters: modules of the base, such as LLaVA's connector,
and modules that the base lacks, such as the head of a classifier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

_MARK = "trained_whole"


class TrainedWhole(nn.Module):
    """Base class of a module that the base lacks. Its parameters are kept with the adapter, trained
    or not.
    """

    def start(self, device: torch.device, dtype: torch.dtype) -> None:
        """Allocate and initialize the parameters of a module that was built on the meta device,
        and say which of them are trained.
        """
        raise NotImplementedError


def train_whole(*modules: nn.Module) -> None:
    """Mark modules of the base, which have parameters of their own. :func:`~kasa_tune.components.adapters.attach`
    then leaves them trainable.
    """
    for module in modules:
        setattr(module, _MARK, True)


def is_trained_whole(module: nn.Module) -> bool:
    """Whether a module is marked."""
    return getattr(module, _MARK, False)


def whole_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules of a model."""
    return [module for module in model.modules() if is_trained_whole(module)]


def freeze(model: nn.Module) -> None:
    """Freeze a model, but for its marked modules."""
    model.requires_grad_(False)
    for module in whole_modules(model):
        module.requires_grad_(True)


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the modules that the base lacks, by their names in the model."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if isinstance(module, TrainedWhole)
        for key, parameter in module.named_parameters()
    }


def whole_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the marked modules and of those that the base lacks, by their names in the
    model.
    """
    marked = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if is_trained_whole(module)
        for key, parameter in module.named_parameters(recurse=False)
    }
    return marked | new_parameters(model)


@contextlib.contextmanager
def exchanged(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, parameters that are trained whole have the values of ``state``, which holds theirs
    meanwhile.
    """

    @torch.no_grad()
    def exchange() -> None:
        parameters = whole_parameters(model)
        for name, tensor in state.items():
            own = parameters[name].clone()
            parameters[name].copy_(tensor)
            tensor.copy_(own)

    exchange()
    try:
        yield
    finally:
        exchange()


def refuse_whole(model: nn.Module, source: object) -> None:
    """Refuse an adapter beside which something was trained whole, where others share its base.

    Args:
        model: of the adapter.
        source: the checkpoint, for the message.

    Raises:
        ValueError: there is such a module.
    """
    if found := whole_parameters(model):
        raise ValueError(
            f"Beside the adapter of {source}, {next(iter(found)).partition('.')[0]} was trained whole, which cannot be "
            "added to a base that others share: merge it (tune run export_adapter --config merged_export) and load the "
            "result as a model."
        )
