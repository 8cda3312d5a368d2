"""An adapter as a plain LoRA on the original base, in the files that PEFT writes and vLLM reads.

KaSA's edit, the start of CorDA and PiSSA and the trained update are all low-rank, so together they are one LoRA of
rank ``r + k`` on the untouched weights: nothing has to be known of how it came about. (DoRA keeps its magnitudes.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kasa_tune.components.exchange.deviations import Deviations, deviation
from kasa_tune.components.exchange.trained_run import TrainedRun
from kasa_tune.components.linalg.low_rank import LowRank

PREFIX = "base_model.model."
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank may have


@torch.no_grad()
def write_peft(
    run: TrainedRun,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    rank_pattern: bool = False,
    tolerance: float | None = None,
    base_model: str | None,
) -> Deviations:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``.

    B holds the scaling, so ``lora_alpha`` equals ``r``. A and B are the balanced factors of the whole change of a
    weight, see :meth:`~kasa_tune.components.linalg.low_rank.LowRank.balanced`. With ``rank_pattern`` both
    are the largest rank R, and a layer of rank k has its B times k / R. So readers that look a layer's rank up (PEFT,
    vLLM) and those that take it from the tensor (llama.cpp) both multiply by R / k. ``alpha_pattern``, which the latter
    do not know, stays empty.

    Args:
        run: what to export.
        folder: exists.
        dtype: of A and B as stored.
        rank: of every layer, filled up; None for the largest that a layer needs.
        rank_pattern: each layer its own rank instead.
        tolerance: leave out singular values of at most this share of a layer's largest; None: the exact update.
        base_model: what ``adapter_config.json`` calls the base; None: nothing.

    Returns:
        By how much each weight then differs from what was trained.

    Raises:
        ValueError: a layer needs more than ``rank``, or experts are adapted in a way that PEFT does not load.
    """
    _check_experts(run.linears, rank_pattern=rank_pattern)
    updates, norms = _updates(run, tolerance or 0.0)
    ranks = _ranks(updates, rank, rank_pattern, at_least=int(_use_dora(run)))
    largest, random = max(ranks.values()), torch.Generator().manual_seed(0)
    updates = {
        key: _stored(updates[key], ranks[key], ranks[key] / largest, random).to(dtype)
        for key in ranks
    }
    tensors: dict[str, Tensor] = {}
    errors = Deviations()
    # Quantized weights without an adapter are among the changed ones.
    for key, linears in run.modules(run.changed).items():
        base, trained = run.base.read(key).float(), run.merged(key, linears)
        exported = base.clone()
        if key in updates:
            out, into = updates[key].out.float(), updates[key].into.float()
            exported.addmm_(out, into, alpha=largest / ranks[key])
            tensors[f"{PREFIX}{_module(key)}.lora_A.weight"] = updates[key].into.contiguous()
            tensors[f"{PREFIX}{_module(key)}.lora_B.weight"] = updates[key].out.contiguous()
        if magnitudes := _magnitudes(run, linears):
            magnitude = _scale_rows(exported, base, magnitudes)
            tensors[f"{PREFIX}{_module(key)}.lora_magnitude_vector"] = magnitude
        errors[_module(key)] = deviation(exported, trained, norms.get(key, 0.0))
    _save(run, folder, tensors, _config(run, ranks, base_model))
    return errors


def _save(
    run: TrainedRun, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Write both files. A connector that was trained whole is among the modules to save."""
    if whole := run.whole:
        tensors |= {f"{PREFIX}{key}": tensor for key, tensor in whole.items()}
        config |= {"modules_to_save": ["multi_modal_projector"]}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _check_experts(names: Iterable[str], *, rank_pattern: bool) -> None:
    """See that PEFT can put the adapters of all experts of a layer into one, as it does on loading: it stacks them,
    and joins gate and up.

    Raises:
        ValueError: it cannot. It would load some of them and leave out the others, without an error in some cases.
    """
    leaves = {name.rpartition(".")[2] for name in names if ".experts." in name}
    dense = {name for name in names if ".mlp." in name and ".experts." not in name}
    wrong = None
    if leaves and rank_pattern:
        wrong = "one rank for all of them: leave out rank_pattern"
    elif leaves and dense:
        wrong = "experts in every layer, but some layers of this model have an MLP that is none"
    elif len(leaves & {"w1", "w3"}) == 1:
        wrong = "adapters of both w1 and w3, or of neither"
    if wrong:
        raise ValueError(
            f"PEFT stacks the adapters of experts when it loads them. For that it needs {wrong}. Export the model with "
            "format=merged, or the adapter with format=native."
        )


def _updates(run: TrainedRun, tolerance: float) -> tuple[dict[str, LowRank], dict[str, float]]:
    """By tensor of the base: what was added to it, as balanced factors, and that one's norm."""
    updates, norms = {}, {}
    for key, linears in run.modules(run.linears).items():
        exact = run.module_update(key, linears)
        updates[key], norms[key] = exact.balanced(tolerance).to(torch.float32), exact.norm()
    return updates, norms


def _scale_rows(exported: Tensor, base: Tensor, magnitudes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Give the rows of a weight their trained lengths, in place; rows without an adapter keep the base's. Returns all
    lengths ``(d_out,)``.
    """
    magnitude = torch.linalg.vector_norm(base, dim=1)
    for rows, values in magnitudes:
        magnitude[rows] = values
    exported *= (magnitude / torch.linalg.vector_norm(exported, dim=1))[:, None]
    return magnitude


def _stored(update: LowRank, rank: int, scale: float, random: torch.Generator) -> LowRank:
    """An update as the file has it: filled up to a rank, B times ``scale``.

    Rows that fill A up are random and the columns of B zero, as a LoRA starts: they change nothing, and can learn.
    """
    filled = update.padded(rank)
    into, width = filled.into.clone(), filled.into.shape[1]
    more = into.new_empty(rank - update.rank, width)
    into[update.rank :] = more.uniform_(-1.0, 1.0, generator=random) / math.sqrt(width)
    return LowRank(filled.out * scale, into)


def _magnitudes(run: TrainedRun, linears: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Rows and DoRA's magnitudes of them; none of other methods."""
    named = {name: f"{name}.lora_magnitude" for name in linears}
    return [
        (linears[name], run.adapter[key].float())
        for name, key in named.items()
        if key in run.adapter
    ]


def _ranks(
    updates: Mapping[str, LowRank], rank: int | None, rank_pattern: bool, *, at_least: int
) -> dict[str, int]:
    """The rank that each tensor's update is stored with; a rank pattern is without those that need none."""
    needed = {key: max(update.rank, at_least) for key, update in updates.items()}
    largest = max(needed, key=needed.__getitem__)
    if rank is not None and rank < needed[largest]:
        raise ValueError(
            f"rank {rank} is too small: {_module(largest)} needs {needed[largest]} (update and edit together). Leave "
            "rank out, or allow an error with tolerance=1e-3, say."
        )
    if rank_pattern:
        return {key: value for key, value in needed.items() if value} or dict.fromkeys(needed, 1)
    return dict.fromkeys(needed, rank or needed[largest] or 1)


def _config(run: TrainedRun, ranks: Mapping[str, int], base_model: str | None) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig; ranks that differ from the largest stand in its pattern."""
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": largest,
        "lora_alpha": largest,
        "target_modules": _targets(run, ranks),
        "rank_pattern": {_module(key): rank for key, rank in ranks.items() if rank != largest},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(map(run.base.transposed, ranks)),
        "use_rslora": False,
        "use_dora": _use_dora(run),
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _targets(run: TrainedRun, ranks: Mapping[str, int]) -> list[str]:
    """Last parts of the modules' names where these mean no other module, else whole names."""
    leaves = {_module(key).rpartition(".")[2] for key in ranks}
    meant = {
        key
        for key in run.base.stored
        if key.endswith(".weight") and _module(key).rpartition(".")[2] in leaves
    }
    return sorted(leaves) if meant == set(ranks) else sorted(map(_module, ranks))


def _use_dora(run: TrainedRun) -> bool:
    return bool(run.config["model"].get("use_dora", False))


def _module(key: str) -> str:
    return key.removesuffix(".weight")
