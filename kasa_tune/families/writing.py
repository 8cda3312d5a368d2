"""The text of a config for fine-tuning: a self-contained YAML file with comments."""

from __future__ import annotations

import textwrap

from kasa_tune.families.combining import MODEL_KEYS, TrainingConfig
from kasa_tune.families.headers import Figures, header
from kasa_tune.families.settings import Calibration, Task
from kasa_tune.families.table import Model

# Keys of `adapter` that one method alone has, and a learning rate that differs from the setting's.
_ADAPTER_KEYS = {
    "eva": (
        "damping: 0.0  # of the covariances; A is exact without it",
        "dynamic_ranks: True  # False: each layer has model.rank",
        "max_rank: {max_rank}  # of one layer; null: no bound",
    ),
    "lora_plus": ("lr_ratio: 16  # learning rate of B over that of A",),
}
_LR = {"lora_plus": "1e-3  # of A; B's is lr_ratio times it"}
_SPLIT_EQUALLY = "balanced  # how B and A share a component's size; paper: as published"
_SPLIT_AS_PUBLISHED = (
    "paper  # how B and A share a component's size: as published; balanced: equally"
)
_MODES = {
    "ipm": "ipm  # adapt what the calibration data uses most; kpm: what it uses least",
    "kpm": "kpm  # adapt what the calibration data uses least; ipm: what it uses most",
}


def training_text(config: TrainingConfig, figures: Figures | None = None) -> str:
    """The YAML file of a config.

    Args:
        config: which one.
        figures: shown in the header; without them the text ends its header at the command that counts them.
    """
    adapter, calibration = _adapter(config), config.calibration
    blocks = [
        header(config, figures),
        _folders(config),
        tokenizer(config.model, config.task),
        model_section(config),
        f"adapter:\n{adapter}" if adapter else "",
        _QUANTIZATION if config.method.quantized else "",
        _calibration(calibration) if calibration else "",
        f"{checkpointer(config.model, '${output_dir}')}\n{_RESUME}",
        _data(config),
        _optimization(config),
        f"save_every_n_steps: {config.setting.save_every}\nkeep_last: 2",
        _device(config),
        _LOGGER + ("\nlog_peak_memory_stats: True" if config.task.device == "cuda" else ""),
        _PROFILER if config.task.device == "cuda" else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _folders(config: TrainingConfig) -> str:
    """Where the model is read from, if that is the user's to say, and where the run writes."""
    if not config.model.is_any:
        return f"output_dir: /tmp/kasa_tune/{config.name}"
    return (
        "checkpoint_dir: null  # yours: the folder of the model\n"
        f"output_dir: /tmp/kasa_tune/${{name_of:${{checkpoint_dir}}}}_{config.name}"
    )


def tokenizer(model: Model, task: Task) -> str:
    """The section ``tokenizer``."""
    family = model.family
    lines = [f"_component_: {family.tokenizer}"]
    lines += [
        f"{key}: {model.checkpoint_dir}/{file}".removesuffix("/")
        for key, file in family.tokenizer_files.items()
    ]
    lines.append(f"max_seq_len: {task.max_seq_len}")
    lines += [f"prompt_template: {family.prompt_template}"] if family.prompt_template else []
    return "tokenizer:\n" + _indented(lines)


def model_section(config: TrainingConfig) -> str:
    """The section ``model``."""
    model, setting, linear = config.model, config.setting, config.method.builders[0]
    lines = [
        f"_component_: kasa_tune.components.models.{linear}_{model.builder or model.name}",
        f"attn_modules: {setting.attn_modules}",
        f"apply_to_mlp: {setting.apply_to_mlp}",
        *([] if model.tied else ["apply_to_output: False"]),
        f"rank: {setting.rank}",
        f"alpha: {setting.alpha}",
        f"dropout: {setting.dropout}",
        *MODEL_KEYS.get(config.method.name, ()),
    ]
    if linear == "kasa":
        lines += [f"truncation_rank: {setting.truncation_rank}", f"diag_init: {setting.diag_init}"]
    lines += [f"{key}: {value}" for key, value in model.sizes.items()]
    return "model:\n" + _indented(lines)


def _adapter(config: TrainingConfig) -> str:
    """The keys of ``adapter``; none for LoRA, for which the defaults do."""
    method, setting = config.method, config.setting
    if method.name == "lora":
        return ""
    lines = [f"method: {method.setting}"] if method.setting else []
    if method.setting == "corda" and method.mode:
        lines.append(f"mode: {_MODES[method.mode]}")
    lines.append("dtype: fp32")
    if method.decomposition and method.split is None:
        published = method.setting == "corda" and method.mode == "kpm"
        lines.append(f"split: {_SPLIT_AS_PUBLISHED if published else _SPLIT_EQUALLY}")
    if method.quantization_iterations:
        lines.append(
            f"quantization_iterations: {method.quantization_iterations}  # times that the start is found; from the "
            "second on, from what quantizing loses"
        )
    if config.has_corda_ranks:
        lines.append(
            "dynamic_ranks: False  # CorDA++: True, each layer its own rank within the budget of model.rank"
        )
    own = _ADAPTER_KEYS.get(method.name, ())
    lines += [line.format(max_rank=2 * setting.rank) for line in own]
    if method.builders[0] == "kasa":
        beta = config.task.betas.get(config.model.name, setting.beta)
        lines += [f"beta: {beta}", f"gamma: {setting.gamma}"]
    return _indented(lines)


_QUANTIZATION = """\
quantization:
  block_size: 64  # weights that share a scale
  scaler_block_size: 256  # scales that share a scale; fewer where a layer's do not divide by it"""


def _calibration(given: Calibration) -> str:
    unit = "samples" if given.concatenate == "False" else "rows"
    return f"""\
calibration:
  dataset:{given.dataset}
  concatenate: {given.concatenate}
  num_samples: {given.num_samples}
  max_seq_len: {given.max_seq_len}
  rounds: {given.rounds}
  batch_size: {given.batch_size}  # {unit} in one forward pass"""


def checkpointer(model: Model, output_dir: str) -> str:
    """The section ``checkpointer``."""
    count = model.num_files
    if not model.family.model_type:
        return f"""\
checkpointer:
  _component_: kasa_tune.components.models.CheckpointFolder
  checkpoint_dir: {model.checkpoint_dir}"""
    if count == 1:
        files = " [model.safetensors]"
    elif count <= 4:
        names = [f"    model-{i:05}-of-{count:05}.safetensors,\n" for i in range(1, count + 1)]
        files = f" [\n{''.join(names)}  ]"
    else:
        pattern = "model-{}-of-{}.safetensors"
        files = f'\n    filename_format: {pattern}\n    max_filename: "{count:05}"'
    return f"""\
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {model.checkpoint_dir}
  checkpoint_files:{files}
  model_type: {model.family.model_type}
  output_dir: {output_dir}"""


_RESUME = "resume_from_checkpoint: False  # True: go on from the newest checkpoint in output_dir"


def _data(config: TrainingConfig) -> str:
    task, size = config.task, config.model.batch_size
    return f"""\
dataset:{task.dataset}
dataset_val:{task.dataset_val}
run_val_every_n_steps: {task.run_val_every_n_steps}
seed: 42
shuffle: True
batch_size: {size}  # times gradient_accumulation_steps: {size * config.accumulation} samples a step"""


def _optimization(config: TrainingConfig) -> str:
    setting, task, chunk = config.setting, config.task, config.model.family.loss_chunk
    schedule, warmup = setting.schedule
    large = "tokens whose logits are alive at once; the vocabulary is large"
    loss = f"\n  chunk_size: {chunk}  # {large}" if chunk else ""
    if setting.label_smoothing:
        loss += f"\n  label_smoothing: {setting.label_smoothing}"
    return f"""\
optimizer:
  _component_: torch.optim.AdamW
  lr: {_LR.get(config.method.name, setting.lr)}
  weight_decay: {setting.weight_decay}
lr_scheduler:
  _component_: {schedule}
  {warmup}
loss:
  _component_: kasa_tune.components.training.ChunkedCrossEntropy{loss}
epochs: {setting.epochs}
max_steps: {task.max_steps}
gradient_accumulation_steps: {config.accumulation}
clip_grad_norm: {task.clip_grad_norm}
compile: False  # True: faster after the first steps"""


def _device(config: TrainingConfig) -> str:
    return f"""\
device: {config.task.device}
dtype: {config.task.dtype}
enable_activation_checkpointing: {config.model.checkpointing}  # True: less memory, more time
enable_activation_offloading: False"""


_LOGGER = """\
metric_logger:
  _component_: kasa_tune.components.training.JSONLLogger
  log_dir: ${output_dir}
log_every_n_steps: 1"""

_PROFILER = """\
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
  output_dir: ${output_dir}/profiler"""


def _indented(lines: list[str]) -> str:
    return textwrap.indent("\n".join(lines), "  ")
