"""Show a run, or several side by side, on one page, from the files in their folders.

    tune run report_run --config report run=/tmp/run
    tune run report_run --config /tmp/run/config.yaml                 # the same, by the config that the run left
    tune run report_run --config report 'runs={kasa: /tmp/a, lora: /tmp/b}' output_dir=/tmp/compared
    tune run report_run --config report run=/tmp/run calibrate=True   # also covariances and spectra under them

It takes the runs of every fine-tuning recipe. It writes report.html, which needs no other file and
no network, into output_dir. loss_curve.png and singular_values.png are written into the folder of
each run. If the layers' ranks differ, so is ranks.png.
"""

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

import kasa_tune
from kasa_tune import config
from kasa_tune.components.adapters import AdapterLinear, CorDALinear
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.checkpoints import Checkpoint, find_checkpoint
from kasa_tune.components.exchange.run_config import config_of_run
from kasa_tune.components.models.agreement import base_architecture, check_base
from kasa_tune.components.models.base_weights import read_base, weights_fingerprint
from kasa_tune.components.models.loading import build_on_meta
from kasa_tune.components.reports import (
    DrawnSpectrum,
    ReportedRun,
    about_run,
    diagonals_of,
    layer_inputs,
    layer_ranks,
    loss_curve,
    ranks_of,
    read_folder,
    run_page,
    singular_values,
    words_of,
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


def reported_run(name: str, cfg: DictConfig, *, calibrate: bool = False) -> ReportedRun:
    """Draw the plots of a run, and collect all that its page shows.

    Args:
        name: of the run on the page.
        cfg: the run's config, whose output_dir is its folder.
        calibrate: whether to run the calibration again for the layers that are drawn.

    Raises:
        FileNotFoundError: the run has logged nothing.
        ValueError: it has no finished checkpoint, or belongs to another base than the config's.
    """
    run = Path(cfg.output_dir)
    found = read_folder(name, run, _metrics_of(run))
    loss_curve(found.metrics, run / "loss_curve.png", title=run.name)
    print(f"Loss curve: {run / 'loss_curve.png'}")
    checkpoint = find_checkpoint(run)
    title = f"{run.name}, {checkpoint.path.name}"
    found.about, found.words = about_run(cfg, checkpoint), words_of(cfg)
    found.spectra = drawn_spectra(cfg, checkpoint)
    singular_values(found.spectra, run / "singular_values.png", title=title, **found.words)
    print(f"Singular values: {run / 'singular_values.png'}")
    found.ranks = ranks_of(checkpoint.adapter)
    if len(set(found.ranks.values())) > 1:
        layer_ranks(found.ranks, run / "ranks.png", title=title, uniform=cfg.model.rank)
        print(f"Ranks: {run / 'ranks.png'}")
    found.diagonals = diagonals_of(run)
    if calibrate:
        found.inputs = layer_inputs(cfg, list(found.spectra), device=_fastest_device())
    return found


def configs_of(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the config of each run by its name on the page.

    Args:
        cfg: the config ``report``, or that of a fine-tuning recipe.

    Raises:
        ValueError: it is neither.
    """
    if "runs" not in cfg:
        if "optimizer" not in cfg:
            raise ValueError(
                "This config trains nothing: give the run's, --config report run=<its output_dir>."
            )
        return {Path(cfg.output_dir).name: cfg}
    folders = cfg.runs or [cfg.run]
    if not isinstance(folders, Mapping):
        names = [Path(folder).resolve().name for folder in folders]
        twice = len(set(names)) < len(names)
        folders = dict(zip(folders if twice else names, folders, strict=True))
    return {
        name: DictConfig(
            {
                **config_of_run(find_checkpoint(Path(folder)), cfg.checkpoint_dir),
                "output_dir": folder,
            }
        )
        for name, folder in folders.items()
    }


@config.parse(None)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``. It takes
    the config ``report``, or that of any fine-tuning recipe.
    """
    configs = configs_of(cfg)
    calibrate = bool(cfg.get("calibrate"))
    runs = [reported_run(name, of_run, calibrate=calibrate) for name, of_run in configs.items()]
    folder = Path(cfg.get("output_dir") or runs[0].folder)
    folder.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d %H:%M %Z")
    text = run_page(
        runs,
        title=" and ".join(configs) if len(runs) < 3 else f"{len(runs)} runs",
        about=", ".join(str(run.folder) for run in runs),
        footer=f"Written by kasa_tune {kasa_tune.__version__} on {now}.",
    )
    (folder / "report.html").write_text(text, encoding="utf-8")
    print(f"Report: {folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
