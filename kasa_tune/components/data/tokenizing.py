"""Tokenizing a whole data set once, in several processes: for packing, for counting, and to keep the tokens.

Shapes: n samples, t tokens in all.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE

_CHUNK = 512  # samples a process tokenizes at a time
FEW = 4096  # below this many samples, starting processes costs more than it saves


class SampleCounts(NamedTuple):
    """How many samples a data set has, and how many of them are cut, have nothing to learn, cannot be tokenized."""

    samples: int
    cut: int
    unlearned: int
    broken: int = 0


class TokenizedSamples(NamedTuple):
    """The samples of a data set end to end.

    ``tokens`` and shifted ``labels`` int32 [t] (empty when they were too many to keep), ``lengths`` int64 [n], ``cut``
    bool [n], ``learns`` bool [n], and the message of each sample that cannot be tokenized, by its index.
    """

    tokens: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    cut: np.ndarray
    learns: np.ndarray
    broken: dict[int, str]

    @property
    def counts(self) -> SampleCounts:
        broken = len(self.broken)
        unlearned = int((~self.learns).sum()) - broken
        return SampleCounts(len(self.lengths), int(self.cut.sum()), unlearned, broken)


def tokenize_all(
    dataset: Dataset,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    allow_broken: bool = False,
    most_tokens: int | None = None,
) -> TokenizedSamples:
    """Tokenize every sample, in order.

    Args:
        dataset: gives ``tokens`` and shifted ``labels``, both int [length].
        num_workers: processes that tokenize; None chooses (none for a small dataset). Does not change the result.
        progress: called as ``progress(done, total)`` with samples.
        allow_broken: note samples that raise ValueError in place of raising it; they have no tokens.
        most_tokens: when there are more, tokens and labels are not kept.

    Raises:
        ValueError: a sample that cannot be tokenized.
        RuntimeError: a tokenizing process died.
    """
    total = len(dataset)  # type: ignore[arg-type]
    spans = [(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    if num_workers is None:
        num_workers = (
            min(len(spans), os.cpu_count() or 1, 16)
            if total >= FEW and sys.platform == "linux"
            else 0
        )
    parts: list[TokenizedSamples] = []
    num_tokens = done = 0
    for part in _map_spans(dataset, spans, num_workers, allow_broken):
        parts.append(part)
        num_tokens += len(part.tokens)
        if most_tokens is not None and num_tokens > most_tokens:
            nothing = np.empty(0, dtype=np.int32)
            parts = [kept._replace(tokens=nothing, labels=nothing) for kept in parts]
        done += len(part.lengths)
        if progress is not None:
            progress(done, total)
    fields = [name for name in TokenizedSamples._fields if name != "broken"]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    broken = {index: message for part in parts for index, message in part.broken.items()}
    return TokenizedSamples(**columns, broken=broken)


_worker_dataset: tuple[Dataset, bool] | None = None


def _start_worker(dataset: Dataset, allow_broken: bool) -> None:
    global _worker_dataset
    _worker_dataset = dataset, allow_broken


def _tokenize_in_worker(span: tuple[int, int]) -> TokenizedSamples:
    assert _worker_dataset is not None
    return _tokenize_span(*_worker_dataset, span)


def _tokenize_span(dataset: Dataset, allow_broken: bool, span: tuple[int, int]) -> TokenizedSamples:
    nothing = {"tokens": np.empty(0, np.int32), "labels": np.empty(0, np.int32)}
    samples, cut, broken = [], [], {}
    for i in range(*span):
        try:
            sample = dataset[i]
            cut.append(_is_cut(dataset, i, len(sample["tokens"])))
        except ValueError as error:
            if not allow_broken:
                raise
            sample, broken[i] = nothing, str(error)
            cut.append(False)
        samples.append(sample)
    tokens, labels = (
        np.concatenate([np.asarray(s[key], dtype=np.int32) for s in samples])
        for key in ("tokens", "labels")
    )
    learns = np.array([(np.asarray(s["labels"]) != IGNORE).any() for s in samples], dtype=bool)
    lengths = np.array([len(s["tokens"]) for s in samples], dtype=np.int64)
    return TokenizedSamples(tokens, labels, lengths, np.array(cut, dtype=bool), learns, broken)


def _is_cut(dataset: Dataset, index: int, length: int) -> bool:
    """Only a sample that fills ``max_seq_len`` (raw text: all but one token of it) is tokenized again to know."""
    limit = getattr(getattr(dataset, "tokenizer", None), "max_seq_len", None)
    return limit is not None and length >= limit - 1 and dataset.is_truncated(index)  # type: ignore[attr-defined]


def _map_spans(
    dataset: Dataset, spans: Sequence[tuple[int, int]], num_workers: int, allow_broken: bool
) -> Iterator[TokenizedSamples]:
    if num_workers < 2:
        yield from (_tokenize_span(dataset, allow_broken, span) for span in spans)
        return
    # A forked process has the dataset and the tokenizer already; elsewhere (macOS, Windows) both are pickled.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=context,
        initializer=_start_worker,
        initargs=(dataset, allow_broken),
    )
    try:
        yield from pool.map(_tokenize_in_worker, spans)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"One of {num_workers} tokenizing processes died, most likely out of memory."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
