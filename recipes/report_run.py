"""Plot a run's loss curve and singular values from the files in its folder.

    tune run report_run --config report run=/tmp/run
    tune run report_run --config /tmp/run/config.yaml                 # the same, by the config that the run left

It takes the runs of every fine-tuning recipe. It writes loss_curve.png and singular_values.png into
output_dir. If the layers' ranks differ, it writes ranks.png as well.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters import AdapterLinear, CorDALinear
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.checkpoints import Checkpoint, find_checkpoint
from kasa_tune.components.exchange.run_config import config_of_run
from kasa_tune.components.models.agreement import base_architecture, check_base
from kasa_tune.components.models.base_weights import read_base, weights_fingerprint
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.components.reports.plots import (
    DrawnSpectrum,
    layer_ranks,
    loss_curve,
    singular_values,
)
from kasa_tune.components.training.loggers import read_metrics
from kasa_tune.methods import method_of

LAYERS_DRAWN = 6


@torch.no_grad()
def drawn_spectra(cfg: DictConfig, checkpoint: Checkpoint) -> dict[str, DrawnSpectrum]:
    """Compute the singular values of a few adapted layers, spread over the depth of the model.

    Raises:
        ValueError: the checkpoint belongs to another model or another base than the config's.
    """
    adapter = checkpoint.adapter
    base = read_base(cfg.checkpointer)
    checkpoint.check_belongs(
        base_fingerprint=weights_fingerprint(base),
        model=OmegaConf.to_container(cfg.model, resolve=True),
        architecture=base_architecture(cfg.checkpointer.checkpoint_dir),
    )
    of_linears = [key for key in adapter if ".lora_" in key]  # not what was trained whole
    drawn = _spread(list(dict.fromkeys(key.partition(".lora_")[0] for key in of_linears)))
    weights = {name: base[f"{name}.weight"] for name in drawn}
    del base  # the weights of a large model would stay in memory during the decompositions
    model = build_on_meta(partial(config.instantiate, cfg.model), dtype=torch.float32)
    check_base(model, cfg)
    linears = dict(adapter_linears(model))
    spectra = {}
    for name, weight in tqdm(
        weights.items(), desc="Singular values", unit="layer", dynamic_ncols=True
    ):
        part = {key: adapter[f"{name}.{key}"].double() for key in _keys_of(adapter, name)}
        spectra[name] = DrawnSpectrum(
            torch.linalg.svdvals(weight.to(_fastest_device(), torch.float32)).cpu(),
            product_singular_values(part["lora_edit_out"], part["lora_edit_in"]),
            product_singular_values(*learned_update(linears[name], part)),
            from_start=_adapts_the_first(cfg),
        )
    return spectra


def learned_update(linear: AdapterLinear, part: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return factors ``(d_out, k)`` and ``(k, d_in)`` of what training added to a weight.

    This is ``s B diag(d) A``. If the update started as a part of the weight (CorDA), the start is
    subtracted: ``s (B A - B0 A0)``.
    """
    out, into = (
        linear.scaling * part["lora_b.weight"] * part.get("lora_diag", 1.0),
        part["lora_a.weight"],
    )
    if not isinstance(linear, CorDALinear):
        return out, into
    return torch.cat((out, -part["lora_edit_out"]), dim=1), torch.cat((into, part["lora_edit_in"]))


def _adapts_the_first(cfg: DictConfig) -> bool:
    """Tell whether the part that was taken out of the weights has the largest singular values, as
    in PiSSA and CorDA's IPM.
    """
    method = method_of(cfg.adapter)
    return method.decomposition is not None and method.mode != "kpm"


def _words(cfg: DictConfig) -> dict[str, str]:
    """Return labels for the plot of singular values. They depend on the method."""
    method = method_of(cfg.adapter)
    if method.builders == ("kasa",):
        return {"removed": "removed", "update": "s B diag(d) A"}
    if method.decomposition is None:
        return {"removed": "removed", "update": "s B A"}
    if method.decomposition == "quantization_error":  # the start is a part of W - Q, not of W
        return {"removed": "taken up by the adapter", "update": "s (B A - B₀ A₀)"}
    return {"removed": "moved into the adapter", "update": "s (B A - B₀ A₀)"}


def adapter_ranks(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the rank of every adapted layer in a checkpoint."""
    suffix = ".lora_a.weight"
    adapter = checkpoint.adapter
    return {
        name.removesuffix(suffix): len(value)
        for name, value in adapter.items()
        if name.endswith(suffix)
    }


def _spread(names: list[str]) -> list[str]:
    """Choose a few of ``names``, spread from the first layer to the last, and keep their order.
    They are of different kinds as far as there are enough kinds.
    """
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    chosen = set()
    for i in range(LAYERS_DRAWN):
        of_kind = [name for name in names if name.rpartition(".")[2] == kinds[i % len(kinds)]]
        chosen.add(of_kind[round(i * (len(of_kind) - 1) / (LAYERS_DRAWN - 1))])
    return [name for name in names if name in chosen]


def _keys_of(adapter: dict[str, Tensor], name: str) -> list[str]:
    return [key.removeprefix(f"{name}.") for key in adapter if key.startswith(f"{name}.lora_")]


def _fastest_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def product_singular_values(out: Tensor, into: Tensor) -> Tensor:
    """Compute the r singular values of ``out @ into``, descending, for ``out (m, r)`` and
    ``into (r, n)``. The product is not formed.

    With out = Q R and intoᵀ = P S they are those of the r x r matrix R Sᵀ. The result has the shape
    ``(r,)``.
    """
    return torch.linalg.svdvals(torch.linalg.qr(out).R @ torch.linalg.qr(into.T).R.T)


def _metrics_of(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} holds no metrics.jsonl: set output_dir to the folder of a run that logged with "
            "JSONLLogger."
        )
    return read_metrics(path)


@config.parse(None)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``. It takes
    the config ``report``, or that of any fine-tuning recipe.
    """
    if "run" in cfg:
        told = config_of_run(find_checkpoint(Path(cfg.run)), cfg.checkpoint_dir)
        cfg = DictConfig({**told, "output_dir": cfg.run})
    elif "optimizer" not in cfg:
        raise ValueError(
            "This config trains nothing: give the run's, --config report run=<its output_dir>."
        )
    run = Path(cfg.output_dir)
    loss_curve(_metrics_of(run), run / "loss_curve.png", title=run.name)
    print(f"Loss curve: {run / 'loss_curve.png'}")
    checkpoint = find_checkpoint(run)
    title = f"{run.name}, {checkpoint.path.name}"
    singular_values(
        drawn_spectra(cfg, checkpoint), run / "singular_values.png", title=title, **_words(cfg)
    )
    print(f"Singular values: {run / 'singular_values.png'}")
    ranks = adapter_ranks(checkpoint)
    if len(set(ranks.values())) > 1:
        layer_ranks(ranks, run / "ranks.png", title=title, uniform=cfg.model.rank)
        print(f"Ranks: {run / 'ranks.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
