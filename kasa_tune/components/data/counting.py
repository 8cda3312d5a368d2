"""Every sample is tokenized once, before training: kept for all epochs, and counted.

A prompt that fills ``max_seq_len`` leaves nothing to learn, and a run over such samples would train on nothing without
a word. So all rows are counted, not the first ones.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from kasa_tune.components.data import packing
from kasa_tune.components.data.conversations import runs_turns_together
from kasa_tune.components.data.fingerprints import fingerprint
from kasa_tune.components.data.samples import MixedDataset, ShiftedDataset
from kasa_tune.components.data.tokenizing import FEW, SampleCounts, TokenizedSamples, tokenize_all

MOST_TOKENS = (
    1 << 28
)  # kept of one data set, 2 GiB with their labels; larger ones are tokenized at every visit
NO_TEMPLATE = (
    "WARNING. {name}: the rows are conversations, and the tokenizer has no chat template. Their turns follow one "
    "another as plain text, so the model does not learn who speaks. Set tokenizer.chat_template_path or "
    "tokenizer.prompt_template, or take the tokenizer of an instruct model."
)
_LARGEST_SHARE = 0.5  # of samples that have nothing to learn


class KeptSamples:
    """The tokens of a data set, in memory or memory-mapped.

    Args:
        arrays: ``tokens`` and ``labels`` int32 [t], ``lengths`` int64 [n].
        broken: indices of samples that are not kept because they cannot be tokenized.
        path: the file behind memory-mapped arrays, or None.
    """

    def __init__(
        self, arrays: dict[str, np.ndarray], broken: frozenset[int], path: Path | None = None
    ) -> None:
        self.arrays, self.broken, self.path = arrays, broken, path
        self.ends = np.cumsum(arrays["lengths"])

    def __contains__(self, index: int) -> bool:
        return index not in self.broken

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        end = int(self.ends[index])
        part = slice(end - int(self.arrays["lengths"][index]), end)
        return {key: self.arrays[key][part].astype(np.int64) for key in ("tokens", "labels")}

    def __getstate__(self) -> dict[str, Any]:
        """Send worker processes the path, not a copy of the mapped data."""
        return {**self.__dict__, "arrays": None if self.path else self.arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.path is not None:
            self.arrays = packing.map_file(self.path)[0]


def tokenize_once(dataset: ShiftedDataset, cache_dir: str | Path | None = None) -> SampleCounts:
    """Tokenize a data set, make it keep its samples, and count them.

    A large one is kept on disk, beside packed rows, and found there by the next run with the same data and tokenizer.
    Samples that cannot be tokenized are counted and not kept, so that a run stops where it meets one.

    Args:
        dataset: what is tokenized.
        cache_dir: default as for packed rows (see :mod:`kasa_tune.components.data.packing`).
    """
    path = key = None
    if len(dataset) >= FEW and dataset.is_repeatable and dataset.node is not None:
        key = fingerprint(dataset.node, dataset, dataset.tokenizer)
        try:
            path = packing.cache_folder(cache_dir) / f"{key}.tokens.safetensors"
        except OSError as error:
            logging.getLogger(__name__).warning("%s Tokens are kept in memory.", error)
    if path is not None and key is not None:
        stored = packing.load_arrays(path, key)
        if stored is not None and stored[1] is not None:
            dataset.keep(KeptSamples(stored[0], frozenset(), path))
            return stored[1]
    samples = tokenize_all(dataset, allow_broken=True, most_tokens=MOST_TOKENS)
    if dataset.is_repeatable and len(samples.tokens) == samples.lengths.sum():
        dataset.keep(_kept(samples, path, key))
    return samples.counts


def _kept(samples: TokenizedSamples, path: Path | None, key: str | None) -> KeptSamples:
    arrays = {"tokens": samples.tokens, "labels": samples.labels, "lengths": samples.lengths}
    if path is None or key is None or samples.broken:
        return KeptSamples(arrays, frozenset(samples.broken))
    packing.save_arrays(arrays, path, key, samples.counts)
    return KeptSamples(packing.map_file(path)[0], frozenset(), path)


def check_all_samples(
    dataset: Dataset, *, name: str, log: logging.Logger | None = None, all_are_used: bool = False
) -> None:
    """Tokenize every sample once and say how many are cut and how many have nothing to learn.

    Args:
        dataset: from ``build_dataset``, plain, mixed or packed.
        name: the config key, used in what is said.
        log: gets one line for each data set; None for processes that say nothing.
        all_are_used: whether the run comes to every row, so that it cannot end if one is broken.

    Raises:
        ValueError: a row that is used cannot be tokenized, more than half of the samples of a data set have nothing to
            learn, or all responses are empty.
    """
    if isinstance(dataset, MixedDataset):
        for i, part in enumerate(dataset.parts):
            check_all_samples(
                part,
                name=name if len(dataset.parts) == 1 else f"{name}[{i}]",
                log=log,
                all_are_used=all_are_used and dataset.weights[i] >= 1,
            )
        return
    source = dataset.source if isinstance(dataset, packing.PackedRows) else dataset
    counts = dataset.counts if isinstance(dataset, packing.PackedRows) else None
    if not isinstance(source, ShiftedDataset):
        return
    if counts is None:
        counts = tokenize_once(source)
    limit = getattr(source.tokenizer, "max_seq_len", None)
    said = (
        f"{name}: {counts.samples} samples, {counts.cut} of them cut to tokenizer.max_seq_len ({limit}), "
        f"{counts.unlearned} with nothing to learn."
    )
    if counts.broken and all_are_used:
        raise ValueError(
            f"{name}: {counts.broken} of {counts.samples} rows cannot be used. Mend them or take them out. "
            f"The first: {first_broken(source)}"
        )
    if counts.unlearned > _LARGEST_SHARE * counts.samples:
        raise ValueError(
            f"{said} More than half have nothing to learn: the prompt fills tokenizer.max_seq_len, or the response is "
            f"empty. Raise tokenizer.max_seq_len, take these rows out, or set {name}.train_on_input: True."
        )
    empty = _count_empty(source, name)
    if log is None:
        return
    log.log(logging.WARNING if counts.unlearned else logging.INFO, said)
    _warn(source, name, log, empty=empty, counts=counts)


def _warn(
    source: ShiftedDataset, name: str, log: logging.Logger, *, empty: int, counts: SampleCounts
) -> None:
    """Of what a run goes on with, and is likely not meant."""
    if runs_turns_together(getattr(source.inner, "_message_transform", None), source.tokenizer):
        log.warning(NO_TEMPLATE.format(name=name))
    if empty:
        log.warning(
            f"{name}: the response of {empty} of {len(source)} rows is empty; from them the model "
            "learns to say nothing. Take them out unless that is meant."
        )
    if counts.broken:
        log.warning(
            f"{name}: {counts.broken} of {counts.samples} rows cannot be used, and the run stops where it meets one. "
            f"The first: {first_broken(source)}"
        )


def _count_empty(source: ShiftedDataset, name: str) -> int:
    """Rows with an empty response. Raise ValueError if all are such."""
    empty = source.count_empty_responses()
    if empty == len(source):
        raise ValueError(
            f"{name}: the response of every row is empty, so the model would learn to say nothing. "
            "Fill them, or name the column that holds them in column_map."
        )
    return empty


def first_broken(dataset: ShiftedDataset) -> str:
    """What is wrong with the first sample that cannot be tokenized."""
    for index in sorted(dataset.kept.broken) if dataset.kept else range(len(dataset)):
        try:
            dataset[index]
        except ValueError as error:
            return str(error)
    return ""
