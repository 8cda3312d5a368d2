"""What a report computes of a run's checkpoints and of its base, beside the spectra."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training

from kasa_tune.components.adapters import adapter_linears
from kasa_tune.components.checkpoints import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
)
from kasa_tune.components.checkpoints.checkpoint import step_of
from kasa_tune.components.corda import Calibrator
from kasa_tune.components.data import build_tokenizer
from kasa_tune.components.models.base_weights import read_base
from kasa_tune.components.models.loading import load_base_weights, needs_dense_mask
from kasa_tune.components.reports.run_files import LayerInput
from kasa_tune.components.training import build_training_model
from kasa_tune.methods import method_of

log = logging.getLogger(__name__)

DRAWN_ENTRIES = 48  # cells on a side of a covariance's picture


def diagonals_of(folder: Path) -> dict[int, dict[str, float]]:
    """Compute the mean of ``|d|`` of every layer in every saved checkpoint of a run (KaSA, Fig. 4).

    Args:
        folder: the run's output_dir.

    Returns:
        By step and by layer. It is empty for a method without d. Damaged checkpoints are left out.
    """
    found: dict[int, dict[str, float]] = {}
    for path in list_checkpoints(folder / "checkpoints"):
        try:
            adapter = Checkpoint(path).adapter
        except CheckpointError as error:
            log.warning(f"Left out of the report: {error}")
            continue
        of_step = {
            name.removesuffix(".lora_diag"): float(value.double().abs().mean())
            for name, value in adapter.items()
            if name.endswith(".lora_diag") and value.numel()
        }
        if of_step:
            found[step_of(path)] = of_step
    return found


def about_run(cfg: DictConfig, checkpoint: Checkpoint) -> dict[str, str]:
    """Return what a run was, for the table at the top of a page.

    Args:
        cfg: the run's config.
        checkpoint: its newest.
    """
    trained = sum(
        value.numel() for name, value in checkpoint.adapter.items() if ".lora_edit_" not in name
    )
    batch, times = cfg.batch_size, cfg.gradient_accumulation_steps
    about = {
        "method": method_of(cfg.adapter).title,
        "base": Path(cfg.checkpointer.checkpoint_dir).name,
        "builder": cfg.model._component_.rpartition(".")[2],
        "rank": str(cfg.model.rank),
        "alpha": str(cfg.model.alpha),
        "learning rate": str(cfg.optimizer.get("lr", "the optimizer's own")),
        "optimizer": cfg.optimizer._component_.rpartition(".")[2],
        "samples a step": str(batch * times),
        "dtype": str(cfg.dtype),
        "seed": str(cfg.seed),
        "trained parameters": f"{trained:,}",
    }
    kasa = method_of(cfg.adapter).builders == ("kasa",)
    for key in ("beta", "gamma") if kasa else ("mode", "dynamic_ranks"):
        if (value := cfg.adapter.get(key)) is not None:
            about[f"adapter.{key}"] = str(value)
    return {**about, "folder": str(cfg.output_dir)}


@torch.no_grad()
def layer_inputs(
    cfg: DictConfig, names: Collection[str], *, device: torch.device
) -> dict[str, LayerInput]:
    """Run the calibration of a run again, and look at a few layers through their inputs (CorDA,
    Fig. 1 and 3).

    The base is loaded whole, in the run's dtype. Only the first round is run.

    Args:
        cfg: the config of a run with a section ``calibration``.
        names: the layers.
        device: where the model runs.

    Raises:
        ValueError: the run has no calibration.
    """
    if "calibration" not in cfg or cfg.calibration.get("dataset") is None:
        raise ValueError(
            f"{cfg.output_dir} was trained without calibration, so there are no covariances to "
            "draw. Set calibrate=False."
        )
    model: Any = build_training_model(cfg, dtype=training.get_dtype(cfg.dtype, device=device))
    tokenizer = build_tokenizer(cfg.tokenizer, longest=model.max_seq_len)
    masks: dict[str, Any] = {"device": device, "dense_mask": needs_dense_mask(model)}
    calibrator = Calibrator(cfg, tokenizer, model, **masks)
    base = read_base(cfg.checkpointer)
    load_base_weights(model, base, device=device, adapter_dtype=torch.float32)
    weights = {name: linear.weight for name, linear in adapter_linears(model) if name in names}

    def wanted(name: str, round: int) -> bool:
        return name in weights and round == 0

    found = {
        name: seen_through(weights[name], covariance)
        for layers, _, covariance in calibrator.covariances(wanted, "Covariances")
        for name in layers
    }
    return {name: found[name] for name in weights}


def seen_through(weight: Tensor, covariance: Tensor) -> LayerInput:
    """Compute the spectra of a weight ``(d_out, d_in)`` alone, under the sizes of its inputs and
    under their covariance ``(d_in, d_in)``, and the picture of that covariance.

    ASVD (arXiv 2312.05821) scales each input by a power 1/2 of its size, here its root mean square.
    CO-SVD (CorDA, eq. 2) is that of ``W C``.
    """
    w, c = weight.float(), covariance.float()
    sizes = c.diagonal().clamp_min(0.0).sqrt().sqrt()
    scaled = {"W": w, "ASVD, W diag(s)": w * sizes, "CO-SVD, W C": w @ c}
    spectra = {name: torch.linalg.svdvals(matrix).tolist() for name, matrix in scaled.items()}
    return LayerInput(covariance_picture(c), len(c), spectra)


def covariance_picture(covariance: Tensor, most: int = DRAWN_ENTRIES) -> list[list[float]]:
    """Return ``√(|C| / largest)`` in at most ``most`` rows and columns. Of each square of entries
    the largest is taken, so that single outliers stay visible.
    """
    size = covariance.abs()
    side = -(-len(size) // most)  # entries of a square's side
    short = -len(size) % side
    squares = torch.nn.functional.pad(size, (0, short, 0, short))
    largest = torch.nn.functional.max_pool2d(squares[None], side)[0]
    return (largest / largest.max().clamp_min(1e-30)).sqrt().tolist()


def words_of(cfg: DictConfig) -> dict[str, str]:
    """Return what the removed part of the weights and the update are called. It depends on the
    method.
    """
    method = method_of(cfg.adapter)
    if method.builders == ("kasa",):
        return {"removed": "removed", "update": "s B diag(d) A"}
    if method.decomposition is None:
        return {"removed": "removed", "update": "s B A"}
    if method.decomposition == "quantization_error":  # the start is a part of W - Q, not of W
        return {"removed": "taken up by the adapter", "update": "s (B A - B₀ A₀)"}
    return {"removed": "moved into the adapter", "update": "s (B A - B₀ A₀)"}


def ranks_of(adapter: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of every adapted layer from an adapter's tensors."""
    suffix = ".lora_a.weight"
    return {
        name.removesuffix(suffix): len(value)
        for name, value in adapter.items()
        if name.endswith(suffix)
    }
