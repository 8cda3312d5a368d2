"""The models of an evaluation: a base, and runs on it, each loaded the cheapest way that keeps it as it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kasa_tune.components.adapters.state import adapter_linears, load_adapter_state_dict
from kasa_tune.components.checkpoints import Checkpoint, build_allowed, find_checkpoint
from kasa_tune.components.exchange.adapter_set import AdapterSet
from kasa_tune.components.exchange.trained_run import check_state
from kasa_tune.components.models.agreement import base_architecture
from kasa_tune.components.models.base_weights import weights_fingerprint
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.components.quantized.base import linears_in_nf4, load_quantized

BASE = "base"


def without_adapters(model: nn.Module) -> nn.Module:
    """The plain model of one that was built on meta with adapters of ours, in place: linears in place of theirs."""
    for name, linear in list(adapter_linears(model)):
        with torch.device("meta"):
            plain = nn.Linear(
                linear.in_dim,
                linear.out_dim,
                bias=linear.bias is not None,
                dtype=linear.weight.dtype,
            )
        model.set_submodule(name, plain)
    return model


def find_adapters(paths: Mapping[str, str]) -> dict[str, Checkpoint]:
    """The checkpoints of adapters by name.

    Raises:
        CheckpointError: there is none, or its state is not whole.
        ValueError: a name is not one of letters, digits, ``-``, ``_`` and ``.``, or is ``base``.
    """
    found = {}
    for name, path in paths.items():
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] == ".":
            raise ValueError(
                f"adapters: {name!r} becomes part of names of files; use letters, digits, - _ and . only."
            )
        if name == BASE:
            raise ValueError(
                "adapters: base is the name of the model without adapters; choose another."
            )
        found[name] = find_checkpoint(Path(path))
        check_state(found[name], with_base=False)
    return found


def evaluated_models(
    model: nn.Module,
    base: Mapping[str, Tensor],
    adapters: Mapping[str, Checkpoint],
    *,
    device: torch.device,
    dtype: torch.dtype,
    folder: str,
) -> Iterator[tuple[str, nn.Module]]:
    """The base model, then every adapter's, each ready to be asked until the next one is taken.

    Adapters are switched on the one base where they can be. DoRA adapters, and those of runs on a base in four bits,
    get a model of their own afterwards, when the base's is no longer needed.

    Args:
        model: the plain model, built on meta.
        base: its weights by torchtune's names.
        adapters: checkpoints by name.
        device: where models live.
        dtype: of the base weights.
        folder: where the base's files lie.

    Yields:
        ``base`` and the model, then the name and the model of each adapter.

    Raises:
        CheckpointError: an adapter belongs to other base weights, or to another model.
        ValueError: weights or an adapter do not fit the model.
    """
    fingerprint = weights_fingerprint(base)
    alone = {name: state for name, state in adapters.items() if not _can_share(state)}
    for checkpoint in alone.values():
        checkpoint.check_belongs(
            base_fingerprint=fingerprint,
            model=checkpoint.config["model"],
            architecture=base_architecture(folder),
        )
    load_base_weights(model, base, device=device, adapter_dtype=torch.float32)
    switched = AdapterSet(model, base=fingerprint, checkpoint_dir=folder)
    for name, checkpoint in adapters.items():
        if name not in alone:
            switched.add(name, checkpoint.path)
    yield BASE, model
    for name in switched.names:
        with switched.use(name):
            yield name, model
    del model, switched
    for name, checkpoint in alone.items():
        yield name, _alone(checkpoint, base, device=device, dtype=dtype, folder=folder)


def _can_share(checkpoint: Checkpoint) -> bool:
    """Whether an adapter is something added to weights that all adapters have."""
    is_dora = any(name.endswith(".lora_magnitude") for name in checkpoint.adapter)
    trains_more = any(".lora_" not in name for name in checkpoint.adapter)
    return not is_dora and not trains_more and not checkpoint.has_quantized_base


def _alone(
    checkpoint: Checkpoint,
    base: Mapping[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    folder: str,
) -> nn.Module:
    """The model of a run as its own config builds it, with the run's adapter."""
    section = checkpoint.config["model"]
    if "checkpoint_dir" in section:
        section = {**section, "checkpoint_dir": folder}
    build = partial(build_allowed, section, "model", checkpoint)
    model = build_on_meta(build, dtype=dtype)
    quantized = linears_in_nf4(model, checkpoint)
    load_base_weights(
        model,
        base,
        device=device,
        adapter_dtype=torch.float32,
        without={f"{name}.weight" for name in quantized},
    )
    if quantized:
        load_quantized(checkpoint, quantized, device)
    load_adapter_state_dict(model, checkpoint.adapter)
    return model.to(device)  # folded edits are kept on the CPU
