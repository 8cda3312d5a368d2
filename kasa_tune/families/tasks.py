"""The tasks of the shipped configs: their data, the papers' hyper-parameters, and where they run.

It is plain data, as the tables of models and of methods are. Values are YAML, some with the comment that follows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kasa_tune.families.settings import (
    CORDA,
    KASA,
    KASA_COMMONSENSE,
    KASA_E2E,
    STORIES,
    TINY,
    Calibration,
    Task,
)
from kasa_tune.families.visual_tasks import VISUAL_TASKS

_DATASETS = "kasa_tune.components.data"
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
    kasa=KASA,
    corda=CORDA,
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
        kasa=KASA_COMMONSENSE,
        corda=replace(CORDA, save_every=200),
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
        kasa=replace(KASA, epochs=3, save_every=200),
        corda=replace(CORDA, save_every=20),
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
        kasa=TINY,
        corda=TINY,
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
    **VISUAL_TASKS,
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
        kasa=KASA_E2E,
        corda=KASA_E2E,
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
        kasa=STORIES,
        corda=STORIES,
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
