"""Fine-tune a language model with QCorDA (or QPiSSA, LoftQ, QLoRA, QKaSA) on one device: the base in 4 bits.

    tune run qcorda_finetune_single_device --config tiny_qcorda
    tune cp qcorda_finetune_single_device my_qcorda.py && tune run my_qcorda.py --config my.yaml

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
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import modules, training, utils
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules.peft import disable_adapter
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters.regularization import kasa_regularization
from kasa_tune.components.adapters.state import (
    adapter_linears,
    adapter_state_dict,
    load_adapter_state_dict,
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
from kasa_tune.components.data.fingerprints import data_fingerprint
from kasa_tune.components.linalg.decomposition import Component
from kasa_tune.components.linalg.nf4 import quantize
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.components.models.loading import (
    build_on_meta,
    load_base_weights,
    read_tensor,
    require_adapters,
    weights_loaded,
)
from kasa_tune.components.quantized import base as quantized_base
from kasa_tune.components.quantized.start import quantized_start
from kasa_tune.components.training.loss import ChunkedCrossEntropy, return_hidden_states
from kasa_tune.components.training.memory import (
    allow_graphs,
    budget_report,
    check_optimizer,
    memory_budget,
)
from kasa_tune.methods import METHODS, method_of

log = utils.get_logger("INFO")


class QCorDAFinetuneRecipeSingleDevice(FTRecipeInterface):
    """Fine-tuning of a base in NF4 on a CPU or one GPU, with exact resume from any saved step.

    Args:
        cfg: the checked config; its keys are described in docs/configs.md.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._device = utils.get_device("cpu" if cfg.dry_run else cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._adapter_dtype = training.get_dtype(cfg.adapter.dtype, device=self._device)
        self._checkpoints = Path(cfg.output_dir) / "checkpoints"
        self.step = self.epoch = self.batches_done = (
            0  # optimizer steps, finished epochs, batches of the running epoch
        )
        self._fingerprints: dict[
            str, str
        ] = {}  # of data and base weights, kept in every checkpoint
        training.set_seed(cfg.seed)

    def setup(self, cfg: DictConfig) -> None:
        """What can fail cheaply first: resume point, shapes, data. Then weights, decomposition, optimizer."""
        settings, choice = OmegaConf.to_container(cfg, resolve=True), cfg.resume_from_checkpoint
        self._resume_path = (
            None if cfg.dry_run else resume_point(self._checkpoints, choice, settings)
        )
        self._resumed = (
            checkpointing.load_part(self._resume_path, "run") if self._resume_path else {}
        )
        quantized = {"quantization": settings["quantization"], "dtype": cfg.dtype}
        self._start_path = start_point(
            self._resume_path, cfg.adapter_checkpoint, quantized=quantized
        )
        self._model = build_on_meta(partial(config.instantiate, cfg.model), dtype=self._dtype)
        require_adapters(self._model, cfg.model._component_)
        self._linears, self._groups = dict(adapter_linears(self._model)), shared_inputs(self._model)
        self._quantized = quantized_base.quantized_linears(self._model, cfg.quantization.block_size)
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
        check_optimizer(partial(config.instantiate, cfg.optimizer), self._model)
        self._setup_data(cfg)
        self._rounds, self._calibration_digest = [], None
        if method_of(cfg.adapter).calibrated and not self._start_path:
            self._setup_calibration(cfg)
        if cfg.dry_run:
            return self._print_budget(cfg)
        self._setup_weights(cfg)
        self._trained = [
            parameter for parameter in self._model.parameters() if parameter.requires_grad
        ]
        if cfg.compile:
            allow_graphs(4 * len(self._linears))  # ranks differ from layer to layer
            training.compile_model(self._model, verbose=False)
        self._offload = training.get_act_offloading_ctx_manager(
            self._model, cfg.enable_activation_offloading
        )
        groups = lora_plus_groups(self._model, cfg.optimizer.get("lr"), cfg.adapter.lr_ratio)
        self._optimizer = config.instantiate(cfg.optimizer, groups)
        self._lr_scheduler = config.instantiate(
            cfg.lr_scheduler, self._optimizer, num_training_steps=self._total_steps
        )
        if self._resume_path:
            self._restore()
        self._logger = config.instantiate(cfg.metric_logger)
        log.info(
            f"{sum(p.numel() for p in self._trained):,} parameters to train, {self._total_steps} steps in all."
        )

    # --- shared: data and resuming
    def _setup_data(self, cfg: DictConfig) -> None:
        self._tokenizer = config.instantiate(cfg.tokenizer)
        self._dataset = build_dataset(cfg.dataset, self._tokenizer, name="dataset")
        self._fingerprints["data"] = data_fingerprint(
            self._dataset, nodes=cfg.dataset, tokenizer=cfg.tokenizer
        )
        if self._resume_path and self._resumed["data"] != self._fingerprints["data"]:
            raise ValueError(
                f"{self._resume_path} was trained on other data than dataset and tokenizer now give."
            )
        self._vocab_size = self._model.tok_embeddings.num_embeddings
        check_token_ids(self._dataset, self._vocab_size)
        self._dense_mask = any(
            isinstance(module, Gemma2Attention) for module in self._model.modules()
        )
        options = {"tokenizer": self._tokenizer, "seed": cfg.seed, "num_workers": cfg.num_workers}
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
        self._optimizer.load_state_dict(checkpointing.load_part(self._resume_path, "optimizer"))
        if self._lr_scheduler:
            self._lr_scheduler.load_state_dict(state["lr_scheduler"])
            if state["total_steps"] != self._total_steps:
                log.warning(
                    f"The schedule now spans {self._total_steps} steps instead of {state['total_steps']}."
                )
        checkpointing.set_rng_state(checkpointing.load_part(self._resume_path, "rng"))

    # --- end

    def _setup_weights(self, cfg: DictConfig) -> None:
        """Full-precision weights from the checkpoint; quantized base and adapter from one of ours, or made."""
        base = read_base_weights(config.instantiate(cfg.checkpointer))
        self._fingerprints["base"] = checkpointing.weights_fingerprint(base)
        if self._start_path:
            known = {
                "base_fingerprint": self._fingerprints["base"],
                "model": OmegaConf.to_container(cfg.model),
            }
            checkpointing.check_belongs(self._start_path, **known)
        options = {"device": self._device, "adapter_dtype": self._adapter_dtype}
        load_base_weights(
            self._model, base, **options, without={f"{name}.weight" for name in self._quantized}
        )
        with checkpointing.run_lock(self._checkpoints):  # nothing of another run's is touched
            if self._start_path and "quantized_base" in checkpointing.load_part(
                self._start_path, "run"
            ):
                quantized_base.load_quantized(self._start_path, self._quantized, self._device)
            else:
                self._start_adapters(cfg, base)
            if self._start_path:
                load_adapter_state_dict(
                    self._model, checkpointing.load_part(self._start_path, "adapter")
                )
            folder = Path(cfg.output_dir) / quantized_base.FOLDER
            known = self._resumed.get("quantized_base")
            weights = {name: linear.weight for name, linear in self._quantized.items()}
            self._fingerprints["quantized_base"] = quantized_base.keep_quantized(
                folder, weights, known
            )

    def _setup_calibration(self, cfg: DictConfig) -> None:
        """The rows to calibrate on, in rounds of batches."""
        dataset = build_dataset(
            cfg.calibration.dataset, self._tokenizer, name="calibration.dataset"
        )
        names = ("num_samples", "max_seq_len", "concatenate", "rounds", "seed")
        options = {name: cfg.calibration[name] for name in names}
        rounds = draw_rounds(dataset, longest=self._model.max_seq_len, **options)
        self._calibration_digest = rows_digest(rounds)
        shape = {"batch_size": cfg.calibration.batch_size, "dense_mask": self._dense_mask}
        self._rounds = [
            batched(rows, tokenizer=self._tokenizer, device=self._device, **shape)
            for rows in rounds
        ]
        check_batches([batch for batches in self._rounds for batch in batches], self._vocab_size)

    def _start_adapters(self, cfg: DictConfig, base: Mapping[str, Tensor]) -> None:
        """Decompose what QCorDA adapts, a block of weights at a time; then quantize, a weight at a time."""
        started, in_nf4 = (
            time.perf_counter(),
            partial(quantize, **cfg.quantization, dtype=self._dtype),
        )
        method = (
            METHODS["qlora"] if self._start_path else method_of(cfg.adapter)
        )  # an adapter that comes with no base has no edit
        components, spectra = self._decompose(cfg, base) if method.calibrated else ({}, {})
        options = {"iterations": cfg.adapter.quantization_iterations, "split": cfg.adapter.split}
        options |= {"quantize": in_nf4, "adapter_dtype": self._adapter_dtype}
        for name, linear in tqdm(
            self._quantized.items(), "Quantizing", unit="layer", dynamic_ncols=True
        ):
            weight = read_tensor(base, f"{name}.weight", device=self._device, dtype=torch.float32)
            start = quantized_start(
                weight, self._linears.get(name), method, component=components.get(name), **options
            )
            start.put_into(linear)
            if start.component:
                components[name] = start.without_vectors().component.to("cpu")
        if components:
            write_decomposition(
                Path(cfg.output_dir) / "decomposition.json", components, spectra, mode=method.mode
            )
        log.info(f"Base quantized and adapters started in {time.perf_counter() - started:.1f} s.")

    def _decompose(
        self, cfg: DictConfig, base: Mapping[str, Tensor]
    ) -> tuple[dict[str, Component], dict]:
        """CorDA's components of all adapted layers; a CorDA run on the same weights and rows shares its cache."""
        options = {
            **cfg.adapter,
            **cfg.calibration,
            "dtype": cfg.dtype,
            "model": OmegaConf.to_container(cfg.model),
        }
        options["method"] = "corda"
        key = decomposition_key(
            self._fingerprints["base"], self._linears, self._calibration_digest, options
        )
        cache = DecompositionCache(Path(cfg.calibration.cache_dir), key)
        return decompose(
            self._linears,
            partial(self._covariances, cfg, base),
            cache,
            method=method_of(cfg.adapter),
            options=options,
        )

    def _covariances(
        self, cfg: DictConfig, base: Mapping[str, Tensor], wanted: Wanted, title: str
    ) -> Iterator[tuple]:
        """Layers that share an input, calibration round, covariance; only their block's weights are in memory."""
        options = {
            name: cfg.adapter[name] for name in ("damping", "damping_search", "normalization")
        }
        options |= {
            "dtype": training.get_dtype(cfg.calibration.accumulate),
            "offload": cfg.calibration.offload,
        }
        options |= {"progress": partial(tqdm, desc=title, unit="batch", dynamic_ncols=True)}
        loaded = partial(weights_loaded, self._quantized, base, device=self._device)
        return damped_covariances(
            self._model, self._groups, self._rounds, wanted=wanted, loaded=loaded, **options
        )

    def _print_budget(self, cfg: DictConfig) -> None:
        shape = {
            "batch_size": cfg.batch_size,
            "seq_len": self._tokenizer.max_seq_len or self._model.max_seq_len,
        }
        shape |= {"vocab_size": self._vocab_size, "loss_chunk": self._loss_fn.chunk_size}
        make = partial(config.instantiate, cfg.optimizer)
        base = quantized_base.base_bytes(self._model, self._quantized, **cfg.quantization)
        budget = (
            base
            | memory_budget(self._model, make, adapter_dtype=self._adapter_dtype, **shape)
            | base
        )
        if self._rounds:
            options = {
                "dtype": training.get_dtype(cfg.calibration.accumulate),
                "offload": cfg.calibration.offload,
            }
            budget |= calibration_bytes(self._model, self._groups, self._rounds, **options)
        print(*budget_report(self._model, budget), sep="\n")

    def train_step(self, cfg: DictConfig, window: list[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step on the mean loss per labelled token of all batches of the window; QKaSA's regularizers.

        Raises:
            RuntimeError: the loss or the gradient is not finite; no weight has been touched.
        """
        task_loss, num_tokens = self._accumulate(window)
        losses = {"loss": task_loss}
        if cfg.adapter.method == "qkasa":
            options = {name: cfg.adapter[name] for name in ("orthogonal_gram", "reduction")}
            losses["l2"], losses["l3"] = kasa_regularization(self._linears.values(), **options)
            (cfg.adapter.beta * losses["l2"] + cfg.adapter.gamma * losses["l3"]).backward()
        return self._apply(cfg, losses) | {"num_tokens": num_tokens}

    # --- shared: training loop
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
        bar = tqdm(total=self._total_steps, initial=self.step, unit="step", dynamic_ncols=True)
        with (
            checkpointing.run_lock(self._checkpoints),
            profiler,
            checkpointing.StopSignals() as self._stop,
        ):
            self._open_log(cfg)
            while self.step < self._total_steps:
                self._loader.batch_sampler.set_position(self.epoch, self.batches_done)
                for window in self._windows(cfg):
                    self._step_and_log(cfg, window, bar)
                    profiler.step()
                    done = self.step == self._total_steps or self._stop.received is not None
                    if done or (cfg.save_every_n_steps and self.step % cfg.save_every_n_steps == 0):
                        self.save_checkpoint(cfg)
                    if done:
                        break
                if self._stop.received is not None or self.step == self._total_steps:
                    break
                self.epoch, self.batches_done = self.epoch + 1, 0
                if not cfg.save_every_n_steps:
                    self.save_checkpoint(cfg)
        bar.close()
        if self._stop.received is not None and self.step < self._total_steps:
            log.warning(
                f"Stopped by a signal after step {self.step}; resume_from_checkpoint=True goes on from here."
            )
            return 128 + self._stop.received
        log.info(
            f"Finished. Adapter: {checkpointing.list_checkpoints(self._checkpoints)[-1] / 'adapter.safetensors'}"
        )
        return 0

    def _open_log(self, cfg: DictConfig) -> None:
        """The config, no line of steps that will be done again, and the losses before the first step."""
        self._logger.log_config(cfg)
        if hasattr(self._logger, "rewind"):
            self._logger.rewind(self.step if self._resume_path else -1)
        if self.step == 0 and cfg.run_val_every_n_steps:
            with disable_adapter(self._model):
                base_loss = self.validate()
            self._logger.log_dict({"val_loss_base": base_loss, "val_loss": self.validate()}, step=0)

    def _windows(self, cfg: DictConfig) -> Iterator[list[dict[str, Any]]]:
        """Batches of one optimizer step each, fewer in an epoch's last. A bad row costs no finished step."""
        batches = iter(self._loader)
        while self.batches_done < self._steps_per_epoch * self._accumulation:
            try:
                window = list(islice(batches, self._accumulation))
                check_batches(window, self._vocab_size)
            except Exception:
                if self.step:
                    self.save_checkpoint(cfg)
                raise
            if not window:
                return
            self.batches_done += len(window)
            yield window

    def _accumulate(self, window: list[dict[str, Any]]) -> tuple[Tensor, int]:
        """Gradients of the mean cross-entropy over the window's labelled tokens; that mean, and how many there are."""
        num_tokens = sum(
            int((batch["labels"] != self._loss_fn.ignore_index).sum()) for batch in window
        )
        task_loss = torch.zeros((), device=self._device)
        for batch in window:
            loss = self._loss_sum(batch) / max(1, num_tokens)
            loss.backward()
            task_loss += loss.detach()
        return task_loss, num_tokens

    def _apply(self, cfg: DictConfig, losses: dict[str, Tensor]) -> dict[str, float]:
        """Clip, check, step; the step's metrics. Whatever is not finite reaches no weight."""
        max_norm = float("inf") if cfg.clip_grad_norm is None else cfg.clip_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(self._trained, max_norm)
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
        metrics["tokens_per_second"] = seen / (time.perf_counter() - started)
        if cfg.log_peak_memory_stats and self._device.type == "cuda":
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        due = cfg.run_val_every_n_steps and self.step % cfg.run_val_every_n_steps == 0
        if (
            due or (cfg.run_val_every_n_steps and self.step == self._total_steps)
        ) and self._stop.received is None:
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
        return total.item() / num_tokens

    def save_checkpoint(self, cfg: DictConfig) -> None:
        """The adapter, and all that going on bit for bit takes."""
        run = {"step": self.step, "epoch": self.epoch, "batches_done": self.batches_done}
        run |= {"total_steps": self._total_steps} | self._fingerprints
        run |= {"lr_scheduler": self._lr_scheduler.state_dict() if self._lr_scheduler else None}
        run |= {"config": OmegaConf.to_container(cfg, resolve=True)}
        parts = {
            "adapter": adapter_state_dict(self._model),
            "optimizer": self._optimizer.state_dict(),
        }
        parts |= {"rng": checkpointing.rng_state(), "run": run}
        checkpointing.save_checkpoint(self._checkpoints, self.step, parts, keep_last=cfg.keep_last)

    def cleanup(self) -> None:
        """Close the metric logger."""
        self._logger.close()

    # --- end


@config.parse(config.QCORDA)
def recipe_main(cfg: DictConfig) -> int:
    """Entry point: ``--config <name or path> [key=value ...]``."""
    recipe = QCorDAFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    if cfg.dry_run:
        return 0
    status = recipe.train(cfg)
    recipe.cleanup()
    return status


if __name__ == "__main__":
    sys.exit(recipe_main())
