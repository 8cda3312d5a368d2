"""From nothing to a model with base weights: built on the meta device, filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kasa_tune.components.adapters import adapter_linears
from kasa_tune.components.decomposition import check_finite


def read_base_weights(checkpointer: Any) -> dict[str, Tensor]:
    """The base model's weights under torchtune's names, on the CPU.

    Args:
        checkpointer: one of torchtune's, built from the config.

    Raises:
        ValueError: the files cannot be read, or are not of the model type that the checkpointer was told.
    """
    try:
        return checkpointer.load_checkpoint()["model"]
    except Exception as error:  # a converter's own errors (KeyError, a shape that cannot be viewed, ...) name no file
        raise ValueError(
            f"Could not read {checkpointer._checkpoint_dir} as a {checkpointer._model_type.name} checkpoint: {error} "
            f"{error.__cause__ or ''}"
        ) from error


def require_adapters(model: nn.Module, name: str) -> None:
    """Refuse a model that would be trained whole and saved as nothing.

    Raises:
        ValueError: no linear of the model is one of ours.
    """
    if next(adapter_linears(model), None) is None:
        raise ValueError(
            f"model._component_: {name} has no adapters of ours; use a kasa_<model>, lora_<model> or corda_<model> "
            "builder of kasa_tune.components.models."
        )


def build_on_meta(build: Callable[[], nn.Module], *, dtype: torch.dtype) -> nn.Module:
    """The model with shapes and dtypes but no storage, in milliseconds whatever its size.

    Args:
        build: a builder without arguments.
        dtype: of the base weights.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(previous)


@torch.no_grad()
def load_base_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, device: torch.device, adapter_dtype: torch.dtype
) -> None:
    """Fill a model built on meta: base weights cast and moved one by one, adapters started without a look at the
    weights.

    Args:
        model: from :func:`build_on_meta`, in place.
        weights: torchtune's names to tensors of any floating dtype.
        device: where the model shall live.
        adapter_dtype: of the trained parameters.

    Raises:
        ValueError: names or shapes differ from the model's (the first differences are listed), or a weight holds NaN or
            infinity.
    """
    expected = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    _check_same_shapes(expected, weights)
    cast = {name: weights[name].to(device=device, dtype=value.dtype) for name, value in expected.items()}
    for name, tensor in cast.items():
        check_finite(tensor, name)
    model.load_state_dict(cast, strict=False, assign=True)
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()
    for _, linear in adapter_linears(model):
        linear.materialize(device, adapter_dtype)


def _check_same_shapes(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    wrong = [
        f"{name}: the model has {_shape(expected, name)}, the checkpoint {_shape(given, name)}"
        for name in sorted(expected.keys() | given.keys())
        if _shape(expected, name) != _shape(given, name)
    ]
    if wrong:
        raise ValueError(
            f"The checkpoint is not one of this model: {len(wrong)} of {len(expected)} tensors differ ("
            + "; ".join(wrong[:3])
            + "). Check model._component_ and checkpointer.checkpoint_dir."
        )


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "none"
