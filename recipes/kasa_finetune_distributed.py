"""Fine-tune a language model with KaSA (or LoRA) on several devices: fully sharded data parallel
(FSDP2).

    tune run --nproc_per_node 2 kasa_finetune_distributed --config tiny_kasa
    tune cp kasa_finetune_distributed my_kasa.py && tune run --nproc_per_node 8 my_kasa.py --config my.yaml

The algorithm (KaSA, arXiv 2412.06071):

    for every adapted weight W:    W  <-  W without its k smallest singular triplets
                                   A  ~  Kaiming,  B = 0,  d ~ N(0, 1)
    for every batch:               y  =  W x + s B (d * A x)
                                   L  =  cross-entropy + beta * mean |d|^2 + gamma * mean (|B'B - I| + |AA' - I|)
                                   (A, B, d)  <-  AdamW

Every process reads its rows of W. Each W is decomposed by one process for all. The checkpoints have
the same form as on one device.
"""

import sys
from collections.abc import Mapping
from functools import partial

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import training, utils
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters import (
    adapter_linears,
    check_adapter_fits,
    kasa_regularization,
    load_adapter,
)
from kasa_tune.components.checkpoints import starting_checkpoint
from kasa_tune.components.data import Batch, TrainingData, build_tokenizer, tensors_digest, versions
from kasa_tune.components.linalg import LowRank, smallest_triplets
from kasa_tune.components.models.base_weights import SharedReading, open_base
from kasa_tune.components.models.loading import (
    block_linears,
    blocks_of,
    load_base_weights,
    needs_dense_mask,
    put_weight,
    read_tensor,
)
from kasa_tune.components.processes import World, distribute_jobs, shard
from kasa_tune.components.training import (
    Phases,
    Steps,
    build_training_model,
    check_optimizer,
    dry_run_report,
    summed_loss,
)

log = utils.get_logger("INFO")


class KaSAFinetuneRecipeDistributed(FTRecipeInterface):
    """Fine-tuning with KaSA or LoRA on several processes, each with a part of every weight.

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
        world.check_same(facts)
        if cfg.compile:
            training.compile_model(self._model, verbose=False)
        self._setup_weights(cfg)
        offload = cfg.enable_activation_offloading
        self._offload = training.get_act_offloading_ctx_manager(self._model, offload)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = config.instantiate(cfg.optimizer, trained)
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
        """Build this process's share of the data."""
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
        edits = {} if saved else self._find_edits(base)
        outside = (self._model, set(self._linears) - set(linears))
        for block, inside in (*blocks_of(self._model, linears), outside):
            for name in inside:
                if name in linears:
                    weight = f"{name}.weight"
                    tensor = read_tensor(shared, weight, device=self._device, dtype=self._dtype)
                    put_weight(linears[name], tensor)
                if saved and name in self._linears:
                    load_adapter(name, self._linears[name], saved)
                elif name in self._linears:
                    self._linears[name].set_edit(edits[name])
                    self._linears[name].reset_update()
            shard(block, self._world, offload=cfg.fsdp_cpu_offload)

    def _find_edits(self, base: Mapping[str, Tensor]) -> dict[str, LowRank]:
        """Find the smallest singular triplets of all adapted weights, the most expensive first."""
        self._phases.done("reading data and weights")

        def find(name: str, k: int) -> LowRank:
            weight = read_tensor(base, f"{name}.weight", device=self._device, dtype=self._dtype)
            return smallest_triplets(weight, k)[0].to("cpu")

        shapes = {name: linear.weight.shape for name, linear in self._linears.items()}
        costs = {name: shape.numel() * min(shape) for name, shape in shapes.items()}
        names = sorted(costs, key=lambda name: -costs[name])
        jobs = ((costs[name], partial(find, name, self._linears[name].edit.rank)) for name in names)
        found = tqdm(
            distribute_jobs(jobs, self._world),
            total=len(names),
            desc="Truncating",
            unit="layer",
            disable=not self._world.is_rank_zero,
        )
        edits = dict(zip(names, found, strict=True))
        factors = (factor for edit in edits.values() for factor in (edit.out, edit.into))
        self._world.check_same({"decomposition": tensors_digest(factors)})
        seconds = self._phases.done("starting the adapters")
        log.info(f"Adapters started in {seconds:.1f} s.")
        return edits

    def _print_budget(self, cfg: DictConfig) -> None:
        report = dry_run_report(
            cfg,
            self._model,
            tokenizer=self._tokenizer,
            loss=self._loss,
            shards=cfg.data_parallel_shard_dim or cfg.world_size or 1,
        )
        print(*report, sep="\n")

    def _loss_sum(self, batch: Batch) -> Tensor:
        labels = batch.pop("labels")  # [b, s]
        with self._offload:
            hidden = self._model(**batch)  # [b, s, d]
        return self._loss(self._model.output, hidden, labels)

    def train(self, cfg: DictConfig) -> int:
        """Train until the end or a stop signal, and return the exit status."""
        adapter = cfg.adapter
        options = {key: adapter[key] for key in ("orthogonal_gram", "reduction")}
        with self.steps as steps:
            for step in steps:
                for batch in step.batches:
                    self._model.set_requires_gradient_sync(step.is_last_batch)
                    loss = self._loss_sum(batch) / step.num_tokens
                    (loss * self._world.size).backward()  # FSDP divides by the number of processes
                    step.add_loss(loss)
                l2, l3 = kasa_regularization(self._linears.values(), **options)
                (adapter.beta * l2 + adapter.gamma * l3).backward()
                step.log(l2=l2, l3=l3)
                step.apply(self._optimizer, self._lr_scheduler, clip_grad_norm=cfg.clip_grad_norm)
        return steps.exit_status

    def cleanup(self) -> None:
        """Leave the group of processes."""
        self._world.leave()


@config.parse(config.FINETUNE)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = KaSAFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    if cfg.dry_run:
        return 0
    status = recipe.train(cfg)
    recipe.cleanup()
    return status


if __name__ == "__main__":
    sys.exit(recipe_main())
