"""README.md of an exported adapter or model: what it is, what it came from, how to load and how to prompt it.

Names, paths and settings come from checkpoints and folders of others. They stand here as text and nothing else, see
:mod:`kasa_tune.components.exchange.markdown`; folders of this machine are left out.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from kasa_tune import __version__
from kasa_tune.components.exchange import card_texts as words
from kasa_tune.components.exchange.deviations import Deviations
from kasa_tune.components.exchange.markdown import (
    argument,
    block,
    code,
    dumped,
    is_repository,
    text,
)
from kasa_tune.components.exchange.peft_lora import VLLM_RANKS
from kasa_tune.components.exchange.prompting import Prompting
from kasa_tune.components.exchange.trained_run import TrainedRun

_HYPERPARAMETERS = (
    "model", "adapter", "quantization", "calibration", "optimizer", "lr_scheduler", "epochs", "max_steps", "batch_size",
    "gradient_accumulation_steps", "clip_grad_norm", "seed", "dtype",
)  # fmt: skip
_LIBRARY = {"peft": "peft", "merged": "transformers", "native": "kasa_tune"}
_RELATION = {"peft": "adapter", "merged": "finetune", "native": "adapter"}
_LICENCE = ("license", "license_name", "license_link")  # as the hub spells them


@dataclass(frozen=True)
class Written:
    """What was written, as far as a card tells of it.

    Args:
        folder: that it will be called; its name is the title.
        form: ``peft``, ``merged`` or ``native``.
        base_model: what the user or the base's folder calls it; None: nothing.
        digest: of the base.
        errors: from writing.
        config: of a PEFT adapter, its ``adapter_config.json``.
        prompting: how to prompt, or why that is not known.
    """

    folder: Path
    form: str
    base_model: str | None
    digest: str
    errors: Deviations
    prompting: Prompting | str
    config: Mapping[str, Any] | None = None


def model_card(run: TrainedRun, written: Written) -> str:
    """The card of what was written of a run."""
    base, config = written.base_model, written.config
    named = is_repository(base)
    facts = {
        "front": _front(run, written),
        "title": text(written.folder.name),
        "base": code(base) if base else "not named",
        "base_python": json.dumps(base if base else "<the base>"),
        "base_shell": argument(base) if base else "<the base>",
        "base_word": argument(base) if base else "<the base>",
        "method": text(run.method.citation),
        "fingerprint": code(run.state["base"]),
        "digest": code(written.digest),
        "digest_word": written.digest,
        "step": _trained(run),
        "error": error_sentence(written.errors),
        "version": __version__,
        "dtype": str(run.dtype).removeprefix("torch."),
        "terms": words.TERMS if named else f"{words.TERMS}\n\n{words.NO_BASE}",
        "rank": _rank_sentence(config) if config else "",
        "pattern": words.PATTERN if config and config["rank_pattern"] else "",
        "largest": config["r"] if config else "",
        "largest_served": VLLM_RANKS[-1],
        "data": block(_data(run)),
        "hyperparameters": block(_hyperparameters(run)),
        "prompt": _prompt(written),
    }
    what, load = _kinds(written.form, config)
    if config and load == "peft":
        facts["served"] = next(rank for rank in VLLM_RANKS if rank >= config["r"])
    facts["what"] = Template(words.WHAT[what]).substitute(facts)
    facts["load"] = Template(words.LOAD[load]).substitute(facts).rstrip()
    facts["check"] = Template(words.CHECK).substitute(facts).rstrip()
    if written.form == "merged":
        facts["check"] = "It holds all weights; the base is not needed."
    return Template(words.CARD).substitute(facts)


def error_sentence(errors: Deviations) -> str:
    """The worst layer's error in one line."""
    if not errors or not any(error.of_weight for error in errors.values()):
        return "none"
    worst = errors.worst
    of_updates = [error.of_update for error in errors.values() if error.of_update < float("inf")]
    sentence = f"at most {errors[worst].of_weight:.1e} of a weight's norm ({code(worst)})"
    return sentence + (f", at most {max(of_updates):.1e} of an update's" if of_updates else "")


def licence_of(folder: Path) -> dict[str, str]:
    """What the card in a base's folder says of its licence; nothing where there is none."""
    if not (folder / "README.md").is_file():
        return {}
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(card.split("---", 2)[1]) if card.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(front, dict):
        return {}
    return {
        key: front[key]
        for key in _LICENCE
        if isinstance(front.get(key), str) and len(front[key]) <= 200
    }


def _front(run: TrainedRun, written: Written) -> str:
    """The card's metadata, with the keys that PEFT's and TRL's cards have."""
    front: dict[str, Any] = {}
    relation, tags = _RELATION[written.form], []
    if is_repository(written.base_model):
        front["base_model"] = written.base_model
        tags.append(f"base_model:{relation}:{written.base_model}")
    front |= {"library_name": _LIBRARY[written.form], "pipeline_tag": "text-generation"}
    tags += [run.method.setting or run.method.name]
    if written.form == "peft":
        tags += ["lora", "transformers"]
    front["tags"] = list(dict.fromkeys([*tags, "kasa_tune"]))
    return dumped(front | licence_of(run.checkpoint_dir))


def _kinds(form: str, config: Mapping[str, Any] | None) -> tuple[str, str]:
    """Which words say what it is, and which how to load it."""
    if config and config["use_dora"]:
        return "dora", "dora"
    if config and config["r"] > VLLM_RANKS[-1]:
        return form, "large"
    return form, form


def _trained(run: TrainedRun) -> str:
    if "peft_adapter" in run.config:
        return f"not here: imported from {code(_last_part(run.config['peft_adapter']))}"
    total, start = run.state.get("total_steps"), run.config.get("adapter_checkpoint")
    steps = f"{run.state['step']} steps" + (f" of {text(total)}" if total else "")
    return f"{steps}, on from the adapter in {code(_last_part(start))}" if start else steps


def _last_part(path: Any) -> str:
    """A file's or folder's name without those of this machine's folders around it."""
    return Path(str(path)).name or str(path)


def _data(run: TrainedRun) -> str:
    if not (dataset := run.config.get("dataset")):
        return "of the imported adapter"
    return dumped({"dataset": _without_folders(dataset)})


def _hyperparameters(run: TrainedRun) -> str:
    found = {key: run.config[key] for key in _HYPERPARAMETERS if key in run.config}
    return dumped(_without_folders(found))


def _without_folders(tree: Any) -> Any:
    """Settings with absolute paths cut to their last part."""
    if isinstance(tree, Mapping):
        return {str(key): _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_folders(value) for value in tree]
    if isinstance(tree, str) and tree.startswith(("/", "~", "file:")):
        return _last_part(tree)
    return tree if isinstance(tree, bool | int | float | str | None) else str(tree)


def _rank_sentence(config: Mapping[str, Any]) -> str:
    ranks = {config["r"], *config["rank_pattern"].values()}
    return f"Rank {config['r']}." if len(ranks) == 1 else f"Ranks {min(ranks)} to {max(ranks)}."


def _prompt(written: Written) -> str:
    found = written.prompting
    if written.form == "native":
        return "`generate_text` prompts as training did."
    if isinstance(found, str):
        return Template(words.NO_PROMPT).substitute(why=text(found))
    if found.of_base:
        chat = words.CHAT_BASE
    elif found.chat_template:
        turns = "" if found.turns else ", for one message of the user"
        chat = Template(words.CHAT_OURS).substitute(turns=turns)
    else:
        chat = words.CHAT_NONE
    model = "tuned" if written.form == "peft" else "<this folder>"
    prompt = found.ids if found.text is None else found.text
    request = json.dumps({"model": model, "prompt": prompt, "max_tokens": 128, "temperature": 0})
    template = words.PROMPT_IDS if found.text is None else words.PROMPT
    facts = {"form": block(json.dumps(found.form)), "request": shlex.quote(request), "chat": chat}
    return Template(template).substitute(facts).rstrip()
