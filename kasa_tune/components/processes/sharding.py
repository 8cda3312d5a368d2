"""Tensors of which every process holds a part (DTensor), and whole ones: from one to the other. Whole ones pass through
unchanged, so that the same code serves one process and many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from kasa_tune.components.linalg.nf4 import divides, is_quantized
from kasa_tune.components.processes.world import World


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. For a DTensor all processes must call it; gradients flow back to the parts.

    Of a part that waits on the host (``fsdp_cpu_offload``) the full tensor is on the mesh's device. The part goes there
    first, so that its gradient comes back to the host; torch 2.12 and later would leave it on the device.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    parts: Any = tensor
    if parts.device.type != parts.device_mesh.device_type:
        parts = parts.to(parts.device_mesh.device_type)
    return parts.full_tensor()


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a full tensor that is cut as ``like`` is; no process is asked.

    Args:
        tensor: full, of the size of ``like`` in every dimension that is cut; the others may differ.
        like: a DTensor, or a whole tensor, for which ``tensor`` comes back.

    Returns:
        A DTensor on the device of ``like``, in the dtype of ``tensor``.
    """
    if not isinstance(like, DTensor):
        return tensor
    mesh, placements = like.device_mesh, like.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    index = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    device = like.to_local().device if not like.is_meta else torch.device(mesh.device_type)
    local = tensor[index].to(device)
    stride = torch.empty(tensor.shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=stride
    )


def full_tensors(tree: Any) -> Any:
    """A tree of dicts, lists, tuples and leaves with every cut tensor whole, on the CPU. All processes must call."""
    if isinstance(tree, Mapping):
        return {key: full_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(full_tensors(value) for value in tree)
    return full_tensor(tree).cpu() if isinstance(tree, DTensor) else tree


@torch.no_grad()
def on_host(tree: Any, host_mesh: DeviceMesh) -> Any:
    """A tree like that of :func:`full_tensors` with this process's parts of cut tensors copied to the host. They can be
    put together over ``host_mesh``, see :class:`~kasa_tune.components.processes.World`. No process is asked.
    """
    if isinstance(tree, Mapping):
        return {key: on_host(value, host_mesh) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(on_host(value, host_mesh) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    if not isinstance(tree, DTensor):
        return tree.detach().to("cpu", copy=True)
    local = tree.to_local().detach().to("cpu", copy=True)
    cut = tree.placements[-1:]  # whatever comes before are replicas
    shape, stride = tree.shape, tree.stride()
    return DTensor.from_local(local, host_mesh, cut, run_check=False, shape=shape, stride=stride)


def distribute_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict of whole tensors, those that have the shape of a cut parameter cut like it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {
            name: distribute_like(value, like=parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": cut}


def shard(module: nn.Module, world: World, *, offload: bool = False) -> None:
    """FSDP2: a block, or the model around blocks that were sharded before, cut over the processes, in place.

    Buffers stay where they are: FSDP2 would move the edits that wait on the host to every device.

    A quantized weight whose scales do not divide by the processes stays whole in each; those of large models divide. So
    does each where one process has the whole model, since FSDP2 does not put together what it has not cut.

    Args:
        module: with its weights, the same on all processes.
        world: whose mesh is used; of a two-dimensional one the first replicates.
        offload: parts wait on the host, and the optimizer steps there.

    Raises:
        ValueError: the trained parameters are of several dtypes, which FSDP2 does not take.
    """
    trained = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.requires_grad}
    if len(trained) > 1:
        raise ValueError(
            f"Trained parameters of {' and '.join(sorted(trained))} cannot be cut together: set adapter.dtype=fp32 "
            "(the magnitudes of DoRA always are float32)."
        )
    pieces = world.mesh.shape[-1]
    uncut = {
        p
        for p in module.parameters()
        if is_quantized(p) and (pieces == 1 or not divides(p, pieces))
    }
    options: dict[str, Any] = {"ignored_params": uncut} if uncut else {}
    with _without_buffers(module):
        fully_shard(
            module,
            mesh=world.mesh,
            **options,
            **({"offload_policy": CPUOffloadPolicy()} if offload else {}),
        )


@contextlib.contextmanager
def _without_buffers(module: nn.Module) -> Iterator[None]:
    """While active, no module inside has a buffer."""
    buffers = [(inside, dict(inside._buffers)) for inside in module.modules()]
    for inside, _ in buffers:
        inside._buffers.clear()
    try:
        yield
    finally:
        for inside, own in buffers:
            inside._buffers.update(own)
