"""What tokenized samples are made of, as one hash: the key under which packed rows are kept on disk."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from kasa_tune import __version__
from kasa_tune.components.data.sources import files_read, is_folder

# Keys of dataset and tokenizer nodes that say where a file lies, not what is in it.
_LOCATIONS = {
    "data_files",
    "data_dir",
    "path",
    "vocab_path",
    "merges_path",
    "merges_file",
    "special_tokens_path",
}
_LOCATIONS |= {"tokenizer_config_path", "chat_template_path", "checkpoint_dir"}


def fingerprint(
    node: Mapping[str, Any], dataset: Dataset, tokenizer: Any, *, probes: int = 32
) -> str:
    """Identify tokenized samples: sha256 over what they are made of.

    That is the dataset's config node, the content of its local files (for hub datasets the fingerprint of the loaded
    table), the tokenizer's class, settings and vocabulary, and a few tokenized samples spread over the dataset, which
    catch a changed prompt template or a changed dataset builder in code.
    """
    files = [_file_digest(path) for path in files_read(node) if path.is_file()]
    table = (
        None
        if files
        else getattr(getattr(getattr(dataset, "inner", None), "_data", None), "_fingerprint", None)
    )
    samples = _probe(dataset, probes)
    digest = hashlib.sha256()
    settings = json.dumps(node, sort_keys=True, default=repr)
    digest.update(repr((settings, files, table, len(dataset), samples)).encode())
    _digest_object(tokenizer, digest, set())
    return digest.hexdigest()


def data_fingerprint(dataset: Dataset, *, nodes: Any, tokenizer: Any, probes: int = 64) -> str:
    """Tell one run's data from another's: settings, content of the local files, sizes, weights, some tokenized samples.

    Where files lie does not matter, so a run can be resumed on another machine.

    Args:
        dataset: what ``nodes`` built.
        nodes: the config's dataset node, or list of nodes.
        tokenizer: the config's tokenizer node.
        probes: samples looked at, spread over the dataset.
    """
    plain = [
        OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        for node in (nodes, tokenizer)
    ]
    entries = [*(plain[0] if isinstance(plain[0], list) else [plain[0]]), plain[1]]
    files = [
        [_file_digest(path) for path in files_read(entry) if path.is_file()] for entry in entries
    ]
    settings = [
        {key: value for key, value in entry.items() if not _is_location(key, value)}
        for entry in entries
    ]
    sizes = (len(dataset), getattr(dataset, "lengths", None), getattr(dataset, "weights", None))
    content = (
        json.dumps(settings, sort_keys=True, default=repr),
        files,
        sizes,
        _probe(dataset, probes),
    )
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _is_location(key: str, value: Any) -> bool:
    return key in _LOCATIONS or (key == "source" and is_folder(value))


def _probe(dataset: Dataset, count: int) -> list[tuple[Any, ...]]:
    """Tokens, labels and digests of the images of up to ``count`` samples, evenly spread."""
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int).tolist()
    samples = (dataset[i] for i in chosen)
    return [
        (
            sample["tokens"].tolist(),
            sample["labels"].tolist(),
            *(image.digest() for image in sample.get("images", ())),
        )
        for sample in samples
    ]


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_object(value: Any, digest: Any, seen: set[int]) -> None:
    """Feed everything that decides what a tokenizer does into ``digest``; the same in every process."""
    kind = type(value)
    digest.update(f"<{kind.__module__}.{kind.__qualname__}>".encode())
    if value is None or isinstance(value, (str, int, float, bool, bytes, Path)):
        digest.update(repr(value).encode())
    elif hasattr(value, "pattern"):  # a compiled regular expression; its repr is cut short
        digest.update(repr(value.pattern).encode())
    elif hasattr(value, "serialized_model_proto"):  # SentencePiece
        digest.update(value.serialized_model_proto())
    elif hasattr(value, "_mergeable_ranks"):  # tiktoken
        _digest_object(
            [value._pat_str, value._mergeable_ranks, value._special_tokens], digest, seen
        )
    elif hasattr(value, "to_str"):  # Hugging Face tokenizers
        digest.update(value.to_str().encode())
    elif isinstance(value, (set, frozenset)):
        digest.update(repr(sorted(map(repr, value))).encode())
    elif id(value) in seen:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _digest_object(item, digest, seen | {id(value)})
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest_object(item, digest, seen | {id(value)})
    elif callable(value) and hasattr(value, "__qualname__"):
        digest.update(value.__qualname__.encode())
    else:
        learned_later = {
            "prefix",
            "encoded_prefix",
        }  # torchtune's SentencePiece wrapper sets them on first use
        state = {
            k: v
            for k, v in sorted(getattr(value, "__dict__", {}).items())
            if k not in learned_later
        }
        _digest_object(state, digest, seen | {id(value)})


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values of tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(
            tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def versions() -> str:
    """Of the packages that decide what a run computes."""
    others = (f"{name} {metadata.version(name)}" for name in ("torch", "torchtune", "torchao"))
    return ", ".join([f"kasa_tune {__version__}", *others])
