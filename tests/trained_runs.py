"""Checkpoints as the recipes write them, of runs that never were: adapters set up on a base in Hugging Face's files,
then moved at random, so that nothing is where it started.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import training
from torchtune.config import instantiate

from kasa_tune.components.adapters import KaSALinear
from kasa_tune.components.adapters.state import adapter_linears, adapter_state_dict
from kasa_tune.components.checkpoints import save_checkpoint
from kasa_tune.components.linalg.decomposition import co_svd, split_component
from kasa_tune.components.linalg.nf4 import dequantize, quantize
from kasa_tune.components.models.base_weights import read_base_weights, weights_fingerprint
from kasa_tune.components.models.loading import build_on_meta, load_base_weights, read_tensor
from kasa_tune.components.quantized.base import FOLDER, keep_quantized, quantized_linears
from kasa_tune.components.quantized.start import quantized_start
from kasa_tune.methods import METHODS as TABLE
from kasa_tune.methods import method_of
from tests.toy_checkpoints import MODELS, write_checkpoint

CPU = torch.device("cpu")
STEP = 7
EVERYWHERE = {"attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_to_mlp": True}
IN_PLACES = {"attn_modules": ["k_proj"], "apply_to_mlp": ["w3"]}  # part of what Phi fuses
RANK, ALPHA = 4, 6.0  # a scaling of 1.5
BLOCK = {"block_size": 16, "scaler_block_size": 4}


class Method(NamedTuple):
    """How a run is configured: whose builder, what the sections adapter and model say besides."""

    kind: str
    adapter: dict
    options: dict = {}  # noqa: RUF012 (nobody changes it)
    mixed_ranks: bool = False


METHODS = {
    "kasa": Method("kasa", {"beta": 1e-4, "gamma": 1e-3}, {"truncation_rank": 3}),
    "kasa_factored": Method("kasa", {"beta": 1e-4, "gamma": 1e-3}, {"edit_storage": "factored"}),
    "corda_ipm": Method("corda", {"method": "corda", "mode": "ipm"}),
    "corda_kpm": Method("corda", {"method": "corda", "mode": "kpm"}, {"edit_storage": "factored"}),
    "corda_mixed": Method("corda", {"method": "corda", "mode": "ipm"}, mixed_ranks=True),
    "pissa": Method("corda", {"method": "pissa"}),
    "milora": Method("corda", {"method": "milora"}),
    "lora": Method("lora", {"method": "lora"}),
    "dora": Method("lora", {"method": "lora"}, {"use_dora": True}),
    "qcorda": Method("corda", {"method": "qcorda"}),
    "qlora": Method("lora", {"method": "qlora"}),
    "qkasa": Method("kasa", {"method": "qkasa"}),
    "loftq": Method("corda", {"method": "loftq"}),
}
QUANTIZED = [name for name, method in METHODS.items() if method_of(method.adapter).quantized]


class Trained(NamedTuple):
    """A run's output_dir and the model that it ended with."""

    path: Path
    model: nn.Module


def trained_run(
    output_dir,
    base,
    files,
    model_type,
    builder,
    sizes,
    method,
    *,
    where=EVERYWHERE,
    dtype="fp32",
    moved=0.3,
    **more,
):
    """Write the checkpoint of a run on a base.

    Args:
        output_dir: of the run.
        base: folder of the base's files.
        files: their names.
        model_type: torchtune's; None for a model that is built from its checkpoint's folder.
        builder: of the model, without the method before it.
        sizes: further arguments of the builder.
        method: one of METHODS.
        where: which linears have adapters.
        dtype: of the run.
        moved: how far A, B, d and m are from their start, as a share of their size (B, where it starts at zero: of
            A's).
        more: sections of the config.
    """
    torch.manual_seed(0)
    kind, adapter, options, mixed = METHODS[method]
    config = {
        "output_dir": str(output_dir),
        "tokenizer": {
            "_component_": "torchtune.models.llama2.llama2_tokenizer",
            "path": str(base / "tokenizer.model"),
        },
        "model": {"_component_": f"kasa_tune.components.models.{kind}_{builder}"}
        | {"rank": RANK, "alpha": ALPHA, **where, **options, **sizes},
        "adapter": adapter,
        "checkpointer": _checkpointer(base, list(files), model_type, str(output_dir)),
        "dataset": {"_component_": "kasa_tune.components.data.instruct_dataset", "source": "json"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "dtype": dtype,
    } | more
    state = {"step": STEP, "epoch": 0, "batches_done": STEP, "total_steps": 9, "config": config}
    weights = read_base_weights(instantiate(OmegaConf.create(config["checkpointer"])))
    state["base"] = weights_fingerprint(weights)
    if method in QUANTIZED:
        config["quantization"] = BLOCK
    model = build_on_meta(
        partial(instantiate, OmegaConf.create(config["model"])),
        dtype=training.get_dtype(dtype, device=CPU),
    )
    linears = dict(adapter_linears(model))
    if mixed:
        ranks = {
            name: 5 * index % 9 for index, name in enumerate(linears)
        }  # 0 for one of each block
    else:
        ranks = dict.fromkeys(linears, RANK)
    if method in QUANTIZED:
        state["quantized_base"] = _start_quantized(model, weights, ranks, method, Path(output_dir))
    else:
        load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32)
        for name, linear in linears.items():
            _start(linear, ranks[name], adapter)
    for linear in linears.values():
        _move(linear, moved)
    parts = {"adapter": adapter_state_dict(model), "run": state}
    save_checkpoint(Path(output_dir) / "checkpoints", STEP, parts)
    return Trained(Path(output_dir), model.eval())


def _checkpointer(base, files, model_type, output_dir):
    where = {"checkpoint_dir": str(base)}
    if model_type is None:
        return {"_component_": "kasa_tune.components.models.CheckpointFolder", **where}
    kind = {"_component_": "torchtune.training.FullModelHFCheckpointer"}
    options = {"checkpoint_files": files, "model_type": model_type, "output_dir": output_dir}
    return kind | where | options


def _component(weight, rank, adapter):
    """By the covariance of random inputs of unlike sizes, or by none."""
    width = weight.shape[1]
    inputs = torch.randn(4 * width, width) * torch.linspace(0.2, 2.0, width)
    covariance = inputs.T @ inputs / len(inputs) if "corda" in adapter["method"] else None
    mode = {"pissa": "ipm", "milora": "kpm"}.get(adapter["method"], adapter.get("mode", "ipm"))
    return co_svd(weight.float(), covariance, rank, mode)


def _start(linear, rank, adapter):
    if "method" not in adapter or adapter["method"] == "lora":
        linear.initialize()
    else:
        linear.start_from(split_component(_component(linear.weight, rank, adapter), linear.scaling))


def _start_quantized(model, weights, ranks, method, output_dir):
    quantized, linears = quantized_linears(model, BLOCK["block_size"]), dict(adapter_linears(model))
    without = {f"{name}.weight" for name in quantized}
    dtype = next(model.parameters()).dtype
    load_base_weights(model, weights, device=CPU, adapter_dtype=torch.float32, without=without)
    for name, linear in quantized.items():
        weight = read_tensor(weights, f"{name}.weight", device=CPU, dtype=torch.float32)
        found = None
        if method == "qcorda" and name in linears:
            found = _component(weight, ranks[name], METHODS[method].adapter)
        start = quantized_start(
            weight,
            linears.get(name),
            TABLE[method],
            quantize=partial(quantize, **BLOCK, dtype=dtype),
            component=found,
        )
        start.put_into(linear)
    for name in linears.keys() - quantized.keys():  # the output projection
        linears[name].initialize()
    return keep_quantized(
        output_dir / FOLDER, {name: linear.weight for name, linear in quantized.items()}
    )


@torch.no_grad()
def _move(linear, share):
    for name in linear.adapter_params():
        parameter = linear.get_parameter(name)
        size = parameter if parameter.any() else linear.lora_a.weight
        parameter.add_(torch.randn_like(parameter) * share * size.std(correction=0).nan_to_num(0.0))
    if isinstance(linear, KaSALinear):
        linear.lora_diag.mul_(1.0 + torch.rand_like(linear.lora_diag))


@torch.no_grad()
def update_of(linear):
    """``s B diag(d) A`` less the edit, in float64, column by column."""
    update = -linear.lora_edit_out.double() @ linear.lora_edit_in.double()
    diag = getattr(linear, "lora_diag", torch.ones(linear.rank)).double()
    for i in range(linear.rank):
        column, row = linear.lora_b.weight[:, i].double(), linear.lora_a.weight[i].double()
        update = update + ALPHA / RANK * diag[i] * torch.outer(column, row)
    return update


@torch.no_grad()
def effective_weight(linear, frozen=None):
    """What an adapter linear multiplies with, in float64; rows of DoRA's lengths.

    Args:
        linear: its weight may have the edit taken out already.
        frozen: another weight than its own, whole.
    """
    weight = dequantize(linear.weight).double() if frozen is None else frozen.double()
    if frozen is None and linear.folded:
        weight = weight + linear.lora_edit_out.double() @ linear.lora_edit_in.double()
    weight = weight + update_of(linear)
    if hasattr(linear, "lora_magnitude"):
        weight = weight * (linear.lora_magnitude.double() / weight.norm(dim=1))[:, None]
    return weight


def toy_run(
    tmp_path,
    name,
    method,
    *,
    base_dtype=torch.float32,
    shards=1,
    change=lambda state: None,
    **options,
):
    """A run of a toy model of :mod:`tests.toy_checkpoints` on a base in ``tmp_path / "base"``, its tokenizer there."""
    files = write_checkpoint(
        tmp_path / "base", name, dtype=base_dtype, shards=shards, change=change
    )
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")
    family, _, model_type = MODELS[name]
    return trained_run(
        tmp_path / "run",
        tmp_path / "base",
        files,
        model_type,
        family,
        MODELS[name].sizes,
        method,
        **options,
    )
