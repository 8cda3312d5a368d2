"""How long the rows of a run may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_FOLDER = ".tokenizer_from_checkpoint"


def longest_row(cfg: Mapping[str, Any], of_model: int) -> int:
    """Tokens at which the samples of a run are cut.

    The tokenizer of the checkpoint's own folder cuts at what the model takes at the latest, and any
    other where it is told to.

    Args:
        cfg: with the section ``checkpointer``, and ``tokenizer`` where there is one.
        of_model: tokens that the model takes.
    """
    tokenizer, checkpointer = _section(cfg, "tokenizer"), _section(cfg, "checkpointer")
    given, folder = tokenizer.get("max_seq_len"), checkpointer.get("checkpoint_dir")
    if type(given) is not int or given < 1:
        return of_model
    of_folder = str(tokenizer.get("_component_")).endswith(OF_FOLDER)
    cuts = of_folder and tokenizer.get("checkpoint_dir") == folder
    return min(given, of_model) if cuts else given


def _section(cfg: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    node = cfg.get(name)
    return node if isinstance(node, Mapping) else {}
