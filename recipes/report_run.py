"""Draw a run's loss curve and singular values, from its folder.

    tune run report_run --config /tmp/run/config.yaml                 # every run leaves its config beside its metrics
    tune run report_run --config tiny_kasa output_dir=/tmp/run        # the same

Writes loss_curve.png and singular_values.png into output_dir.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torchtune import training, utils

from kasa_tune import config
from kasa_tune.components.checkpointing import latest_checkpoint, load_part
from kasa_tune.components.linear import adapter_linears, load_adapter_state_dict
from kasa_tune.components.metrics import read_metrics
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.components.plots import LayerSpectrum, loss_curve, singular_values

log = utils.get_logger("INFO")

LAYERS_DRAWN = 6


@torch.no_grad()
def layer_spectra(cfg: DictConfig, checkpoint: Path) -> dict[str, LayerSpectrum]:
    """Spectra of a few adapted layers, spread over the depth of the model."""
    model = build_on_meta(partial(config.instantiate, cfg.model), dtype=torch.float32)
    base = config.instantiate(cfg.checkpointer).load_checkpoint()[training.MODEL_KEY]
    load_base_weights(model, base, device=torch.device("cpu"), adapter_dtype=torch.float32)
    linears = list(adapter_linears(model))
    stride = len(linears) / LAYERS_DRAWN  # one more each time, or every drawn layer would be of the same kind
    drawn = {linears[(int(i * stride) + i) % len(linears)] for i in range(LAYERS_DRAWN)}
    weights = {name: linear.weight.clone() for name, linear in drawn}
    load_adapter_state_dict(model, load_part(checkpoint, "adapter"))
    spectra = {}
    for name, linear in linears:
        if name in weights:
            edit = linear.edit.dense()
            update = linear.merged_weight() - (weights[name] - edit)
            spectra[name] = LayerSpectrum(
                torch.linalg.svdvals(weights[name]),
                torch.linalg.svdvals(edit)[: linear.edit.rank],
                torch.linalg.svdvals(update)[: linear.rank],
            )
    return spectra


@config.parse(config.FINETUNE)
def recipe_main(cfg: DictConfig) -> int:
    """Entry point: ``--config <name or path> [key=value ...]``."""
    run = Path(cfg.output_dir)
    if not (run / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{run} holds no metrics.jsonl: set output_dir to the folder of a run.")
    loss_curve(read_metrics(run / "metrics.jsonl"), run / "loss_curve.png", title=run.name)
    print(f"Loss curve: {run / 'loss_curve.png'}")
    checkpoint, _ = latest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(f"{run} holds no finished checkpoint; the singular values cannot be drawn yet.")
    singular_values(layer_spectra(cfg, checkpoint), run / "singular_values.png", title=f"{run.name}, {checkpoint.name}")
    print(f"Singular values: {run / 'singular_values.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
