"""What a data file may call: the builders of this package, and torchtune's checkpointers and
tokenizers.

A training config may call whatever its owner wrote. A checkpoint, an exported adapter or a PEFT
folder may come from somebody else. A name in such a file selects one of the known builders, and
nothing else is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Literal

COMPONENT = "_component_"

Kind = Literal["model", "checkpointer", "tokenizer"]

# The allowed names of each kind, and how messages describe them.
_ALLOWED: Mapping[str, tuple[re.Pattern[str], str]] = {
    "model": (
        re.compile(r"kasa_tune\.components\.models\.(kasa|lora|corda)_\w+"),
        "a kasa_<model>, lora_<model> or corda_<model> builder of kasa_tune.components.models",
    ),
    "checkpointer": (
        re.compile(
            r"torchtune\.training\.FullModel(HF|Meta|TorchTune)Checkpointer"
            r"|kasa_tune\.components\.models\.(Checkpoint|Encoder)Folder"
        ),
        "one of torchtune.training.FullModel{HF,Meta,TorchTune}Checkpointer, or CheckpointFolder "
        "or EncoderFolder of kasa_tune.components.models",
    ),
    "tokenizer": (
        re.compile(
            r"torchtune\.models\.[a-z0-9_]+\.[a-z0-9_]+_tokenizer"
            r"|kasa_tune\.components\.data\.(hf|encoder)_tokenizer"
            r"|kasa_tune\.components\.data\.tokenizer_from_checkpoint"
        ),
        "a tokenizer of torchtune.models, or hf_tokenizer, encoder_tokenizer or tokenizer_from_checkpoint of "
        "kasa_tune.components.data",
    ),
}
_MOST_LAYERS = 1000  # each layer takes milliseconds to build
_TEMPLATE = re.compile(r"torchtune\.(data|models\.[a-z0-9_]+)\.[A-Z]\w*Template")


def build_allowed(node: Any, kind: Kind, source: Any, **more: Any) -> Any:
    """Call the component that a section of a data file names, if it is one of the allowed
    components.

    Args:
        node: the section in plain containers. ``${...}`` in it is plain text.
        kind: what the section describes.
        source: the file or folder that holds the section, for messages.
        more: arguments that replace those of the section.

    Raises:
        ValueError: the section names another component, an argument of it holds a component, or its
            arguments do not fit the component. In the first two cases nothing has been imported or
            called.
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
    except Exception as error:  # an argument of a wrong type can raise any error
        raise ValueError(
            f"{source}: {name} does not take its section {kind} ({type(error).__name__}: {error})."
        ) from error


def check_allowed(node: Any, kind: Kind, source: Any) -> None:
    """Check that :func:`build_allowed` may call the component of a section.

    Raises:
        ValueError: it may not, for one of the reasons given there.
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
            f"{source}: an argument of {kind} holds a {COMPONENT} of its own, which is never "
            "called from a data file."
        )
    layers = arguments.get("num_layers", 1)
    if kind == "model" and not (type(layers) is int and 0 < layers <= _MOST_LAYERS):
        raise ValueError(
            f"{source}: model.num_layers is {_shown(layers)}; it is between 1 and {_MOST_LAYERS}."
        )
    template = arguments.get("prompt_template")
    if isinstance(template, str) and not _TEMPLATE.fullmatch(template):
        raise ValueError(
            f"{source} names {kind}.prompt_template {_shown(template)}. A data file may only name "
            "a "
            "template of torchtune.data or torchtune.models, or hold {role: [before, after]}."
        )


def _mappings(tree: Any) -> Iterator[Mapping[Any, Any]]:
    """Yield all mappings within nested containers."""
    open_ends = [tree]
    while open_ends:
        value = open_ends.pop()
        if isinstance(value, Mapping):
            yield value
            open_ends += value.values()
        elif isinstance(value, list | tuple):
            open_ends += value


def _shown(value: Any) -> str:
    """Return a value's text for a message, cut off after 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
