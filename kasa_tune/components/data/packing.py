"""Packing: several samples in one row of fixed length, tokenized once, in several processes, kept on disk.

torchtune's ``PackedDataset`` is not used: it holds every row as Python objects in memory, tokenizes in one process on
every start, and its rows let the last token of one sample learn the first token of the next. Here labels arrive shifted
per sample (:mod:`kasa_tune.components.data`), so no label ever crosses a border.

Shapes: t tokens in all, r rows, p pieces (a piece is a sample, or part of one that was split across rows).
"""

import bisect
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch.utils.data import Dataset

from kasa_tune.components.data.batches import permutation
from kasa_tune.components.data.tokenizing import SampleCounts, tokenize_all

PACKING_VERSION = 1  # raise it when the same input gives other rows or another file layout
_OPEN_ROWS = 64  # rows that still wait for a sample that fits; more of them waste less room and shuffle samples further
_DTYPES = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


class PackedRows(Dataset):
    """Rows of packed samples over flat arrays, in memory or memory-mapped.

    Args:
        arrays: ``tokens`` and ``labels`` int32 [t], ``row_tokens`` int64 [r + 1] and ``row_pieces`` int64 [r + 1]
            (where each row starts), ``piece_lens`` int32 [p], ``piece_samples`` int64 [p] (index of the sample in the
            dataset that was packed).
        max_seq_len: the length of a row; shorter ones are padded when collated.
        path: file behind memory-mapped arrays, or None.
        source: the dataset that was packed.
        counts: of the samples that were packed, where they are known.

    ``self[i]`` is ``tokens``, ``labels``, ``input_pos`` int64 [n] (restarting at 0 in each sample) and ``seq_lens``,
    the lengths of the samples in the row.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        *,
        max_seq_len: int,
        path: Path | None = None,
        source: Dataset | None = None,
        counts: SampleCounts | None = None,
    ) -> None:
        self.arrays, self.max_seq_len, self.path, self.source = (
            dict(arrays),
            max_seq_len,
            path,
            source,
        )
        self.counts = counts

    def __len__(self) -> int:
        return len(self.arrays["row_tokens"]) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        tokens = slice(*self.arrays["row_tokens"][index : index + 2])
        pieces = slice(*self.arrays["row_pieces"][index : index + 2])
        lens = self.arrays["piece_lens"][pieces].astype(np.int64)
        return {
            "tokens": self.arrays["tokens"][tokens].astype(np.int64),
            "labels": self.arrays["labels"][tokens].astype(np.int64),
            "input_pos": np.concatenate([np.arange(n) for n in lens]),
            "seq_lens": lens,
        }

    def samples_in_row(self, index: int) -> np.ndarray:
        """Indices [k] of the samples in a row, in the dataset that was packed."""
        return np.array(
            self.arrays["piece_samples"][slice(*self.arrays["row_pieces"][index : index + 2])]
        )

    def __getstate__(self) -> dict[str, Any]:
        """Send worker processes the path, not a copy of the mapped data."""
        return {**self.__dict__, "arrays": None if self.path else self.arrays, "source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.arrays is None:
            self.arrays = map_file(self.path)[0]


def pack(
    dataset: Dataset,
    *,
    max_seq_len: int,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    split_across_pack: bool = False,
    max_packs: int | None = None,
    fingerprint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackedRows:
    """Pack a dataset's samples into rows of at most ``max_seq_len`` tokens.

    Greedy: samples are taken in a fixed random order (split ones in the dataset's order), and each goes into the
    fullest of the open rows that has room for it. Every sample is in exactly one row (or, split, in consecutive rows);
    samples without tokens are left out.

    Args:
        dataset: gives ``tokens`` and shifted ``labels`` (last label -100), both int [n].
        max_seq_len: tokens in a row.
        cache_dir: where rows are kept; default ``$KASA_TUNE_CACHE``, else ``~/.cache/kasa_tune/packed``.
        num_workers: processes that tokenize; None chooses (none for a small dataset). Does not change the rows.
        split_across_pack: cut samples where a row is full and go on in the next row, which wastes no room but cuts the
            context (right for raw text). The label at the cut stays. False keeps samples whole.
        max_packs: keep this many rows at most.
        fingerprint: identifies the samples (see ``data.fingerprints``). None: nothing is read from or written to
            disk.
        progress: called as ``progress(done, total)`` with the number of samples tokenized.

    Raises:
        ValueError: a sample longer than a row that may not be split, ``max_seq_len`` or ``max_packs`` below 1, or
            nothing to pack.
        OSError: the cache cannot be written.
    """
    if max_seq_len < 1 or (max_packs is not None and max_packs < 1):
        raise ValueError(
            f"max_seq_len and max_packs must be at least 1, got {max_seq_len} and {max_packs}."
        )
    build = partial(PackedRows, max_seq_len=max_seq_len, source=dataset)
    path = key = None
    if fingerprint is not None:
        key = _sha256(
            repr((PACKING_VERSION, fingerprint, max_seq_len, bool(split_across_pack), max_packs))
        )
        path = cache_folder(cache_dir) / f"{key}.safetensors"
        if (stored := load_arrays(path, key)) is not None:
            return build(stored[0], path=path, counts=stored[1])
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise ValueError("Nothing to pack: the dataset has no samples.")
    samples = tokenize_all(dataset, num_workers, progress)
    make_rows = _split_rows if split_across_pack else _whole_rows
    rows = make_rows(samples.lengths, max_seq_len)
    if not rows:
        raise ValueError("Nothing to pack: no sample has tokens.")
    arrays = _lay_out(samples.tokens, samples.labels, samples.lengths, rows[:max_packs])
    if path is not None:
        save_arrays(arrays, path, key, samples.counts)
        arrays = map_file(path)[0]
    return build(arrays, path=path, counts=samples.counts)


# ---------------------------------------------------------------------------------------------------- rows

_Piece = tuple[int, int, int]  # sample, first token, number of tokens


def _whole_rows(lengths: np.ndarray, max_seq_len: int) -> list[list[_Piece]]:
    rows: list[list[_Piece]] = []
    waiting: list[
        tuple[int, int]
    ] = []  # (room left, row), sorted, so the fullest row that fits is one bisection away
    # In files sorted by length or topic neighbours do not complement each other; a fixed random order wastes less room.
    for sample in permutation(len(lengths), PACKING_VERSION).tolist():
        length = int(lengths[sample])
        if length > max_seq_len:
            raise ValueError(
                f"Sample {sample} has {length} tokens and a packed row {max_seq_len}. "
                "Raise max_seq_len, or set split_across_pack: True."
            )
        if length == 0:
            continue
        fits = bisect.bisect_left(waiting, (length, -1))
        if fits == len(waiting):
            rows.append([])
            room, row = max_seq_len, len(rows) - 1
        else:
            room, row = waiting.pop(fits)
        rows[row].append((sample, 0, length))
        bisect.insort(waiting, (room - length, row))
        if len(waiting) > _OPEN_ROWS:
            waiting.pop(0)
    return rows


def _split_rows(lengths: np.ndarray, max_seq_len: int) -> list[list[_Piece]]:
    rows: list[list[_Piece]] = []
    room = 0
    for sample, length in enumerate(lengths.tolist()):
        start = 0
        while start < length:
            if room == 0:
                rows.append([])
                room = max_seq_len
            taken = min(room, length - start)
            rows[-1].append((sample, start, taken))
            start, room = start + taken, room - taken
    return rows


def _lay_out(
    tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray, rows: Sequence[Sequence[_Piece]]
) -> dict[str, np.ndarray]:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    samples, offsets, lens = np.array([piece for row in rows for piece in row], dtype=np.int64).T
    begins = starts[samples] + offsets
    first = np.cumsum(lens) - lens  # where each piece starts in the new layout
    packed = {
        "tokens": np.empty(lens.sum(), tokens.dtype),
        "labels": np.empty(lens.sum(), labels.dtype),
    }
    for begin, target, length in zip(begins.tolist(), first.tolist(), lens.tolist(), strict=True):
        packed["tokens"][target : target + length] = tokens[begin : begin + length]
        packed["labels"][target : target + length] = labels[begin : begin + length]
    row_pieces = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return {
        **packed,
        "row_tokens": np.append(first, lens.sum())[row_pieces].astype(np.int64),
        "row_pieces": row_pieces.astype(np.int64),
        "piece_lens": lens.astype(np.int32),
        "piece_samples": np.ascontiguousarray(samples),
    }


# ---------------------------------------------------------------------------------------------------- cache


def cache_folder(cache_dir: str | Path | None) -> Path:
    default = os.environ.get("KASA_TUNE_CACHE") or Path.home() / ".cache" / "kasa_tune" / "packed"
    folder = Path(cache_dir or default).expanduser()
    try:  # before hours of tokenizing, not after
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        message = f"Tokens cannot be kept in {folder} ({error}). Set KASA_TUNE_CACHE to a folder you may write."
        raise OSError(message) from error
    return folder


def save_arrays(
    arrays: Mapping[str, np.ndarray], path: Path, key: str, counts: SampleCounts
) -> None:
    """Write to a temporary name, reach the disk, then rename: the final name never holds half a file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {"key": key, "sha256": _digest_arrays(arrays), "counts": json.dumps(counts)}
    try:
        save_file(dict(arrays), draft, metadata=metadata)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except Exception as error:
        draft.unlink(missing_ok=True)
        raise OSError(
            f"The tokens could not be written to {path} ({error}). Free some space, or set KASA_TUNE_CACHE elsewhere."
        ) from error


def load_arrays(path: Path, key: str) -> tuple[dict[str, np.ndarray], SampleCounts | None] | None:
    """The arrays of a cache file, and the counts in it, if it is whole and holds exactly these rows, else None."""
    try:
        arrays, metadata = map_file(path)
        whole = metadata.get("key") == key and metadata.get("sha256") == _digest_arrays(arrays)
        counts = SampleCounts(*json.loads(metadata["counts"])) if "counts" in metadata else None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,  # a size that no array has
        RecursionError,  # a header nested without end
    ):  # absent, cut short, or not such a file
        return None
    return (arrays, counts) if whole else None


def map_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Memory-map every array of a safetensors file (its own reader would copy them)."""
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > os.path.getsize(path):
            raise ValueError(f"{path} is not a safetensors file")
        header = json.loads(file.read(header_size))
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        offset = 8 + header_size + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        arrays[name] = np.memmap(
            path, _DTYPES[entry["dtype"]], mode="r", offset=offset, shape=shape
        )
    return arrays, metadata


def _digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(repr((name, str(arrays[name].dtype), arrays[name].shape)).encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
