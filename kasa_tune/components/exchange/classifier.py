"""A trained classifier for transformers and PEFT: its adapter with the head, or the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kasa_tune.architectures.encoder_names import hub_name
from kasa_tune.components.exchange.deviations import Deviations, deviation
from kasa_tune.components.exchange.merged import copy_side_files
from kasa_tune.components.exchange.peft_lora import PREFIX, write_peft
from kasa_tune.components.exchange.trained_run import TrainedRun
from kasa_tune.components.models.encoder import Encoder

_TASK = "classification"
_CLASSES = {"roberta": "Roberta", "bert": "Bert", "deberta-v2": "DebertaV2"}
_HEADS = {
    "roberta": ["classifier"],
    "bert": ["classifier", "pooler"],
    "deberta-v2": ["classifier", "pooler"],
}


def _model(run: TrainedRun) -> Any:
    """The encoder that a run trained."""
    return run.model


def is_classifier(run: TrainedRun) -> bool:
    """Whether a run trained an encoder."""
    return isinstance(run.model, Encoder)


def write_classifier_peft(run: TrainedRun, folder: Path, **options: Any) -> Deviations:
    """Write the adapter as :func:`~kasa_tune.components.exchange.peft_lora.write_peft` does, for a
    model that classifies sequences. The head is among ``modules_to_save``.

    Args:
        run: what to export.
        folder: exists.
        options: those of ``write_peft``.
    """
    errors = write_peft(run, folder, **options)
    kind = _model(run).architecture.model_type
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, value in _head(run).items():
        tensors[f"{PREFIX}{hub_name(kind, _TASK, name)}"] = value.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "task_type": "SEQ_CLS",
        # Whole names, because the head's linears have the same last parts as those of layers.
        "target_modules": sorted(_hub(run, name).removesuffix(".weight") for name in run.linears),
        "modules_to_save": _HEADS[kind],
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return errors


@torch.no_grad()
def write_classifier_merged(
    run: TrainedRun, folder: Path, *, dtype: torch.dtype | None = None
) -> Deviations:
    """Write the model with its adapter merged in and its head, as transformers reads it.

    Args:
        run: what to export.
        folder: exists.
        dtype: of all weights; None: each tensor's in the base.

    Returns:
        By how much each merged weight differs from the trained one, because of ``dtype``.
    """
    kind, errors, tensors = _model(run).architecture.model_type, Deviations(), {}
    for name in run.base:
        key, linear = hub_name(kind, _TASK, name), name.removesuffix(".weight")
        stored = run.base[name]
        if linear in run.linears and name.endswith(".weight"):
            trained = run.effective(linear)
            merged = trained.to(dtype or stored.dtype)
            norm = run.update(linear).norm()
            errors[key.removesuffix(".weight")] = deviation(
                merged.to(torch.float32, copy=True), trained, norm
            )
        else:
            merged = stored.to(dtype or stored.dtype)
        tensors[key] = merged.contiguous()
    for name, value in _head(run).items():
        tensors[hub_name(kind, _TASK, name)] = value.to(dtype or value.dtype).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    copy_side_files(run, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | labels_of(run)
    config["architectures"] = [f"{_CLASSES[kind]}ForSequenceClassification"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return errors


def labels_of(run: TrainedRun) -> dict[str, Any]:
    """The labels of the head, as config.json has them."""
    count = _model(run).head.out_proj.out_features
    dataset = run.config.get("dataset")
    given = dataset.get("labels") if isinstance(dataset, dict) else None
    names = [str(name) for name in given] if isinstance(given, list) else []
    if len(names) != count:
        names = [f"LABEL_{i}" for i in range(count)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression" if count == 1 else "single_label_classification",
    }


def _head(run: TrainedRun) -> dict[str, Tensor]:
    return {name: value for name, value in run.adapter.items() if name.startswith("head.")}


def _hub(run: TrainedRun, linear: str) -> str:
    return hub_name(_model(run).architecture.model_type, _TASK, f"{linear}.weight")


def classifier_card(run: TrainedRun, form: str, base: str | None, digest: str) -> str:
    """README.md of an exported classifier: what it is, and how to load it.

    Args:
        run: what was exported.
        form: ``peft``, ``merged`` or ``native``.
        base: name of the base; None if it has none.
        digest: of the base.
    """
    count = _model(run).head.out_proj.out_features
    auto = "from transformers import AutoModelForSequenceClassification\n\n"
    named = json.dumps(base or "<the base>")
    load = {
        "peft": f"from peft import PeftModel\n{auto}"
        f"base = AutoModelForSequenceClassification.from_pretrained({named}, num_labels={count})\n"
        'model = PeftModel.from_pretrained(base, "<this folder>")',
        "merged": f'{auto}model = AutoModelForSequenceClassification.from_pretrained("<this folder>")',
        "native": "# adapter_checkpoint=<this folder> of classify_finetune_single_device",
    }[form]
    return (
        "# A classifier of texts\n\n"
        f"Trained by kasa_tune with {run.method.citation}, {run.state['step']} steps. The head has "
        f"{count} {'output' if count == 1 else 'outputs'}.\n\n"
        f"    {load.replace(chr(10), chr(10) + '    ')}\n\n"
        f"Base weights: SHA-256 {digest}, of every byte.\n"
    )
