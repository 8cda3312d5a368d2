"""README.md of an exported adapter or model: what it is, what it came from, how to load it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from string import Template

from omegaconf import OmegaConf

from kasa_tune import __version__
from kasa_tune.components.exchange.deviations import Deviations
from kasa_tune.components.exchange.peft_lora import VLLM_RANKS
from kasa_tune.components.exchange.trained_run import TrainedRun

_HYPERPARAMETERS = (
    "model", "adapter", "quantization", "calibration", "optimizer", "lr_scheduler", "epochs", "max_steps", "batch_size",
    "gradient_accumulation_steps", "clip_grad_norm", "seed", "dtype",
)  # fmt: skip

_CARD = Template("""---
base_model: $base_json
library_name: $library
tags: [$tags]
---

# $title

$what

| | |
|---|---|
| method | $method |
| base model | `$base` |
| base weights | `$fingerprint` (SHA-256 over names, shapes and samples of every tensor) |
| trained | $step |
| error | $error |
| written by | kasa_tune $version |

The terms of the base model apply to this one too.

## Load

$load
## Data

    $data

## Hyper-parameters

    $hyperparameters
""")

_WHAT = {
    "peft": "A plain LoRA on the unchanged base model: the update that was trained and what the method took out of the "
    "weights, together. $rank",
    "merged": "The base model with the trained adapter merged in.",
    "native": "The adapter by itself, update and edit, as the recipes of kasa_tune use it.",
}
_LOAD = {
    "peft": """    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained($base_json)
    model = PeftModel.from_pretrained(model, "<this folder>")

or

$vllm""",
    "merged": """    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("<this folder>")

or

    vllm serve <this folder>
""",
    "native": """    tune run generate_text --config <one with this model> adapter_checkpoint=<this folder>
""",
}
_VLLM = """    vllm serve $base_quoted --enable-lora --max-lora-rank $served --lora-modules tuned=<this folder>
"""
_NO_VLLM = "vLLM does not read $why; export this adapter merged for it.\n"


def model_card(
    run: TrainedRun,
    folder: Path,
    form: str,
    *,
    base_model: str,
    errors: Deviations,
    config: dict | None = None,
) -> str:
    """The card of what was written.

    Args:
        run: what was exported.
        folder: that it will be called; its name is the title.
        form: ``peft``, ``merged`` or ``native``.
        base_model: repository or path of the base.
        errors: from writing.
        config: of a PEFT adapter, its ``adapter_config.json``.
    """
    facts = {
        "title": folder.name,
        "base": base_model,
        "base_json": json.dumps(base_model),
        "base_quoted": shlex.quote(base_model),
        "library": {"peft": "peft", "merged": "transformers", "native": "kasa_tune"}[form],
        "tags": ", ".join(
            dict.fromkeys(
                [run.method.setting or run.method.name, *(["lora"] if form == "peft" else [])]
            )
        ),
        "method": run.method.citation,
        "fingerprint": run.state["base"],
        "step": _trained(run),
        "error": error_sentence(errors),
        "version": __version__,
        "data": _yaml({"dataset": run.config["dataset"]})
        if run.config.get("dataset")
        else "of the imported adapter",
        "hyperparameters": _yaml(
            {key: run.config[key] for key in _HYPERPARAMETERS if key in run.config}
        ),
        "rank": _rank_sentence(config) if config else "",
    }
    facts["vllm"] = Template(_vllm(config)).substitute(facts, **_served(config)) if config else ""
    facts["what"], facts["load"] = (
        Template(texts[form]).substitute(facts) for texts in (_WHAT, _LOAD)
    )
    return _CARD.substitute(facts)


def error_sentence(errors: Deviations) -> str:
    """The worst layer's error in one line."""
    if not errors or not any(error.of_weight for error in errors.values()):
        return "none"
    worst = errors.worst
    of_updates = [error.of_update for error in errors.values() if error.of_update < float("inf")]
    sentence = f"at most {errors[worst].of_weight:.1e} of a weight's norm (`{worst}`)"
    return sentence + (f", at most {max(of_updates):.1e} of an update's" if of_updates else "")


def _trained(run: TrainedRun) -> str:
    if "peft_adapter" in run.config:
        return f"not here: imported from `{run.config['peft_adapter']}`"
    total, start = run.state.get("total_steps"), run.config.get("adapter_checkpoint")
    steps = f"{run.state['step']} steps" + (f" of {total}" if total else "")
    return f"{steps}, on from the adapter in `{start}`" if start else steps


def _yaml(tree: dict) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(tree)).rstrip().replace("\n", "\n    ")


def _rank_sentence(config: dict) -> str:
    ranks = {config["r"], *config["rank_pattern"].values()}
    return f"Rank {config['r']}." if len(ranks) == 1 else f"Ranks {min(ranks)} to {max(ranks)}."


def _largest(config: dict) -> int:
    return max([config["r"], *config["rank_pattern"].values()])


def _vllm(config: dict) -> str:
    return _VLLM if not config["use_dora"] and _largest(config) <= VLLM_RANKS[-1] else _NO_VLLM


def _served(config: dict) -> dict[str, object]:
    """The vLLM option a rank takes, or why there is none."""
    if config["use_dora"]:
        return {"why": "DoRA's magnitudes"}
    rank = _largest(config)
    if rank > VLLM_RANKS[-1]:
        return {"why": f"ranks above {VLLM_RANKS[-1]} (this one has {rank})"}
    return {"served": next(known for known in VLLM_RANKS if known >= rank)}
