"""From a config's dataset node to batches: build, check, shift labels, order, collate.

Shapes: b batch, s sequence length, n tokens of one sample.

Labels leave this file already shifted: ``labels[t]`` is the token that position ``t`` has to predict, -100 where
nothing is to be learned. A loss therefore compares ``logits[:, t]`` with ``labels[:, t]`` and never shifts again,
which is what makes packed rows right (nothing may be shifted across the border of two samples).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.data import Dataset
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.datasets import TextCompletionDataset

from kasa_tune.components.data import csv_files, packing, sources
from kasa_tune.components.data.batches import EpochBatches, build_dataloader, collate
from kasa_tune.components.data.file_faults import file_fault
from kasa_tune.components.data.fingerprints import fingerprint
from kasa_tune.components.data.samples import MixedDataset, ShiftedDataset, shift_labels
from kasa_tune.components.data.visual import VisualDataset

__all__ = [
    "EpochBatches",
    "MixedDataset",
    "ShiftedDataset",
    "build_dataloader",
    "build_dataset",
    "check_batches",
    "check_samples",
    "check_token_ids",
    "collate",
    "count_truncated",
    "shift_labels",
]

_NUM_CHECKED = 64  # samples looked at before training starts; a few milliseconds of tokenization
_OUR_KEYS = ("packed", "weight", "max_packs", "split_across_pack")


# ---------------------------------------------------------------------------------------------------- building


def build_dataset(
    cfg: Mapping | Sequence | DictConfig | ListConfig,
    tokenizer: Any,
    *,
    name: str,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Build one dataset, or a weighted mixture, from a config and check that it can be trained on.

    Args:
        cfg: a node with ``_component_`` (called as ``component(tokenizer, **other_keys)``, so every torchtune
            dataset builder works), or a list of nodes. Four keys are taken out before the call:
            ``packed`` (False), ``max_packs`` (None), ``split_across_pack`` (False; True for raw text) and
            ``weight`` (1.0): ``round(weight * len)`` samples of this dataset in every epoch.
        tokenizer: a torchtune ``ModelTokenizer``. Longer samples are cut to its ``max_seq_len``
            (see :func:`count_truncated`).
        name: the config key, used in errors (``dataset``, ``dataset_val``).
        cache_dir: where packed rows are kept (see :mod:`kasa_tune.components.data.packing`).
        progress: called as ``progress(done, total)`` with samples while packing.

    Raises:
        FileNotFoundError: a local data file that is not there.
        ConnectionError: a hub dataset that cannot be reached.
        ValueError: no samples, a row without its columns, nothing to learn in the first samples, packed mixed with
            unpacked, an impossible weight, or a component that cannot be called so.
    """
    nodes = _resolved(cfg)
    names = [name] if len(nodes) == 1 else [f"{name}[{i}]" for i in range(len(nodes))]
    packed = [bool(node.get("packed", False)) for node in nodes]
    if any(packed) and not all(packed):
        raise ValueError(
            f"{name}: packed and unpacked datasets cannot be mixed. Set packed the same in all of them."
        )
    weights = [_checked_weight(node, key) for node, key in zip(nodes, names, strict=True)]
    parts: list[Dataset] = []
    for node, key in zip(nodes, names, strict=True):
        of_data = {name: value for name, value in node.items() if name not in _OUR_KEYS}
        samples = ShiftedDataset(
            _instantiate(node, tokenizer, key), name=key, tokenizer=tokenizer, node=of_data
        )
        check_samples(samples, name=key)
        parts.append(_packed(samples, node, key, cache_dir, progress) if packed[0] else samples)
    for part, weight, key in zip(parts, weights, names, strict=True):
        if round(weight * len(part)) == 0:
            raise ValueError(
                f"{key}: weight {weight} of {len(part)} samples leaves none. Set a larger weight."
            )
    return parts[0] if len(parts) == 1 and weights[0] == 1.0 else MixedDataset(parts, weights)


def load_rows(
    cfg: Mapping | DictConfig, tokenizer: Any, *, name: str
) -> tuple[Any, dict[str, Any]]:
    """Call the component of one dataset node as it is, without shifting labels.

    Args:
        cfg: a node with ``_component_``.
        tokenizer: given to the component.
        name: the config key, used in errors.

    Returns:
        What the component gives, and the node in plain containers.

    Raises:
        FileNotFoundError: a local data file that is not there.
        ConnectionError: a hub dataset that cannot be reached.
        ValueError: there are no rows, or the component cannot load them.
    """
    (node,) = _resolved(cfg)
    return _instantiate(node, tokenizer, name), node


def _resolved(cfg: Mapping | Sequence | DictConfig | ListConfig) -> list[dict[str, Any]]:
    plain = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    nodes = [dict(plain)] if isinstance(plain, Mapping) else [dict(node) for node in plain]
    if not nodes:
        raise ValueError(
            "The list of datasets is empty. Give one node with _component_, or a list of them."
        )
    return nodes


def _checked_weight(node: Mapping[str, Any], name: str) -> float:
    weight = node.get("weight", 1.0)
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not 0 < weight < float("inf")
    ):
        raise ValueError(
            f"{name}.weight must be a number above 0, got {weight!r} (0.5 = half of it per epoch)."
        )
    return float(weight)


def _instantiate(node: Mapping[str, Any], tokenizer: Any, name: str) -> Dataset:
    """Call the node's component and turn the loader's ways of failing into sentences."""
    component = node.get("_component_")
    kwargs = {key: value for key, value in node.items() if key not in _OUR_KEYS}
    kwargs = sources.prepared(kwargs, name)
    _check_files(kwargs, name)
    try:
        dataset = config.instantiate(
            OmegaConf.create(kwargs, flags={"allow_objects": True}), tokenizer
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from error
    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: {error}. Without a network, set source: json and data_files: to a local file."
        ) from error
    except InstantiationError as error:
        raise ValueError(f"{name}._component_: {error}") from error
    except (
        Exception
    ) as error:  # the json reader alone has a dozen error types; the cause holds the useful line
        if fault := file_fault(kwargs, error):
            raise ValueError(f"{name}: {fault}") from error
        reason = f"{error}. {error.__cause__}" if error.__cause__ is not None else str(error)
        if isinstance(kwargs.get("data_files"), str):
            reason = f"{reason.strip()} (data_files: {kwargs['data_files']})"
        raise ValueError(f"{name}: {component} could not load its data: {reason}") from error
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{name}: {component} gives {type(dataset).__name__}, which has no length. A run counts its samples and "
            "reads them in random order: use a data set with __len__ and __getitem__."
        )
    sources.check_header(dataset, kwargs, name)
    if len(dataset) == 0:
        raise ValueError(
            f"{name}: no samples. Check data_files, split ({node.get('split', 'train')!r}) and filters."
        )
    return dataset


def _check_files(node: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if columns of local files cannot be told apart, or if files of a folder would be left out."""
    if node.get("source") == "csv":
        for path in sources.files_read(node):
            csv_files.check_columns(path, node, name)
    sources.check_folder(node, name)


def _packed(
    samples: ShiftedDataset, node: Mapping, name: str, cache_dir: Any, progress: Any
) -> Dataset:
    max_seq_len = getattr(samples.tokenizer, "max_seq_len", None)
    if isinstance(samples.inner, VisualDataset):
        raise ValueError(f"{name}.packed: rows with images are not packed. Set it to False.")
    if max_seq_len is None:
        raise ValueError(
            f"{name}.packed: True needs tokenizer.max_seq_len, the length of a packed row."
        )
    return packing.pack(
        samples,
        max_seq_len=max_seq_len,
        cache_dir=cache_dir,
        split_across_pack=node.get(
            "split_across_pack", isinstance(samples.inner, TextCompletionDataset)
        ),
        max_packs=node.get("max_packs"),
        fingerprint=fingerprint(samples.node or {}, samples, samples.tokenizer),
        progress=progress,
    )


# ---------------------------------------------------------------------------------------------------- checks


def check_samples(dataset: Dataset, *, name: str, first: int = _NUM_CHECKED) -> None:
    """Tokenize the first samples; raise ValueError if a row is broken or not one label in all of them is learned."""
    count = min(first, len(dataset))
    learned = [
        (dataset[i]["labels"] != IGNORE).any() for i in range(count)
    ]  # a list: every row is to be read
    if not any(learned):
        limit = getattr(getattr(dataset, "tokenizer", None), "max_seq_len", None)
        raise ValueError(
            f"{name}: every label of the first {count} samples is ignored, so there is nothing to learn. The response "
            f"is empty or cut off: raise tokenizer.max_seq_len (now {limit}), or set train_on_input: True."
        )


def check_token_ids(dataset: Dataset, vocab_size: int, *, first: int = _NUM_CHECKED) -> None:
    """Raise ValueError if one of the first samples holds a token id that a model of ``vocab_size`` rows lacks."""
    if isinstance(dataset, MixedDataset):
        for part in dataset.parts:
            check_token_ids(part, vocab_size, first=first)
        return
    for i in range(min(first, len(dataset))):
        tokens = dataset[i]["tokens"]
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            bad = tokens.max() if tokens.max() >= vocab_size else tokens.min()
            raise ValueError(
                f"The tokenizer does not fit the model: sample {i} holds token id {bad}, but the model's vocabulary "
                f"has {vocab_size} entries (0 to {vocab_size - 1}). Set tokenizer to the one the checkpoint came with."
            )


def check_batches(batches: Sequence[Mapping[str, Any]], vocab_size: int) -> None:
    """Raise ValueError if a batch holds a token id that a model of ``vocab_size`` rows lacks.

    On a GPU such an id would end the process in an assertion of the device that names nothing.
    """
    for batch in batches:
        if (largest := int(batch["tokens"].max())) >= vocab_size:
            raise ValueError(
                f"The tokenizer does not fit the model: a sample holds token id {largest}, but the model's vocabulary "
                f"has {vocab_size} entries (0 to {vocab_size - 1})."
            )


def count_truncated(dataset: Dataset, first: int | None = None) -> int:
    """How many of the first samples (default: of all) are cut to the tokenizer's ``max_seq_len``.

    Tokenizes each of them twice. For packed rows the samples they are made of are counted.
    """
    if isinstance(dataset, MixedDataset):
        return sum(count_truncated(part, first) for part in dataset.parts)
    if isinstance(dataset, packing.PackedRows):
        dataset = dataset.source
    if (
        not isinstance(dataset, ShiftedDataset)
        or getattr(dataset.tokenizer, "max_seq_len", None) is None
    ):
        return 0
    return sum(dataset.is_truncated(i) for i in range(min(first or len(dataset), len(dataset))))
