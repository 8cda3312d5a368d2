"""What a task of the shipped configs is made of, and the hyper-parameters that the papers train with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kasa_tune.families.table import COMMON

_SCHEDULES = "kasa_tune.components.training"
_ALL_ATTENTION = "[q_proj, k_proj, v_proj, output_proj]"


@dataclass(frozen=True)
class Setting:
    """The hyper-parameters that one paper trains a task with.

    Args:
        attn_modules, apply_to_mlp: which linears get an adapter.
        rank, alpha, dropout: of each adapter.
        lr: the learning rate.
        schedule: the learning rate's schedule, and its warm-up.
        epochs: passes over the data.
        samples: samples of an optimizer step; None leaves them to the family of the model.
        save_every: optimizer steps between checkpoints.
        truncation_rank, diag_init, beta, gamma: of KaSA alone.
        weight_decay: of the optimizer.
        label_smoothing: share of the target that is spread over the vocabulary; empty leaves the loss without.
        tried: other hyper-parameters to try, as the header shows them, and what ends the name of that run.
    """

    attn_modules: str
    apply_to_mlp: str
    rank: int
    alpha: int
    dropout: float
    lr: str
    schedule: tuple[str, str]
    epochs: int
    save_every: int
    tried: tuple[str, str]
    samples: int | None = None
    truncation_rank: str = (
        "null  # smallest singular triplets taken out of each weight; null: as many as rank"
    )
    diag_init: str = "normal  # as published; ones: starts as LoRA does"
    beta: str = "1e-4"
    gamma: str = "1e-3"
    weight_decay: str = "0.0"
    label_smoothing: str = ""


@dataclass(frozen=True)
class Calibration:
    """The data that a calibrated method looks at before training; arguments as the keys of that section."""

    dataset: str
    concatenate: str
    num_samples: int
    max_seq_len: int
    batch_size: int = 1
    rounds: str = "1"
    rounds_to_try: int | None = None


@dataclass(frozen=True)
class Task:
    """What a config fine-tunes for.

    Args:
        words: what the header calls it.
        dataset, dataset_val: these sections of a config, without their first line.
        kasa, corda: the settings of KaSA and LoRA, and of the methods that start from the weights.
        kept: the calibration on the knowledge to keep.
        suffix: what follows the model's name in the names of configs.
        source: what the header says of the setting of the KaSA config; by default that it is the paper's.
        comes_from_papers: whether the settings are papers'.
        preparation: lines of the header on data that must be fetched, or on what a run needs.
        note: the last sentence of the header's paragraph.
        betas: KaSA's beta, for models that have their own.
        methods: that have configs for it, where it is not the first task of a model.
        max_seq_len, calibration_batch: tokens of the longest row, and rows in one forward pass of a calibration.
        max_steps, clip_grad_norm, run_val_every_n_steps, device, dtype: as these keys.
    """

    words: str
    dataset: str
    kasa: Setting
    corda: Setting
    kept: Calibration
    dataset_val: str = " null"
    suffix: str = ""
    source: str = ""
    comes_from_papers: bool = True
    preparation: tuple[str, ...] = ()
    note: str = ""
    betas: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = COMMON
    max_seq_len: int = 512
    calibration_batch: int = 1
    max_steps: str = "null"
    clip_grad_norm: str = "null"
    run_val_every_n_steps: str = "null"
    device: str = "cuda"
    dtype: str = "bf16"


# arXiv 2412.06071, instruction following.
KASA = Setting(
    attn_modules="[q_proj, v_proj]",
    apply_to_mlp="False",
    rank=8,
    alpha=16,
    dropout=0.05,
    lr="2e-4",
    schedule=(f"{_SCHEDULES}.cosine_schedule", "warmup_ratio: 0.1"),
    epochs=1,
    save_every=500,
    tried=("model.rank=16 model.alpha=32", "rank16"),
)
# arXiv 2412.06071, commonsense reasoning.
KASA_COMMONSENSE = replace(
    KASA,
    attn_modules="[q_proj, k_proj, v_proj]",
    apply_to_mlp="[w2, w3]  # down and up projection",
    rank=32,
    alpha=64,
    lr="3e-4",
    schedule=(f"{_SCHEDULES}.linear_schedule", "num_warmup_steps: 100"),
    epochs=3,
    save_every=1000,
    tried=("optimizer.lr=1e-4 epochs=1", "short"),
)
# arXiv 2406.05223, every task.
CORDA = Setting(
    attn_modules=_ALL_ATTENTION,
    apply_to_mlp="True",
    rank=128,
    alpha=128,
    dropout=0.0,
    lr="2e-5",
    schedule=(f"{_SCHEDULES}.cosine_schedule", "warmup_ratio: 0.03"),
    epochs=1,
    samples=128,
    save_every=100,
    tried=("model.rank=32 model.alpha=32", "rank32"),
)
TINY = Setting(
    attn_modules=_ALL_ATTENTION,
    apply_to_mlp="True",
    rank=16,
    alpha=32,
    dropout=0.0,
    lr="4e-3",
    schedule=(f"{_SCHEDULES}.cosine_schedule", "warmup_ratio: 0.1"),
    epochs=4,
    save_every=100,
    tried=("model.rank=4 optimizer.lr=1e-3", "rank4"),
    truncation_rank="1  # smallest singular triplets taken out of each weight; null: as many as rank",
    diag_init="ones  # starts as LoRA does; normal: as published",
)
STORIES = replace(
    TINY,
    rank=8,
    alpha=16,
    lr="2e-3",
    schedule=(f"{_SCHEDULES}.cosine_schedule", "num_warmup_steps: 10"),
    epochs=1,
    tried=("max_steps=50 model.rank=16", "rank16"),
)

# arXiv 2412.06071, E2E. The rank is that of the script of LoRA, which the paper follows.
KASA_E2E = replace(
    KASA,
    rank=4,
    alpha=32,
    dropout=0.1,
    schedule=(f"{_SCHEDULES}.linear_schedule", "num_warmup_steps: 500"),
    epochs=5,
    samples=8,
    save_every=1000,
    tried=("model.base_dropout=True", "base_dropout"),
    weight_decay="0.01",
    label_smoothing="0.1",
)
