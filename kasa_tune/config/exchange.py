"""The schemas of `export_adapter` and `import_adapter`."""

from dataclasses import replace
from typing import Literal

from kasa_tune.config.bounds import COUNT, NOT_EMPTY, SHARD_SIZE, TOLERANCE
from kasa_tune.config.entries import FilePath, Key, Schema
from kasa_tune.config.parts import CHECKPOINT_DIR, CHECKPOINTER, DEVICE, DTYPE, MODEL

EXPORT: Schema = {
    "format": Key(
        Literal["peft", "merged", "native"],
        help="what to write: a LoRA for PEFT, a whole model, or an adapter for these recipes",
    ),
    "adapter_checkpoint": Key(
        FilePath, help="a run's `output_dir`, one of its checkpoints, or a native adapter"
    ),
    "output_dir": Key(FilePath, help="the folder to write, which must not exist yet"),
    "checkpoint_dir": Key(
        FilePath | None,
        None,
        help="folder of the base model's files; null: where the run read them",
    ),
    "base_model": Key(
        str | None,
        None,
        NOT_EMPTY,
        help="name of the base model in the adapter and its card; "
        "null: the repository it was downloaded from, if that is known",
    ),
    "dtype": Key(
        Literal["bf16", "fp32"],
        None,
        help="precision of the written weights; null: fp32 for peft, that of the base's files for "
        "merged",
    ),
    "rank": Key(
        int | None,
        None,
        COUNT,
        help="peft: rank of every layer, filled up with zeros; null: the largest that a layer needs",
    ),
    "rank_pattern": Key(bool, False, help="peft: store each layer with its own rank"),
    "tolerance": Key(
        float | None,
        None,
        TOLERANCE,
        help="peft: leave out singular values up to this share of the layer's largest; "
        "null: leave out none",
    ),
    "max_shard_size": Key(
        str,
        "5GB",
        SHARD_SIZE,
        help="merged: the largest size of a file; one file at a time is held in memory",
    ),
}

# What import_adapter reads; IMPORT also takes, and ignores, the keys of a training config.
OF_IMPORT: Schema = {
    "peft_adapter": Key(
        FilePath,
        help="folder of a LoRA saved by PEFT: `adapter_config.json` and `adapter_model.safetensors`",
    ),
    "initial_adapter": Key(
        FilePath | None,
        None,
        help="the same adapter, saved before its training; for PiSSA, CorDA, OLoRA, LoRA-GA and LoftQ, "
        "which take their start out of the base weights",
    ),
    "checkpoint_dir": CHECKPOINT_DIR,
    "output_dir": Key(FilePath, help="the folder to write, which must not exist yet"),
    "model": replace(
        MODEL,
        help="a builder of the base model; the PEFT adapter says which linears are adapted, and "
        "with which rank",
    ),
    "checkpointer": replace(
        CHECKPOINTER, help="reads the base's weights from Hugging Face's files"
    ),
    "device": replace(
        DEVICE, default="cpu", help="device on which weights are decomposed (PiSSA, OLoRA, KaSA)"
    ),
    "dtype": replace(DTYPE, help="precision that the base had when the adapter was trained"),
}
