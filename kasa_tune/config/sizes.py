"""The sizes of the model that a config describes, read from its keys and from its builder's source."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from kasa_tune.config import folders, signatures
from kasa_tune.config.entries import Problem

log = logging.getLogger(__name__)

CALIBRATION_ROWS = "calibration.max_seq_len"
_MLP = ("w1", "w2", "w3")


def sizes_of(node: dict[str, Any]) -> dict[str, int]:
    """`num_heads`, `embed_dim` and the like of a `model` node, as far as it or its builder tells them."""
    try:
        told = signatures.constants(str(node.get("_component_")))
    except (signatures.UnreadableError, signatures.NoSuchNameError):
        told = {}
    sizes = {name: value for name, value in (told | node).items() if isinstance(value, int)}
    if {"num_heads", "embed_dim"} <= sizes.keys():
        sizes.setdefault("num_kv_heads", sizes["num_heads"])
        sizes.setdefault("head_dim", sizes["embed_dim"] // sizes["num_heads"])
    return sizes


def _smaller_dimensions(node: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The adapted linears whose shape is known, each with its smaller dimension, which bounds the rank."""
    sizes = _sizes_of_folder(node) or sizes_of(node)
    hidden, head = sizes.get("embed_dim"), sizes.get("head_dim")
    if hidden is None or head is None:
        return
    q, kv = sizes["num_heads"] * head, sizes["num_kv_heads"] * head
    inner = {"q_proj": q, "output_proj": q, "k_proj": kv, "v_proj": kv}
    for name in node.get("attn_modules") or ():
        if name in inner:
            yield name, min(hidden, inner[name])
    mlp = node.get("apply_to_mlp")
    if mlp and "intermediate_dim" in sizes:
        for name in _MLP if mlp is True else mlp:
            yield name, min(hidden, sizes["intermediate_dim"])


def _sizes_of_folder(node: dict[str, Any]) -> dict[str, int]:
    """The same of a model that is what its folder says; none where it cannot be read."""
    told = folders.architecture_of(node)
    if told is None:
        return {}
    inner = told.experts.intermediate_dim if told.experts else told.intermediate_dim
    return {
        "num_heads": told.num_heads,
        "num_kv_heads": told.num_kv_heads,
        "head_dim": told.head_dim,
        "embed_dim": told.embed_dim,
        "intermediate_dim": min(inner, told.intermediate_dim),
    }


def output_is_free(cfg: dict[str, Any]) -> Iterator[Problem]:
    """An adapted output projection is none that is tied to the embedding."""
    node = cfg.get("model") or {}
    told = folders.architecture_of(node) if node.get("apply_to_output") else None
    if told is not None and told.tied:
        wrong = "got True, but this model's output projection is its embedding and takes no adapter"
        yield Problem("model.apply_to_output", f"{wrong}; set it to False")


def shorten_calibration(cfg: dict[str, Any], overrides: Sequence[str]) -> None:
    """Cut `calibration.max_seq_len` to what the model takes, and say so. `rows_fit` refuses one among the overrides."""
    if any(override.startswith(f"{CALIBRATION_ROWS}=") for override in overrides):
        return
    told = folders.architecture_of(cfg.get("model") or {})
    calibration = cfg.get("calibration")
    if told is None or not isinstance(calibration, dict) or not calibration.get("dataset"):
        return
    given = calibration.get("max_seq_len")
    if isinstance(given, int) and given > told.max_seq_len:
        calibration["max_seq_len"] = told.max_seq_len
        log.warning(
            f"{CALIBRATION_ROWS}: {given} is cut to {told.max_seq_len}, the most tokens that the model takes."
        )


def rows_fit(cfg: dict[str, Any]) -> Iterator[Problem]:
    """Rows are no longer than the model takes. The tokenizer of its folder sees to that itself."""
    told = folders.architecture_of(cfg.get("model") or {})
    tokenizer = cfg.get("tokenizer") or {}
    calibration = cfg.get("calibration") or {}
    places = {}
    if calibration.get("dataset"):
        places[CALIBRATION_ROWS] = calibration.get("max_seq_len")
    if not folders.reads_folder(tokenizer):
        places["tokenizer.max_seq_len"] = tokenizer.get("max_seq_len")
    for key, given in places.items():
        if told is not None and isinstance(given, int) and given > told.max_seq_len:
            most = told.max_seq_len
            yield Problem(
                key, f"got {given}, and the model takes {most} tokens; set at most {most}"
            )


def rank_fits(cfg: dict[str, Any]) -> Iterator[Problem]:
    """No adapter has a larger rank than its weight can have."""
    node = cfg.get("model") or {}
    for key in ("rank", "truncation_rank"):
        rank = node.get(key)
        bounds = dict(_smaller_dimensions(node))
        if bounds and isinstance(rank, int) and rank > min(bounds.values()):
            name = min(bounds, key=lambda name: bounds[name])
            yield Problem(
                f"model.{key}",
                f"got {rank}, but {name} has a smaller dimension of {bounds[name]}; set at most that",
            )


def heads_divide(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The attention heads divide the hidden state, and the heads of keys and values divide them."""
    node = cfg.get("model") or {}
    sizes = sizes_of(node)
    heads, kv_heads = sizes.get("num_heads"), sizes.get("num_kv_heads")
    if heads is None or kv_heads is None:
        return
    if heads % kv_heads:
        wrong = f"got {kv_heads}, which does not divide num_heads {heads}"
        yield Problem("model.num_kv_heads", wrong)
    if "head_dim" not in node and sizes.get("embed_dim", 0) % heads:
        wrong = f"got {heads}, which does not divide embed_dim {sizes['embed_dim']}"
        yield Problem("model.num_heads", wrong)


RULES = (rank_fits, heads_divide, output_is_free, rows_fit)
