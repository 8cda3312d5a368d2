"""JSON for nested dicts, lists, tuples, numbers and tensors. The tensors are stored beside the
JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kasa_tune.components.linalg.nf4 import from_parts, to_parts


def encode(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Turn nested containers into JSON. Values that JSON cannot express become tagged objects.

    Args:
        tree: nested dicts, lists, tuples, tensors, strings, numbers, booleans and None.
        path: where ``tree`` lies in the outermost container, such as ``state/0/exp_avg``.
        tensors: receives a copy of each tensor, on the CPU and of any shape, under
            its path.

    Raises:
        ValueError: the tree holds something else. The message says what it is and where.
    """
    path = path.lstrip("/")
    if isinstance(tree, Tensor):
        try:
            packed = to_parts(tree)
        except TypeError as error:
            raise ValueError(
                f"A checkpoint cannot hold {type(tree).__name__} (at {path}): {error}. Use an "
                "optimizer of torch.optim or torchao.optim."
            ) from None
        if packed:
            kind, parts, numbers = packed
            return {
                "quantized": [kind, encode(parts, path, tensors), encode(numbers, path, tensors)]
            }
        name = path
        while name in tensors:  # the keys 1 and "1" of a dict have the same path
            name += "'"
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(tree, Mapping):
        if not all(key is None or isinstance(key, str | int | float) for key in tree):
            raise ValueError(f"A checkpoint's dict keys must be strings or numbers (at {path}).")
        return {
            "dict": [[key, encode(value, f"{path}/{key}", tensors)] for key, value in tree.items()]
        }
    if isinstance(tree, tuple):
        return {"tuple": [encode(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]}
    if isinstance(tree, list):
        return [encode(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise ValueError(f"A checkpoint cannot hold {type(tree).__name__} (at {path}).")


def decode(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the nested containers that were given to :func:`encode`.

    Args:
        document: what :func:`encode` returned.
        tensors: the tensors that it stored, of any shape, by path.
    """
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
