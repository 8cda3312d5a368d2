"""Whether the weights of a checkpoint have the shapes that its config.json tells, by the headers of its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kasa_tune.architectures.architecture import Architecture
from kasa_tune.architectures.files import header_of
from kasa_tune.architectures.names import is_transposed, parts_of, usual_name

_FLOATS = ("F64", "F32", "F16", "BF16")  # what is packed in fewer bits has a shape of its own


def wrong_shapes(architecture: Architecture, paths: Iterable[Path]) -> list[str]:
    """What differs between the weights and the architecture, in words; a weight of unknown shape is left out.

    Args:
        architecture: read from config.json.
        paths: the safetensors files, all of them.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is no safetensors file, or was not fetched whole.
    """
    wrong, layers = [], set()
    for path in paths:
        for stored, entry in header_of(path).items():
            if stored == "__metadata__":
                continue
            key = usual_name(architecture, stored)
            names = [part.name for part in parts_of(architecture, key)]
            layers |= {name.split(".")[1] for name in names if name.startswith("layers.")}
            expected = [_shape(architecture, name) for name in names]
            shape = tuple(entry["shape"])[:: -1 if is_transposed(architecture, key) else 1]
            if entry["dtype"] not in _FLOATS or None in expected or not expected:
                continue
            whole = (sum(one[0] for one in expected if one), *(expected[0] or ())[1:])
            if shape != whole:
                wrong.append(
                    f"{path.name} holds {key} of shape {shape}, and config.json tells {whole}"
                )
    lacking = [i for i in range(architecture.num_layers) if str(i) not in layers]
    if lacking:
        told, first = architecture.num_layers, lacking[0]
        wrong.append(
            f"config.json tells {told} layers, and the weights of layer {first} are missing"
        )
    return wrong


def _shape(architecture: Architecture, name: str) -> tuple[int, ...] | None:
    """Of one of our weights; None where it is not known from these sizes alone."""
    model, (*modules, leaf) = architecture, name.split(".")
    if leaf != "weight":
        return None
    hidden, queries = model.embed_dim, model.num_heads * model.head_dim
    keys = model.num_kv_heads * model.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (model.vocab_size, hidden),
        "output": (model.vocab_size, hidden),
        "norm": (hidden,),
        "attn.q_proj": (queries, hidden),
        "attn.k_proj": (keys, hidden),
        "attn.v_proj": (keys, hidden),
        "attn.output_proj": (hidden, queries),
        "mlp.w1": (model.intermediate_dim, hidden),
        "mlp.w2": (hidden, model.intermediate_dim),
        "mlp.w3": (model.intermediate_dim, hidden),
    }
    return sizes.get(".".join(modules[2:] if modules[0] == "layers" else modules))
