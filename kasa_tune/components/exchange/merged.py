"""The trained model as a Hugging Face checkpoint of its own: shards, index, config and tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from kasa_tune.components.exchange.deviations import Deviations, deviation
from kasa_tune.components.exchange.trained_run import TrainedRun
from kasa_tune.components.models.llava import Llava

INDEX = "model.safetensors.index.json"
_ROTARY = "rotary_emb"  # tables that some checkpoints hold besides weights, in float32
_DTYPE_KEYS = ("dtype", "torch_dtype")  # in config.json, of transformers 5 and 4
# What a checkpoint's folder holds besides weights: config, tokenizer, chat template, code, terms of use.
_SIDE_FILES = (
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# What the files of a tokenizer are called.
_TOKENIZER_FILE = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template|tekken)[\w.-]*"
    r"|[\w.-]+\.(model|tiktoken|jinja)"
)
# The name of a repository that holds other weights; an adapter that transformers would load besides.
_NOT_OF_IT = ("original_repo_id.json", "adapter_config.json")


@torch.no_grad()
def write_merged(
    run: TrainedRun, folder: Path, *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
) -> Deviations:
    """Write the model with its adapter merged in, one shard in memory at a time.

    Weights that training left alone are the base's, bit for bit unless ``dtype`` is another than theirs. Those of a run
    on an NF4 base are the dequantized ones that it multiplied with.

    Args:
        run: what to export.
        folder: exists.
        dtype: of all weights, but not of rotary tables; None: each tensor's in the base.
        max_shard_size: of a file: ``5GB``, ``500MB``.

    Returns:
        By how much each merged weight differs from the trained one, because of ``dtype``.

    Raises:
        ValueError: ``max_shard_size`` is no size, or a file to be copied is a link out of its folder.
    """
    side_files = _side_files(run)
    modules, whole = run.modules(run.changed), run.whole
    weights = {
        key
        for key, value in run.base.stored.items()
        if _ROTARY not in key and value.is_floating_point()
    }
    # Readers of LLaVA know the names of its files.
    named = run.base.name_in_file if isinstance(run.model, Llava) else str
    own = {named(key): key for key in run.base.stored}
    stored = {
        name: run.base.stored[key].to(dtype) if dtype and key in weights else run.base.stored[key]
        for name, key in own.items()
    }
    plan = split_torch_state_dict_into_shards(
        stored, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    errors = Deviations()
    for filename, keys in plan.filename_to_tensors.items():
        shard = {}
        for name in keys:
            key, kind = own[name], stored[name].dtype
            if key in whole:
                shard[name] = whole[key].to(kind)
            else:
                shard[name] = _tensor(run, key, modules.get(key), kind, errors)
        save_file(shard, folder / filename, metadata={"format": "pt"})
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _copy(side_files, folder)
    _set_dtype(
        folder / "config.json",
        {value.dtype for name, value in stored.items() if own[name] in weights},
    )
    return errors


def _tensor(
    run: TrainedRun,
    key: str,
    linears: Mapping[str, Tensor] | None,
    dtype: torch.dtype,
    errors: Deviations,
) -> Tensor:
    if linears is None:
        return run.base.as_in_file(key, run.base.read(key).to(dtype))
    trained = run.merged(key, linears)
    merged = trained.to(dtype)
    errors[key.removesuffix(".weight")] = deviation(
        merged.to(torch.float32, copy=True), trained, run.module_update(key, linears).norm()
    )
    return run.base.as_in_file(key, merged)


def copy_side_files(run: TrainedRun, folder: Path) -> None:
    """Copy all of the base's folder that is not weights, and the run's tokenizer.

    Raises:
        ValueError: a file to be copied is a link out of its folder.
    """
    _copy(_side_files(run), folder)


def _copy(files: list[Path], folder: Path) -> None:
    for source in files:
        if not (folder / source.name).exists():
            shutil.copyfile(source, folder / source.name)


def _side_files(run: TrainedRun) -> list[Path]:
    """All of the base's folder that is not weights, and the run's tokenizer if that lies elsewhere.

    Raises:
        ValueError: one is a link to a file that is none of its folder's. The folder may come from somebody else, and
            the link may lead to what its owner does not mean to publish.
    """
    of_base = [path for pattern in _SIDE_FILES for path in run.checkpoint_dir.glob(pattern)]
    of_base = [
        path
        for path in of_base
        if path.is_file() and path.name not in _NOT_OF_IT and not path.name.endswith(".index.json")
    ]
    found = [*of_base, *_paths_in(run.config.get("tokenizer") or {})]
    for path in found:
        _check_own_file(path)
    return found


def _check_own_file(path: Path) -> None:
    """Refuse a link out of the folder, except to the blobs of Hugging Face's cache, which its snapshots consist of."""
    folder, target = path.parent.resolve(), path.resolve()
    allowed = [folder]
    for above in folder.parents:
        if above.name == "snapshots":
            allowed.append(above.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{path} is a link to {target}, outside its folder, and is not copied. If it belongs to the model, put "
            "the file itself there."
        )


def _paths_in(tokenizer: Mapping[str, Any]) -> list[Path]:
    """The run's tokenizer files. The paths come from a data file, so nothing but tokenizer files is copied."""
    texts = [value for value in tokenizer.values() if isinstance(value, str) and "\0" not in value]
    paths = [Path(text) for text in texts if _TOKENIZER_FILE.fullmatch(Path(text).name)]
    return [path for path in paths if path.is_file()]


def _set_dtype(path: Path, dtypes: set[torch.dtype]) -> None:
    """Let config.json name the weights' dtype, if they all have one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if len(dtypes) == 1:
        name = str(next(iter(dtypes))).removeprefix("torch.")
        config |= dict.fromkeys(
            [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"], name
        )
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
