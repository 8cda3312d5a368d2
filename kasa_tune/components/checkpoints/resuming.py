"""Choosing the checkpoint that a run resumes from or starts with, and checking that it may."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from kasa_tune.components.checkpoints.checkpoint import (
    Checkpoint,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
)
from kasa_tune.components.checkpoints.locking import check_unlocked, run_lock

log = utils.get_logger("INFO")  # prints on rank 0

# Files and folders, besides checkpoints, that a run writes into its output_dir. A restarted run
# writes them anew.
OF_A_RUN = (
    "metrics.jsonl", "samples.jsonl", "phases.json", "config.yaml", "quantized_base",
    "decomposition.json", "evaluation.json", "checkpoints/best",
)  # fmt: skip

# Keys that may differ between a run and its continuation. They say how a run is watched, saved and
# computed, how long it is, and where its inputs lie. That weights and data are the same is checked
# on their content.
RESUMABLE_KEYS = {
    "output_dir", "resume_from_checkpoint", "metric_logger", "log_every_n_steps",
    "log_peak_memory_stats", "profiler", "save_every_n_steps", "keep_last", "dataset_val",
    "run_val_every_n_steps", "batch_size_val", "validation", "keep_best",
    "early_stopping", "device", "compile",
    "enable_activation_checkpointing", "enable_activation_offloading", "num_workers", "epochs",
    "max_steps", "batch_size", "gradient_accumulation_steps", "world_size", "timeout",
    "data_parallel_shard_dim", "fsdp_cpu_offload", "verify_base", "checkpointer", "tokenizer", "dataset",
    "dry_run", "adapter_checkpoint", "calibration.dataset", "calibration.batch_size",
    "calibration.offload", "calibration.cache_dir", "checkpoint_dir", "model.checkpoint_dir",
    "metric", "evaluate_only",
}  # fmt: skip


RESTART = "restart"  # a value of the key resume_from_checkpoint


def starting_checkpoint(
    cfg: DictConfig, *, rank: int = 0, world_size: int = 1
) -> Checkpoint | None:
    """Choose the checkpoint that a fine-tuning run starts from, or None for a run that starts from
    the base.

    The checkpoint's ``resumes`` is True if the run goes on from it, and False if the run takes only
    the adapters from it.

    With ``resume_from_checkpoint=restart`` the run starts at step 0. The files of an earlier run in
    the output folder are moved aside, see :func:`set_aside`.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        rank: rank of this process. Rank 0 moves the files.
        world_size: number of processes.

    Raises:
        ValueError: another run writes to the output folder, the checkpoint is of another model, or
            one of the reasons of :func:`resume_point` and :func:`adapter_start`.
        OSError: the output folder or a checkpoint cannot be read.
    """
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    if not cfg.get("dry_run"):
        folder = Path(cfg.output_dir) / "checkpoints"
        choice = cfg.resume_from_checkpoint
        if choice != RESTART:
            check_unlocked(folder)
            resumed = resume_point(folder, choice, settings, world_size=world_size)
            if resumed:
                resumed.check_model(settings["model"])
                return resumed
        elif rank == 0:
            set_aside(Path(cfg.output_dir))
    quantized = None
    if "quantization" in settings:
        quantized = {key: settings[key] for key in ("quantization", "dtype")}
    start = adapter_start(cfg.adapter_checkpoint, quantized=quantized)
    if start:
        start.check_model(settings["model"])
    return start


def set_aside(output_dir: Path) -> None:
    """Move the files of an earlier run in ``output_dir`` to a new folder ``restarted_<n>`` inside
    it. Nothing is deleted.

    Raises:
        ValueError: another run writes to the folder.
        OSError: a file cannot be moved.
    """
    folder = output_dir / "checkpoints"
    left = [*list_checkpoints(folder), *(output_dir / name for name in OF_A_RUN)]
    left = [path for path in left if path.exists()]
    if not left:
        return
    number = next(n for n in itertools.count(1) if not (output_dir / f"restarted_{n}").exists())
    aside = output_dir / f"restarted_{number}"
    with run_lock(folder):
        for path in left:
            target = aside / path.relative_to(output_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.rename(target)
            except OSError:
                for empty in (target.parent, aside):
                    with contextlib.suppress(OSError):  # it holds what was moved before
                        empty.rmdir()
                raise
    log.info(f"Restarting: what the earlier run left is in {aside}.")


def resume_point(
    folder: Path,
    choice: bool | str,
    config: Mapping[str, Any],
    *,
    may_change: Collection[str] = RESUMABLE_KEYS,
    world_size: int = 1,
) -> Checkpoint | None:
    """Choose the checkpoint that a run resumes from, or None for a run that starts at step 0.

    Args:
        folder: folder of the run's own checkpoints.
        choice: True takes the newest undamaged checkpoint in ``folder``, if there is one. False
            takes none. A path names a checkpoint, or a run whose newest checkpoint is taken.
        config: the run's config in plain containers.
        may_change: keys whose value may differ from that of the saved run. A dot leads into a
            section.
        world_size: number of processes. It may differ if a step still has as many samples.

    Raises:
        ValueError: the run would overwrite another run's checkpoints, or its settings differ from
            the saved ones.
    """
    if choice is True:
        checkpoint, skipped = latest_checkpoint(folder)
        if skipped and checkpoint is None:
            raise ValueError(
                f"{folder} holds checkpoints and none of them is intact. {' '.join(skipped)} To "
                f"start over, set resume_from_checkpoint={RESTART}, which moves them aside."
            )
        for reason in skipped:
            log.warning(reason)
    else:
        checkpoint = find_checkpoint(Path(choice)) if choice else None
        own = checkpoint is not None and checkpoint.path.parent.resolve() == folder.resolve()
        if ahead := [
            other
            for other in list_checkpoints(folder)
            if not (own and other.name <= checkpoint.path.name)
        ]:
            raise ValueError(
                f"{folder} already holds checkpoints, the newest {ahead[-1].name}. Set "
                "resume_from_checkpoint=True to go on from it, choose another output_dir, or set "
                f"resume_from_checkpoint={RESTART} to move them aside."
            )
    if checkpoint is None:
        log.info("Starting at step 0.")
        return None
    _check_same_run(checkpoint, config, may_change, world_size)
    log.info(f"Resuming from {checkpoint}.")
    checkpoint.resumes = True
    return checkpoint


def _check_same_run(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    may_change: Collection[str],
    world_size: int,
) -> None:
    """Raise ValueError if the samples of a step, or a setting that may not change, differ from the
    saved run.
    """
    before = _samples_a_step(checkpoint.config, checkpoint.run.get("world_size", 1))
    now = _samples_a_step(config, world_size)
    if before != now:
        raise ValueError(
            f"{checkpoint} was saved by a run with {before} samples a step; batch_size x "
            f"gradient_accumulation_steps x processes is now {now}. Set the first two so that the "
            f"product is {before}."
        )
    if changed := list(_changed(checkpoint.config, config, may_change)):
        raise ValueError(
            f"{checkpoint} was saved by a run with other settings, so this run cannot resume it. "
            f"Different: {'; '.join(changed)}. Set these keys to the saved values, or start a new "
            "run in another output_dir."
        )


def adapter_start(
    adapter_checkpoint: str | None, *, quantized: Mapping[str, Any] | None = None
) -> Checkpoint | None:
    """Choose the checkpoint whose adapters a new run starts with, or None if the run initializes
    its own.

    Args:
        adapter_checkpoint: a run's output_dir, one of its checkpoints, or a native adapter.
        quantized: the keys ``quantization`` and ``dtype`` of a run that quantizes its base,
            otherwise None.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ValueError: the adapters took something out of weights of another kind. Those weights were
            quantized and this run's are not, or the reverse, or they were quantized with other
            settings.
    """
    if not adapter_checkpoint:
        return None
    checkpoint = find_checkpoint(Path(adapter_checkpoint))
    if checkpoint.has_quantized_base != bool(quantized) and _has_edit(checkpoint):
        there, here, remedy = (
            ("weights before they were quantized", "not", "with a qcorda_finetune recipe")
            if checkpoint.has_quantized_base
            else ("full-precision weights", "quantized", "with the recipe that trained it")
        )
        raise ValueError(
            f"{checkpoint} holds what its adapters took out of {there}; here they are {here}. "
            f"Continue {remedy}, or merge the adapter into its base and start from that."
        )
    if checkpoint.has_quantized_base and quantized:
        made = {key: checkpoint.config[key] for key in quantized}
        if changed := list(_changed(made, quantized, ())):
            raise ValueError(
                f"{checkpoint} brings its quantized base, made with other settings: "
                f"{'; '.join(changed)}. Set these keys to the saved values."
            )
    log.info(f"Starting with the adapters of {checkpoint}.")
    return checkpoint


def _has_edit(checkpoint: Checkpoint) -> bool:
    """Tell whether any adapter of a checkpoint took something out of its weight."""
    edits = (value for name, value in checkpoint.adapter.items() if name.endswith(".lora_edit_in"))
    return any(len(edit) for edit in edits)


def resume_position(
    run: Mapping[str, Any], accumulation: int, num_batches: int
) -> tuple[int, int, int]:
    """Return where a run resumes: steps done, epochs done, and batches done in the current epoch.

    A resumed run may split a step into another number of batches than the saved run did.

    Args:
        run: part ``run`` of the checkpoint.
        accumulation: batches in a step of the present run.
        num_batches: batches in an epoch of the present run, on one process.
    """
    steps = -(-run["batches_done"] // run["config"]["gradient_accumulation_steps"])  # of this epoch
    return run["step"], run["epoch"], min(steps * accumulation, num_batches)


def _samples_a_step(config: Mapping[str, Any], world_size: int) -> int:
    """Return how many samples one optimizer step learns from."""
    return config.get("batch_size", 1) * config.get("gradient_accumulation_steps", 1) * world_size


def _changed(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]
) -> Iterator[str]:
    """Yield ``key: saved <value>, now <value>`` for each setting that differs and may not."""
    for key in sorted(saved.keys() - set(may_change)):
        inside = {name.removeprefix(f"{key}.") for name in may_change if name.startswith(f"{key}.")}
        before, after = saved[key], now.get(key)
        if inside and isinstance(before, Mapping) and isinstance(after, Mapping):
            before, after = (
                {k: v for k, v in tree.items() if k not in inside} for tree in (before, after)
            )
        if before != after:
            yield f"{key}: saved {before}, now {after}"
