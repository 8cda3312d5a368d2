"""The configs that fine-tune encoders to classify: those of KaSA's and CorDA++'s tables on GLUE, and
some on the tiny encoders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kasa_tune.families.headers import paragraph
from kasa_tune.methods import METHODS


@dataclass(frozen=True)
class EncoderModel:
    """An encoder: its name in configs, its title, its folder, its repository, and a note."""

    name: str
    title: str
    folder: str
    repository: str = ""
    builder: str = ""
    note: str = ""


@dataclass(frozen=True)
class GlueTask:
    """A task: its title, its columns, its metric, and the number of labels."""

    title: str
    columns: str
    metric: str
    num_labels: int = 2
    subset: str = ""


@dataclass(frozen=True)
class Trial:
    """The hyper-parameters of a run.

    Args:
        model, task, method: keys of the tables.
        batch, epochs, lr, decay, beta, gamma, length: as the paper names them.
        note: what paper, script and log say differently.
    """

    model: str
    task: str
    batch: int
    epochs: int
    lr: str
    decay: float = 0.0
    beta: str = "1e-4"
    gamma: str = "1e-3"
    length: int = 512
    method: str = "kasa"
    note: str = ""

    @property
    def name(self) -> str:
        """Of its config."""
        task = f"_{self.task}" if self.task else ""
        return f"{self.model}{task}_{self.method}_classify"


_DEBERTA_NOTE = (
    "The repository has its weights as a pickle alone: write them as safetensors with "
    "transformers' save_pretrained. The published runs leave the first linear of the head at its "
    "random start: model.train_pooler=False."
)
ENCODERS = {
    model.name: model
    for model in (
        EncoderModel("tiny_roberta", "The tiny RoBERTa", "kasa_tune://tiny_world/roberta"),
        EncoderModel("tiny_deberta", "The tiny DeBERTaV3", "kasa_tune://tiny_world/deberta"),
        EncoderModel(
            "roberta_base", "RoBERTa base", "/tmp/roberta-base", "FacebookAI/roberta-base",
            "roberta_base",
        ),
        EncoderModel(
            "roberta_large", "RoBERTa large", "/tmp/roberta-large", "FacebookAI/roberta-large",
            "roberta_large",
        ),
        EncoderModel(
            "deberta_v3_base", "DeBERTaV3 base", "/tmp/deberta-v3-base",
            "microsoft/deberta-v3-base", "deberta_v3_base", _DEBERTA_NOTE,
        ),
    )
}  # fmt: skip
_ONE = "{text: sentence, label: label}"
_TWO = "{text: sentence1, text_pair: sentence2, label: label}"
TASKS = {
    "": GlueTask("whether two statements agree", _TWO, "accuracy"),
    "order": GlueTask("whether the words of a sentence are in order", _ONE, "matthews"),
    "sst2": GlueTask("SST-2", _ONE, "accuracy"),
    "mrpc": GlueTask("MRPC", _TWO, "accuracy"),
    "cola": GlueTask("CoLA", _ONE, "matthews"),
    "qnli": GlueTask("QNLI", "{text: question, text_pair: sentence, label: label}", "accuracy"),
    "rte": GlueTask("RTE", _TWO, "accuracy"),
    "stsb": GlueTask("STS-B", _TWO, "pearson", 1),
}
_LOGGED = (
    "beta and gamma are those of the published log, whose result the paper reports. Its table and "
    "script have 2.4e-1 and 2.4e-4."
)
_GUESSED = "The learning rate is KaSA's for this task, because the paper's text does not give one."
_TRIALS = (
    Trial("roberta_base", "sst2", 128, 100, "5e-4"),
    Trial("roberta_base", "mrpc", 32, 100, "4e-4", beta="1e-1"),
    Trial("roberta_base", "cola", 32, 100, "4e-4"),
    Trial("roberta_base", "qnli", 32, 10, "4e-4", beta="1e-2", gamma="1e-5"),
    Trial("roberta_base", "rte", 32, 100, "4e-4", beta="1e-2", gamma="1e-5", note=_LOGGED),
    Trial("roberta_base", "stsb", 32, 40, "3e-4", gamma="1e-5"),
    Trial("roberta_large", "sst2", 64, 10, "4e-4", 0.1, gamma="1e-4"),
    Trial("roberta_large", "mrpc", 32, 10, "3e-4", 0.1, "1e-2", "1e-2"),
    Trial(
        "roberta_large", "cola", 32, 100, "3e-4", beta="1e-2", gamma="1e-5",
        note=f"{_LOGGED} That log trained a full matrix in place of the diagonal.",
    ),
    Trial("roberta_large", "qnli", 8, 20, "4e-4", beta="1e-2"),
    Trial("roberta_large", "rte", 32, 100, "4e-4"),
    Trial("roberta_large", "stsb", 32, 20, "3e-4", beta="1e-3", gamma="1e-2", length=128),
    Trial("deberta_v3_base", "sst2", 128, 10, "5e-4"),
    Trial("deberta_v3_base", "mrpc", 32, 10, "4e-4", beta="1.0", gamma="1.0"),
    Trial("deberta_v3_base", "cola", 32, 100, "4e-4", beta="2.4e-1", gamma="2.4e-4", length=64),
    Trial("deberta_v3_base", "qnli", 16, 20, "4e-4", beta="1e-1", gamma="1e-1"),
    Trial("deberta_v3_base", "rte", 32, 100, "5e-4"),
    Trial("deberta_v3_base", "stsb", 32, 20, "4e-4", beta="1e-1", gamma="1e-1"),
)  # fmt: skip
_LR_OF_CORDA = {"sst2": "5e-4", "qnli": "3e-4", "stsb": "3e-4"}
_TINY = Trial("tiny_roberta", "", 32, 8, "4e-3", length=64)


def trials() -> Iterator[Trial]:
    """Every config for classification."""
    for model in ("tiny_roberta", "tiny_deberta"):
        for method in ("kasa", "lora", "corda"):
            yield replace(_TINY, model=model, method=method)
    yield replace(_TINY, task="order")
    yield from _TRIALS
    for trial in _TRIALS[:6]:
        task = trial.task
        yield Trial(
            "roberta_base",
            task,
            128 if task == "sst2" else 32,
            40 if task in ("qnli", "stsb") else 100,
            _LR_OF_CORDA.get(task, "4e-4"),
            method="corda",
            note=_GUESSED,
        )


def classification_texts() -> Iterator[tuple[str, str]]:
    """Names and texts of the configs for classification."""
    for trial in trials():
        yield trial.name, _text(trial)


def _text(trial: Trial) -> str:
    model, task, method = ENCODERS[trial.model], TASKS[trial.task], METHODS[trial.method]
    linear = method.builders[0]
    built = model.builder or f"encoder_from_checkpoint\n  checkpoint_dir: {model.folder}"
    is_tiny = not model.repository
    return f"""\
{_header(trial, model, task)}

output_dir: /tmp/kasa_tune/{trial.name}

tokenizer:
  _component_: kasa_tune.components.data.encoder_tokenizer
  checkpoint_dir: {model.folder}
  max_seq_len: {trial.length}

model:
  _component_: kasa_tune.components.models.{linear}_{built}
  num_labels: {task.num_labels}{"  # 1: a regression" if task.num_labels == 1 else ""}
  train_pooler: True  # the first linear of the head
  attn_modules: [q_proj, v_proj]
  apply_to_mlp: False
  rank: 8
  alpha: 16
  dropout: 0.0
{_adapter(trial, is_tiny=is_tiny)}
checkpointer:
  _component_: kasa_tune.components.models.EncoderFolder
  checkpoint_dir: {model.folder}
resume_from_checkpoint: False  # True: go on from the newest checkpoint in output_dir

dataset:{_dataset(trial, task, "train")}
dataset_val:{_dataset(trial, task, "validation")}
seed: 42
shuffle: True
batch_size: {trial.batch}

optimizer:
  _component_: torch.optim.AdamW
  lr: {trial.lr}
  weight_decay: {trial.decay}
lr_scheduler:
  _component_: kasa_tune.components.training.linear_schedule
  warmup_ratio: 0.06
epochs: {trial.epochs}
gradient_accumulation_steps: 1
clip_grad_norm: null

keep_last: 2

device: {"cpu" if is_tiny else "cuda"}
dtype: fp32

metric_logger:
  _component_: kasa_tune.components.training.JSONLLogger
  log_dir: ${{output_dir}}
log_every_n_steps: 1

metric: {task.metric}  # chooses the best epoch; best and last are reported
head_lr: null  # of the head; null: as optimizer.lr
"""


def _header(trial: Trial, model: EncoderModel, task: GlueTask) -> str:
    method = METHODS[trial.method]
    sentences = [f"{model.title}, {task.title}, with {method.citation}: {method.summary}."]
    if trial.method == "corda" and model.repository:
        sentences.append(
            "CorDA++ (arXiv 2506.13187): the best of five draws, and a rank of its own for each "
            "layer."
        )
    sentences += [trial.note, model.note]
    lines = [paragraph(" ".join(sentence for sentence in sentences if sentence)), "#"]
    run = f"#   tune run classify_finetune_single_device --config {trial.name}"
    if model.repository:
        lines += [
            "# Download the model:",
            f"#   tune download {model.repository} --output-dir {model.folder}",
        ]
    lines += ["# Train:", run, "# Change any key on the command line:"]
    other = "epochs=2 optimizer.lr=2e-3" if not model.repository else "seed=1 head_lr=1e-3"
    return "\n".join([*lines, f"{run} {other} output_dir=/tmp/kasa_tune/{trial.name}_other"])


def _adapter(trial: Trial, *, is_tiny: bool) -> str:
    """The rest of ``model``, and the sections ``adapter`` and ``calibration``."""
    k = 1 if is_tiny else 8
    if trial.method == "kasa":
        return f"""\
  truncation_rank: {k}
  diag_init: normal

adapter:
  method: kasa
  dtype: fp32
  beta: {trial.beta}
  gamma: {trial.gamma}
  orthogonal_gram: full  # as the published script; thin: as the paper's equation
"""
    if trial.method == "lora":
        return "\nadapter:\n  method: lora\n  dtype: fp32\n"
    return f"""\

adapter:
  method: corda
  mode: ipm  # adapt what the calibration data uses most; kpm: what it uses least
  dtype: fp32
  split: balanced  # how B and A share a component's size; paper: as published
  dynamic_ranks: {not is_tiny}  # CorDA++: True, each layer its own rank

calibration:
  dataset: ${{dataset}}  # texts of the new task
  num_samples: 256
  max_seq_len: {trial.length}
  rounds: {1 if is_tiny else 5}  # CorDA++: 5, of which each layer keeps its best
  batch_size: 8  # texts in one forward pass
"""


def _dataset(trial: Trial, task: GlueTask, split: str) -> str:
    if ENCODERS[trial.model].repository:
        where = f"  source: nyu-mll/glue\n  name: {trial.task}\n  split: {split}"
    else:
        name = f"{trial.task or 'same'}_{'val' if split == 'validation' else split}"
        where = f"  source: json\n  data_files: kasa_tune://tiny_world/data/{name}.jsonl"
        where += "\n  split: train"
    return f"""
  _component_: kasa_tune.components.data.labelled_texts
{where}
  columns: {task.columns}"""
