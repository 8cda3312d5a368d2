"""The batches of a classifier: texts in an order that depends on the seed alone, padded to the
longest of their batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset
from torchtune.utils import get_logger

from kasa_tune.components.data.batches import FILLER, EpochBatches
from kasa_tune.components.data.building import load_rows
from kasa_tune.components.data.encoder_tokenizer import EncoderTokenizer
from kasa_tune.components.data.fingerprints import data_fingerprint
from kasa_tune.components.data.labelled_texts import LabelledTexts

Batch = dict[str, Any]  # tokens [b, s], labels [b]

log = get_logger("INFO")


class EncodedTexts(Dataset):
    """Tokens and label of every row of a config's section.

    Args:
        node: a config's section ``dataset``.
        tokenizer: of the model.
        num_labels: of the model.
        name: the config's key, for messages.
        labelled: False for texts whose labels do not matter; they may then have none.

    Attributes:
        ignore_index: the label of rows that fill up a batch. Nothing is learned from them.

    Raises:
        ValueError: a row cannot be used; the message names row and column. Or there are no labels.
    """

    def __init__(
        self,
        node: Any,
        tokenizer: EncoderTokenizer,
        num_labels: int,
        *,
        name: str,
        labelled: bool = True,
    ) -> None:
        rows, self.node = load_rows(node, tokenizer, name=name)
        if not isinstance(rows, LabelledTexts):
            raise ValueError(
                f"{name}._component_: {node['_component_']} gives no texts with labels. Use "
                "kasa_tune.components.data.labelled_texts."
            )
        if labelled and "label" not in rows.columns:
            raise ValueError(f"{name}.columns names no column for label. Set {name}.columns.label.")
        self.pairs, before = rows.pairs, tokenizer.num_full
        self.tokens, self.labels = rows.encode(
            num_labels if labelled else None, name=name, node=self.node
        )
        self.ignore_index = -100 if self.labels.dtype == np.int64 else -math.inf
        if cut := tokenizer.num_full - before:
            log.info(
                f"{name}: {cut:,} of {len(rows):,} rows have as many tokens as "
                f"tokenizer.max_seq_len allows, {tokenizer.max_seq_len}. What is more is cut off."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens[index], "labels": self.labels[index : index + 1]}

    def batch(self, indices: list[int], pad_id: int) -> Batch:
        """Rows as ``tokens [b, s]``, padded on the right, and ``labels [b]``. FILLER among the
        indices is a row with the label ``ignore_index``.
        """
        chosen = [self.tokens[i] for i in indices]
        tokens = np.full((len(chosen), max(map(len, chosen))), pad_id, dtype=np.int64)
        for row, ids in zip(tokens, chosen, strict=True):
            row[: len(ids)] = ids
        labels = np.where(np.equal(indices, FILLER), self.ignore_index, self.labels[indices])
        labels = labels.astype(self.labels.dtype)
        return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


class ClassificationData:
    """Training and validation rows of a config, checked, as batches.

    Args:
        cfg: the checked config of a classification recipe.
        tokenizer: built from ``cfg.tokenizer``.
        num_labels: of the model; 1 for a regression.
        vocab_size: rows of the model's embedding.
        rank: of this process.
        world_size: number of processes, each of which gets its share of every batch's rows.

    Attributes:
        dataset, dataset_val: the rows.
        ignore_index: the label of rows that fill up a batch which does not divide by the processes.
        fingerprint: SHA-256 of what is learned from; a resumed run must have the same.
        steps_per_epoch, total_steps: optimizer steps.
        num_batches: of an epoch, on one process.
        batches_per_step: of an optimizer step.

    Raises:
        ValueError: a row cannot be used, the tokenizer does not fit the model, or one of the sets
            has pairs and the other has none.
    """

    def __init__(
        self,
        cfg: DictConfig,
        tokenizer: EncoderTokenizer,
        *,
        num_labels: int,
        vocab_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"The tokenizer does not fit the model: it has {tokenizer.vocab_size} tokens, and "
                f"the model has {vocab_size}. Set tokenizer to the one the checkpoint came with."
            )
        self._pad_id = tokenizer.pad_id
        self.dataset = EncodedTexts(cfg.dataset, tokenizer, num_labels, name="dataset")
        self.dataset_val = EncodedTexts(cfg.dataset_val, tokenizer, num_labels, name="dataset_val")
        if self.dataset.pairs != self.dataset_val.pairs:
            raise ValueError(
                "dataset and dataset_val: one has the column text_pair and the other has not. Set "
                "columns alike."
            )
        self.ignore_index = self.dataset.ignore_index
        share = {"seed": cfg.seed, "rank": rank, "world_size": world_size}
        self._batches = EpochBatches(
            [len(self.dataset)], batch_size=cfg.batch_size, shuffle=cfg.shuffle, **share
        )
        self._validation = EpochBatches(
            [len(self.dataset_val)], batch_size=cfg.batch_size_val, shuffle=False, **share
        )
        self.num_batches = len(self._batches)
        self.batches_per_step = cfg.gradient_accumulation_steps
        self.steps_per_epoch = -(-self.num_batches // self.batches_per_step)
        self.total_steps = min(self.steps_per_epoch * cfg.epochs, cfg.max_steps or sys.maxsize)
        self.fingerprint = data_fingerprint(
            self.dataset, nodes=cfg.dataset, tokenizer=cfg.tokenizer
        )

    def steps(self, epoch: int, batches_done: int) -> Iterator[list[Batch]]:
        """The batches of each optimizer step of an epoch, fewer in its last step.

        Args:
            epoch: from 0.
            batches_done: batches of the epoch that are left out, because a step has taken them.
        """
        self._batches.set_position(epoch, batches_done)
        indices = iter(self._batches)
        while of_step := list(islice(indices, self.batches_per_step)):
            yield [self.dataset.batch(one, self._pad_id) for one in of_step]

    def validation(self) -> Iterator[Batch]:
        """The batches of the validation set, each row once, in the order of the file. Every process
        has the same number of them.
        """
        for indices in self._validation:
            yield self.dataset_val.batch(indices, self._pad_id)
