"""The tasks of the shipped configs: their data, the papers' hyper-parameters, and where they run.

It is plain data, as the tables of models and of methods are. Values are YAML, some with the comment that follows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kasa_tune.families.table import COMMON

_SCHEDULES = "kasa_tune.components.training"
_DATASETS = "kasa_tune.components.data"
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
_KASA = Setting(
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
_KASA_COMMONSENSE = replace(
    _KASA,
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
_CORDA = Setting(
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
_TINY = Setting(
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
_STORIES = replace(
    _TINY,
    rank=8,
    alpha=16,
    lr="2e-3",
    schedule=(f"{_SCHEDULES}.cosine_schedule", "num_warmup_steps: 10"),
    epochs=1,
    tried=("max_steps=50 model.rank=16", "rank16"),
)

# arXiv 2412.06071, E2E. The rank is that of the script of LoRA, which the paper follows.
_KASA_E2E = replace(
    _KASA,
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
_PACKED = "\n  packed: False  # True: several samples in one row, faster"
_QUESTIONS = Calibration(
    dataset=f"""  # questions of the knowledge to keep
    _component_: {_DATASETS}.completion_dataset
    source: google-research-datasets/nq_open
    split: train
    column: question""",
    concatenate="True  # one stream of tokens cut into rows of max_seq_len",
    num_samples=256,
    max_seq_len=2048,
    rounds="1  # CorDA++: several, of which each layer keeps its best; these questions fill about two",
    rounds_to_try=2,
)

_INSTRUCTION = Task(
    words="instruction following",
    dataset=f"\n  _component_: {_DATASETS}.alpaca_dataset{_PACKED}",
    kasa=_KASA,
    corda=_CORDA,
    kept=_QUESTIONS,
)
_COMMONSENSE_DATA = "https://github.com/AGI-Edgerunners/LLM-Adapters/raw/main/ft-training_set"

TASKS: Mapping[str, Task] = {
    "instruction": _INSTRUCTION,
    "own": replace(
        _INSTRUCTION,
        words="on your own data",
        dataset=f"""
  _component_: {_DATASETS}.by_columns_dataset
  data_files: null  # yours: JSON Lines with messages, or prompt and completion, or text ... (docs/data.md){_PACKED}""",
        source="The setting is the paper's for instruction following.",
        max_seq_len=2048,
    ),
    "commonsense": replace(
        _INSTRUCTION,
        words="commonsense reasoning",
        suffix="_commonsense",
        preparation=(
            "Fetch the training set of LLM-Adapters:",
            f"  curl -L -o /tmp/commonsense_170k.json {_COMMONSENSE_DATA}/commonsense_170k.json",
        ),
        dataset=f"""
  _component_: {_DATASETS}.commonsense_dataset
  source: json
  data_files: /tmp/commonsense_170k.json
  train_on_input: False  # True: learn the prompt too, as LLM-Adapters' script does
  published_layout: False  # True: its prompt with the indentation and the stray comment of that script{_PACKED}""",
        kasa=_KASA_COMMONSENSE,
        corda=replace(_CORDA, save_every=200),
        source="The paper trains this model in this setting.",
        betas={"llama2_7b": "1e-2"},
    ),
    "gsm8k": replace(
        _INSTRUCTION,
        words="grade-school mathematics (GSM8K)",
        suffix="_gsm8k",
        dataset=f"""
  _component_: {_DATASETS}.gsm8k_dataset
  calculator: True  # False: without the <<48/2=24>> annotations{_PACKED}""",
        kasa=replace(_KASA, epochs=3, save_every=200),
        corda=replace(_CORDA, save_every=20),
        source="The paper gives no setting for it: these are its values for instruction following, for 3 epochs.",
    ),
    "synthesized": replace(
        _INSTRUCTION,
        words="instructions synthesized from a few seeds",
        suffix="_synth",
        preparation=(
            "Synthesize the data of a task first (docs/synthesis.md). The paper's four are summarization,",
            "classification, coding and closed QA, each with a run of its own:",
        ),
        dataset=f"""
  _component_: {_DATASETS}.by_columns_dataset
  data_files: /tmp/kasa_tune/synthesize/rows.jsonl  # of synthesize_data{_PACKED}""",
        methods=("kasa",),
    ),
    "tiny_world": Task(
        words="putting data into words",
        comes_from_papers=False,
        note="It takes a minute or two on a CPU and downloads nothing.",
        dataset=f"""
  _component_: {_DATASETS}.instruct_dataset
  source: json
  data_files: kasa_tune://tiny_world/data/task_train.jsonl{_PACKED}""",
        dataset_val=f"""
  _component_: {_DATASETS}.instruct_dataset
  source: json
  data_files: kasa_tune://tiny_world/data/task_val.jsonl""",
        kasa=_TINY,
        corda=_TINY,
        kept=Calibration(
            dataset=f"""  # the facts to keep
    _component_: {_DATASETS}.completion_dataset
    source: json
    data_files: kasa_tune://tiny_world/data/facts_calibration.jsonl
    column: text""",
            concatenate="False",
            num_samples=1000,
            max_seq_len=128,
            batch_size=50,
        ),
        max_seq_len=256,
        calibration_batch=16,
        max_steps="350",
        clip_grad_norm="1.0",
        run_val_every_n_steps="50",
        device="cpu",
        dtype="fp32",
    ),
    "gpt2_e2e": Task(
        words="describing restaurants (E2E)",
        suffix="_e2e",
        source="The setting is the paper's; docs/gpt2.md says where it and the script that it follows differ.",
        preparation=("Fetch the E2E data and write it as JSON Lines (docs/gpt2.md).",),
        dataset=f"""
  _component_: {_DATASETS}.e2e_dataset
  source: json
  template: "{{mr}}"
  data_files: /tmp/e2e/train.jsonl{_PACKED}""",
        dataset_val=f"""
  _component_: {_DATASETS}.e2e_dataset
  source: json
  template: "{{mr}}"
  data_files: /tmp/e2e/dev.jsonl""",
        kasa=_KASA_E2E,
        corda=_KASA_E2E,
        kept=_QUESTIONS,
        run_val_every_n_steps="1000",
        dtype="fp32",
    ),
    "e2e": Task(
        words="describing restaurants (E2E)",
        comes_from_papers=False,
        note="It takes minutes on a CPU.",
        preparation=(
            "Let KASA_TUNE_DATA name a folder with models/stories260K/hf (in the layout of Hugging Face), datasets/e2e",
            "and, for the knowledge to keep, datasets/tinystories.",
        ),
        dataset=f"""
  _component_: {_DATASETS}.e2e_dataset
  source: json
  data_files: ${{oc.env:KASA_TUNE_DATA}}/datasets/e2e/train_sample.jsonl
  split: train
  detokenize: True""",
        dataset_val=f"""
  _component_: {_DATASETS}.e2e_dataset
  source: json
  data_files: ${{oc.env:KASA_TUNE_DATA}}/datasets/e2e/dev.jsonl
  split: train[:160]""",
        kasa=_STORIES,
        corda=_STORIES,
        kept=Calibration(
            dataset=f"""  # stories, as those that it knows
    _component_: {_DATASETS}.completion_dataset
    source: json
    data_files: ${{oc.env:KASA_TUNE_DATA}}/datasets/tinystories/sample_2MiB.jsonl
    column: text""",
            concatenate="True  # one stream of tokens cut into rows of max_seq_len",
            num_samples=256,
            max_seq_len=512,
            batch_size=8,
            rounds_to_try=2,
        ),
        max_seq_len=384,
        calibration_batch=8,
        max_steps="600",
        clip_grad_norm="1.0",
        run_val_every_n_steps="100",
        device="cpu",
        dtype="fp32",
    ),
}
