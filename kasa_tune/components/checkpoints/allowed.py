"""What a data file may call: the builders of this package, and torchtune's checkpointers and tokenizers.

A training config may call whatever its owner wrote. A checkpoint, an exported adapter or a PEFT folder comes from
elsewhere: a name in it chooses among known builders and never anything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Literal

COMPONENT = "_component_"

Kind = Literal["model", "checkpointer", "tokenizer"]

# The names of each kind, and the words for them.
_ALLOWED: Mapping[str, tuple[re.Pattern[str], str]] = {
    "model": (
        re.compile(r"kasa_tune\.components\.models\.(kasa|lora|corda)_\w+"),
        "a kasa_<model>, lora_<model> or corda_<model> builder of kasa_tune.components.models",
    ),
    "checkpointer": (
        re.compile(r"torchtune\.training\.FullModel(HF|Meta|TorchTune)Checkpointer"),
        "one of torchtune.training.FullModel{HF,Meta,TorchTune}Checkpointer",
    ),
    "tokenizer": (
        re.compile(
            r"torchtune\.models\.[a-z0-9_]+\.[a-z0-9_]+_tokenizer"
            r"|kasa_tune\.components\.data\.hf_tokenizer"
        ),
        "a tokenizer of torchtune.models, or kasa_tune.components.data.hf_tokenizer",
    ),
}
_MOST_LAYERS = 1000  # building the modules of a model takes milliseconds each
_TEMPLATE = re.compile(r"torchtune\.(data|models\.[a-z0-9_]+)\.[A-Z]\w*Template")


def build_allowed(node: Any, kind: Kind, source: Any, **more: Any) -> Any:
    """Call the component that a section of a data file names, if it is one of the allowed ones.

    Args:
        node: the section, as plain containers; ``${...}`` in it is text.
        kind: what the section describes.
        source: the file or folder that it comes from, for messages.
        more: arguments that take the place of the section's.

    Raises:
        ValueError: the section names another component, holds a component within an argument, or its arguments are
            not those of the component. Nothing has been called or imported then.
    """
    check_allowed(node, kind, source)
    name = node[COMPONENT]
    arguments = {key: value for key, value in node.items() if key != COMPONENT} | more
    module, _, attribute = name.rpartition(".")
    component = getattr(import_module(module), attribute, None)
    if component is None:
        raise ValueError(f"{source} names {kind}.{COMPONENT} {name}, which does not exist.")
    try:
        return component(**arguments)
    except (ValueError, OSError):
        raise
    except Exception as error:  # arguments of wrong types fail anywhere in a builder, in any way
        raise ValueError(
            f"{source}: {name} does not take its section {kind} ({type(error).__name__}: {error})."
        ) from error


def check_allowed(node: Any, kind: Kind, source: Any) -> None:
    """Refuse a section that :func:`build_allowed` would not call.

    Raises:
        ValueError: as there.
    """
    allowed, words = _ALLOWED[kind]
    name = node.get(COMPONENT) if isinstance(node, Mapping) else None
    if not isinstance(name, str) or not allowed.fullmatch(name):
        raise ValueError(
            f"{source} names {kind}.{COMPONENT} {_shown(name)}. A data file may only name {words}; "
            "nothing else is called from one."
        )
    arguments = {key: value for key, value in node.items() if key != COMPONENT}
    if any(COMPONENT in inner for inner in _mappings(arguments)):
        raise ValueError(
            f"{source}: an argument of {kind} holds a {COMPONENT} of its own, which is never called "
            "from a data file."
        )
    layers = arguments.get("num_layers", 1)
    if kind == "model" and not (type(layers) is int and 0 < layers <= _MOST_LAYERS):
        raise ValueError(
            f"{source}: model.num_layers is {_shown(layers)}; it is between 1 and {_MOST_LAYERS}."
        )
    template = arguments.get("prompt_template")
    if isinstance(template, str) and not _TEMPLATE.fullmatch(template):
        raise ValueError(
            f"{source} names {kind}.prompt_template {_shown(template)}. A data file may only name a "
            "template of torchtune.data or torchtune.models, or hold {role: [before, after]}."
        )


def _mappings(tree: Any) -> Iterator[Mapping[Any, Any]]:
    """All mappings within nested containers."""
    open_ends = [tree]
    while open_ends:
        value = open_ends.pop()
        if isinstance(value, Mapping):
            yield value
            open_ends += value.values()
        elif isinstance(value, list | tuple):
            open_ends += value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
