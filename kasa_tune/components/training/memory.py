"""What a run will need, counted on the meta device before a byte of it is allocated."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torchtune.modules import TransformerDecoder

from kasa_tune.components.adapters import CorDALinear
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.adapters.whole import TrainedWhole, whole_modules
from kasa_tune.components.checkpoints.writing import check_saveable
from kasa_tune.components.linalg.nf4 import to_parts
from kasa_tune.components.models.rotary import build_rotary_caches

# Purposes in a budget that are over when training begins: of phases that follow each other, beside WEIGHTS.
SET_UP = (
    ("truncation workspace",),
    (
        "one block unquantized",
        "calibration hidden states",
        "covariances of one block",
        "CO-SVD workspace",
    ),
    ("base weights in NF4", "quantizing one weight"),
)
WEIGHTS = ("base weights", "adapters")


@torch.no_grad()
def state_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the given tensors, of quantized ones those of their parts."""
    total = 0
    for tensor in tensors:
        packed = to_parts(tensor)
        total += sum(
            part.numel() * part.element_size()
            for part in (packed[1].values() if packed else (tensor,))
        )
    return total


def memory_budget(
    model: nn.Module,
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    *,
    batch_size: int,
    seq_len: int,
    vocab_size: int,
    loss_chunk: int,
    adapter_dtype: torch.dtype,
) -> dict[str, int]:
    """Bytes by purpose of a training step on one device.

    Weights, adapters, gradients and optimizer state are exact. Activations are the tensors that autograd saves in one
    forward of a full batch and, with checkpointing, in running one block again, counted on meta; plus one chunk of
    logits. Kernels' temporaries and allocator slack come on top.

    Args:
        model: built on meta, with activation checkpointing applied if it will be.
        make_optimizer: from the trained parameters.
        batch_size: sequences of a micro-batch.
        seq_len: tokens of the longest sequence.
        vocab_size: width of the logits.
        loss_chunk: tokens whose logits are alive at once.
        adapter_dtype: of the trained parameters.
    """
    for _, linear in adapter_linears(model):
        linear.materialize("meta", adapter_dtype)
    for module in whole_modules(model):
        module.to(adapter_dtype)
    for module in model.modules():
        if isinstance(module, TrainedWhole):
            module.start(torch.device("meta"), adapter_dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    edits = [
        buffer
        for _, linear in adapter_linears(model)
        for buffer in (linear.lora_edit_out, linear.lora_edit_in)
    ]
    starts = [linear for _, linear in adapter_linears(model) if isinstance(linear, CorDALinear)]
    factored = sum(
        4 * s.rank * (s.in_dim + s.out_dim) for s in starts if s.edit_storage == "factored"
    )
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")
    return {
        "base weights": state_bytes(p for p in model.parameters() if not p.requires_grad),
        "adapters": state_bytes(trained) + state_bytes(edits) + factored,
        "gradients": state_bytes(trained),
        "optimizer": _optimizer_bytes(trained, make_optimizer),
        "activations (estimate)": _saved_bytes(model, tokens),
        "one block recomputed": _recomputed_bytes(model, tokens),
        "logits of one chunk": 3 * 4 * min(loss_chunk, batch_size * seq_len) * vocab_size,
        "truncation workspace": max(
            (
                truncation_workspace(*linear.weight.shape)
                for _, linear in adapter_linears(model)
                if linear.edit.rank
            ),
            default=0,
        ),
    }


def per_process(
    budget: Mapping[str, int], model: TransformerDecoder, shards: int
) -> dict[str, int]:
    """A :func:`memory_budget` of one of ``shards`` processes that hold the model together (FSDP2).

    Weights, gradients and optimizer state are cut; the block that computes, the one that is fetched meanwhile, and what
    lies outside the blocks are whole.
    """
    if shards == 1:
        return dict(budget)
    cut = {"base weights", "base weights in NF4", "gradients", "optimizer"}
    own = {
        purpose: -(-size // shards) if purpose in cut else size for purpose, size in budget.items()
    }
    own["adapters"] += (
        own["gradients"] - budget["gradients"]
    )  # those trained, as large as their gradients; not edits
    in_nf4 = budget.get("base weights in NF4")
    blocks = [
        state_bytes(p for p in block.parameters() if p.requires_grad or not in_nf4)
        + (in_nf4 // len(model.layers) if in_nf4 else 0)
        for block in model.layers
    ]
    outside = state_bytes(
        p for name, p in model.named_parameters() if not name.startswith("layers.")
    )
    return own | {"gathered weights": 2 * max(blocks) + outside}


def budget_report(model: nn.Module, budget: Mapping[str, int]) -> list[str]:
    """Lines to print: the trained parameters of a model, a :func:`memory_budget` in MiB, the most that preparing takes
    at once, and the sum in training.
    """
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    total, diagonals = (
        sum(trained.values()),
        sum(n for name, n in trained.items() if name.endswith("lora_diag")),
    )
    parts = f" ({total - diagonals:,} + {diagonals:,} in diagonals)" if diagonals else ""
    set_up, step = peaks(budget)
    sizes = [(purpose, size) for purpose, size in budget.items() if size]
    sizes += [("set-up, at most", set_up)] if set_up else []
    lines = [
        f"{purpose:>25} {size / 2**20:>12,.1f} MiB"
        for purpose, size in [*sizes, ("training step", step)]
    ]
    return [f"Trainable parameters: {total:,}{parts}", *lines]


def peaks(budget: Mapping[str, int]) -> tuple[int, int]:
    """The most that preparing a run takes at once, 0 if it takes nothing besides the model, and what a step takes.

    Args:
        budget: bytes by purpose, of :func:`memory_budget` or :func:`per_process`, with what a method adds.
    """
    phases = [sum(budget.get(purpose, 0) for purpose in phase) for phase in SET_UP]
    # On many processes what is outside the blocks, and one of them, is whole until all are filled.
    held = sum(budget.get(purpose, 0) for purpose in (*WEIGHTS, "gathered weights"))
    over = {purpose for phase in SET_UP for purpose in phase} - {"base weights in NF4"}
    step = sum(size for purpose, size in budget.items() if purpose not in over)
    return (held + max(phases) if any(phases) else 0), step


def truncation_workspace(d_out: int, d_in: int) -> int:
    """Bytes that finding the smallest singular triplets of one weight takes: Gram matrix, a shifted copy, its factor,
    the factor before, and a chunk of the weight in float64.
    """
    n = min(d_out, d_in)
    return 8 * (4 * n * n + n * 4096)


def stepped_optimizer(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer], parameter: Tensor
) -> Optimizer:
    """An optimizer of one zero parameter like ``parameter``, after one step: it has all the state it will ever have.

    The step is taken on the CPU. ``capturable``, which torch refuses there, is switched off for it: it decides how a
    step is written, not what state there is.
    """
    stand_in = nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))
    stand_in.grad = torch.zeros_like(stand_in)
    optimizer = make_optimizer([stand_in])
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} needs a closure that computes the loss several "
            "times a step, which the recipes do not give. Use another one, such as "
            "torch.optim.AdamW."
        )
    if getattr(optimizer, "is_paged", False):  # of bitsandbytes
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} pages its state between a GPU and the host, and "
            "checkpoints cannot hold such a state. Use torchao.optim.AdamW8bit, or a distributed "
            "recipe with fsdp_cpu_offload=True, which keeps the state on the host."
        )
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = False
    optimizer.step()
    return optimizer


def check_optimizer(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    model: nn.Module,
    *,
    is_cut: bool = False,
    device: torch.device | str | None = None,
) -> None:
    """See before any training that the optimizer can step, and that checkpoints can hold its state.

    Args:
        make_optimizer: from the trained parameters.
        model: on any device, meta included.
        is_cut: every process will hold a part of each parameter and of its state.
        device: where it will step; None where that is not known.

    Raises:
        ValueError: they cannot; the message says what and where. Or the state is quantized, which cannot be cut. Or the
            optimizer is for CUDA graphs and steps on a CPU.
    """
    largest = max((p for p in model.parameters() if p.requires_grad), key=torch.numel)
    if device is not None and torch.device(device).type == "cpu":
        _check_not_capturable(make_optimizer([nn.Parameter(torch.zeros(1))]))
    optimizer = stepped_optimizer(make_optimizer, largest)
    check_saveable(optimizer.state_dict())
    state = [
        value
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    if is_cut and any(to_parts(value) for value in state):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} keeps a quantized state, which is not cut over processes yet. Use "
            "one of torch.optim, or train on one device."
        )


def _check_not_capturable(optimizer: Optimizer) -> None:
    if any(group.get("capturable") for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} with capturable=True is for CUDA graphs and "
            "cannot step on a CPU. Leave optimizer.capturable out, or set device=cuda."
        )


def allow_graphs(number: int) -> None:
    """Let torch.compile keep that many graphs of one function; beyond its default of 8 it would give up compiling.

    The option has had two names.
    """
    options = torch._dynamo.config
    name = "recompile_limit" if hasattr(options, "recompile_limit") else "cache_size_limit"
    setattr(options, name, max(number, getattr(options, name)))


def _optimizer_bytes(
    parameters: list[nn.Parameter], make_optimizer: Callable[[list[nn.Parameter]], Optimizer]
) -> int:
    """State of every trained parameter, from one step on a real tensor of each shape: some optimizers refuse meta."""
    total = 0
    for (shape, dtype), count in Counter(
        (parameter.shape, parameter.dtype) for parameter in parameters
    ).items():
        optimizer = stepped_optimizer(
            make_optimizer, torch.empty(shape, dtype=dtype, device="meta")
        )
        state = [value for values in optimizer.state.values() for value in values.values()]
        total += count * state_bytes(value for value in state if isinstance(value, Tensor))
    return total


class _FusedAttention(torch.autograd.Function):
    """What the fused attention kernels keep for the backward: inputs, output and one float32 a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output


class _AttentionAsOnDevice(TorchFunctionMode):
    """On meta, torch takes the attention that forms all s x s weights; no device does where a fused kernel fits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **kwargs or {})


def _recomputed_bytes(model: TransformerDecoder, tokens: Tensor) -> int:
    """Where blocks are checkpointed, what one of them saves when it is run again in the backward."""
    block = getattr(model.layers[0], "_checkpoint_wrapped_module", None)
    if block is None:
        return 0
    embedding = model.tok_embeddings.weight
    hidden = torch.empty(
        *tokens.shape, embedding.shape[1], dtype=embedding.dtype, device="meta", requires_grad=True
    )
    return _saved_bytes(block, hidden)


def _saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages, parameters and ``x`` aside, that a forward leaves for the backward."""
    build_rotary_caches(module)  # before its buffers are listed, as they are no activations
    own = {
        tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers(), x]
    }
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            saved[key] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        _AttentionAsOnDevice(),
    ):
        output = module(x)
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del output
    return total
