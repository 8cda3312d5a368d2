"""Fine-tune a language model with QCorDA (or QPiSSA, LoftQ, QLoRA, QKaSA) on several devices: the
base in 4 bits, cut over the devices (FSDP2).

    tune run --nproc_per_node 2 qcorda_finetune_distributed --config tiny_qcorda
    tune cp qcorda_finetune_distributed my_qcorda.py && tune run --nproc_per_node 8 my_qcorda.py --config my.yaml

The algorithm (QCorDA, arXiv 2506.13187, section 3.4), reading a block of weights at a time:

    for every block, and every calibration round:
        C  =  sum of x x' over the inputs x of its linears               of the task to learn
        of the rounds, every layer keeps the C that makes W C most compact
    r  =  per layer, by what filtering its last components would cost
    for every adapted weight W:    U S V'  =  svd(W C)
                                   s B A   =  U_r U_r' W,   U_r the first r of U
    for every weight W:            Q  =  NF4(W - s B A)
    for every batch:               y  =  Q x + s B A x
                                   (A, B)  <-  AdamW on the cross-entropy

Every process runs the model over its part of the calibration rows. Each W is decomposed and
quantized by one process for all. The checkpoints have the same form as on one device.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

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
from kasa_tune.components.linalg import Component, quantize
from kasa_tune.components.models.base_weights import SharedReading, open_base
from kasa_tune.components.models.loading import (
    blocks_of,
    load_base_weights,
    needs_dense_mask,
    read_tensor,
    weights_loaded,
)
from kasa_tune.components.processes import World, distribute_jobs, shard
from kasa_tune.components.quantized import (
    FOLDER,
    QuantizedStart,
    keep_quantized,
    quantized_linears,
    quantized_start,
    read_quantized,
)
from kasa_tune.components.training import (
    Phases,
    Steps,
    allow_graphs,
    build_training_model,
    check_optimizer,
    dry_run_report,
    summed_loss,
)
from kasa_tune.methods import METHODS, method_of

log = utils.get_logger("INFO")


class QCorDAFinetuneRecipeDistributed(FTRecipeInterface):
    """Fine-tuning on an NF4 base, on several processes, each with a part of every weight.

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
        self._regularized = "kasa" in self._method.builders

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
        self._quantized = quantized_linears(self._model, cfg.quantization.block_size)
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
        """Quantize the base and start adapters, block by block. Each process keeps its part."""
        base, saved = self._open_base(cfg)
        checkpoint, shared, kept = self._checkpoint, SharedReading(base, self._world), {}
        load_base_weights(
            self._model,
            shared,
            device=self._device,
            adapter_dtype=self._adapter_dtype,
            without={f"{name}.weight" for name in self._quantized},
        )
        if checkpoint and checkpoint.has_quantized_base:
            stored = read_quantized(checkpoint, self._quantized)
            starts = ((name, QuantizedStart(weight)) for name, weight in stored)
        else:
            starts = self._find_starts(cfg, base, shared)
        for block, inside in blocks_of(self._model, self._quantized):
            for _ in inside:
                name, start = next(starts)
                start.to(self._device).put_into(self._quantized[name])
                if saved and name in self._linears:
                    load_adapter(name, self._linears[name], saved)
                if self._world.is_rank_zero:
                    kept[name] = start.weight
            shard(block, self._world, offload=cfg.fsdp_cpu_offload)
        next(starts, None)  # run the generator's code after its last yield
        shard(self._model, self._world, offload=cfg.fsdp_cpu_offload)
        resumes = checkpoint and checkpoint.resumes
        known = checkpoint.run.get("quantized_base") if resumes else None
        keep = partial(keep_quantized, Path(cfg.output_dir) / FOLDER, kept, known)
        checksum = self._world.on_rank_zero(keep, "Writing the quantized base")
        self._fingerprints["quantized_base"] = checksum

    def _find_starts(
        self, cfg: DictConfig, base: Mapping[str, Tensor], shared: SharedReading
    ) -> Iterator[tuple[str, QuantizedStart]]:
        """Yield every linear's quantized weight and its adapter's start, in the model's order."""
        self._phases.done("reading data and weights")
        # An adapter that comes without a quantized base takes nothing out of the weights.
        method = METHODS["qlora"] if self._checkpoint else self._method
        components, spectra = self._decompose(cfg, shared) if method.calibrated else ({}, {})
        options = {
            "method": method,
            "quantize": partial(quantize, **cfg.quantization, dtype=self._dtype),
            "iterations": cfg.adapter.quantization_iterations,
            "split": cfg.adapter.split,
            "adapter_dtype": self._adapter_dtype,
        }

        def find(name: str) -> QuantizedStart:
            weight = read_tensor(base, f"{name}.weight", device=self._device, dtype=torch.float32)
            given = {"linear": self._linears.get(name), "component": components.get(name)}
            return quantized_start(weight, **given, **options).to("cpu").without_vectors()

        sizes = {name: linear.weight.numel() for name, linear in self._quantized.items()}
        jobs = ((size, partial(find, name)) for name, size in sizes.items())
        found = tqdm(
            distribute_jobs(jobs, self._world),
            total=len(sizes),
            desc="Quantizing",
            unit="layer",
            disable=not self._world.is_rank_zero,
        )
        for name, start in zip(sizes, found, strict=True):
            if start.component:
                components[name] = start.component
            yield name, start
        if components and self._world.is_rank_zero:
            report = Path(cfg.output_dir) / "decomposition.json"
            write_decomposition(report, components, spectra, mode=method.mode)
        values = tensors_digest(component.singular_values for component in components.values())
        self._world.check_same({"decomposition": values})
        seconds = self._phases.done("starting the adapters")
        log.info(f"Base quantized and adapters started in {seconds:.1f} s.")

    def _decompose(self, cfg: DictConfig, base: SharedReading) -> tuple[dict[str, Component], dict]:
        """Compute CorDA's components of all adapted layers, or take them from the cache."""
        with self._world.all_succeed("Opening the decomposition's cache"):
            cache = open_cache(
                cfg,
                self._method,
                base=self._fingerprints["base"],
                layers=self._linears,
                data=self._calibrator.digest,
                writes=self._world.is_rank_zero,
            )
        self._world.check_same({"calibration.cache_dir's content": cache.content()})
        return decompose(
            self._linears,
            partial(self._covariances, base),
            cache,
            method=self._method,
            options={**cfg.adapter, **cfg.calibration},
            compute=partial(distribute_jobs, world=self._world),
        )

    def _covariances(self, base: SharedReading, wanted: Wanted, title: str) -> Iterator[tuple]:
        """Yield layers with the same input, the round, and the covariance ``(d_in, d_in)``."""
        return self._calibrator.covariances(
            wanted,
            title,
            loaded=partial(weights_loaded, self._quantized, base, device=self._device),
            combine=partial(add_up, world=self._world),
            show_progress=self._world.is_rank_zero,
        )

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
            quantized=self._quantized,
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
        adapter = cfg.adapter
        options = {key: adapter[key] for key in ("orthogonal_gram", "reduction")}
        with self.steps as steps:
            for step in steps:
                for batch in step.batches:
                    self._model.set_requires_gradient_sync(step.is_last_batch)
                    loss = self._loss_sum(batch) / step.num_tokens
                    (loss * self._world.size).backward()  # FSDP divides by the number of processes
                    step.add_loss(loss)
                if self._regularized:
                    l2, l3 = kasa_regularization(self._linears.values(), **options)
                    (adapter.beta * l2 + adapter.gamma * l3).backward()
                    step.log(l2=l2, l3=l3)
                step.apply(self._optimizer, self._lr_scheduler, clip_grad_norm=cfg.clip_grad_norm)
        return steps.exit_status

    def cleanup(self) -> None:
        """Leave the group of processes."""
        self._world.leave()


@config.parse(config.QCORDA)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = QCorDAFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    if cfg.dry_run:
        return 0
    status = recipe.train(cfg)
    recipe.cleanup()
    return status


if __name__ == "__main__":
    sys.exit(recipe_main())
