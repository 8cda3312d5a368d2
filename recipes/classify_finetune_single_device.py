"""Fine-tune an encoder (RoBERTa, BERT, DeBERTaV3) to classify texts, or to score them, on one device.

    tune run classify_finetune_single_device --config tiny_roberta_kasa_classify
    tune cp classify_finetune_single_device my_classifier.py && tune run my_classifier.py --config my.yaml

The algorithm, for KaSA, LoRA, CorDA and their relatives (adapter.method):

    start the adapters as their method says; draw the head anew
    for every batch:               z  =  head(encoder(texts)[first token])
                                   L  =  cross-entropy, or (z - score)^2 with one label
                                         + beta * mean |d|^2 + gamma * mean (|B'B - I| + |AA' - I|)     KaSA
                                   (adapters, head)  <-  AdamW, each at its own rate
    after every epoch:             the metrics of the validation set
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F
from torchtune import training, utils
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters import (
    adapter_linears,
    kasa_regularization,
    load_adapter_state_dict,
    lora_plus_groups,
)
from kasa_tune.components.checkpoints import run_lock, starting_checkpoint
from kasa_tune.components.corda import (
    TextCalibrator,
    Wanted,
    decompose,
    open_cache,
    write_decomposition,
)
from kasa_tune.components.data import ClassificationData, build_tokenizer
from kasa_tune.components.evaluation.classification import check_metric, score
from kasa_tune.components.linalg import split_component
from kasa_tune.components.models.base_weights import open_base
from kasa_tune.components.models.encoder_folder import fit_tokenizer, take_head
from kasa_tune.components.models.loading import load_base_weights
from kasa_tune.components.training import (
    Steps,
    build_classifier,
    check_optimizer,
    report_without_rows,
)
from kasa_tune.components.training.epoch_scores import EpochScores
from kasa_tune.methods import method_of

log = utils.get_logger("INFO")


class ClassifyFinetuneRecipeSingleDevice(FTRecipeInterface):
    """Fine-tuning of a classifier or a regression on a CPU or one GPU. Runs resume exactly.

    Args:
        cfg: the checked config; docs/encoders.md describes its keys.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._device = utils.get_device("cpu" if cfg.dry_run else cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._adapter_dtype = training.get_dtype(cfg.adapter.dtype, device=self._device)
        self._method = method_of(cfg.adapter)
        training.set_seed(cfg.seed)

    def setup(self, cfg: DictConfig) -> None:
        """Set up the run. The checks that can fail quickly come before any weight is read."""
        if cfg.dry_run:
            model = build_classifier(cfg, dtype=self._dtype)
            print(*report_without_rows(cfg, model, loss=None), sep="\n")
            return
        self._checkpoint = starting_checkpoint(cfg)
        self._model = build_classifier(cfg, dtype=self._dtype)
        self._linears = dict(adapter_linears(self._model))
        self._num_labels = self._model.head.out_proj.out_features
        check_metric(cfg.metric, self._num_labels)
        check_optimizer(partial(config.instantiate, cfg.optimizer), self._model, device=cfg.device)
        tokenizer = build_tokenizer(cfg.tokenizer, longest=self._model.max_seq_len)
        fit_tokenizer(self._model, tokenizer)
        self._data = ClassificationData(
            cfg,
            tokenizer,
            num_labels=self._num_labels,
            vocab_size=self._model.tok_embeddings.num_embeddings,
        )
        self._calibrator = None
        if self._method.calibrated and not self._checkpoint:
            self._calibrator = TextCalibrator(cfg, tokenizer, self._model, device=self._device)
        self._fingerprints = {"data": self._data.fingerprint}
        if self._checkpoint:
            self._checkpoint.check_data(self._data.fingerprint)
        self._setup_weights(cfg)
        groups = lora_plus_groups(
            self._model, cfg.optimizer.get("lr"), cfg.adapter.lr_ratio, head_lr=cfg.head_lr
        )
        self._optimizer = config.instantiate(cfg.optimizer, groups)
        self._lr_scheduler = config.instantiate(
            cfg.lr_scheduler, self._optimizer, num_training_steps=self._data.total_steps
        )
        self.steps = Steps(
            cfg,
            model=self._model,
            data=self._data,
            loss_sum=self._loss_sum,
            optimizer=self._optimizer,
            lr_scheduler=self._lr_scheduler,
            checkpoint=self._checkpoint,
            fingerprints=self._fingerprints,
            device=self._device,
            ignore_index=self._data.ignore_index,
        )

    def _setup_weights(self, cfg: DictConfig) -> None:
        """Read the base weights. Load adapters and head from a checkpoint, or start them."""
        base, fingerprints = open_base(cfg, self._checkpoint)
        self._fingerprints |= fingerprints
        load_base_weights(self._model, base, device=self._device, adapter_dtype=self._adapter_dtype)
        del base
        if self._checkpoint:
            load_adapter_state_dict(self._model, self._checkpoint.adapter)
            return
        take_head(self._model.head, cfg.checkpointer.checkpoint_dir)
        with run_lock(Path(cfg.output_dir) / "checkpoints"):  # two runs must not write here at once
            self._start_adapters(cfg)

    def _start_adapters(self, cfg: DictConfig) -> None:
        """Start every adapter: KaSA and LoRA at zero, the others from a part of their weight."""
        started, method = time.perf_counter(), self._method
        if method.decomposition is None:
            for linear in self._linears.values():
                linear.initialize()
            return
        digest = self._calibrator.digest if self._calibrator else None
        base = self._fingerprints["base"]
        cache = open_cache(cfg, method, base=base, layers=self._linears, data=digest)
        # `decompose` calibrates once, or twice for CorDA++: first to choose covariances and ranks.
        components, spectra = decompose(
            self._linears,
            self._covariances,
            cache,
            method=method,
            options={**cfg.adapter, **cfg.calibration},
        )
        for name, linear in self._linears.items():
            component = components[name].to(self._device)
            split = method.split or cfg.adapter.split
            linear.start_from(split_component(component, linear.scaling, split))
        report = Path(cfg.output_dir) / "decomposition.json"
        write_decomposition(report, components, spectra, mode=method.mode)
        log.info(f"Adapters started in {time.perf_counter() - started:.1f} s.")

    def _covariances(self, wanted: Wanted, title: str) -> Iterator[tuple]:
        """Yield layers with the same input, the round, and the covariance ``(d_in, d_in)``."""
        if self._calibrator:
            return self._calibrator.covariances(wanted, title)
        return (([name], 0, None) for name in tqdm(self._linears, title, unit="layer"))

    def _loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        scores = self._model(batch["tokens"]).float()  # [b, n]
        labels = batch["labels"].to(self._device, non_blocking=True)  # [b]
        if self._num_labels == 1:
            return F.mse_loss(scores[:, 0], labels, reduction="sum")
        return F.cross_entropy(scores, labels, reduction="sum")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compute the metrics of the validation set."""
        self._model.eval()
        scores, labels = [], []
        for batch in tqdm(self._data.validation(), "Evaluating", unit="batch", leave=False):
            scores.append(self._model(batch["tokens"].to(self._device)).double().cpu().numpy())
            labels.append(batch["labels"].numpy())
        self._model.train()
        return score(np.concatenate(scores), np.concatenate(labels))

    def train(self, cfg: DictConfig) -> int:
        """Train until the end or a stop signal, and return the exit status."""
        adapter = cfg.adapter
        options = {key: adapter[key] for key in ("orthogonal_gram", "reduction")}
        linears = list(self._linears.values())
        epochs = EpochScores(Path(cfg.output_dir), cfg.metric, steps_done=self.steps.step)
        with self.steps as steps:
            for step in steps:
                for batch in step.batches:
                    loss = self._loss_sum(batch) / step.num_tokens  # of texts, here
                    loss.backward()
                    step.add_loss(loss)
                if self._method.builders == ("kasa",):
                    l2, l3 = kasa_regularization(linears, **options)
                    (adapter.beta * l2 + adapter.gamma * l3).backward()
                    step.log(l2=l2, l3=l3)
                step.apply(self._optimizer, self._lr_scheduler, clip_grad_norm=cfg.clip_grad_norm)
                ends = steps.step % self._data.steps_per_epoch == 0
                if ends or steps.step == self._data.total_steps:
                    found = self.evaluate()
                    steps.phases.done("validation")
                    epochs.add(steps.step, steps.epoch + 1, found)
                    step.metrics |= {f"val_{name}": value for name, value in found.items()}
        epochs.report()
        return steps.exit_status


@config.parse(config.CLASSIFY)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = ClassifyFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    if cfg.dry_run:
        return 0
    if cfg.evaluate_only:
        for name, value in recipe.evaluate().items():
            print(f"{name}: {value:.4f}")
        return 0
    return recipe.train(cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
