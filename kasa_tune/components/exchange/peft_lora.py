"""An adapter as a plain LoRA on the original base, in the files that PEFT writes and vLLM reads.

KaSA's edit, the start of CorDA and PiSSA and the trained update are all low-rank, so together they are one LoRA of
rank ``r + k`` on the untouched weights: nothing has to be known of how it came about.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kasa_tune.components.exchange.errors import Errors, relative_errors
from kasa_tune.components.exchange.trained_run import TrainedRun
from kasa_tune.components.low_rank import LowRank

PREFIX = "base_model.model."
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank may have


@torch.no_grad()
def write_peft(
    run: TrainedRun,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    rank_pattern: bool = False,
    tolerance: float | None = None,
    base_model: str,
) -> Errors:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``.

    B holds the scaling, so ``lora_alpha`` equals ``r``. A and B are the balanced factors of the whole change of a
    weight, see :meth:`~kasa_tune.components.low_rank.LowRank.balanced`.

    Args:
        run: what to export.
        folder: exists.
        dtype: of A and B as stored.
        rank: of every layer, filled up with zeros; None for the largest that a layer needs.
        rank_pattern: each layer its own rank instead.
        tolerance: leave out singular values of at most this share of a layer's largest; None: the exact update.
        base_model: what ``adapter_config.json`` calls the base.

    Returns:
        By how much each weight then differs from what was trained.

    Raises:
        ValueError: a layer needs more than ``rank``.
    """
    modules = run.modules(run.linears)
    updates = {key: module_update(run, key, linears).balanced(tolerance or 0.0) for key, linears in modules.items()}
    ranks = _ranks(updates, rank, rank_pattern)
    tensors: dict[str, Tensor] = {}
    errors = Errors()
    for key, update in updates.items():
        if key in ranks:
            update = update.padded(ranks[key]).to(dtype)
            tensors |= {f"{PREFIX}{_module(key)}.lora_A.weight": update.into.contiguous()}
            tensors |= {f"{PREFIX}{_module(key)}.lora_B.weight": update.out.contiguous()}
        base, trained = run.base.read(key).float(), run.merged(key, modules[key])
        exported = base + update.to(torch.float32).dense()
        if magnitudes := _magnitudes(run, modules[key]):
            magnitude = torch.linalg.vector_norm(base, dim=1)  # rows without an adapter keep their length
            for rows, values in magnitudes:
                magnitude[rows] = values
            tensors[f"{PREFIX}{_module(key)}.lora_magnitude_vector"] = magnitude
            exported *= (magnitude / torch.linalg.vector_norm(exported, dim=1))[:, None]
        errors[_module(key)] = relative_errors(exported, trained, base)
    config = _config(run, ranks, rank_pattern=rank_pattern, base_model=base_model)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return errors


def module_update(run: TrainedRun, key: str, linears: Mapping[str, Tensor]) -> LowRank:
    """What turns a tensor of the base into the trained one, in the base's layout; of the sum of its linears' ranks.

    Args:
        run: what to export.
        key: the tensor's own name.
        linears: what lies in it, each with its rows there.
    """
    height = len(run.base.stored[key])
    outs, intos = [], []
    for name, rows in linears.items():
        update = run.update(name)
        outs.append(update.out.new_zeros(height, update.rank).index_copy(0, rows, update.out))
        intos.append(update.into)
    return LowRank(torch.cat(outs, dim=1), torch.cat(intos))


def _magnitudes(run: TrainedRun, linears: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Rows and DoRA's magnitudes of them; none of other methods."""
    named = {name: f"{name}.lora_magnitude" for name in linears}
    return [(linears[name], run.adapter[key].float()) for name, key in named.items() if key in run.adapter]


def _ranks(updates: Mapping[str, LowRank], rank: int | None, rank_pattern: bool) -> dict[str, int]:
    """The rank that each tensor's update is stored with; without those that have none in a rank pattern."""
    needed = {key: update.rank for key, update in updates.items()}
    largest = max(needed, key=needed.__getitem__)
    if rank is not None and rank < needed[largest]:
        raise ValueError(
            f"rank {rank} is too small: {_module(largest)} needs {needed[largest]} (update and edit together). Leave "
            "rank out, or allow an error with tolerance=1e-3, say."
        )
    if rank_pattern:
        return {key: value for key, value in needed.items() if value}
    return dict.fromkeys(needed, rank or needed[largest] or 1)


def _config(run: TrainedRun, ranks: Mapping[str, int], *, rank_pattern: bool, base_model: str) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {_module(key): rank for key, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": common,
        "lora_alpha": common,
        "target_modules": _targets(run, ranks),
        "rank_pattern": others if rank_pattern else {},
        "alpha_pattern": others if rank_pattern else {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": bool(run.config["model"].get("use_dora", False)),
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _targets(run: TrainedRun, ranks: Mapping[str, int]) -> list[str]:
    """Last parts of the modules' names where these mean no other module, else whole names."""
    leaves = {_module(key).rpartition(".")[2] for key in ranks}
    meant = {key for key in run.base.stored if key.endswith(".weight") and _module(key).rpartition(".")[2] in leaves}
    return sorted(leaves) if meant == set(ranks) else sorted(map(_module, ranks))


def _module(key: str) -> str:
    return key.removesuffix(".weight")
