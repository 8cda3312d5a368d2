"""Write a trained adapter for PEFT and vLLM, merged into its base model, or in this project's own
format.

    tune run export_adapter --config peft_export adapter_checkpoint=/tmp/run output_dir=/tmp/adapter
    tune run export_adapter --config merged_export adapter_checkpoint=/tmp/run output_dir=/tmp/model dtype=bf16
    tune run export_adapter --config native_export adapter_checkpoint=/tmp/run output_dir=/tmp/adapter

It takes the runs of every fine-tuning recipe. Their checkpoints say which base they were trained
on. Every method ends in  W_eff  =  W0 - E_out E_in + s B diag(d) A. On the base model W0 the
adapter is therefore

    a LoRA  [ s B diag(d) | -E_out ] [ A ; E_in ]  of rank r + k           format: peft (DoRA: with its magnitudes)
    or a weight W_eff                                                      format: merged
    or the factors as they are                                             format: native

The output folder appears when all of it is on the disk. Its README.md says what it is and how to
load it.
"""

import sys
from math import isfinite
from pathlib import Path

import torch
from omegaconf import DictConfig
from torchtune import training

from kasa_tune import config
from kasa_tune.components.exchange.checksums import write_checksums
from kasa_tune.components.exchange.classifier import (
    classifier_card,
    is_classifier,
    write_classifier_merged,
    write_classifier_peft,
)
from kasa_tune.components.exchange.deviations import Deviations
from kasa_tune.components.exchange.markdown import is_repository
from kasa_tune.components.exchange.merged import write_merged
from kasa_tune.components.exchange.model_card import Written, error_sentence, model_card
from kasa_tune.components.exchange.native import write_native
from kasa_tune.components.exchange.new_folder import check_new, check_outside, new_folder
from kasa_tune.components.exchange.peft_lora import write_peft
from kasa_tune.components.exchange.prompting import (
    NoPromptError,
    Prompting,
    prompting_of,
    put_chat_template,
)
from kasa_tune.components.exchange.trained_run import TrainedRun, open_run
from kasa_tune.components.models.agreement import kept_architecture
from kasa_tune.components.models.base_files import read_object

# Formats that each of these keys belongs to. All other keys belong to every format.
ONLY_OF = {
    "rank": ("peft",), "rank_pattern": ("peft",), "tolerance": ("peft",),
    "max_shard_size": ("merged",), "dtype": ("peft", "merged"),
}  # fmt: skip
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
# An error above this share of the weight is printed for its layer. Rounding to bfloat16 gives less.
SHOWN = 1e-2
MOST = 40  # layers that are printed


def check(cfg: DictConfig) -> None:
    """Check the config before anything is read.

    Raises:
        ValueError: a key of another format was set, or the output would lie in the run's folder.
        FileExistsError: output_dir exists.
    """
    output_dir = Path(cfg.output_dir)
    for key, formats in ONLY_OF.items():
        if cfg.format not in formats and cfg[key] != config.EXPORT[key].default:
            raise ValueError(
                f"{key} says nothing about format {cfg.format}: it is of {' and '.join(formats)}."
            )
    if cfg.rank and cfg.rank_pattern:
        raise ValueError(
            "rank gives all layers one rank, rank_pattern each its own: set one of them."
        )
    check_new(output_dir)
    check_outside(output_dir, Path(cfg.adapter_checkpoint), "adapter_checkpoint")


def write(cfg: DictConfig, run: TrainedRun, folder: Path, base_model: str | None) -> Deviations:
    """Write everything but the model card. The result says how far the written weights are from the
    trained ones.
    """
    dtype = training.get_dtype(cfg.dtype, device=torch.device("cpu")) if cfg.dtype else None
    encoder = is_classifier(run)
    match cfg.format:
        case "peft":
            options = {
                "rank": cfg.rank,
                "rank_pattern": cfg.rank_pattern,
                "tolerance": cfg.tolerance,
            }
            options |= {"dtype": dtype} if dtype else {}
            writer = write_classifier_peft if encoder else write_peft
            return writer(run, folder, base_model=base_model, **options)
        case "merged" if encoder:
            return write_classifier_merged(run, folder, dtype=dtype)
        case "merged":
            return write_merged(run, folder, dtype=dtype, max_shard_size=cfg.max_shard_size)
        case "native":
            write_native(run, folder)
            return Deviations()


def name_of_base(run: TrainedRun) -> str | None:
    """Return the repository that ``tune download`` recorded, or None. A local path would mean
    nothing to others.
    """
    note = run.checkpoint_dir / "original_repo_id.json"
    repository = read_object(note).get("repo_id") if note.is_file() else None
    return repository if is_repository(repository) else None


def how_to_prompt(run: TrainedRun) -> Prompting | str:
    """Return the form of the prompts in training, or a sentence that says why it is unknown."""
    try:
        return prompting_of(run.config, run.checkpoint_dir, run.checkpoint)
    except NoPromptError as why:
        return str(why)


def print_errors(errors: Deviations, *, in_nf4: bool) -> None:
    """Print one line for all layers, and one for each layer whose error is more than rounding, the
    worst first. With an NF4 base, every layer that has an error counts.
    """
    least = 0.0 if in_nf4 else SHOWN
    listed = [name for name, error in errors.items() if error.of_weight > least]
    listed.sort(key=lambda name: -errors[name].of_weight)
    for name in listed[:MOST]:
        of_weight, of_update = errors[name]
        told = f"{of_update:.1e} of its update" if isfinite(of_update) else "which has no update"
        print(f"{name:<48} error {of_weight:.1e} of the weight, {told}")
    if len(listed) > MOST:
        print(f"The errors of {len(listed) - MOST:,} other layers are no larger.")
    print(f"Difference from the trained weights: {error_sentence(errors)}.")


@config.parse(config.EXPORT)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    check(cfg)
    output_dir = Path(cfg.output_dir)
    run = open_run(Path(cfg.adapter_checkpoint), checkpoint_dir=cfg.checkpoint_dir)
    base_model, digest = cfg.base_model or name_of_base(run), run.check_base()
    prompting = "" if is_classifier(run) else how_to_prompt(run)
    with new_folder(output_dir) as folder:
        errors = write(cfg, run, folder, base_model)
        if cfg.format == "peft":
            kept = kept_architecture(run.checkpoint_dir)
            write_checksums(folder, PEFT_FILES, base_digest=digest, **kept)
        if cfg.format != "native" and isinstance(prompting, Prompting):
            put_chat_template(folder, prompting)
        settings = folder / "adapter_config.json"
        written = Written(
            output_dir, cfg.format, base_model, digest, errors, prompting,
            config=read_object(settings) if settings.is_file() else None,
        )  # fmt: skip
        card = (
            classifier_card(run, cfg.format, base_model, digest)
            if is_classifier(run)
            else model_card(run, written)
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    if errors:
        print_errors(errors, in_nf4=cfg.format == "peft" and bool(run.quantized))
    print(f"Base weights: SHA-256 {digest}, of every byte.")
    print(f"{run.method.title}, {run.checkpoint.path.name}, as {cfg.format}: {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
