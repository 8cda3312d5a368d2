"""The schema of the classification recipes."""

from dataclasses import replace
from typing import Literal

from kasa_tune.config.bounds import COUNT
from kasa_tune.config.entries import Check, Key, OneOrMany, Schema, Section, at_least
from kasa_tune.config.parts import DATASET, MODEL, REGULARIZERS
from kasa_tune.methods import METHODS

# Keys of the recipes of decoders alone.
_OF_DECODERS = (
    "loss run_val_every_n_steps max_steps_per_epoch num_workers compile device_flops "
    "enable_activation_checkpointing enable_activation_offloading world_size fsdp_cpu_offload"
).split()
_MODEL = replace(
    MODEL,
    values={
        "num_labels": Key(int, 2, COUNT, help="number of labels; 1 for a regression"),
        "train_pooler": Key(
            bool, True, help="train the first linear of the head too (docs/encoders.md)"
        ),
        **MODEL.values,
    },
    help="a builder of an encoder, such as `kasa_encoder_from_checkpoint` (docs/encoders.md)",
)
_OWN: Schema = {
    "metric": Key(
        Literal["accuracy", "f1", "matthews", "pearson", "spearman"],
        help="the metric that chooses the best epoch; all metrics of the task are reported, of the "
        "best and of the last epoch (docs/encoders.md)",
    ),
    "head_lr": Key(
        float | None,
        None,
        at_least(0, 1000),
        help="highest learning rate of the head; null: `optimizer.lr`",
    ),
    "evaluate_only": Key(
        bool,
        False,
        help="print the metrics of the validation set for the model of `resume_from_checkpoint` or "
        "`adapter_checkpoint`, and stop",
    ),
}


def of_encoders(corda: Schema) -> Schema:
    """The keys of the corda recipes with those of KaSA, without those of decoders alone, and with
    those of encoders.

    Args:
        corda: the schema of the corda recipes.
    """
    adapter = corda["adapter"]
    assert isinstance(adapter, Section)
    keys = {**adapter.keys, "method": _method(), **REGULARIZERS}
    schema = {
        **corda,
        "model": _MODEL,
        "adapter": replace(adapter, keys=keys),
        "dataset_val": OneOrMany(DATASET, help="the rows that each epoch is evaluated on"),
    }
    return {**{name: spec for name, spec in schema.items() if name not in _OF_DECODERS}, **_OWN}


def _method() -> Key:
    """The key `adapter.method`: the methods on unquantized weights."""
    names = ["kasa", *(m.setting for m in METHODS.values() if m.setting and not m.quantized)]
    because = {
        m.setting or m.name: "it has no recipe for encoders"
        for m in METHODS.values()
        if m.quantized
    }
    return Key(
        Literal[tuple(dict.fromkeys(names))],
        "kasa",
        Check("", lambda value: True, because),
        help="how the adapters start: as the methods of kasa_finetune_single_device (kasa, lora) "
        "and of corda_finetune_single_device do",
    )
