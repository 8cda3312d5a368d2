"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtune import utils

from kasa_tune.components.checkpoints.checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_part,
)

log = utils.get_logger("INFO")

# Keys that may change between a run and its continuation: where and how it is watched, saved and computed, how long it
# is, and where its inputs lie. That weights and data are the same is checked on what they hold.
RESUMABLE_KEYS = {
    "output_dir", "resume_from_checkpoint", "metric_logger", "log_every_n_steps", "log_peak_memory_stats", "profiler",
    "save_every_n_steps", "keep_last", "dataset_val", "run_val_every_n_steps", "batch_size_val", "device", "compile",
    "enable_activation_checkpointing", "enable_activation_offloading", "num_workers", "epochs", "max_steps",
    "batch_size", "gradient_accumulation_steps", "world_size", "timeout", "data_parallel_shard_dim",
    "fsdp_cpu_offload", "checkpointer", "tokenizer", "dataset", "dry_run", "adapter_checkpoint", "calibration.dataset",
    "calibration.batch_size", "calibration.offload", "calibration.cache_dir",
}  # fmt: skip


def resume_point(
    folder: Path,
    choice: bool | str,
    config: Mapping[str, Any],
    *,
    may_change: Collection[str] = RESUMABLE_KEYS,
    world_size: int = 1,
) -> Path | None:
    """The checkpoint to go on from, or None to start from the beginning.

    Args:
        folder: of the run's own checkpoints.
        choice: True for the newest good one in ``folder``, if any; False for none; or the path of one or of a run.
        config: the run's, as plain containers.
        may_change: keys, dotted inside a section, whose value may differ from that of the saved run.
        world_size: number of processes; it may differ if a step still has as many samples.

    Raises:
        ValueError: the run would overwrite another one's checkpoints, or goes on with other settings.
    """
    if choice is True:
        path, passed_over = latest_checkpoint(folder)
        for reason in passed_over:
            log.warning(reason)
    else:
        path = find_checkpoint(Path(choice)) if choice else None
        own = path is not None and path.parent.resolve() == folder.resolve()
        if ahead := [
            other for other in list_checkpoints(folder) if not (own and other.name <= path.name)
        ]:
            raise ValueError(
                f"{folder} already holds checkpoints, the newest {ahead[-1].name}. Set resume_from_checkpoint=True to "
                "go on from it, choose another output_dir, or delete them."
            )
    if path is not None:
        run = load_part(path, "run")
        saved = run["config"]
        before, now = (
            _samples_a_step(saved, run.get("world_size", 1)),
            _samples_a_step(config, world_size),
        )
        if before != now:
            raise ValueError(
                f"{path} was saved by a run with {before} samples a step; batch_size x gradient_accumulation_steps x "
                f"processes is now {now}. Set the first two so that the product is {before}."
            )
        if changed := list(_changed(saved, config, may_change)):
            raise ValueError(
                f"{path} was saved by a run with other settings; going on would be neither run. Different: "
                + "; ".join(changed)
            )
    log.info(f"Resuming from {path}." if path else "Starting from the beginning.")
    return path


def start_point(
    resume_path: Path | None,
    adapter_checkpoint: str | None,
    *,
    quantized: Mapping[str, Any] | None = None,
) -> Path | None:
    """The checkpoint whose adapters a run starts with, or None where it starts them itself.

    Args:
        resume_path: from :func:`resume_point`, which goes first.
        adapter_checkpoint: a run's output_dir, one of its checkpoints, or a native adapter.
        quantized: the keys ``quantization`` and ``dtype`` of a run that quantizes its base; None of one that does not.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ValueError: what its adapters take out of the weights was taken out of other ones: quantized here and not there,
            not here and there, or otherwise.
    """
    if resume_path or not adapter_checkpoint:
        return resume_path
    path = find_checkpoint(Path(adapter_checkpoint))
    run = load_part(path, "run")
    brings_base = "quantized_base" in run
    if brings_base != bool(quantized) and _has_edit(path):
        there, here, way = (
            ("weights before they were quantized", "not", "with a qcorda_finetune recipe")
            if brings_base
            else ("full-precision weights", "quantized", "with the recipe that trained it")
        )
        raise ValueError(
            f"{path} holds what its adapters took out of {there}; here they are {here}. Go on {way}, or merge the "
            "adapter into its base and start from that."
        )
    if brings_base and quantized:
        made = {key: run["config"][key] for key in quantized}
        if changed := list(_changed(made, quantized, ())):
            raise ValueError(
                f"{path} brings its quantized base, made with other settings: {'; '.join(changed)}."
            )
    log.info(f"Starting with the adapters of {path}.")
    return path


def _has_edit(checkpoint: Path) -> bool:
    """Whether any of its adapters took something out of its weight."""
    adapter = load_part(checkpoint, "adapter")
    return any(len(value) for name, value in adapter.items() if name.endswith(".lora_edit_in"))


def resume_position(
    run: Mapping[str, Any], accumulation: int, num_batches: int
) -> tuple[int, int, int]:
    """Steps, epochs and batches of the running epoch that are done, for a run that may cut a step into other batches.

    Args:
        run: part ``run`` of the checkpoint.
        accumulation: batches of a step now.
        num_batches: of an epoch now, on one process.
    """
    steps = -(-run["batches_done"] // run["config"]["gradient_accumulation_steps"])  # of this epoch
    return run["step"], run["epoch"], min(steps * accumulation, num_batches)


def _samples_a_step(config: Mapping[str, Any], world_size: int) -> int:
    return config.get("batch_size", 1) * config.get("gradient_accumulation_steps", 1) * world_size


def _changed(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]
) -> Iterator[str]:
    """``key: saved value, value now`` of what differs and may not."""
    for key in sorted(saved.keys() - set(may_change)):
        inside = {name.removeprefix(f"{key}.") for name in may_change if name.startswith(f"{key}.")}
        before, after = saved[key], now.get(key)
        if inside and isinstance(before, Mapping) and isinstance(after, Mapping):
            before, after = (
                {k: v for k, v in tree.items() if k not in inside} for tree in (before, after)
            )
        if before != after:
            yield f"{key}: saved {before}, now {after}"
