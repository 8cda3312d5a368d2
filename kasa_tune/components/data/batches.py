"""The order of samples and the batches made of them.

Shapes: b batch, s sequence length.

The order is a pure function of (seed, epoch, lengths, weights), so a run's place in the data is two integers, the
epoch and the number of batches already taken from it. Nothing here touches torch's global random state.
"""

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.modules.attention_utils import create_block_causal_mask, packed_block_causal_mask

FILLER = -1  # index of the sample that ranks take when there are none left for them


def permutation(n: int, *key: int) -> np.ndarray:
    """A random order of 0 .. n-1 [n], int64, that depends on nothing but ``n`` and ``key``.

    It sorts raw PCG64 output, whose stream NumPy promises to keep (NEP 19), where ``Generator.permutation`` and
    ``torch.randperm`` may change from release to release, and with them the data order of a resumed run.
    """
    digest = hashlib.sha256(repr(tuple(int(k) for k in key)).encode()).digest()
    bits = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(n)
    return np.argsort(bits, kind="stable")


class EpochBatches(Sampler[list[int]]):
    """Batches of sample indices, the same on every machine for the same (seed, epoch, lengths, weights).

    An epoch holds ``round(weight * length)`` samples of each dataset: every sample ``floor(weight)`` times, and a
    random selection once more, another one in every epoch (at weight 0.5 the two halves of a random split take turns,
    then those of a new split). Nothing is dropped: the last batch may be smaller.

    On ``world_size`` ranks the epoch is cut into global batches of ``world_size * batch_size`` samples of which rank r
    takes the r-th slice. When the last global batch does not divide by ``world_size`` it is filled up with FILLER, a
    sample without labels, so that every rank takes the same number of batches of the same size and no sample counts
    twice.

    Args:
        lengths: number of samples of each dataset; indices run through them one after the other.
        batch_size: samples per batch and rank.
        seed: of the order.
        shuffle: False keeps the order of the files, dataset after dataset.
        weights: one per dataset, default 1.0.
        rank: this process, ``0 .. world_size - 1``.
        world_size: number of processes.

    Raises:
        ValueError: an impossible batch size, seed, rank or weight, or an epoch without samples.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. {world_size - 1}, got {rank}.")
        self.lengths = [int(length) for length in lengths]
        self.weights = (
            [float(w) for w in weights] if weights is not None else [1.0] * len(self.lengths)
        )
        self.counts = [round(w * n) for w, n in zip(self.weights, self.lengths, strict=True)]
        if min(self.counts, default=0) < 0 or sum(self.counts) == 0:
            raise ValueError(
                f"No samples in an epoch: lengths {self.lengths}, weights {self.weights}."
            )
        self.batch_size, self.seed, self.shuffle, self.rank, self.world_size = (
            batch_size,
            seed,
            shuffle,
            rank,
            world_size,
        )
        self.epoch, self.start_batch = 0, 0

    def __len__(self) -> int:
        """Batches of a full epoch on one rank, whatever ``start_batch`` is."""
        return -(-sum(self.counts) // (self.batch_size * self.world_size))

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Make the next iteration go through ``epoch`` from batch number ``start_batch`` (both from 0) to its end."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(
                f"No position (epoch {epoch}, batch {start_batch}): an epoch has {len(self)} batches."
            )
        self.epoch, self.start_batch = epoch, start_batch

    def order(self, epoch: int) -> np.ndarray:
        """Sample indices of an epoch in the order they are trained on [sum of counts], int64, before rank slicing."""
        picked, offset = [], 0
        for part, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            times, rest = divmod(count, length) if length else (0, 0)
            extra = np.sort(self._selection(part, length, rest, epoch))
            picked.append(offset + np.concatenate([np.tile(np.arange(length), times), extra]))
            offset += length
        order = np.concatenate(picked).astype(np.int64)
        return (
            order[permutation(len(order), self.seed, epoch, len(self.lengths))]
            if self.shuffle
            else order
        )

    def _selection(self, part: int, length: int, count: int, epoch: int) -> np.ndarray:
        """``count`` < ``length`` indices; successive epochs go through one permutation before the next is begun."""
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        cycle, turn = divmod(epoch, length // count)
        return permutation(length, self.seed, cycle, part)[turn * count : (turn + 1) * count]

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        order = np.append(order, np.full(-len(order) % self.world_size, FILLER))
        step = self.batch_size * self.world_size
        for start in range(self.start_batch * step, len(order), step):
            both = order[start : start + step]
            share = len(both) // self.world_size
            yield both[self.rank * share : (self.rank + 1) * share].tolist()


def collate(
    samples: Sequence[dict[str, Any]], *, pad_id: int, width: int | None = None
) -> dict[str, Any]:
    """Right-pad samples into one batch.

    Args:
        samples: each with ``tokens`` and shifted ``labels`` [n]; packed rows also with ``input_pos`` [n] and
            ``seq_lens``, the lengths of the samples in the row, which sum to n.
        pad_id: token id of the padding.
        width: s; default the longest sample. Packed rows take their full length, so that shapes never change.

    Returns:
        ``tokens`` [b, s] int64 and ``labels`` [b, s] int64, -100 in the padding. For packed rows also ``input_pos``
        [b, s] int64 and ``seq_lens``, b tensors that each sum to s (the padding counts as one more sample);
        :func:`block_mask` turns these into the attention mask. Where samples have ``images``, these are decoded now:
        ``images`` [n, 3, h, w] float32, sample after sample.
    """
    width = max(width or 1, *(len(sample["tokens"]) for sample in samples))
    columns = {"tokens": pad_id, "labels": IGNORE}
    packed = "seq_lens" in samples[0]
    batch: dict[str, Any] = {}
    for column, fill in columns.items():
        rows = np.full((len(samples), width), fill, dtype=np.int64)
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample[column])] = sample[column]
        batch[column] = torch.from_numpy(rows)
    if images := [image.load() for sample in samples for image in sample.get("images", ())]:
        batch["images"] = torch.stack(images)
    if packed:
        padding = [width - len(sample["tokens"]) for sample in samples]
        positions = [
            np.append(s["input_pos"], np.arange(p)) for s, p in zip(samples, padding, strict=True)
        ]
        batch["input_pos"] = torch.from_numpy(np.stack(positions).astype(np.int64))
        lens = [
            np.append(s["seq_lens"], p) if p else s["seq_lens"]
            for s, p in zip(samples, padding, strict=True)
        ]
        batch["seq_lens"] = [torch.from_numpy(np.asarray(n, dtype=np.int64)) for n in lens]
    return batch


def move_batch(batch: dict[str, Any], device: torch.device) -> None:
    """Move a batch to a device, in place, but for its labels.

    Which positions have a label decides how many of them the loss looks at. It is known on the host without waiting
    for a GPU, so the labels stay there. From pinned memory the other tensors are copied while the GPU works.
    """
    for name, value in batch.items():
        if name == "labels":
            continue
        if isinstance(value, torch.Tensor):
            batch[name] = value.to(device, non_blocking=True)
        else:  # a BlockMask
            batch[name] = value.to(device)


def block_mask(
    seq_lens: Sequence[torch.Tensor],
    device: torch.device | str | None = None,
    *,
    dense: bool = False,
) -> Any:
    """Attention mask of packed rows: a token sees the earlier tokens of its own sample alone.

    On a GPU where torchtune uses flex attention it is a ``BlockMask`` on that GPU, else bool [b, s, s] on the CPU.
    ``device`` is where the model runs; None leaves the choice to torchtune. ``dense`` is always the latter kind.
    """
    if dense or (device is not None and torch.device(device).type != "cuda"):
        return create_block_causal_mask(list(seq_lens))
    return packed_block_causal_mask(list(seq_lens))


class WithFiller(Dataset):
    """A dataset and, at index FILLER, its first sample with nothing to learn in it."""

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != FILLER:
            return self.inner[index]
        sample = self.inner[0]
        return sample | {"labels": np.full_like(sample["labels"], IGNORE)}


class BatchLoader(DataLoader):
    """A DataLoader that gives packed batches their ``mask`` in the main process, since a BlockMask lives on the GPU."""

    def __init__(
        self,
        *args: Any,
        device: torch.device | str | None = None,
        dense_mask: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.device, self.dense_mask = device, dense_mask

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if "seq_lens" in batch:
                batch["mask"] = block_mask(
                    batch.pop("seq_lens"), self.device, dense=self.dense_mask
                )
            yield batch


def _ignore_stop_signals(worker: int) -> None:
    """In a worker: leave signals that reach all processes of a run to the main one, which still needs batches then.

    The main process's own SIGTERM, the end of a worker that does not end by itself, is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def build_dataloader(
    dataset: Dataset,
    *,
    tokenizer: Any,
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str | None = None,
    dense_mask: bool = False,
) -> DataLoader:
    """Batches of ``dataset`` in an order that depends on (seed, epoch) alone.

    Args:
        dataset: from :func:`~kasa_tune.components.data.building.build_dataset`, plain, mixed or packed.
        tokenizer: gives ``pad_id``; 0 stands in when it has none or a negative one (the Llama-2 SentencePiece models),
            which no embedding could look up.
        batch_size: samples (packed: rows) per batch and rank.
        seed: of the order.
        shuffle: False keeps the order of the files.
        num_workers: processes that tokenize ahead; 0 = in this process. Does not change the batches. They
            outlive a SIGINT or SIGTERM to the whole process group and end with this process.
        rank: of this process.
        world_size: number of processes; see :class:`EpochBatches` for how they share an epoch.
        device: where the model runs; decides the kind of mask packed rows get (see :func:`block_mask`) and, for a GPU,
            that batches are pinned.
        dense_mask: packed rows get a boolean mask on a GPU too, for models whose attention takes no ``BlockMask``
            (torchtune's Gemma 2).

    Returns:
        A DataLoader of ``dict(tokens [b, s], labels [b, s])``, packed also ``mask`` and ``input_pos`` [b, s]. Its
        ``batch_sampler`` is an :class:`EpochBatches`; ``loader.batch_sampler.set_position(epoch, start_batch)`` before
        iterating resumes in the middle of an epoch. Drawing batches leaves torch's global generator alone.
    """
    pad_id = getattr(tokenizer, "pad_id", None)
    pad_id = pad_id if pad_id is not None and pad_id >= 0 else 0
    batches = EpochBatches(
        getattr(dataset, "lengths", None) or [len(dataset)],
        weights=getattr(dataset, "weights", None),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
    )
    return BatchLoader(
        WithFiller(dataset),
        batch_sampler=batches,
        collate_fn=partial(collate, pad_id=pad_id, width=getattr(dataset, "max_seq_len", None)),
        num_workers=num_workers,
        worker_init_fn=_ignore_stop_signals if num_workers else None,
        generator=torch.Generator().manual_seed(
            seed
        ),  # workers' base seed; without it, drawn from the global one
        pin_memory=device is not None and torch.device(device).type == "cuda",
        device=device,
        dense_mask=dense_mask,
    )
