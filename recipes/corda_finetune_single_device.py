"""Fine-tune a language model with CorDA (or PiSSA, MiLoRA, LoRA, DoRA) on one device.

    tune run corda_finetune_single_device --config tiny_corda
    tune cp corda_finetune_single_device my_corda.py && tune run my_corda.py --config my.yaml

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
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor
from torchtune import training, utils
from torchtune.recipe_interfaces import FTRecipeInterface
from tqdm import tqdm

from kasa_tune import config
from kasa_tune.components.adapters import (
    adapter_linears,
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
from kasa_tune.components.linalg import split_component
from kasa_tune.components.models.base_weights import open_base
from kasa_tune.components.models.loading import load_base_weights, needs_dense_mask
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
from kasa_tune.methods import method_of

log = utils.get_logger("INFO")


class CorDAFinetuneRecipeSingleDevice(FTRecipeInterface):
    """Fine-tuning with CorDA and its relatives on a CPU or one GPU. Runs resume exactly.

    Args:
        cfg: the checked config; docs/configs.md describes its keys.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._device = utils.get_device("cpu" if cfg.dry_run else cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._adapter_dtype = training.get_dtype(cfg.adapter.dtype, device=self._device)
        self._method = method_of(cfg.adapter)
        self._phases = Phases()
        training.set_seed(cfg.seed)

    def setup(self, cfg: DictConfig) -> None:
        """Set up the run. The checks that can fail quickly come before any weight is read."""
        self._checkpoint = starting_checkpoint(cfg)
        self._model = build_training_model(cfg, dtype=self._dtype)
        self._linears = dict(adapter_linears(self._model))
        vocab_size = self._model.tok_embeddings.num_embeddings
        self._loss = summed_loss(config.instantiate(cfg.loss), vocab_size)
        check_optimizer(partial(config.instantiate, cfg.optimizer), self._model, device=cfg.device)
        if cfg.dry_run and not rows_at_hand(cfg):
            print(*report_without_rows(cfg, self._model, loss=self._loss), sep="\n")
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
        """Read the base weights. Load the adapters from a checkpoint, or initialize them."""
        base, fingerprints = open_base(cfg, self._checkpoint)
        self._fingerprints |= fingerprints
        load_base_weights(self._model, base, device=self._device, adapter_dtype=self._adapter_dtype)
        del base
        if self._checkpoint:
            load_adapter_state_dict(self._model, self._checkpoint.adapter)
            return
        with run_lock(Path(cfg.output_dir) / "checkpoints"):  # two runs must not write here at once
            self._start_adapters(cfg)

    def _start_adapters(self, cfg: DictConfig) -> None:
        """Initialize every adapter: LoRA at zero, the others from a part of their weight."""
        self._phases.done("reading data and weights")
        method = self._method
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
        seconds = self._phases.done("starting the adapters")
        log.info(f"Adapters started in {seconds:.1f} s.")

    def _covariances(self, wanted: Wanted, title: str) -> Iterator[tuple]:
        """Yield layers with the same input, the round, and the covariance ``(d_in, d_in)``."""
        if self._calibrator:
            return self._calibrator.covariances(wanted, title)
        return (([name], 0, None) for name in tqdm(self._linears, title, unit="layer"))

    def _print_budget(self, cfg: DictConfig) -> None:
        calibrator = self._calibrator
        report = dry_run_report(
            cfg,
            self._model,
            tokenizer=self._tokenizer,
            loss=self._loss,
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
        with self.steps as steps:
            for step in steps:
                for batch in step.batches:
                    loss = self._loss_sum(batch) / step.num_tokens
                    loss.backward()
                    step.add_loss(loss)
                step.apply(self._optimizer, self._lr_scheduler, clip_grad_norm=cfg.clip_grad_norm)
        return steps.exit_status


@config.parse(config.CORDA)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = CorDAFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    return 0 if cfg.dry_run else recipe.train(cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
