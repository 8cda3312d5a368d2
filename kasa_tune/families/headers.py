"""The comments above a config's first key: what it is, how it is run, and what a run takes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from kasa_tune.families.combining import TrainingConfig, generation_of
from kasa_tune.families.table import Model
from kasa_tune.families.tasks import TASKS

# What a header shows besides: what for, the overrides, what ends the name of that run. `{rounds}` is filled in.
_VARIANTS = {
    "eva": (
        "One rank for all layers:",
        "adapter.dynamic_ranks=False adapter.max_rank=null",
        "one_rank",
    ),
    "lora_plus": ("Let B learn 4 times as fast as A:", "adapter.lr_ratio=4", "ratio4"),
}
_COUNT = "Count parameters and memory, which needs the tokenizer and the data but no weights"
_COUNT_ANY = "Count parameters and memory, which needs no weights"
_PLUS = "CorDA++ (arXiv 2506.13187), {draws}a rank of its own for each layer:"
GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 141, 192)  # GB of memory that GPUs are sold with


@dataclass(frozen=True)
class Figures:
    """What a dry run counts.

    Args:
        parameters: how many are trained.
        step: bytes of an optimizer step.
        set_up: bytes that the adapters' start takes at most; 0 where they start without a look at weights or data.
        base_weights: bytes of the frozen weights.
    """

    parameters: int
    step: int
    set_up: int
    base_weights: int


def paragraph(text: str, indent: str = "# ", width: int = 120) -> str:
    """A comment of as many lines as it takes; lines after the first are indented as the text of the first."""
    hanging = "#" + " " * (len(indent) - 1)
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=hanging, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def header(config: TrainingConfig, figures: Figures | None) -> str:
    model, task, method = config.model, config.task, config.method
    sentences = [
        f"{model.title}, {task.words} with {method.citation}: {method.summary}.",
        _relation(config),
        task.note,
    ]
    lines = [paragraph(" ".join(sentence for sentence in sentences if sentence)), "#"]
    if model.repository:
        terms = " (its licence must be accepted on huggingface.co first; then your token)"
        lines += [f"# Download the model{terms if model.family.gated else ''}:"]
        lines += [f"#   {_download(model)}"]
    lines += [f"# {line}" for line in task.preparation]
    run = f"#   tune run {config.recipe} --config {config.name}{' ' * model.is_any}"
    if model.is_any:
        lines += ["# Two values are yours: the folder of the model, and the data."]
        run += "checkpoint_dir=/models/Qwen3-8B dataset.data_files=/data/mine.jsonl"
    lines += ["# Train:", run, "# Change any key on the command line:"]
    lines += [f"{run} {overrides}" for overrides in _overrides(config)]
    for purpose, overrides, ending in _variants(config):
        lines += [f"# {purpose}", f"{run} {overrides} output_dir={_run_folder(config, ending)}"]
    if not model.repository:
        lines += _afterwards(config)
    lines += [f"# {_COUNT_ANY if model.is_any else _COUNT}:"]
    lines += [f"{run} dry_run=true"]
    if figures:
        lines.append(paragraph(_counted(config, figures), indent="#   -> "))
    return "\n".join(lines)


def _relation(config: TrainingConfig) -> str:
    """Whose hyper-parameters these are."""
    method, setting = config.method, config.setting
    if method.name == "kasa" and not config.task.comes_from_papers:
        return ""
    if method.name == "kasa":
        trained = "The paper trains this model in this setting."
        return config.task.source or (
            trained if config.model.in_kasa_paper else "The setting is the paper's."
        )
    if not config.task.comes_from_papers or (setting is config.task.kasa and _has_kasa(config)):
        return f"All else is as in {_beside(config, 'kasa')}."
    if method.setting == "corda":
        return "The hyper-parameters are the paper's."
    if not _has_kasa(config):
        return f"All else is as in {_beside(config, 'corda_kpm')}."
    if method.name == "qcorda":
        return "The hyper-parameters are those of CorDA's paper (arXiv 2406.05223)."
    return f"All else is as in {_beside(config, 'qcorda' if method.quantized else 'corda')}."


def _has_kasa(config: TrainingConfig) -> bool:
    """Whether KaSA has a config for this model and this task."""
    first = config.task is TASKS[config.model.tasks[0]]
    return "kasa" in (config.model.methods if first else config.task.methods)


def _beside(config: TrainingConfig, method: str) -> str:
    """The name of the config of another method."""
    return f"{config.prefix}_{method}".lstrip("_")


def _download(model: Model) -> str:
    """The command that fetches a model."""
    parts = [f"tune download {model.repository} --output-dir {model.checkpoint_dir}"]
    parts += [f'--ignore-patterns "{model.family.ignored}"'] if model.family.ignored else []
    parts += ["--hf-token <HF_TOKEN>"] if model.family.gated else []
    return " ".join(parts)


def _overrides(config: TrainingConfig) -> Iterator[str]:
    size, steps = config.model.batch_size, config.accumulation
    if size == 1:  # what does not fit with two rows
        yield "enable_activation_offloading=True tokenizer.max_seq_len=256"
    elif steps > 1:
        yield f"batch_size={2 * size} gradient_accumulation_steps={steps // 2}"
    overrides, ending = config.setting.tried
    yield f"{overrides} output_dir={_run_folder(config, ending)}"


def _variants(config: TrainingConfig) -> Iterator[tuple[str, str, str]]:
    if config.has_corda_ranks and config.calibration:
        rounds = config.calibration.rounds_to_try
        draws = "the best of several draws and " if rounds else ""
        overrides = [f"calibration.rounds={rounds}"] if rounds else []
        ranks = " ".join([*overrides, "adapter.dynamic_ranks=True"])
        yield _PLUS.format(draws=draws), ranks, "plus"
    if variant := _VARIANTS.get(config.method.name):
        yield variant


def _run_folder(config: TrainingConfig, ending: str) -> str:
    return f"/tmp/kasa_tune/{config.name}_{ending}"


def _afterwards(config: TrainingConfig) -> list[str]:
    """How to see what was learnt, where a config for that is shipped."""
    if config.model.is_any:
        folder = f"/tmp/kasa_tune/Qwen3-8B_{config.name}"
        return [
            "# Let it write, draw its curves, and export it:",
            f"#   tune run generate_text --config generate adapter_checkpoint={folder} "
            "'prompts=[\"Hello.\"]'",
            f"#   tune run report_run --config report run={folder}",
            f"#   tune run export_adapter --config peft_export adapter_checkpoint={folder}",
        ]
    given = generation_of(config)
    if given is None:
        return []
    name, overrides = given
    lines = ["# Let it write, and draw its curves:"]
    lines.append(" ".join(["#   tune run generate_text --config", name, *overrides]))
    return [*lines, f"#   tune run report_run --config {config.name}"]


def _counted(config: TrainingConfig, figures: Figures) -> str:
    """What a dry run counts, and the smallest GPU that has it."""
    rows = config.model.batch_size
    gib = {name: size / 2**30 for name, size in vars(figures).items()}
    text = (
        f"{figures.parameters:,} parameters to train; counted for a step of {rows} row{'s' * (rows > 1)} of "
        f"{config.task.max_seq_len} tokens: {gib['step']:.1f} GiB"
    )
    if figures.set_up > figures.step:
        text += f", and {gib['set_up']:.1f} to start the adapters"
    if max(figures.step, figures.set_up) <= GPUS[-3] * 2**30:
        return f"{text}, so a GPU with {gpu(figures)} GB."
    return (
        f"{text}. Of these {gib['base_weights']:.1f} GiB are base weights: a single GPU must have {gpu(figures)} GB, "
        "and the host must have as much to load them."
    )


def gpu(figures: Figures) -> int:
    """The smallest of GPUS that has what is counted and some to spare.

    Kernels' temporaries and the allocator's slack are not counted: 15 % of the memory is left for them, 6 GiB at most.
    """
    needed = max(figures.step, figures.set_up) / 2**30
    return next(size for size in GPUS if needed + min(0.15 * size, 6) <= size)
