"""Fine-tune an encoder (RoBERTa, BERT, DeBERTaV3) to classify texts, or to score them, on several
devices: fully sharded data parallel (FSDP2).

    tune run --nproc_per_node 2 classify_finetune_distributed --config tiny_roberta_kasa_classify
    tune cp classify_finetune_distributed mine.py && tune run --nproc_per_node 8 mine.py --config my.yaml

The algorithm, for KaSA, LoRA, CorDA and their relatives (adapter.method):

    start the adapters as their method says; draw the head anew
    for every batch:               z  =  head(encoder(texts)[first token])
                                   L  =  cross-entropy, or (z - score)^2 with one label
                                         + beta * mean |d|^2 + gamma * mean (|B'B - I| + |AA' - I|)     KaSA
                                   (adapters, head)  <-  AdamW, each at its own rate
    after every epoch:             the metrics of the validation set, of which each process has its share

Each weight is decomposed by one process for all. Checkpoints have the same form as on one device.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune import training, utils
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters import (
    adapter_linears,
    check_adapter_fits,
    kasa_regularization,
    load_adapter,
    load_whole,
    lora_plus_groups,
)
from kasa_tune.components.checkpoints import starting_checkpoint
from kasa_tune.components.corda import (
    TextCalibrator,
    Wanted,
    add_up,
    decompose,
    open_cache,
    write_decomposition,
)
from kasa_tune.components.data import ClassificationData, build_tokenizer, tensors_digest, versions
from kasa_tune.components.evaluation.classification import check_metric, score
from kasa_tune.components.linalg import LowRank, smallest_triplets, split_component
from kasa_tune.components.models.base_weights import SharedReading, open_base
from kasa_tune.components.models.encoder_folder import fit_tokenizer, take_head
from kasa_tune.components.models.loading import (
    block_linears,
    blocks_of,
    load_base_weights,
    put_weight,
    read_tensor,
    weights_loaded,
)
from kasa_tune.components.processes import World, distribute_jobs, shard
from kasa_tune.components.training import Phases, Steps, build_classifier, check_optimizer
from kasa_tune.components.training.epoch_scores import EpochScores
from kasa_tune.methods import method_of

log = utils.get_logger("INFO")


class ClassifyFinetuneRecipeDistributed(FTRecipeInterface):
    """Fine-tuning of a classifier or a regression on processes that each have a part of every weight.

    Args:
        cfg: the checked config; docs/encoders.md describes its keys.
    """

    def __init__(self, cfg: DictConfig) -> None:
        if cfg.dry_run:
            raise ValueError("dry_run: classify_finetune_single_device counts the bytes.")
        self._phases = Phases()
        training.set_seed(cfg.seed)  # the same in all processes until adapters and head start
        options = {"timeout": cfg.timeout, "shards": cfg.data_parallel_shard_dim}
        self._world = World.join(cfg.device, **options)
        self._device = self._world.device
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._adapter_dtype = training.get_dtype(cfg.adapter.dtype, device=self._device)
        self._method, self._calibrator = method_of(cfg.adapter), None
        self._is_kasa = self._method.builders == ("kasa",)

    def setup(self, cfg: DictConfig) -> None:
        """Set up the run. The checks that can fail quickly come before any weight is read."""
        world = self._world
        world.check_same({"config": OmegaConf.to_yaml(cfg, resolve=True), "software": versions()})
        with world.all_succeed("Preparing model and data"):
            self._checkpoint = starting_checkpoint(cfg, rank=world.rank, world_size=world.size)
            self._setup_model(cfg)
            self._setup_data(cfg)
        facts = {"resume point": str(self._checkpoint), "data": self._fingerprints["data"]}
        digest = self._calibrator.digest if self._calibrator else None
        world.check_same(facts | {"calibration data": str(digest)})
        self._setup_weights(cfg)
        groups = lora_plus_groups(
            self._model, cfg.optimizer.get("lr"), cfg.adapter.lr_ratio, head_lr=cfg.head_lr
        )
        self._optimizer = config.instantiate(cfg.optimizer, groups)
        self._lr_scheduler = config.instantiate(
            cfg.lr_scheduler, self._optimizer, num_training_steps=self._data.total_steps
        )
        if world.rank:  # from here on, each process draws its own random numbers
            torch.manual_seed(cfg.seed + world.rank)
        self.steps = Steps(
            cfg,
            model=self._model,
            data=self._data,
            loss_sum=self._loss_sum,
            optimizer=self._optimizer,
            lr_scheduler=self._lr_scheduler,
            checkpoint=self._checkpoint,
            fingerprints=self._fingerprints,
            phases=self._phases,
            device=self._device,
            ignore_index=self._data.ignore_index,
            processes=world,
        )

    def _setup_model(self, cfg: DictConfig) -> None:
        """Build the model's shapes and its tokenizer, without reading any weight."""
        self._model = build_classifier(cfg, dtype=self._dtype)
        self._linears = dict(adapter_linears(self._model))
        self._num_labels = self._model.head.out_proj.out_features
        check_metric(cfg.metric, self._num_labels)
        options = {"is_cut": True, "device": cfg.device}
        check_optimizer(partial(config.instantiate, cfg.optimizer), self._model, **options)
        self._tokenizer = build_tokenizer(cfg.tokenizer, longest=self._model.max_seq_len)
        fit_tokenizer(self._model, self._tokenizer)

    def _setup_data(self, cfg: DictConfig) -> None:
        """Build this process's share of the texts, and of those to calibrate on."""
        share = {"rank": self._world.rank, "world_size": self._world.size}
        vocab_size = self._model.tok_embeddings.num_embeddings
        sizes = {"num_labels": self._num_labels, "vocab_size": vocab_size}
        self._data = ClassificationData(cfg, self._tokenizer, **sizes, **share)
        self._fingerprints = {"data": self._data.fingerprint}
        if self._checkpoint:
            self._checkpoint.check_data(self._data.fingerprint)
        elif self._method.calibrated:
            self._calibrator = TextCalibrator(
                cfg, self._tokenizer, self._model, device=self._device, **share
            )

    def _open_base(self, cfg: DictConfig) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """Open the base and read the saved adapter, if any. Both must fit the model."""
        saved: dict[str, Tensor] = {}
        with self._world.all_succeed("Opening the checkpoint"):
            leads = self._world.is_rank_zero
            base, fingerprints = open_base(cfg, self._checkpoint, is_rank_zero=leads)
            self._fingerprints |= fingerprints
            if self._checkpoint:
                saved = self._checkpoint.adapter
                check_adapter_fits(self._model, saved)
        self._world.check_same({"base weights": self._fingerprints["base"]})
        return base, saved

    def _setup_weights(self, cfg: DictConfig) -> None:
        """Read base weights, start adapters and head, block by block. Each process keeps its part."""
        base, saved = self._open_base(cfg)
        linears, shared = block_linears(self._model), SharedReading(base, self._world)
        load_base_weights(
            self._model,
            shared,
            device=self._device,
            adapter_dtype=self._adapter_dtype,
            without={f"{name}.weight" for name in linears},
        )
        if saved:
            load_whole(self._model, saved)
        else:
            take_head(self._model.head, cfg.checkpointer.checkpoint_dir)
        starts = {} if saved else self._find_starts(cfg, linears, shared)
        for block, inside in blocks_of(self._model, linears):
            for name in inside:
                weight = f"{name}.weight"
                tensor = read_tensor(shared, weight, device=self._device, dtype=self._dtype)
                put_weight(linears[name], tensor)
                if name in self._linears:
                    self._start_adapter(name, saved, starts)
            shard(block, self._world)
        shard(self._model.head, self._world)
        shard(self._model, self._world)

    def _start_adapter(
        self, name: str, saved: Mapping[str, Tensor], starts: dict[str, LowRank]
    ) -> None:
        """Load a saved adapter, or start it: KaSA and LoRA at zero, the others from a part of their weight."""
        linear = self._linears[name]
        if saved:
            load_adapter(name, linear, saved)
        elif name not in starts:
            linear.initialize()
        elif self._is_kasa:
            linear.set_edit(starts.pop(name))
            linear.reset_update()
        else:
            linear.start_from(starts.pop(name).to(self._device))

    def _find_starts(
        self, cfg: DictConfig, linears: Mapping[str, nn.Module], base: SharedReading
    ) -> dict[str, LowRank]:
        """Find what KaSA removes from its weight, or the part of it that an adapter starts from."""
        self._phases.done("reading data and weights")
        if self._is_kasa:
            found = self._smallest_triplets(base.weights)
        elif self._method.decomposition is None:
            return {}
        else:
            found = self._decomposed(cfg, linears, base)
        factors = (factor for start in found.values() for factor in (start.out, start.into))
        self._world.check_same({"decomposition": tensors_digest(factors)})
        log.info(f"Adapters started in {self._phases.done('starting the adapters'):.1f} s.")
        return found

    def _smallest_triplets(self, base: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """Find the smallest singular triplets of all adapted weights."""

        def find(name: str, k: int) -> LowRank:
            weight = read_tensor(base, f"{name}.weight", device=self._device, dtype=self._dtype)
            return smallest_triplets(weight, k)[0].to("cpu")

        shapes = {name: linear.weight.shape for name, linear in self._linears.items()}
        costs = {name: shape.numel() * min(shape) for name, shape in shapes.items()}
        jobs = ((costs[name], partial(find, name, self._linears[name].edit.rank)) for name in costs)
        shown = {"desc": "Truncating", "unit": "layer", "disable": not self._world.is_rank_zero}
        found = tqdm(distribute_jobs(jobs, self._world), total=len(costs), **shown)
        return dict(zip(costs, found, strict=True))

    def _decomposed(
        self, cfg: DictConfig, linears: Mapping[str, nn.Module], base: SharedReading
    ) -> dict[str, LowRank]:
        """Find the part of its weight that every adapter starts from."""
        method, leads = self._method, self._world.is_rank_zero
        digest = self._calibrator.digest if self._calibrator else None
        with self._world.all_succeed("Opening the decomposition's cache"):
            facts = {"base": self._fingerprints["base"], "layers": self._linears, "data": digest}
            cache = open_cache(cfg, method, **facts, writes=leads)
        self._world.check_same({"calibration.cache_dir's content": cache.content()})
        components, spectra = decompose(
            self._linears,
            partial(self._covariances, linears, base),
            cache,
            method=method,
            options={**cfg.adapter, **cfg.calibration},
            compute=partial(distribute_jobs, world=self._world),
        )
        report = Path(cfg.output_dir) / "decomposition.json"
        if leads:
            write_decomposition(report, components, spectra, mode=method.mode)
        split = method.split or cfg.adapter.split
        return {
            name: split_component(components.pop(name), linear.scaling, split)
            for name, linear in self._linears.items()
        }

    def _covariances(
        self, linears: Mapping[str, nn.Module], base: SharedReading, wanted: Wanted, title: str
    ) -> Iterator[tuple]:
        """Yield layers with the same input, the round, and the covariance ``(d_in, d_in)``."""
        loaded = partial(weights_loaded, linears, base, device=self._device)
        shown = self._world.is_rank_zero
        if not self._calibrator:
            for name in tqdm(self._linears, desc=title, unit="layer", disable=not shown):
                with loaded(name):
                    yield [name], 0, None
            return
        combine = partial(add_up, world=self._world)
        options = {"loaded": loaded, "combine": combine, "show_progress": shown}
        yield from self._calibrator.covariances(wanted, title, **options)

    def _loss_sum(self, batch: dict[str, Tensor]) -> Tensor:
        counted = batch["labels"] != self._data.ignore_index  # all but what fills up the last batch
        scores = self._model(batch["tokens"]).float()[counted]  # [n, labels]
        labels = batch["labels"][counted].to(self._device, non_blocking=True)  # [n]
        loss = F.mse_loss if self._num_labels == 1 else F.cross_entropy
        return loss(scores.squeeze(1), labels, reduction="sum")  # squeezed with one label alone

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compute the metrics of the validation set. All processes have the same."""
        self._model.eval()
        batches, leads = self._data.validation(), self._world.is_rank_zero
        scores, labels = [], []
        for batch in tqdm(batches, "Evaluating", unit="batch", leave=False, disable=not leads):
            counted = batch["labels"] != self._data.ignore_index  # all but what fills up the last
            found = self._model(batch["tokens"].to(self._device)).double().cpu()
            scores.append(found[counted].numpy())
            labels.append(batch["labels"][counted].numpy())
        self._model.train()
        parts = self._world.gather((np.concatenate(scores), np.concatenate(labels)))
        return score(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def train(self, cfg: DictConfig) -> int:
        """Train until the end or a stop signal, and return the exit status."""
        adapter, leads = cfg.adapter, self._world.is_rank_zero
        options = {key: adapter[key] for key in ("orthogonal_gram", "reduction")}
        epochs = EpochScores(Path(cfg.output_dir), cfg.metric, steps_done=self.steps.step)
        with self.steps as steps:
            for step in steps:
                for batch in step.batches:
                    self._model.set_requires_gradient_sync(step.is_last_batch)
                    loss = self._loss_sum(batch) / step.num_tokens  # of texts, here
                    (loss * self._world.size).backward()  # FSDP divides by the number of processes
                    step.add_loss(loss)
                if self._is_kasa:
                    l2, l3 = kasa_regularization(self._linears.values(), **options)
                    (adapter.beta * l2 + adapter.gamma * l3).backward()
                    step.log(l2=l2, l3=l3)
                step.apply(self._optimizer, self._lr_scheduler, clip_grad_norm=cfg.clip_grad_norm)
                ends = steps.step % self._data.steps_per_epoch == 0
                if ends or steps.step == self._data.total_steps:
                    found = self.evaluate()
                    if leads:
                        epochs.add(steps.step, steps.epoch + 1, found)
                    step.metrics |= {f"val_{name}": value for name, value in found.items()}
        epochs.report()
        return steps.exit_status

    def cleanup(self) -> None:
        """Leave the group of processes."""
        self._world.leave()


@config.parse(config.CLASSIFY)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = ClassifyFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    status = 0
    if cfg.evaluate_only:
        found = recipe.evaluate()
        if recipe._world.is_rank_zero:
            print("\n".join(f"{name}: {value:.4f}" for name, value in found.items()))
    else:
        status = recipe.train(cfg)
    recipe.cleanup()
    return status


if __name__ == "__main__":
    sys.exit(recipe_main())
