"""What a tokenizer's or a checkpoint's file is, judged by its first bytes."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from kasa_tune.config.entries import Problem, show

_POINTER = b"version https://git-lfs"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")

# The builder's name, as it begins, to the parameter that names a file and the kinds of file that it reads.
_READS = {
    "hf_tokenizer": {"path": ("a tokenizer.json of Hugging Face",)},
    "llama3_tokenizer": {"path": ("a tiktoken file",)},
    "qwen2": {"path": ("a vocab.json",)},
    "phi4": {"vocab_path": ("a vocab.json",)},
    "llama2_tokenizer": {"path": ("a SentencePiece model",)},
    "gemma": {"path": ("a SentencePiece model",)},
    "mistral": {"path": ("a SentencePiece model",)},
    "phi3": {"path": ("a SentencePiece model",)},
}
_BUILDERS = {  # the kind of file to who reads it
    "a tokenizer.json of Hugging Face": "kasa_tune.components.data.hf_tokenizer",
    "a tiktoken file": "torchtune.models.llama3.llama3_tokenizer",
    "a SentencePiece model": "the tokenizers of Llama 2, Mistral, Gemma and Phi-3 in torchtune",
    "a vocab.json": "torchtune.models.qwen2.qwen2_tokenizer, with merges_file,",
}


def kind_of(path: str) -> str | None:
    """The kind of tokenizer file at `path` in words, or what it is instead; None where its beginning does not tell.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(4096)
    if not start:
        return "an empty file"
    if start.startswith(_POINTER):
        return "a Git LFS pointer, not the file itself"
    if _TIKTOKEN_LINE.match(start):
        return "a tiktoken file"
    if start.lstrip().startswith(b"{"):
        model = re.search(rb'"(version|truncation|added_tokens|model)"\s*:\s*["\[{n]', start)
        return "a tokenizer.json of Hugging Face" if model else "a vocab.json"
    if start[:1] == b"\n" and b"\0" not in start[:2]:  # field 1 of a protobuf message: the pieces
        return "a SentencePiece model"
    return None


def tokenizer_kind(cfg: dict[str, Any]) -> Iterator[Problem]:
    """The tokenizer's file is of the kind that its builder reads."""
    node = cfg.get("tokenizer") or {}
    builder = str(node.get("_component_")).rpartition(".")[2]
    reads = next((files for name, files in _READS.items() if builder.startswith(name)), {})
    for name, kinds in reads.items():
        path = node.get(name)
        if not isinstance(path, str) or not os.path.exists(path):
            continue
        key = f"tokenizer.{name}"
        try:
            kind = kind_of(path)
        except OSError as error:
            yield Problem(key, f"got {show(path)}, which cannot be read: {error.strerror}")
            continue
        if kind is None or kind in kinds:
            continue
        other = f"; it is read by {_BUILDERS[kind]}" if kind in _BUILDERS else ""
        wrong = f"got {show(path)}, which is {kind}; {builder} reads {' or '.join(kinds)}"
        yield Problem(key, wrong + other)


def settings_of(path: str) -> dict[str, Any]:
    """The JSON object in a file of at most a megabyte.

    Raises:
        ValueError: there is none, or the file cannot be read; the message says why.
    """
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.loads(file.read(1_000_000))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"holds {show(settings)} where a JSON object is expected")
    return settings


def weights_files(folder: str, names: list[str], key: str) -> Iterator[Problem]:
    """The files with weights, of which each exists, are weights, and all of them."""
    for name in names:
        if name.endswith((".json", ".txt", ".py", ".md")):
            yield Problem(key, f"got {show(name)}, which holds no weights; name the files that do")
            return
        with open(os.path.join(folder, name), "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                wrong = f"got {show(name)}, which is a Git LFS pointer, not the weights themselves"
                yield Problem(key, f"{wrong}; `git lfs pull` in {show(folder)} fetches them")
                return
    missing = sorted(_shards(folder, names) - {*names})
    if missing:
        yield Problem(
            key,
            f"got {len(names)} of {len({*names, *missing})} parts of the weights; "
            f"{show(missing[0])} is not among them. List every part",
        )


def _shards(folder: str, names: list[str]) -> set[str]:
    """All parts of what `names` are parts of: by their numbers, and by the index that lists them."""
    parts = set()
    for name in names:
        if found := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.\w+)", name):
            before, number, of, count, suffix = found.groups()
            if int(count) <= 10_000:
                numbers = (str(i).zfill(len(number)) for i in range(1, int(count) + 1))
                parts |= {f"{before}{i}{of}{count}{suffix}" for i in numbers}
    index = os.path.join(folder, "model.safetensors.index.json")
    if not parts and os.path.isfile(index) and os.path.getsize(index) < 50_000_000:
        try:
            with open(index, encoding="utf-8") as file:
                listed = {*json.load(file)["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return parts  # nothing reads the index; it only helps to see what is missing
        parts = {str(name) for name in listed} if listed & {*names} else parts
    return parts
