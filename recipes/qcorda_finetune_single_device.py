"""Fine-tune a language model with QCorDA (or QPiSSA, LoftQ, QLoRA, QKaSA) on one device: the base
in 4 bits.

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

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
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
    Calibrator,
    Wanted,
    decompose,
    open_cache,
    write_decomposition,
)
from kasa_tune.components.data import Batch, TrainingData, build_tokenizer
from kasa_tune.components.linalg import Component, quantize
from kasa_tune.components.models.base_weights import open_base
from kasa_tune.components.models.loading import (
    load_base_weights,
    needs_dense_mask,
    read_tensor,
    weights_loaded,
)
from kasa_tune.components.quantized import (
    FOLDER,
    keep_quantized,
    load_quantized,
    quantized_linears,
    quantized_start,
)
from kasa_tune.components.training import (
    Phases,
    Steps,
    allow_graphs,
    build_training_model,
    check_optimizer,
    dry_run_report,
    report_without_rows,
    rows_at_hand,
    summed_loss,
)
from kasa_tune.methods import METHODS, method_of

log = utils.get_logger("INFO")


class QCorDAFinetuneRecipeSingleDevice(FTRecipeInterface):
    """Fine-tuning on an NF4 base, on a CPU or one GPU. Runs resume exactly.

    Args:
        cfg: the checked config; docs/configs.md describes its keys.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._device = utils.get_device("cpu" if cfg.dry_run else cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._adapter_dtype = training.get_dtype(cfg.adapter.dtype, device=self._device)
        self._method = method_of(cfg.adapter)
        self._regularized = "kasa" in self._method.builders
        self._phases = Phases()
        training.set_seed(cfg.seed)

    def setup(self, cfg: DictConfig) -> None:
        """Set up the run. The checks that can fail quickly come before any weight is read."""
        self._checkpoint = starting_checkpoint(cfg)
        self._model = build_training_model(cfg, dtype=self._dtype)
        self._linears = dict(adapter_linears(self._model))
        self._quantized = quantized_linears(self._model, cfg.quantization.block_size)
        vocab_size = self._model.tok_embeddings.num_embeddings
        self._loss = summed_loss(config.instantiate(cfg.loss), vocab_size)
        check_optimizer(partial(config.instantiate, cfg.optimizer), self._model, device=cfg.device)
        if cfg.dry_run and not rows_at_hand(cfg):
            options = {"loss": self._loss, "quantized": self._quantized}
            print(*report_without_rows(cfg, self._model, **options), sep="\n")
            return
        self._tokenizer = build_tokenizer(cfg.tokenizer, longest=self._model.max_seq_len)
        masks = {"device": self._device, "dense_mask": needs_dense_mask(self._model)}
        self._data = TrainingData(cfg, self._tokenizer, vocab_size=vocab_size, **masks)
        self._calibrator = None
        if self._method.calibrated and not self._checkpoint:
            self._calibrator = Calibrator(cfg, self._tokenizer, self._model, **masks)
        if cfg.dry_run:
            self._print_budget(cfg)
            return
        self._fingerprints = {"data": self._data.fingerprint}
        if self._checkpoint:
            self._checkpoint.check_data(self._data.fingerprint)
        self._setup_weights(cfg)
        if cfg.compile:
            allow_graphs(4 * len(self._linears))  # every rank needs its own graph
            training.compile_model(self._model, verbose=False)
        offload = cfg.enable_activation_offloading
        self._offload = training.get_act_offloading_ctx_manager(self._model, offload)
        groups = lora_plus_groups(self._model, cfg.optimizer.get("lr"), cfg.adapter.lr_ratio)
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
            phases=self._phases,
            device=self._device,
        )

    def _setup_weights(self, cfg: DictConfig) -> None:
        """Read the base. Load NF4 weights and adapters from a checkpoint, or make them."""
        base, fingerprints = open_base(cfg, self._checkpoint)
        self._fingerprints |= fingerprints
        checkpoint = self._checkpoint
        load_base_weights(
            self._model,
            base,
            device=self._device,
            adapter_dtype=self._adapter_dtype,
            without={f"{name}.weight" for name in self._quantized},
        )
        with run_lock(Path(cfg.output_dir) / "checkpoints"):  # two runs must not write here at once
            if checkpoint and checkpoint.has_quantized_base:
                load_quantized(checkpoint, self._quantized, self._device)
            else:
                self._start_adapters(cfg, base)
            if checkpoint:
                load_adapter_state_dict(self._model, checkpoint.adapter)
            resumes = checkpoint and checkpoint.resumes
            self._fingerprints["quantized_base"] = keep_quantized(
                Path(cfg.output_dir) / FOLDER,
                {name: linear.weight for name, linear in self._quantized.items()},
                known=checkpoint.run.get("quantized_base") if resumes else None,
            )

    def _start_adapters(self, cfg: DictConfig, base: Mapping[str, Tensor]) -> None:
        """Decompose the adapted weights, one block at a time. Then quantize all weights."""
        self._phases.done("reading data and weights")
        # An adapter that comes without a quantized base takes nothing out of the weights.
        method = METHODS["qlora"] if self._checkpoint else self._method
        components, spectra = self._decompose(cfg, base) if method.calibrated else ({}, {})
        options = {
            "quantize": partial(quantize, **cfg.quantization, dtype=self._dtype),
            "iterations": cfg.adapter.quantization_iterations,
            "split": cfg.adapter.split,
            "adapter_dtype": self._adapter_dtype,
        }
        bar = tqdm(self._quantized.items(), "Quantizing", unit="layer", dynamic_ncols=True)
        for name, linear in bar:
            weight = read_tensor(base, f"{name}.weight", device=self._device, dtype=torch.float32)
            component = components.get(name)
            adapted = self._linears.get(name)
            start = quantized_start(weight, adapted, method, component=component, **options)
            start.put_into(linear)
            if start.component:
                components[name] = start.without_vectors().component.to("cpu")
        if components:
            report = Path(cfg.output_dir) / "decomposition.json"
            write_decomposition(report, components, spectra, mode=method.mode)
        seconds = self._phases.done("starting the adapters")
        log.info(f"Base quantized and adapters started in {seconds:.1f} s.")

    def _decompose(
        self, cfg: DictConfig, base: Mapping[str, Tensor]
    ) -> tuple[dict[str, Component], dict]:
        """Compute CorDA's components of all adapted layers, or take them from the cache."""
        cache = open_cache(
            cfg,
            self._method,
            base=self._fingerprints["base"],
            layers=self._linears,
            data=self._calibrator.digest,
        )
        return decompose(
            self._linears,
            partial(self._covariances, base),
            cache,
            method=self._method,
            options={**cfg.adapter, **cfg.calibration},
        )

    def _covariances(
        self, base: Mapping[str, Tensor], wanted: Wanted, title: str
    ) -> Iterator[tuple]:
        """Yield layers with the same input, the round, and the covariance ``(d_in, d_in)``."""
        loaded = partial(weights_loaded, self._quantized, base, device=self._device)
        return self._calibrator.covariances(wanted, title, loaded=loaded)

    def _print_budget(self, cfg: DictConfig) -> None:
        calibrator = self._calibrator
        report = dry_run_report(
            cfg,
            self._model,
            tokenizer=self._tokenizer,
            loss=self._loss,
            quantized=self._quantized,
            calibration=(calibrator.groups, calibrator.rounds) if calibrator else None,
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
        regularization = {key: adapter[key] for key in ("orthogonal_gram", "reduction")}
        with self.steps as steps:
            for step in steps:
                for batch in step.batches:
                    loss = self._loss_sum(batch) / step.num_tokens
                    loss.backward()
                    step.add_loss(loss)
                if self._regularized:
                    l2, l3 = kasa_regularization(self._linears.values(), **regularization)
                    (adapter.beta * l2 + adapter.gamma * l3).backward()
                    step.log(l2=l2, l3=l3)
                step.apply(self._optimizer, self._lr_scheduler, clip_grad_norm=cfg.clip_grad_norm)
        return steps.exit_status


@config.parse(config.QCORDA)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = QCorDAFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    return 0 if cfg.dry_run else recipe.train(cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
