"""Replacing named linears of any torchtune model by adapter linears, and the model builders that do
this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import get_type_hints

from torch import nn

from kasa_tune.components.adapters.corda import CorDALinear
from kasa_tune.components.adapters.kasa import KaSALinear
from kasa_tune.components.adapters.linear import AdapterLinear
from kasa_tune.components.adapters.lora import LoRALinear
from kasa_tune.components.adapters.sharing import share_inputs
from kasa_tune.components.adapters.whole import freeze

ATTN_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")
MLP_MODULES = ("w1", "w2", "w3")  # torchtune's names for gate, down and up projection
OUTPUTS = ("output", "decoder.output")  # in a decoder, and in a decoder fused with an encoder

Builder = Callable[..., nn.Module]


def attach(
    model: nn.Module,
    linear: type[AdapterLinear],
    attn_modules: Sequence[str],
    apply_to_mlp: bool | Sequence[str] = False,
    apply_to_output: bool = False,
    **options,
) -> nn.Module:
    """Replace the chosen linears of a model, in place, by adapter linears with the same weights.
    Everything else is frozen, but for modules that are :func:`trained whole <.whole.train_whole>`.

    Args:
        model: any torchtune model, on any device (meta included).
        linear: class of the adapter linears.
        attn_modules: names of the linears to adapt in every attention, out of
            ``q_proj, k_proj, v_proj, output_proj``.
        apply_to_mlp: True for all linears of every MLP, or the names of some: ``w1`` (gate), ``w2``
            (down), ``w3`` (up).
        apply_to_output: whether to adapt the output projection as well. This is impossible if it is
            tied to the embedding.
        options: rank, alpha, dropout, and the other arguments of ``linear``.

    Returns:
        The same model.

    Raises:
        ValueError: a module name is unknown, nothing is to be adapted, or the output projection is
            tied. Or a layer cannot take an option, such as a rank above its smaller dimension. The
            message names the layer.
    """
    mlp_modules = (
        (MLP_MODULES if apply_to_mlp else ())
        if isinstance(apply_to_mlp, bool)
        else tuple(apply_to_mlp)
    )
    _check_names(attn_modules, ATTN_MODULES, "attn_modules")
    _check_names(mlp_modules, MLP_MODULES, "apply_to_mlp")
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    outputs = linears.keys() & set(OUTPUTS) if apply_to_output else set()
    if apply_to_output and not outputs:
        raise ValueError(
            "apply_to_output: this model's output projection is tied to its embedding and takes no "
            "adapter. Set apply_to_output=False."
        )
    leaves = {*attn_modules, *mlp_modules}
    chosen = [name for name in linears if name.rpartition(".")[2] in leaves or name in outputs]
    if not chosen:
        raise ValueError(
            "Nothing to adapt: set attn_modules, apply_to_mlp or apply_to_output to at least one "
            "linear."
        )
    freeze(model)
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        adapter = _adapter_on(linears[name], name, linear, options)
        setattr(model.get_submodule(parent), leaf, adapter)
    share_inputs(model)
    return model


def _adapter_on(
    module: nn.Linear, name: str, linear: type[AdapterLinear], options: dict
) -> AdapterLinear:
    """Make an adapter linear on the weight and the bias of ``module``."""
    try:
        with module.weight.device:
            adapter = linear(
                module.in_features, module.out_features, use_bias=module.bias is not None, **options
            )
    except ValueError as error:
        raise ValueError(
            f"{name} ({module.out_features} x {module.in_features}): {error}"
        ) from None
    adapter.weight, adapter.bias = module.weight, module.bias
    return adapter.train(module.training)


def _check_names(given: Sequence[str], known: Sequence[str], key: str) -> None:
    """Raise ValueError if ``given`` is not a list of known names."""
    unknown = [name for name in given if name not in known]
    if isinstance(given, str) or unknown:
        raise ValueError(f"{key} must be a list of names out of {', '.join(known)}; got {given!r}.")


def builders(base: Builder) -> tuple[Builder, Builder, Builder]:
    """Make the builders ``kasa_<name>``, ``lora_<name>`` and ``corda_<name>`` from a torchtune
    builder.

    Each takes ``attn_modules``, ``apply_to_mlp``, ``apply_to_output``, the options of its adapter
    linear, and the arguments of the torchtune builder. Its signature shows all of them.
    """
    kasa, lora = _builder(base, "kasa", KaSALinear), _builder(base, "lora", LoRALinear)
    return kasa, lora, _builder(base, "corda", CorDALinear)


def _builder(base: Builder, method: str, linear: type[AdapterLinear]) -> Builder:
    base_names = set(inspect.signature(base).parameters)

    def build(
        attn_modules: Sequence[str], apply_to_mlp=False, apply_to_output: bool = False, **options
    ) -> nn.Module:
        base_options = {name: options.pop(name) for name in base_names & options.keys()}
        return attach(
            base(**base_options), linear, attn_modules, apply_to_mlp, apply_to_output, **options
        )

    build.__name__ = build.__qualname__ = f"{method}_{base.__name__}"
    build.__doc__ = (
        f"Build torchtune's {base.__name__} with {linear.__name__} as the chosen linears.\n\n"
        f"The arguments are those of :func:`attach`, of :class:`{linear.__name__}` and of "
        f"torchtune's ``{base.__name__}``."
    )
    build.__signature__ = _signature(base, linear)
    return build


def _signature(base: Builder, linear: type[AdapterLinear]) -> inspect.Signature:
    """Make the signature of a builder: where to adapt, the linear's options, and the torchtune
    builder's arguments.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    types = get_type_hints(linear.__init__)
    where = [
        inspect.Parameter(
            "attn_modules", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=list[str]
        ),
        inspect.Parameter("apply_to_mlp", keyword, default=False, annotation=bool | list[str]),
        inspect.Parameter("apply_to_output", keyword, default=False, annotation=bool),
    ]
    options = [
        parameter.replace(kind=keyword, annotation=types[name])
        for name, parameter in inspect.signature(linear).parameters.items()
        if name not in ("in_dim", "out_dim", "use_bias")
    ]
    of_base = [
        parameter.replace(kind=keyword) for parameter in inspect.signature(base).parameters.values()
    ]
    return inspect.Signature(where + options + of_base, return_annotation=nn.Module)
