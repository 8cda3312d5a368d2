"""From a dataset to the rows that a model is calibrated on.

Shapes: b batch, s sequence length, n tokens of one row.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from kasa_tune.components.data.batches import EpochBatches, block_mask, collate

log = logging.getLogger(__name__)

# tokens [n]; of packed rows also input_pos [n] and seq_lens, of rows with images a list of these
Row = dict[str, Any]


def draw_rounds(
    dataset: Dataset,
    *,
    num_samples: int,
    max_seq_len: int,
    concatenate: bool,
    rounds: int,
    seed: int,
    longest: int,
) -> list[list[Row]]:
    """Draw disjoint rounds of rows, the same for the same arguments on every machine.

    A dataset mixed in with a weight above 1 repeats its samples, as in an epoch of training.

    Args:
        dataset: from :func:`~kasa_tune.components.data.build_dataset`, mixed by its weights; prompts and responses
            both count.
        num_samples: rows of a round.
        max_seq_len: longer samples are cut; with ``concatenate`` the length of every row.
        concatenate: join the samples, in random order, and cut the stream into rows; else a sample is a row.
        rounds: how many draws.
        seed: of the draw.
        longest: that the model takes.

    Returns:
        Rounds of rows. Where the data holds fewer rows than asked for, each round gets an equal share of them, with a
        warning.

    Raises:
        ValueError: not a row a round, or rows longer than the model takes; the message has the numbers.
    """
    if max_seq_len > longest:
        raise ValueError(
            f"calibration.max_seq_len {max_seq_len} is more than the model takes, {longest}."
        )
    lengths = getattr(dataset, "lengths", [len(dataset)])
    weights = getattr(dataset, "weights", None)
    order = EpochBatches(lengths, weights=weights, batch_size=1, seed=seed, shuffle=True).order(0)
    if concatenate:
        drawn = _windows(dataset, order, max_seq_len, rounds * num_samples)
    else:
        drawn = [_cut(dataset[int(index)], max_seq_len) for index in order[: rounds * num_samples]]
        drawn = [row for row in drawn if len(row["tokens"])]
    share = min(num_samples, len(drawn) // rounds)
    if share == 0:
        what = f"windows of {max_seq_len} tokens" if concatenate else "samples"
        advice = ["Give more data"] + ["lower calibration.max_seq_len"] * concatenate
        advice += ["lower calibration.rounds"] * (rounds > 1)
        raise ValueError(
            f"calibration.dataset holds {len(drawn)} {what}, fewer than one for each of {rounds} rounds. "
            f"{', or '.join(advice)}."
        )
    if share < num_samples:
        log.warning(
            f"calibration.dataset holds {len(drawn):,} rows instead of {rounds} x {num_samples:,}: each round has "
            f"{share:,}."
        )
    return [drawn[i * share : (i + 1) * share] for i in range(rounds)]


def _cut(sample: Row, length: int) -> Row:
    """The first ``length`` tokens of a sample or packed row."""
    row: Row = {key: sample[key][:length] for key in ("tokens", "input_pos") if key in sample}
    if "seq_lens" in sample:
        ends = np.minimum(np.cumsum(sample["seq_lens"]), length)
        lens = np.diff(ends, prepend=0)
        row["seq_lens"] = lens[lens > 0]
    if "images" in sample:
        row["images"] = sample["images"]
        if len(sample["tokens"]) > length:
            raise ValueError(
                f"calibration.max_seq_len is {length}, and a row with images has {len(sample['tokens'])} tokens. Such "
                "rows are not cut: raise it."
            )
    return row


def _windows(dataset: Dataset, order: np.ndarray, length: int, count: int) -> list[Row]:
    """Up to ``count`` rows of exactly ``length`` tokens out of the samples joined in ``order``."""
    pieces: list[np.ndarray] = []
    missing = count * length
    for index in order:
        if missing <= 0:
            break
        sample = dataset[int(index)]
        if "images" in sample:
            raise ValueError(
                "calibration.concatenate joins rows and cuts them anywhere, and a row has images. Set it to False."
            )
        pieces.append(sample["tokens"])
        missing -= len(pieces[-1])
    stream = np.concatenate([np.zeros(0, dtype=np.int64), *pieces])
    num_rows = min(count, len(stream) // length)
    return [{"tokens": row} for row in stream[: num_rows * length].reshape(num_rows, length)]


def rows_digest(rounds: Sequence[Sequence[Row]]) -> str:
    """SHA-256 of the tokens and images of all rows and of how they fall into rounds and packed samples."""
    digest = hashlib.sha256()
    for rows in rounds:
        digest.update(f"round of {len(rows)} ".encode())
        for row in rows:
            for image in row.get("images", ()):
                digest.update(f"image {image.side} {image.aspect_ratio} {image.digest()} ".encode())
            for key in sorted(row.keys() - {"images"}):
                digest.update(f"{key} {len(row[key])} ".encode() + row[key].astype("<i8").tobytes())
    return digest.hexdigest()


def batched(
    rows: Iterable[Row],
    *,
    tokenizer: Any,
    batch_size: int,
    device: torch.device,
    dense_mask: bool = False,
) -> list[dict[str, Any]]:
    """Rows as right-padded batches, rows of like length together.

    Args:
        rows: of one round.
        tokenizer: gives ``pad_id``; 0 stands in for none.
        batch_size: rows of a batch.
        device: where the model runs; decides the kind of mask that packed rows get.
        dense_mask: a boolean mask everywhere, see :func:`~kasa_tune.components.data.batches.block_mask`.

    Returns:
        Batches of ``tokens`` [b, s], ``valid`` [b, s] (False in the padding) and, for packed rows, ``input_pos`` and
        ``mask``, of rows with images ``images`` [n, 3, h, w], on the CPU.
    """
    pad_id = max(0, getattr(tokenizer, "pad_id", None) or 0)
    ordered = sorted(rows, key=lambda row: len(row["tokens"]))
    packed = (
        ordered and "seq_lens" in ordered[0]
    )  # of one width, or each would compile its own attention
    width = len(ordered[-1]["tokens"]) if packed else None
    batches = []
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        batch = collate(
            [row | {"labels": row["tokens"]} for row in chosen], pad_id=pad_id, width=width
        )
        del batch["labels"]
        lengths = torch.tensor([len(row["tokens"]) for row in chosen])
        batch["valid"] = torch.arange(batch["tokens"].shape[1]) < lengths[:, None]
        if "seq_lens" in batch:
            batch["mask"] = block_mask(batch.pop("seq_lens"), device, dense=dense_mask)
        batches.append(batch)
    return batches
