"""Fine-tune a language model with CorDA (or PiSSA, MiLoRA, LoRA, DoRA) on several devices: fully
sharded data parallel.

    tune run --nproc_per_node 2 corda_finetune_distributed --config tiny_corda
    tune cp corda_finetune_distributed my_corda.py && tune run --nproc_per_node 8 my_corda.py --config my.yaml

The algorithm (CorDA, arXiv 2406.05223, and CorDA++, arXiv 2506.13187):

    for every block, and every calibration round:
        C  =  sum of x x' over the inputs x of its linears               on what to learn (IPM) or to keep (KPM)
        of the rounds, every layer keeps the C that makes W C most compact                               CorDA++
    r  =  per layer, by what filtering its last components would cost                                    CorDA++
    for every adapted weight W:    U S V'  =  svd(W C)
                                   s B A   =  U_r U_r' W,   U_r the first (IPM) or last (KPM) r of U
                                   W  <-  W - s B A
    for every batch:               y  =  W x + s B A x
                                   (A, B)  <-  AdamW on the cross-entropy

Every process reads its rows of W and runs the model over its part of the calibration rows. Each W
is decomposed by one process for all. The checkpoints have the same form as on one device.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune import training, utils
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters import (
    adapter_linears,
    check_adapter_fits,
    load_adapter,
    lora_plus_groups,
)
from kasa_tune.components.checkpoints import starting_checkpoint
from kasa_tune.components.corda import (
    Calibrator,
    Wanted,
    add_up,
    decompose,
    open_cache,
    write_decomposition,
)
from kasa_tune.components.data import Batch, TrainingData, build_tokenizer, tensors_digest, versions
from kasa_tune.components.linalg import LowRank, split_component
from kasa_tune.components.models.base_weights import SharedReading, open_base
from kasa_tune.components.models.loading import (
    block_linears,
    blocks_of,
    load_base_weights,
    needs_dense_mask,
    put_weight,
    read_tensor,
    weights_loaded,
)
from kasa_tune.components.processes import World, distribute_jobs, shard
from kasa_tune.components.training import (
    Phases,
    Steps,
    allow_graphs,
    build_training_model,
    check_optimizer,
    dry_run_report,
    summed_loss,
)
from kasa_tune.methods import method_of

log = utils.get_logger("INFO")


class CorDAFinetuneRecipeDistributed(FTRecipeInterface):
    """Fine-tuning with CorDA and its relatives on processes that each have a part of every weight.

    Args:
        cfg: the checked config; docs/configs.md describes its keys.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._phases = Phases()
        training.set_seed(cfg.seed)  # the same in all processes until adapters start
        options = {"timeout": cfg.timeout, "shards": cfg.data_parallel_shard_dim}
        self._world = None if cfg.dry_run else World.join(cfg.device, **options)
        self._device = self._world.device if self._world else torch.device("cpu")
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._adapter_dtype = training.get_dtype(cfg.adapter.dtype, device=self._device)
        self._method, self._calibrator = method_of(cfg.adapter), None

    def setup(self, cfg: DictConfig) -> None:
        """Set up the run. The checks that can fail quickly come before any weight is read."""
        if cfg.dry_run:
            self._setup_model(cfg)
            self._print_budget(cfg)
            return
        world = self._world
        world.check_same({"config": OmegaConf.to_yaml(cfg, resolve=True), "software": versions()})
        with world.all_succeed("Preparing model and data"):
            self._checkpoint = starting_checkpoint(cfg, rank=world.rank, world_size=world.size)
            self._setup_model(cfg)
            self._setup_data(cfg)
        facts = {"resume point": str(self._checkpoint), "data": self._fingerprints["data"]}
        digest = self._calibrator.digest if self._calibrator else None
        world.check_same(facts | {"calibration data": str(digest)})
        if cfg.compile:
            allow_graphs(4 * len(self._linears))  # every rank needs its own graph
            training.compile_model(self._model, verbose=False)
        self._setup_weights(cfg)
        offload = cfg.enable_activation_offloading
        self._offload = training.get_act_offloading_ctx_manager(self._model, offload)
        groups = lora_plus_groups(self._model, cfg.optimizer.get("lr"), cfg.adapter.lr_ratio)
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
            processes=world,
        )

    def _setup_model(self, cfg: DictConfig) -> None:
        """Build the model's shapes, its loss and its tokenizer, without reading any weight."""
        self._model = build_training_model(cfg, dtype=self._dtype)
        self._linears = dict(adapter_linears(self._model))
        self._vocab_size = self._model.tok_embeddings.num_embeddings
        self._loss = summed_loss(config.instantiate(cfg.loss), self._vocab_size)
        steps_on = "cpu" if cfg.fsdp_cpu_offload else cfg.device
        options = {"is_cut": True, "device": steps_on}
        check_optimizer(partial(config.instantiate, cfg.optimizer), self._model, **options)
        self._tokenizer = build_tokenizer(cfg.tokenizer, longest=self._model.max_seq_len)

    def _setup_data(self, cfg: DictConfig) -> None:
        """Build this process's share of the training data and of the calibration rows."""
        options = {
            "device": self._device,
            "dense_mask": needs_dense_mask(self._model),
            "rank": self._world.rank,
            "world_size": self._world.size,
        }
        self._data = TrainingData(cfg, self._tokenizer, vocab_size=self._vocab_size, **options)
        self._fingerprints = {"data": self._data.fingerprint}
        if self._checkpoint:
            self._checkpoint.check_data(self._data.fingerprint)
        if self._method.calibrated and not self._checkpoint:
            self._calibrator = Calibrator(cfg, self._tokenizer, self._model, **options)

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
        """Read base weights and start adapters, block by block. Each process keeps its part."""
        base, saved = self._open_base(cfg)
        linears, shared = block_linears(self._model), SharedReading(base, self._world)
        load_base_weights(
            self._model,
            shared,
            device=self._device,
            adapter_dtype=self._adapter_dtype,
            without={f"{name}.weight" for name in linears},
        )
        starts = {} if saved else self._find_starts(cfg, linears, shared)
        outside = (self._model, set(self._linears) - set(linears))
        for block, inside in (*blocks_of(self._model, linears), outside):
            for name in inside:
                if name in linears:
                    weight = f"{name}.weight"
                    tensor = read_tensor(shared, weight, device=self._device, dtype=self._dtype)
                    put_weight(linears[name], tensor)
                if saved and name in self._linears:
                    load_adapter(name, self._linears[name], saved)
                elif name in starts:
                    self._linears[name].start_from(starts.pop(name).to(self._device))
                elif name in self._linears:
                    self._linears[name].initialize()
            shard(block, self._world, offload=cfg.fsdp_cpu_offload)

    def _find_starts(
        self, cfg: DictConfig, linears: Mapping[str, nn.Module], base: SharedReading
    ) -> dict[str, LowRank]:
        """Find the part of its weight that every adapter starts from. LoRA starts at zero."""
        self._phases.done("reading data and weights")
        method = self._method
        if method.decomposition is None:
            return {}
        digest = self._calibrator.digest if self._calibrator else None
        with self._world.all_succeed("Opening the decomposition's cache"):
            cache = open_cache(
                cfg,
                self._method,
                base=self._fingerprints["base"],
                layers=self._linears,
                data=digest,
                writes=self._world.is_rank_zero,
            )
        self._world.check_same({"calibration.cache_dir's content": cache.content()})
        components, spectra = decompose(
            self._linears,
            partial(self._covariances, linears, base),
            cache,
            method=method,
            options={**cfg.adapter, **cfg.calibration},
            compute=partial(distribute_jobs, world=self._world),
        )
        if self._world.is_rank_zero:
            report = Path(cfg.output_dir) / "decomposition.json"
            write_decomposition(report, components, spectra, mode=method.mode)
        found = tensors_digest(component.projection for component in components.values())
        self._world.check_same({"decomposition": found})
        seconds = self._phases.done("starting the adapters")
        log.info(f"Adapters started in {seconds:.1f} s.")
        return {
            name: split_component(
                components.pop(name), self._linears[name].scaling, method.split or cfg.adapter.split
            )
            for name in list(components)
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

    def _print_budget(self, cfg: DictConfig) -> None:
        processes, calibration = cfg.world_size or 1, None
        if self._method.calibrated and not cfg.adapter_checkpoint:
            options = {"device": self._device, "world_size": processes}
            calibrator = Calibrator(cfg, self._tokenizer, self._model, **options)
            calibration = (calibrator.groups, calibrator.rounds)
        report = dry_run_report(
            cfg,
            self._model,
            tokenizer=self._tokenizer,
            loss=self._loss,
            calibration=calibration,
            shards=cfg.data_parallel_shard_dim or processes,
        )
        print(*report, sep="\n")

    def _loss_sum(self, batch: Batch) -> Tensor:
        labels = batch.pop("labels")  # [b, s]
        with self._offload:
            hidden = self._model(**batch)  # [b, s, d]
        return self._loss(self._model.output, hidden, labels)

    def train(self, cfg: DictConfig) -> int:
        """Train until the end or a stop signal, and return the exit status."""
        with self.steps as steps:
            for step in steps:
                for batch in step.batches:
                    self._model.set_requires_gradient_sync(step.is_last_batch)
                    loss = self._loss_sum(batch) / step.num_tokens
                    (loss * self._world.size).backward()  # FSDP divides by the number of processes
                    step.add_loss(loss)
                step.apply(self._optimizer, self._lr_scheduler, clip_grad_norm=cfg.clip_grad_norm)
        return steps.exit_status

    def cleanup(self) -> None:
        """Leave the group of processes."""
        self._world.leave()


@config.parse(config.CORDA)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = CorDAFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    if cfg.dry_run:
        return 0
    status = recipe.train(cfg)
    recipe.cleanup()
    return status


if __name__ == "__main__":
    sys.exit(recipe_main())
