"""Print what a model completes before and after fine-tuning.

    tune run generate_text --config generate adapter_checkpoint=/tmp/run 'prompts=["Once upon a time"]'
    tune run generate_text --config tiny_kasa_generate adapter_checkpoint=/tmp/run

A config without the sections model, tokenizer and checkpointer takes them from the run.
With ``adapter_checkpoint`` (a run's output_dir or one of its checkpoints) the base model and the
tuned one complete every prompt. Without it, only the base model does.

The texts in ``prompts`` are completed as they are. The first ``num_samples`` different prompts of
``dataset`` follow, each shown with its reference. With ``output_dir``, the completions are also
written there, to completions.jsonl.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset
from torchtune import training, utils
from torchtune.modules.peft import disable_adapter
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters.state import load_adapter_state_dict
from kasa_tune.components.adapters.whole import exchanged, whole_parameters
from kasa_tune.components.checkpoints import find_checkpoint
from kasa_tune.components.data import build_tokenizer
from kasa_tune.components.data.building import build_dataset
from kasa_tune.components.data.datasets import prompt_tokens
from kasa_tune.components.data.images import load_images
from kasa_tune.components.evaluation.generation import complete
from kasa_tune.components.exchange.run_config import complete_config
from kasa_tune.components.models.agreement import base_architecture, check_base
from kasa_tune.components.models.base_weights import read_base, weights_fingerprint
from kasa_tune.components.models.loading import build_on_meta, load_base_weights, require_adapters
from kasa_tune.components.quantized.base import linears_in_nf4, load_quantized

log = utils.get_logger("INFO")


class GenerateTextRecipe:
    """Completes prompts with a base model and with its fine-tuned version.

    Args:
        cfg: the checked config.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._device = utils.get_device(cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        training.set_seed(cfg.seed)

    def setup(self, cfg: DictConfig) -> None:
        """Find the adapter, collect the prompts, and load the model."""
        self._adapter = (
            find_checkpoint(Path(cfg.adapter_checkpoint)) if cfg.adapter_checkpoint else None
        )
        self._tokenizer = build_tokenizer(cfg.tokenizer)
        self._prompts = [
            {"prompt": text, "tokens": prompt_tokens(self._tokenizer, text)} for text in cfg.prompts
        ]
        if cfg.dataset:
            dataset = build_dataset(cfg.dataset, self._tokenizer, name="dataset")
            self._prompts += self._prompts_of(dataset, cfg.num_samples)
        self._model = build_on_meta(partial(config.instantiate, cfg.model), dtype=self._dtype)
        require_adapters(self._model, cfg.model._component_)
        longest = cfg.max_new_tokens + max((len(row["tokens"]) for row in self._prompts), default=0)
        check_base(self._model, cfg, longest=longest)
        base = read_base(cfg.checkpointer)
        quantized, self._base_whole = {}, {}
        if self._adapter:
            model = OmegaConf.to_container(cfg.model, resolve=True)
            self._adapter.check_belongs(
                base_fingerprint=weights_fingerprint(base),
                model=model,
                architecture=base_architecture(cfg.checkpointer.checkpoint_dir),
            )
            quantized = linears_in_nf4(self._model, self._adapter)
        load_base_weights(
            self._model,
            base,
            device=self._device,
            adapter_dtype=training.get_dtype(cfg.adapter.dtype, device=self._device),
            without={f"{name}.weight" for name in quantized},
        )
        if self._adapter:
            if quantized:
                load_quantized(self._adapter, quantized, self._device)
            whole = whole_parameters(self._model)  # such as LLaVA's connector
            self._base_whole = {name: each.detach().clone() for name, each in whole.items()}
            load_adapter_state_dict(self._model, self._adapter.adapter)
            # Folded edits are kept on the CPU, but the base's completions need them at every token.
            self._model.to(self._device)

    def _prompts_of(self, dataset: Dataset, num_samples: int) -> list[dict[str, Any]]:
        """Return the first ``num_samples`` different prompts of a dataset. Some datasets, such as
        E2E, have several references for a prompt.
        """
        found: dict[tuple, dict[str, Any]] = {}
        for i in range(len(dataset)):
            row = self._prompt_of(dataset[i])
            found.setdefault((row["prompt"], *row["images"]), row)
            if len(found) == num_samples:
                break
        return list(found.values())

    def _prompt_of(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Split a training sample into the prompt and the response."""
        learned = sample["labels"] != -100
        begin = int(learned.argmax()) + 1
        response = [
            token
            for token in sample["labels"][learned].tolist()
            if token not in self._tokenizer.stop_tokens
        ]
        tokens, images = sample["tokens"][:begin].tolist(), sample.get("images", [])
        if images:  # those of the first question
            vision = self._tokenizer.vision
            images = images[: tokens.count(vision.image_token) // vision.num_features]
        return {
            "prompt": self._tokenizer.decode(tokens),
            "tokens": tokens,
            "images": images,
            "reference": self._tokenizer.decode(response),
        }

    def generate(self, cfg: DictConfig) -> list[dict[str, str]]:
        """Complete every prompt, and return one record for each."""
        records = [
            {key: row[key] for key in ("prompt", "reference") if key in row}
            for row in self._prompts
        ]
        images = [load_images(row.get("images", ())) for row in self._prompts]
        for label in ("base", "tuned") if self._adapter else ("base",):
            with (
                self._as_base() if label == "base" else nullcontext(),
                tqdm(total=len(records), desc=f"Completing ({label})", unit="prompt") as bar,
            ):
                completions = complete(
                    self._model,
                    [row["tokens"] for row in self._prompts],
                    max_new_tokens=cfg.max_new_tokens,
                    stop_tokens=self._tokenizer.stop_tokens,
                    temperature=cfg.temperature,
                    top_k=cfg.top_k,
                    batch_size=cfg.batch_size,
                    seed=cfg.seed,
                    progress=bar.update,
                    images=images,
                )
            for record, tokens in zip(records, completions, strict=True):
                record[label] = self._tokenizer.decode(tokens).strip()
        return records

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        """While active, the model is the base."""
        with disable_adapter(self._model), exchanged(self._model, self._base_whole):
            yield


def print_records(records: list[dict[str, str]]) -> None:
    """Print one paragraph for each prompt."""
    for record in records:
        print()
        for name, text in record.items():
            print(f"{name:>9}: {text.strip()}")


@config.parse(config.GENERATE)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    cfg = complete_config(cfg)
    recipe = GenerateTextRecipe(cfg)
    recipe.setup(cfg)
    records = recipe.generate(cfg)
    print_records(records)
    if cfg.output_dir:
        path = Path(cfg.output_dir) / "completions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(recipe_main())
