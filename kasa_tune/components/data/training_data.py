"""The training and validation batches of a run, and how many optimizer steps they make."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune.utils import get_logger

from kasa_tune.components.data.batches import build_dataloader
from kasa_tune.components.data.building import build_dataset, check_batches, check_token_ids
from kasa_tune.components.data.counting import check_all_samples
from kasa_tune.components.data.fingerprints import data_fingerprint

Batch = dict[str, Any]  # tokens, labels [b, s]; of packed rows also mask and input_pos [b, s]


class TrainingData:
    """Data sets of a config, built and checked, as batches in an order that depends on the seed alone.

    Args:
        cfg: the checked config of a fine-tuning recipe.
        tokenizer: built from ``cfg.tokenizer``.
        vocab_size: rows of the model's embedding; larger token ids are refused.
        device: where the model runs. It decides the kind of attention mask that packed rows get.
        dense_mask: packed rows always get a boolean mask, for attention that takes no ``BlockMask``.
        rank: of this process.
        world_size: number of processes, each of which gets its share of every step's samples.

    Attributes:
        tokenizer: that of the data.
        dataset: what is learned from, see ``build_dataset``.
        dataset_val: held-out samples, or None.
        fingerprint: SHA-256 of what is learned from; a resumed run must have the same.
        steps_per_epoch: optimizer steps of an epoch.
        total_steps: optimizer steps of the run.
        num_batches: of a full epoch, on one process.

    Raises:
        ValueError: a data set is empty, damaged, or of another tokenizer than the model's, or more than half of its
            samples have nothing to learn.
    """

    def __init__(
        self,
        cfg: DictConfig,
        tokenizer: Any,
        *,
        vocab_size: int,
        device: torch.device,
        dense_mask: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._vocab_size, self.tokenizer = vocab_size, tokenizer
        loader = partial(
            build_dataloader,
            tokenizer=tokenizer,
            seed=cfg.seed,
            num_workers=cfg.num_workers,
            device=device,
            dense_mask=dense_mask,
            rank=rank,
            world_size=world_size,
        )
        self.dataset = dataset = build_dataset(cfg.dataset, tokenizer, name="dataset")
        check_token_ids(dataset, vocab_size)
        log = get_logger("INFO") if rank == 0 else None
        self._batches = loader(dataset, batch_size=cfg.batch_size, shuffle=cfg.shuffle)
        self._validation = self.dataset_val = None
        if cfg.dataset_val:
            self.dataset_val = dataset_val = build_dataset(
                cfg.dataset_val, tokenizer, name="dataset_val"
            )
            check_token_ids(dataset_val, vocab_size)
            is_used = bool(cfg.run_val_every_n_steps)
            check_all_samples(dataset_val, name="dataset_val", log=log, all_are_used=is_used)
            self._validation = loader(dataset_val, batch_size=cfg.batch_size_val, shuffle=False)
        self.num_batches = len(self._batches.batch_sampler)
        self.batches_per_step = cfg.gradient_accumulation_steps
        self.steps_per_epoch = -(-self.num_batches // self.batches_per_step)
        if cfg.max_steps_per_epoch:
            self.steps_per_epoch = min(self.steps_per_epoch, cfg.max_steps_per_epoch)
        self.total_steps = min(self.steps_per_epoch * cfg.epochs, cfg.max_steps or sys.maxsize)
        is_whole = self.total_steps * self.batches_per_step >= self.num_batches
        check_all_samples(dataset, name="dataset", log=log, all_are_used=is_whole)
        self.fingerprint = data_fingerprint(dataset, nodes=cfg.dataset, tokenizer=cfg.tokenizer)

    def steps(self, epoch: int, batches_done: int) -> Iterator[list[Batch]]:
        """The batches of each optimizer step of an epoch, fewer in its last step.

        Args:
            epoch: from 0.
            batches_done: batches of the epoch that are left out, because a step has taken them already.

        Raises:
            ValueError: a row cannot be tokenized, or holds a token id that the model lacks.
        """
        self._batches.batch_sampler.set_position(epoch, batches_done)
        batches = iter(self._batches)
        while batches_done < self.steps_per_epoch * self.batches_per_step:
            of_step = list(islice(batches, self.batches_per_step))
            check_batches(of_step, self._vocab_size)
            if not of_step:
                return
            batches_done += len(of_step)
            yield of_step

    def validation(self) -> Iterator[Batch]:
        """The batches of the validation set, each sample once."""
        return iter(self._validation or ())
