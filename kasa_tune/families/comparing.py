"""The text of the configs that compare methods: on the embedded model, and on any checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

_TINY = """\
# Methods side by side on the embedded tiny Llama: what each learned of the task, and what it forgot of the facts. It
# takes about half an hour on a CPU and downloads nothing. Every method is judged at its own best learning rate. The
# command can be repeated: what is finished is skipped.
#
#   tune run compare_methods --config tiny_compare
#   tune run compare_methods --config tiny_compare 'methods=[lora,kasa,dora]' 'seeds=[1,2,3]' output_dir=/tmp/mine
#   tune run compare_methods --config tiny_compare 'overrides=[max_steps=50]' output_dir=/tmp/short

output_dir: /tmp/kasa_tune/tiny_compare

base: tiny_lora
overrides: [model.rank=8, model.alpha=16, max_steps=200]
methods:  # names, and what their runs change
  lora: []
  kasa: [model.truncation_rank=1, model.diag_init=ones]
  milora: []
  corda_kpm:
    - adapter.split=paper
    - "calibration.dataset={_component_: kasa_tune.components.data.completion_dataset, source: json,
      data_files: 'kasa_tune://tiny_world/data/facts_calibration.jsonl', column: text}"
    - calibration.num_samples=1000
    - calibration.max_seq_len=128
    - calibration.batch_size=50
reference: lora
seeds: [1, 2, 3]
learning_rates: [2e-3, 4e-3, 8e-3]
sweep_seeds: 1  # the learning rate is chosen by the first seed; null: by all
metric: val_loss

tasks:
  - _component_: kasa_tune.components.evaluation.QuestionAnswering
    name: texts  # of places that training has not seen
    data_file: kasa_tune://tiny_world/data/task_val.jsonl
    measures: learned
    prompt: "{input}"
    chat: True
    answer: output
    normalization: none
    max_new_tokens: 64
  - _component_: kasa_tune.components.evaluation.QuestionAnswering
    name: facts  # of pretraining
    data_file: kasa_tune://tiny_world/data/facts_test.jsonl
    measures: kept
    prompt: "Q: {question} A:"
    max_new_tokens: 12
batch_size: 64
"""

_ANY = """\
# Methods side by side on your own checkpoint and data. Every method is judged at its own best learning rate. The
# command can be repeated: what is finished is skipped, what was begun goes on.
#
# Copy it, and set the four values of `overrides`:
#   tune cp compare my_compare.yaml
#   tune run compare_methods --config my_compare.yaml

output_dir: /tmp/kasa_tune/compare

base: lora  # any config of a fine-tuning recipe, best that of LoRA
overrides:  # of all methods, as on a command line
  - checkpoint_dir=null  # yours: the folder of the model
  - dataset.data_files=null  # yours: JSON Lines (docs/data.md)
  - "dataset_val={_component_: kasa_tune.components.data.by_columns_dataset, data_files: null}"  # yours: held out
  - run_val_every_n_steps=50
methods:  # names, and what their runs change
  lora: []
  kasa: []
  pissa: []
  corda: ["calibration.dataset=${dataset}"]  # looks at samples of the task
reference: lora
seeds: [1, 2, 3]
learning_rates: [1e-4, 2e-4, 4e-4]
sweep_seeds: 1  # the learning rate is chosen by the first seed; null: by all
metric: val_loss
tasks: null  # what the base and the chosen runs do at the end (docs/evaluation.md)
"""


def comparison_texts() -> Iterator[tuple[str, str]]:
    """Names and texts of the configs of comparisons."""
    yield "tiny_compare", _TINY
    yield "compare", _ANY
