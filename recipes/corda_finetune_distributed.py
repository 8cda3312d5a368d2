"""Fine-tune a language model with CorDA (or PiSSA, MiLoRA, LoRA, DoRA) on several devices: fully sharded data parallel.

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

Every process reads its rows of W and runs the model over its part of the calibration rows; a W is decomposed by one
process for all. The checkpoints are those of one device.
"""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune import modules, training, utils
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules.peft import disable_adapter
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_state_dict,
    check_adapter_fits,
    load_adapter,
    lora_plus_groups,
)
from kasa_tune.components.checkpoints import checkpoint as checkpointing
from kasa_tune.components.checkpoints.resuming import resume_point, resume_position, start_point
from kasa_tune.components.corda.cache import (
    DecompositionCache,
    decomposition_key,
    write_decomposition,
)
from kasa_tune.components.corda.calibration import (
    Wanted,
    add_up,
    calibration_bytes,
    damped_covariances,
    shared_inputs,
)
from kasa_tune.components.corda.calibration_data import batched, draw_rounds, rows_digest
from kasa_tune.components.corda.decompose import decompose
from kasa_tune.components.data.building import (
    build_dataloader,
    build_dataset,
    check_batches,
    check_token_ids,
)
from kasa_tune.components.data.fingerprints import data_fingerprint, tensors_digest, versions
from kasa_tune.components.linalg.decomposition import split_component
from kasa_tune.components.linalg.low_rank import LowRank
from kasa_tune.components.models.base_weights import SharedReading, read_base_weights
from kasa_tune.components.models.loading import (
    block_linears,
    blocks_of,
    build_on_meta,
    load_base_weights,
    put_weight,
    read_tensor,
    require_adapters,
    weights_loaded,
)
from kasa_tune.components.processes.sharding import (
    distribute_optimizer_state,
    full_tensor,
    full_tensors,
)
from kasa_tune.components.processes.world import OtherRankError, World, distribute_jobs, shard
from kasa_tune.components.training.loggers import SilentLogger
from kasa_tune.components.training.loss import ChunkedCrossEntropy, return_hidden_states
from kasa_tune.components.training.memory import (
    allow_graphs,
    budget_report,
    check_optimizer,
    memory_budget,
    per_process,
)
from kasa_tune.methods import method_of

log = utils.get_logger("INFO")


class CorDAFinetuneRecipeDistributed(FTRecipeInterface):
    """CorDA fine-tuning and its baselines on the processes that torchrun starts, each with a part of every weight.

    Args:
        cfg: the checked config; its keys are described in docs/configs.md.
    """

    def __init__(self, cfg: DictConfig) -> None:
        training.set_seed(cfg.seed)  # the same in all processes until the adapters have started
        options = {"timeout": cfg.timeout, "shards": cfg.data_parallel_shard_dim}
        self._world = None if cfg.dry_run else World.join(cfg.device, **options)
        self._device = self._world.device if self._world else torch.device("cpu")
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._adapter_dtype = training.get_dtype(cfg.adapter.dtype, device=self._device)
        self._checkpoints = Path(cfg.output_dir) / "checkpoints"
        self.step = self.epoch = self.batches_done = (
            0  # optimizer steps, finished epochs, batches of the running epoch
        )
        self._fingerprints: dict[
            str, str
        ] = {}  # of data and base weights, kept in every checkpoint

    def setup(self, cfg: DictConfig) -> None:
        """What can fail cheaply first: resume point, shapes, data. Then weights, decomposition, optimizer."""
        if cfg.dry_run:
            self._setup_model(cfg)
            self._rounds = []
            if method_of(cfg.adapter).calibrated and not cfg.adapter_checkpoint:
                self._dense_mask = False  # masks are not counted
                self._setup_calibration(cfg, 0, cfg.world_size or 1)
            return self._print_budget(cfg)
        settings, world = OmegaConf.to_container(cfg, resolve=True), self._world
        world.check_same({"config": OmegaConf.to_yaml(cfg, resolve=True), "software": versions()})
        with world.all_succeed("Preparing model and data"):
            choice = cfg.resume_from_checkpoint
            self._resume_path = resume_point(
                self._checkpoints, choice, settings, world_size=world.size
            )
            self._resumed = (
                checkpointing.load_part(self._resume_path, "run") if self._resume_path else {}
            )
            self._start_path = start_point(self._resume_path, cfg.adapter_checkpoint)
            self._setup_model(cfg)
            self._setup_data(cfg)
            self._rounds, self._calibration_digest = [], None
            if method_of(cfg.adapter).calibrated and not self._start_path:
                self._setup_calibration(cfg, world.rank, world.size)
        facts = {"resume point": str(self._start_path), "data": self._fingerprints["data"]}
        world.check_same(facts | {"calibration data": str(self._calibration_digest)})
        if cfg.compile:
            allow_graphs(4 * len(self._linears))  # ranks differ from layer to layer
            training.compile_model(self._model, verbose=False)
        self._setup_weights(cfg)
        self._trained = [
            parameter for parameter in self._model.parameters() if parameter.requires_grad
        ]
        self._offload = training.get_act_offloading_ctx_manager(
            self._model, cfg.enable_activation_offloading
        )
        groups = lora_plus_groups(self._model, cfg.optimizer.get("lr"), cfg.adapter.lr_ratio)
        self._optimizer = config.instantiate(cfg.optimizer, groups)
        self._lr_scheduler = config.instantiate(
            cfg.lr_scheduler, self._optimizer, num_training_steps=self._total_steps
        )
        if world.rank:  # from here on, what is random differs
            torch.manual_seed(cfg.seed + world.rank)
        if self._resume_path:
            self._restore()
        self._logger = (
            config.instantiate(cfg.metric_logger) if world.is_rank_zero else SilentLogger()
        )
        log.info(
            f"{sum(p.numel() for p in self._trained):,} parameters to train, {self._total_steps} steps in all."
        )

    def _setup_model(self, cfg: DictConfig) -> None:
        """Shapes alone, on the meta device."""
        self._model = build_on_meta(partial(config.instantiate, cfg.model), dtype=self._dtype)
        require_adapters(self._model, cfg.model._component_)
        self._linears, self._groups = dict(adapter_linears(self._model)), shared_inputs(self._model)
        return_hidden_states(self._model)
        if cfg.enable_activation_checkpointing:
            training.set_activation_checkpointing(
                self._model, {modules.TransformerSelfAttentionLayer}
            )
        self._loss_fn = config.instantiate(cfg.loss)
        if not isinstance(self._loss_fn, ChunkedCrossEntropy):
            raise ValueError(
                f"loss must be components.training.ChunkedCrossEntropy; got {cfg.loss._component_}."
            )
        check_optimizer(partial(config.instantiate, cfg.optimizer), self._model, is_cut=True)
        self._tokenizer = config.instantiate(cfg.tokenizer)
        self._vocab_size = self._model.tok_embeddings.num_embeddings

    # --- shared: distributed data and resuming
    def _setup_data(self, cfg: DictConfig) -> None:
        self._dataset = build_dataset(cfg.dataset, self._tokenizer, name="dataset")
        self._fingerprints["data"] = data_fingerprint(
            self._dataset, nodes=cfg.dataset, tokenizer=cfg.tokenizer
        )
        if self._resume_path and self._resumed["data"] != self._fingerprints["data"]:
            raise ValueError(
                f"{self._resume_path} was trained on other data than dataset and tokenizer now give."
            )
        check_token_ids(self._dataset, self._vocab_size)
        self._dense_mask = any(
            isinstance(module, Gemma2Attention) for module in self._model.modules()
        )
        options = {"tokenizer": self._tokenizer, "seed": cfg.seed, "num_workers": cfg.num_workers}
        options |= {"rank": self._world.rank, "world_size": self._world.size}
        loader = partial(
            build_dataloader, **options, device=self._device, dense_mask=self._dense_mask
        )
        self._loader = loader(self._dataset, batch_size=cfg.batch_size, shuffle=cfg.shuffle)
        if cfg.dataset_val:
            dataset_val = build_dataset(cfg.dataset_val, self._tokenizer, name="dataset_val")
            check_token_ids(dataset_val, self._vocab_size)
            self._loader_val = loader(dataset_val, batch_size=cfg.batch_size_val, shuffle=False)
        self._accumulation = cfg.gradient_accumulation_steps
        self._steps_per_epoch = -(-len(self._loader.batch_sampler) // self._accumulation)
        if cfg.max_steps_per_epoch:
            self._steps_per_epoch = min(self._steps_per_epoch, cfg.max_steps_per_epoch)
        self._total_steps = min(self._steps_per_epoch * cfg.epochs, cfg.max_steps or sys.maxsize)

    def _restore(self) -> None:
        """Optimizer, schedule, place in the data and random state of the resume point."""
        state = self._resumed
        self.step, self.epoch, self.batches_done = resume_position(
            state, self._accumulation, len(self._loader.batch_sampler)
        )
        saved = checkpointing.load_part(self._resume_path, "optimizer")
        self._optimizer.load_state_dict(distribute_optimizer_state(self._optimizer, saved))
        if self._lr_scheduler:
            self._lr_scheduler.load_state_dict(state["lr_scheduler"])
            if state["total_steps"] != self._total_steps:
                log.warning(
                    f"The schedule now spans {self._total_steps} steps instead of {state['total_steps']}."
                )
        self._world.set_rng_state(checkpointing.load_part(self._resume_path, "rng"))

    def _open_checkpoint(self, cfg: DictConfig) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """The base's weights, to be read when asked for, and the adapter to start with; both fit the model."""
        saved: dict[str, Tensor] = {}
        with self._world.all_succeed("Opening the checkpoint"):
            base = read_base_weights(config.instantiate(cfg.checkpointer))
            self._fingerprints["base"] = checkpointing.weights_fingerprint(base)
            if self._start_path:
                known = {
                    "base_fingerprint": self._fingerprints["base"],
                    "model": OmegaConf.to_container(cfg.model),
                }
                checkpointing.check_belongs(self._start_path, **known)
                saved = checkpointing.load_part(self._start_path, "adapter")
                check_adapter_fits(self._model, saved)
        self._world.check_same({"base weights": self._fingerprints["base"]})
        return base, saved

    # --- end

    def _setup_weights(self, cfg: DictConfig) -> None:
        """Base weights and adapters, a block at a time, of which each process keeps its part."""
        base, saved = self._open_checkpoint(cfg)
        linears, shared = block_linears(self._model), SharedReading(base, self._world)
        options = {"device": self._device, "adapter_dtype": self._adapter_dtype}
        load_base_weights(
            self._model, shared, **options, without={f"{name}.weight" for name in linears}
        )
        starts = {} if saved else self._find_starts(cfg, linears, shared)
        for block, inside in (
            *blocks_of(self._model, linears),
            (self._model, set(self._linears) - set(linears)),
        ):
            for name in inside:
                if name in linears:
                    weight = read_tensor(
                        shared, f"{name}.weight", device=self._device, dtype=self._dtype
                    )
                    put_weight(linears[name], weight)
                if saved and name in self._linears:
                    load_adapter(name, self._linears[name], saved)
                elif name in starts:
                    self._linears[name].start_from(starts.pop(name).to(self._device))
                elif name in self._linears:
                    self._linears[name].initialize()
            shard(block, self._world, offload=cfg.fsdp_cpu_offload)

    def _setup_calibration(self, cfg: DictConfig, rank: int, world_size: int) -> None:
        """This process's part of the rows to calibrate on, in rounds of batches."""
        dataset = build_dataset(
            cfg.calibration.dataset, self._tokenizer, name="calibration.dataset"
        )
        names = ("num_samples", "max_seq_len", "concatenate", "rounds", "seed")
        options = {name: cfg.calibration[name] for name in names}
        rounds = draw_rounds(dataset, longest=self._model.max_seq_len, **options)
        self._calibration_digest = rows_digest(rounds)
        shape = {"batch_size": cfg.calibration.batch_size, "dense_mask": self._dense_mask}
        self._rounds = [
            batched(rows[rank::world_size], tokenizer=self._tokenizer, device=self._device, **shape)
            for rows in rounds
        ]
        check_batches([batch for batches in self._rounds for batch in batches], self._vocab_size)

    def _find_starts(
        self, cfg: DictConfig, linears: Mapping[str, nn.Module], base: SharedReading
    ) -> dict[str, LowRank]:
        """Where every adapter starts: a part of its weight, found by one process; nothing for LoRA."""
        started = time.perf_counter()
        method = method_of(cfg.adapter)
        if method.decomposition is None:
            return {}
        options = {
            **cfg.adapter,
            **cfg.calibration,
            "dtype": cfg.dtype,
            "model": OmegaConf.to_container(cfg.model),
        }
        key = decomposition_key(
            self._fingerprints["base"], self._linears, self._calibration_digest, options
        )
        with self._world.all_succeed("Opening the decomposition's cache"):
            cache = DecompositionCache(
                Path(cfg.calibration.cache_dir), key, writes=self._world.is_rank_zero
            )
        self._world.check_same({"calibration.cache_dir's content": cache.content()})
        covariances, compute = (
            partial(self._covariances, cfg, linears, base),
            partial(distribute_jobs, world=self._world),
        )
        components, spectra = decompose(
            self._linears, covariances, cache, method=method, options=options, compute=compute
        )
        if self._world.is_rank_zero:
            write_decomposition(
                Path(cfg.output_dir) / "decomposition.json", components, spectra, mode=method.mode
            )
        self._world.check_same(
            {"decomposition": tensors_digest(c.projection for c in components.values())}
        )
        log.info(f"Adapters started in {time.perf_counter() - started:.1f} s.")
        return {
            name: split_component(
                components.pop(name), self._linears[name].scaling, cfg.adapter.split
            )
            for name in list(components)
        }

    def _covariances(
        self, cfg: DictConfig, linears: dict, base: SharedReading, wanted: Wanted, title: str
    ) -> Iterator:
        """Layers that share an input, calibration round, covariance over all processes; None where none is needed."""
        lend = partial(weights_loaded, linears, base, device=self._device)
        bar = partial(tqdm, desc=title, dynamic_ncols=True, disable=not self._world.is_rank_zero)
        if not method_of(cfg.adapter).calibrated:
            for name in bar(self._linears, unit="layer"):
                with lend(name):
                    yield [name], 0, None
            return
        options = {
            name: cfg.adapter[name] for name in ("damping", "damping_search", "normalization")
        }
        options |= {
            "dtype": training.get_dtype(cfg.calibration.accumulate),
            "offload": cfg.calibration.offload,
        }
        options |= {
            "progress": partial(bar, unit="batch"),
            "loaded": lend,
            "combine": partial(add_up, world=self._world),
        }
        yield from damped_covariances(
            self._model, self._groups, self._rounds, wanted=wanted, **options
        )

    def _print_budget(self, cfg: DictConfig) -> None:
        shape = {
            "batch_size": cfg.batch_size,
            "seq_len": self._tokenizer.max_seq_len or self._model.max_seq_len,
        }
        shape |= {"vocab_size": self._vocab_size, "loss_chunk": self._loss_fn.chunk_size}
        make = partial(config.instantiate, cfg.optimizer)
        budget = memory_budget(self._model, make, adapter_dtype=self._adapter_dtype, **shape)
        if self._rounds:
            options = {
                "dtype": training.get_dtype(cfg.calibration.accumulate),
                "offload": cfg.calibration.offload,
            }
            budget |= calibration_bytes(self._model, self._groups, self._rounds, **options)
        shards = cfg.data_parallel_shard_dim or cfg.world_size or 1
        print(*budget_report(self._model, per_process(budget, self._model, shards)), sep="\n")

    def train_step(self, cfg: DictConfig, window: list[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step on the mean loss per labelled token of all batches of the window.

        Raises:
            RuntimeError: the loss or the gradient is not finite; no weight has been touched.
        """
        task_loss, num_tokens = self._accumulate(window)
        return self._apply(cfg, {"loss": task_loss}) | {"num_tokens": num_tokens}

    # --- shared: distributed training loop
    def train(self, cfg: DictConfig) -> int:
        """Run to the end, or to the first SIGINT or SIGTERM. Returns the exit status: 0, or 128 + signal."""
        self._model.train()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)  # loading and decomposing are over
        profiler = (
            config.instantiate(cfg.profiler)[0]
            if cfg.profiler.enabled
            else training.DummyProfiler()
        )
        shown = {"unit": "step", "dynamic_ncols": True, "disable": not self._world.is_rank_zero}
        bar = tqdm(total=self._total_steps, initial=self.step, **shown)
        with contextlib.ExitStack() as held, profiler, checkpointing.StopSignals() as self._stop:
            with self._world.all_succeed("Opening the output folder"):
                if self._world.is_rank_zero:
                    held.enter_context(checkpointing.run_lock(self._checkpoints))
            self._open_log(cfg)
            while self.step < self._total_steps:
                self._loader.batch_sampler.set_position(self.epoch, self.batches_done)
                for window in self._windows(cfg):
                    self._step_and_log(cfg, window, bar)
                    profiler.step()
                    done = self.step == self._total_steps or self._stopping
                    if done or (cfg.save_every_n_steps and self.step % cfg.save_every_n_steps == 0):
                        self.save_checkpoint(cfg)
                    if done:
                        break
                if self._stopping or self.step == self._total_steps:
                    break
                self.epoch, self.batches_done = self.epoch + 1, 0
                if not cfg.save_every_n_steps:
                    self.save_checkpoint(cfg)
        bar.close()
        if self._stopping and self.step < self._total_steps:
            log.warning(
                f"Stopped by a signal after step {self.step}; resume_from_checkpoint=True goes on from here."
            )
            return 128 + (self._stop.received or signal.SIGTERM)
        log.info(
            f"Finished. Adapter: {checkpointing.list_checkpoints(self._checkpoints)[-1] / 'adapter.safetensors'}"
        )
        return 0

    def _open_log(self, cfg: DictConfig) -> None:
        """The config, no line of steps that will be done again, and the losses before the first step."""
        self._stopping = False
        self._logger.log_config(cfg)
        if hasattr(self._logger, "rewind"):
            self._logger.rewind(self.step if self._resume_path else -1)
        if self.step == 0 and cfg.run_val_every_n_steps:
            with disable_adapter(self._model):
                base_loss = self.validate()
            self._logger.log_dict({"val_loss_base": base_loss, "val_loss": self.validate()}, step=0)

    def _windows(self, cfg: DictConfig) -> Iterator[list[dict[str, Any]]]:
        """Batches of one optimizer step each, fewer in an epoch's last. A bad row anywhere costs no finished step.

        The processes agree here: how many tokens all of them learn from, and whether one failed or was told to stop.
        """
        batches, ignored = iter(self._loader), self._loss_fn.ignore_index
        while self.batches_done < self._steps_per_epoch * self._accumulation:
            window, failure = [], None
            try:
                window = list(islice(batches, self._accumulation))
                check_batches(window, self._vocab_size)
            except Exception as error:
                failure = error
            labelled = sum(int((batch["labels"] != ignored).sum()) for batch in window)
            told = self._stop.received is not None
            self._num_tokens, failed, stopping = map(
                int, self._world.sum(labelled, failure is not None, told)
            )
            if failed:
                if self.step:
                    self.save_checkpoint(cfg)
                raise failure or OtherRankError(
                    "A batch could not be read on another rank; its message says why."
                )
            if not window:
                return
            self._stopping = stopping > 0
            self.batches_done += len(window)
            yield window

    def _accumulate(self, window: list[dict[str, Any]]) -> tuple[Tensor, int]:
        """Gradients of the mean cross-entropy over the labelled tokens of all processes; that mean, their number."""
        task_loss = torch.zeros((), device=self._device)
        for i, batch in enumerate(window, start=1):
            self._model.set_requires_gradient_sync(i == len(window))
            loss = self._loss_sum(batch) / max(1, self._num_tokens)
            (loss * self._world.size).backward()  # FSDP takes the mean over processes
            task_loss += loss.detach()
        total, told = self._world.sum(task_loss.item(), self._stop.received is not None)
        self._stopping |= told > 0
        return torch.tensor(total, device=self._device), self._num_tokens

    def _apply(self, cfg: DictConfig, losses: dict[str, Tensor]) -> dict[str, float]:
        """Clip, check, step; the step's metrics. Whatever is not finite reaches no weight."""
        max_norm = float("inf") if cfg.clip_grad_norm is None else cfg.clip_grad_norm
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self._trained, max_norm))
        values = torch.stack(
            [v.detach().to(self._device) for v in (*losses.values(), grad_norm)]
        ).tolist()
        if not all(map(math.isfinite, values)):
            newest = (checkpointing.list_checkpoints(self._checkpoints) or ["none"])[-1]
            raise RuntimeError(
                f"Step {self.step + 1}: loss {values[0]}, gradient norm {values[-1]}. Weights are still those of step "
                f"{self.step}; last checkpoint: {newest}. Lower optimizer.lr, set clip_grad_norm, or look at the data."
            )
        lr = float(
            self._optimizer.param_groups[0]["lr"]
        )  # some optimizers keep a tensor, which the step changes
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._lr_scheduler:
            self._lr_scheduler.step()
        self.step += 1
        return dict(zip((*losses, "grad_norm"), values, strict=True)) | {"lr": lr}

    def _loss_sum(self, batch: dict[str, Any]) -> Tensor:
        """Summed cross-entropy of one batch."""
        utils.batch_to_device(batch, self._device)
        labels = batch.pop("labels")  # [b, s]
        with self._offload:
            hidden = self._model(**batch)  # [b, s, d]
        return self._loss_fn(self._model.output, hidden, labels)

    def _step_and_log(self, cfg: DictConfig, window: list[dict[str, Any]], bar: tqdm) -> None:
        started = time.perf_counter()
        seen = sum(batch["tokens"].numel() for batch in window)
        metrics = self.train_step(cfg, window)
        metrics["tokens_per_second"] = self._world.size * seen / (time.perf_counter() - started)
        if cfg.log_peak_memory_stats and self._device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        due = cfg.run_val_every_n_steps and self.step % cfg.run_val_every_n_steps == 0
        if (
            due or (cfg.run_val_every_n_steps and self.step == self._total_steps)
        ) and not self._stopping:
            metrics["val_loss"] = self.validate()
        shown = ("loss", "val_loss", "l2", "l3", "lr", "tokens_per_second", "peak_memory_gib")
        bar.set_postfix(
            {name: f"{metrics[name]:.4g}" for name in shown if name in metrics}, refresh=False
        )
        bar.update()
        if (
            self.step % cfg.log_every_n_steps == 0
            or "val_loss" in metrics
            or self.step == self._total_steps
        ):
            self._logger.log_dict(metrics, step=self.step)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross-entropy per labelled token of the validation set."""
        self._model.eval()
        total, num_tokens = torch.zeros((), dtype=torch.float64, device=self._device), 0
        for batch in self._loader_val:
            num_tokens += int((batch["labels"] != self._loss_fn.ignore_index).sum())
            total += self._loss_sum(batch)
        self._model.train()
        total, num_tokens = self._world.sum(total.item(), num_tokens)
        return total / num_tokens

    def save_checkpoint(self, cfg: DictConfig) -> None:
        """The adapter, and all that going on bit for bit takes."""
        run = {"step": self.step, "epoch": self.epoch, "batches_done": self.batches_done}
        run |= {"total_steps": self._total_steps} | self._fingerprints
        run |= {"lr_scheduler": self._lr_scheduler.state_dict() if self._lr_scheduler else None}
        run |= {"config": OmegaConf.to_container(cfg, resolve=True), "world_size": self._world.size}
        first, *others = self._world.gather(checkpointing.rng_state())
        parts = {
            "adapter": adapter_state_dict(self._model),
            "optimizer": full_tensors(self._optimizer.state_dict()),
        }
        parts |= {"rng": first | {"other_ranks": others}, "run": run}
        write = partial(
            checkpointing.save_checkpoint,
            self._checkpoints,
            self.step,
            parts,
            keep_last=cfg.keep_last,
        )
        self._world.on_rank_zero(lambda: write() and None, "Saving")

    def cleanup(self) -> None:
        """Close the metric logger, part from the other processes."""
        self._logger.close()
        self._world.leave()

    # --- end


@config.parse(config.CORDA)
def recipe_main(cfg: DictConfig) -> int:
    """Entry point: ``--config <name or path> [key=value ...]``."""
    recipe = CorDAFinetuneRecipeDistributed(cfg)
    recipe.setup(cfg)
    if cfg.dry_run:
        return 0
    status = recipe.train(cfg)
    recipe.cleanup()
    return status


if __name__ == "__main__":
    sys.exit(recipe_main())
