"""Fine-tune a language model with KaSA (or LoRA) on one device.

    tune run kasa_finetune_single_device --config tiny_kasa
    tune cp kasa_finetune_single_device my_kasa.py && tune run my_kasa.py --config my.yaml

The algorithm (KaSA, arXiv 2412.06071):

    for every adapted weight W:    W  <-  W without its k smallest singular triplets
                                   A  ~  Kaiming,  B = 0,  d ~ N(0, 1)
    for every batch:               y  =  W x + s B (d * A x)
                                   L  =  cross-entropy + beta * mean |d|^2 + gamma * mean (|B'B - I| + |AA' - I|)
                                   (A, B, d)  <-  AdamW
"""

import sys
from functools import partial

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
)
from kasa_tune.components.checkpoints import starting_checkpoint
from kasa_tune.components.data import Batch, TrainingData, build_tokenizer
from kasa_tune.components.models.base_weights import open_base
from kasa_tune.components.models.loading import load_base_weights, needs_dense_mask
from kasa_tune.components.training import (
    Phases,
    Steps,
    build_training_model,
    check_optimizer,
    dry_run_report,
    report_without_rows,
    rows_at_hand,
    summed_loss,
)

log = utils.get_logger("INFO")


class KaSAFinetuneRecipeSingleDevice(FTRecipeInterface):
    """Fine-tuning with KaSA or LoRA on a CPU or one GPU. Runs resume exactly.

    Args:
        cfg: the checked config; docs/configs.md describes its keys.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._device = utils.get_device("cpu" if cfg.dry_run else cfg.device)
        self._dtype = training.get_dtype(cfg.dtype, device=self._device)
        self._adapter_dtype = training.get_dtype(cfg.adapter.dtype, device=self._device)
        self._phases = Phases()
        training.set_seed(cfg.seed)

    def setup(self, cfg: DictConfig) -> None:
        """Set up the run. The checks that can fail quickly come before any weight is read."""
        self._checkpoint = starting_checkpoint(cfg)
        self._model = build_training_model(cfg, dtype=self._dtype)
        vocab_size = self._model.tok_embeddings.num_embeddings
        self._loss = summed_loss(config.instantiate(cfg.loss), vocab_size)
        check_optimizer(partial(config.instantiate, cfg.optimizer), self._model, device=cfg.device)
        if cfg.dry_run and not rows_at_hand(cfg):
            print(*report_without_rows(cfg, self._model, loss=self._loss), sep="\n")
            return
        self._tokenizer = build_tokenizer(cfg.tokenizer, longest=self._model.max_seq_len)
        self._data = TrainingData(
            cfg,
            self._tokenizer,
            vocab_size=vocab_size,
            device=self._device,
            dense_mask=needs_dense_mask(self._model),
        )
        if cfg.dry_run:
            self._print_budget(cfg)
            return
        self._fingerprints = {"data": self._data.fingerprint}
        if self._checkpoint:
            self._checkpoint.check_data(self._data.fingerprint)
        self._setup_weights(cfg)
        self._linears = [linear for _, linear in adapter_linears(self._model)]
        if cfg.compile:
            training.compile_model(self._model, verbose=False)
        offload = cfg.enable_activation_offloading
        self._offload = training.get_act_offloading_ctx_manager(self._model, offload)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = config.instantiate(cfg.optimizer, trained)
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
        """Read the base weights. Load the adapters, or truncate the weights and initialize them."""
        base, fingerprints = open_base(cfg, self._checkpoint)
        self._fingerprints |= fingerprints
        load_base_weights(self._model, base, device=self._device, adapter_dtype=self._adapter_dtype)
        del base
        if self._checkpoint:
            load_adapter_state_dict(self._model, self._checkpoint.adapter)
            return
        self._phases.done("reading data and weights")
        linears = list(adapter_linears(self._model))
        for name, linear in tqdm(linears, desc="Starting adapters", unit="layer"):
            try:
                linear.initialize()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        seconds = self._phases.done("starting the adapters")
        log.info(f"Adapters started in {seconds:.1f} s.")

    def _print_budget(self, cfg: DictConfig) -> None:
        report = dry_run_report(cfg, self._model, tokenizer=self._tokenizer, loss=self._loss)
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
                    loss = self._loss_sum(batch) / step.num_tokens
                    loss.backward()
                    step.add_loss(loss)
                l2, l3 = kasa_regularization(self._linears, **options)
                (adapter.beta * l2 + adapter.gamma * l3).backward()
                step.log(l2=l2, l3=l3)
                step.apply(self._optimizer, self._lr_scheduler, clip_grad_norm=cfg.clip_grad_norm)
        return steps.exit_status


@config.parse(config.FINETUNE)
def recipe_main(cfg: DictConfig) -> int:
    """Run the recipe from the command line: ``--config <name or path> [key=value ...]``."""
    recipe = KaSAFinetuneRecipeSingleDevice(cfg)
    recipe.setup(cfg)
    return 0 if cfg.dry_run else recipe.train(cfg)


if __name__ == "__main__":
    sys.exit(recipe_main())
