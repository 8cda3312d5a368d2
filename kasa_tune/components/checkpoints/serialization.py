"""Trees of dicts, lists, tuples, numbers and tensors as JSON with the tensors beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kasa_tune.components.linalg.nf4 import from_parts, to_parts


def encode(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for ``tree``; what JSON lacks becomes a tagged object, copies of the tensors go to ``tensors`` under their
    path in the tree.

    Raises:
        TypeError: the tree holds something else; the message says what and where.
    """
    path = path.lstrip("/")
    if isinstance(tree, Tensor):
        try:
            packed = to_parts(tree)
        except TypeError as error:
            raise TypeError(
                f"A checkpoint cannot hold {type(tree).__name__} (at {path}): {error}. Use an optimizer of torch.optim "
                "or torchao.optim."
            ) from None
        if packed:
            kind, parts, numbers = packed
            return {
                "quantized": [kind, encode(parts, path, tensors), encode(numbers, path, tensors)]
            }
        name = path
        while name in tensors:  # keys 1 and "1" share a path
            name += "'"
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        if not all(key is None or isinstance(key, str | int | float) for key in tree):
            raise TypeError(f"A checkpoint's dict keys must be strings or numbers (at {path}).")
        return {
            "dict": [[key, encode(value, f"{path}/{key}", tensors)] for key, value in tree.items()]
        }
    if isinstance(tree, tuple):
        return {"tuple": [encode(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]}
    if isinstance(tree, list):
        return [encode(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"A checkpoint cannot hold {type(tree).__name__} (at {path}).")


def decode(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that :func:`encode` was given."""
    if isinstance(document, list):
        return [decode(value, tensors) for value in document]
    if not isinstance(document, dict):
        return document
    ((tag, content),) = document.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "quantized":
        kind, parts, numbers = content
        return from_parts(kind, decode(parts, tensors), decode(numbers, tensors))
    if tag == "tuple":
        return tuple(decode(value, tensors) for value in content)
    return {key: decode(value, tensors) for key, value in content}
