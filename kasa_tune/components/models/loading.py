"""From nothing to a model with base weights: built on the meta device, filled tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention

from kasa_tune.components.adapters import AdapterLinear
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.adapters.whole import (
    TrainedWhole,
    is_trained_whole,
    new_parameters,
    whole_modules,
)
from kasa_tune.components.linalg.decomposition import check_finite
from kasa_tune.components.models.attention import Attention
from kasa_tune.components.models.base_weights import shapes_of
from kasa_tune.components.models.norms import fuse_norms

# The smallest head size that flex attention compiles for a GPU. Below it torch raises
# NotImplementedError.
FLEX_HEAD_DIM = 16
OTHER_CONFIG = "Its config.json is of another model than its weights."
_TWO_KEYS = "Check model._component_ and checkpointer.checkpoint_dir."


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
            return fuse_norms(build())
    finally:
        torch.set_default_dtype(previous)


@torch.no_grad()
def load_base_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device,
    adapter_dtype: torch.dtype,
    without: Collection[str] = (),
) -> None:
    """Fill a model built on meta: base weights cast and moved one by one, adapters started without a look at the
    weights.

    Args:
        model: from :func:`build_on_meta`, in place.
        weights: torchtune's names to tensors of any floating dtype.
        device: where the model shall live.
        adapter_dtype: of the trained parameters.
        without: names of weights that stay on meta for now; they too must be among ``weights``.

    Raises:
        ValueError: names or shapes differ from the model's (the first differences are listed), or a weight holds NaN or
            infinity.
    """
    check_shapes(model, weights)
    for name, value in _base_state(model).items():
        if name not in without:
            set_tensor(model, name, read_tensor(weights, name, device=device, dtype=value.dtype))
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()
    for _, linear in adapter_linears(model):
        linear.materialize(device, adapter_dtype)
    for module in whole_modules(model):
        module.to(adapter_dtype)
    for module in model.modules():
        if isinstance(module, TrainedWhole):
            module.start(device, adapter_dtype)


def check_shapes(model: nn.Module, weights: Mapping[str, Tensor], advice: str = _TWO_KEYS) -> int:
    """See that base weights have the names and shapes of the model's, without reading a tensor
    where the mapping knows them.

    Args:
        model: on any device.
        weights: of the base, by name.
        advice: a sentence on what to do about a difference.

    Returns:
        How many there are.

    Raises:
        ValueError: they differ; the message lists the first differences.
    """
    expected = {name: tuple(value.shape) for name, value in _base_state(model).items()}
    _check_same_shapes(expected, shapes_of(weights), advice)
    return len(expected)


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without that of its adapters, and of modules that the base lacks."""
    own = new_parameters(model)
    state = model.state_dict()
    return {
        name: value for name, value in state.items() if ".lora_" not in name and name not in own
    }


def read_tensor(
    weights: Mapping[str, Tensor], name: str, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One weight where and as it is needed.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    tensor = weights[name].to(device=device, dtype=dtype)
    check_finite(tensor, name)
    return tensor


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the model's parameter or buffer of that name. It is frozen, but
    for one of a module that is trained whole.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(
        module,
        leaf,
        nn.Parameter(tensor, requires_grad=is_trained_whole(module))
        if leaf in module._parameters
        else tensor,
    )


def needs_dense_mask(model: nn.Module) -> bool:
    """Whether an attention of the model takes boolean masks alone.

    Torchtune's Gemma 2 does, and every attention with dropout, or whose heads are too small for the kernels of flex
    attention.
    """
    return any(
        isinstance(module, Gemma2Attention)
        or (isinstance(module, MultiHeadAttention | Attention) and module.head_dim < FLEX_HEAD_DIM)
        or (isinstance(module, Attention) and module.dropout > 0)
        for module in model.modules()
    )


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Names and modules of all linears in the transformer's blocks, with or without an adapter: nearly all weights."""
    return {
        name: module
        for name, module in (
            (n.replace("_checkpoint_wrapped_module.", ""), m) for n, m in model.named_modules()
        )
        if isinstance(module, AdapterLinear | nn.Linear)
        and name.startswith("layers.")
        and ".lora_" not in name
    }


def blocks_of(
    model: nn.Module, linears: Mapping[str, nn.Module]
) -> Iterator[tuple[nn.Module, list[str]]]:
    """The model's transformer blocks, each with the names of the linears in it, of those given."""
    for index, block in enumerate(model.layers):
        yield block, [name for name in linears if name.startswith(f"layers.{index}.")]


def put_weight(linear: nn.Module, weight: Tensor) -> None:
    """Make a tensor, quantized or not, a linear's frozen weight."""
    linear.weight = nn.Parameter(weight, requires_grad=False)


@contextlib.contextmanager
def weights_loaded(
    linears: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    prefix: str,
    *,
    device: torch.device,
) -> Iterator[None]:
    """While active, those of ``linears`` whose names begin with ``prefix`` hold their weights; before and after they
    hold none.

    Args:
        linears: from :func:`block_linears`, with weights on meta, whose dtype is taken.
        weights: of the base, by name.
        prefix: ``layers.<i>.``, of one block.
        device: where the block is to run.

    Raises:
        ValueError: a weight holds NaN or infinity.
    """
    inside = {name: linear for name, linear in linears.items() if name.startswith(prefix)}
    on_meta = {name: linear.weight for name, linear in inside.items()}
    try:
        for name, linear in inside.items():
            put_weight(
                linear,
                read_tensor(weights, f"{name}.weight", device=device, dtype=on_meta[name].dtype),
            )
        yield
    finally:
        for name, linear in inside.items():
            linear.weight = on_meta[name]


def _check_same_shapes(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], advice: str
) -> None:
    wrong = [
        f"{name}: the model has {expected.get(name, 'none')}, the checkpoint {given.get(name, 'none')}"
        for name in sorted(expected.keys() | given.keys())
        if expected.get(name) != given.get(name)
    ]
    if wrong:
        raise ValueError(
            "The checkpoint is not one of this model: "
            f"{len(wrong)} of {len(expected.keys() | given.keys())} tensors differ ("
            + "; ".join(wrong[:3])
            + f"). {advice}"
        )
