"""The adapters of a whole model: which of its linears have one, and their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kasa_tune.components.adapters.corda import CorDALinear
from kasa_tune.components.adapters.linear import AdapterLinear
from kasa_tune.components.adapters.whole import whole_parameters
from kasa_tune.components.linalg.decomposition import check_finite
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.linalg.nf4 import is_quantized
from kasa_tune.components.processes.sharding import full_tensor

EDIT = ("lora_edit_out", "lora_edit_in")


def adapter_linears(model: nn.Module) -> Iterator[tuple[str, AdapterLinear]]:
    """Names and modules of every adapter linear in the model, in the model's order.

    The names are those of the bare model, without the parts that activation checkpointing puts between.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            yield name.replace("_checkpoint_wrapped_module.", ""), module


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Update and edit factors of every adapter linear, ``<module>.lora_*`` to tensor, and the parameters of modules
    trained whole, by their own names: all that a base needs to become the model. Tensors of which every process holds a
    part are gathered: all processes must call.
    """
    return {name: full_tensor(value.detach()) for name, value in adapter_tensors(model).items()}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors behind :func:`adapter_state_dict`, not gathered and not copied."""
    factors = {
        f"{name}.{key}": value
        for name, linear in adapter_linears(model)
        for key, value in linear.state_dict(keep_vars=True).items()
        if key.startswith("lora_")
    }
    return factors | whole_parameters(model)


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a saved adapter onto a model that holds the untouched base weights, or quantized ones from which the edits to
    be folded have been taken.

    Linears whose ranks are found by data (:class:`CorDALinear`) take the saved ones.

    Raises:
        ValueError: names or shapes differ from the model's adapter (the first differences are listed), or a tensor
            holds NaN or infinity.
        RuntimeError: an edit is folded into one of the weights already.
    """
    check_adapter_fits(model, state)
    for name, linear in adapter_linears(model):
        load_adapter(name, linear, state)
    load_whole(model, state)


def check_adapter_fits(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise as :func:`load_adapter_state_dict` would, before any tensor is touched."""
    expected = {name: tuple(value.shape) for name, value in adapter_state_dict(model).items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    for name, linear in adapter_linears(model):
        linear.check_unfolded()
        saved = [
            (given.get(f"{name}.{key}") or (None,))[0] for key in ("lora_a.weight", "lora_edit_in")
        ]
        if isinstance(linear, CorDALinear) and None not in saved:
            expected |= {
                f"{name}.{key}": shape for key, shape in linear.adapter_shapes(*saved).items()
            }
    if expected != given:
        wrong = [
            f"{name}: model {expected.get(name, 'has none')}, adapter {given.get(name, 'has none')}"
            for name in sorted(expected.keys() | given.keys())
            if expected.get(name) != given.get(name)
        ]
        raise ValueError(
            f"The adapter does not fit the model in {len(wrong)} tensors: " + "; ".join(wrong[:3])
        )
    for name, tensor in state.items():
        check_finite(tensor, f"The adapter's {name}")


@torch.no_grad()
def load_adapter(name: str, linear: AdapterLinear, state: Mapping[str, Tensor]) -> None:
    """The part of :func:`load_adapter_state_dict` that belongs to one linear, which holds its weight."""
    if isinstance(linear, CorDALinear):
        linear.set_rank(len(state[f"{name}.lora_a.weight"]))
    for parameter in linear.adapter_params():
        linear.get_parameter(parameter).copy_(state[f"{name}.{parameter}"])
    edit = LowRank(state[f"{name}.lora_edit_out"].clone(), state[f"{name}.lora_edit_in"].clone())
    folded_before = is_quantized(linear.weight) and linear.edit_storage == "folded"
    linear.set_edit(edit, taken_out=folded_before and edit.rank > 0)


@torch.no_grad()
def load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The part of :func:`load_adapter_state_dict` that belongs to modules trained whole, which no process has cut."""
    for name, parameter in whole_parameters(model).items():
        parameter.copy_(state[name])


def adapter_update(state: Mapping[str, Tensor], name: str, scaling: float) -> LowRank:
    """What turns a layer's base weight into the one it was trained to, exactly: ``W_eff - W0`` as factors
    ``[s · B diag(d) | -E_out]`` and ``[A ; E_in]`` in float64, of rank ``r + k``. Of DoRA it is the change before the
    rows are scaled.

    Args:
        state: from :func:`adapter_state_dict`.
        name: of the linear.
        scaling: its ``s``.
    """
    part = {
        key: state[f"{name}.{key}"].double() for key in ("lora_a.weight", "lora_b.weight", *EDIT)
    }
    diag = state[f"{name}.lora_diag"].double() if f"{name}.lora_diag" in state else 1.0
    edit_out, edit_in = (part[key] for key in EDIT)
    out = torch.cat((scaling * part["lora_b.weight"] * diag, -edit_out), dim=1)
    return LowRank(out, torch.cat((part["lora_a.weight"], edit_in)))


def lora_plus_groups(
    model: nn.Module, lr: float | None, ratio: float, *, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer in which every B learns ``ratio`` times as fast as the rest (LoRA+, arXiv
    2402.12354, with its λ as ``ratio``). One group for a ratio of 1. What is trained whole is a group of its own, with
    the rate ``head_lr``.

    Raises:
        ValueError: a ratio other than 1 of no ``lr``.
    """
    whole = set(whole_parameters(model))
    every = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    trained = {name: parameter for name, parameter in every.items() if name not in whole}
    head = [parameter for name, parameter in every.items() if name in whole]
    own_lr = {} if head_lr is None else {"lr": head_lr}
    heads = [{"params": head, **own_lr}] if head else []
    if ratio == 1:
        return [{"params": list(trained.values())}, *heads]
    if lr is None:
        raise ValueError(
            f"adapter.lr_ratio {ratio} needs optimizer.lr, the learning rate it is a multiple of."
        )
    fast = [parameter for name, parameter in trained.items() if name.endswith("lora_b.weight")]
    rest = [parameter for name, parameter in trained.items() if not name.endswith("lora_b.weight")]
    return [{"params": rest, "lr": lr}, {"params": fast, "lr": lr * ratio}, *heads]
