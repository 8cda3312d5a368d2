"""The files of a checkpoint in Hugging Face's layout, looked at without torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kasa_tune.json_text import parse_json

INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"(?P<name>.+)-\d+-of-(?P<count>\d+)(?P<suffix>\.\w+)")
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own bound
_LONGEST_JSON = 100_000_000  # bytes; the index of a model with 100,000 tensors has 10,000,000


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON, or JSON that is no object.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file.")
    try:
        with open(path, "rb") as file:
            text = file.read(_LONGEST_JSON + 1)
        if len(text) > _LONGEST_JSON:
            raise ValueError(f"it has more than {_LONGEST_JSON:,} bytes")
        content = parse_json(text.decode("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing.") from None
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 among them
        raise ValueError(f"{path} is damaged: it is no JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object.")
    return content


def shards_of(folder: Path) -> list[str]:
    """The files that the index of a Hugging Face checkpoint names; none without an index.

    Raises:
        ValueError: the index is damaged.
    """
    if not (folder / INDEX).is_file():
        return []
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map from names to files.")
    names = sorted(set(weight_map.values()))
    for name in names:
        plain = name.isprintable() and len(name) < 256 and name == Path(name).name
        if name in ("", ".", "..") or not plain:
            raise ValueError(
                f"{folder / INDEX} is damaged: its weight_map names {name!r:.80}, which is no file "
                "of this folder."
            )
    return names


def check_folder(folder: Path) -> None:
    """See that a checkpoint's folder is one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is a file, or holds a GGUF file and no config.json.
    """
    if folder.suffix == ".gguf":
        raise ValueError(_gguf(folder))
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Give the folder that it lies in.")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder. Give the folder of a checkpoint; `tune download <repository> "
            "--output-dir <folder>` fetches one."
        )
    if not (folder / "config.json").is_file() and (ggufs := sorted(folder.glob("*.gguf"))):
        raise ValueError(_gguf(ggufs[0]))


def _gguf(path: Path) -> str:
    return (
        f"{path} is a GGUF file, whose weights are in llama.cpp's layout. Give the checkpoint in "
        "safetensors that it was made from."
    )


def weight_files(folder: Path) -> list[str]:
    """The names of a checkpoint's safetensors files, all of them there and none a stand-in.

    Raises:
        FileNotFoundError: the folder is missing, or holds no weights, or not all of them.
        ValueError: what it holds is in another format, or the pointer of a git-lfs file.
    """
    check_folder(folder)
    names = shards_of(folder)
    if not names:
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        others = ("adapter_", "consolidated", "optimizer")
        names = [name for name in found if not name.startswith(others)]
        names = whole_set(folder, names) if names else []
    if not names:
        raise _no_weights(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(names)} files with weights, {missing[0]} among "
            "them. Fetch the rest; `tune download` goes on where it was."
        )
    for name in names:
        header_of(folder / name)  # which is there whole
    return names


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: ``dtype``, ``shape`` and ``data_offsets`` of each tensor by name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file, or is shorter than its header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if (start + file.read(len(_POINTER) - 8)) == _POINTER:
            raise ValueError(
                f"{path} is the pointer of a git-lfs file, not the weights. Fetch them with "
                "`git lfs pull` or `tune download`."
            )
        file.seek(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if length <= min(size, _LONGEST_HEADER) else b""
    try:
        entries = json.loads(header)
        tensors = [entry for key, entry in entries.items() if key != "__metadata__"]
        for entry in tensors:
            (*entry["dtype"], *map(int.__index__, entry["shape"]))  # a word and whole numbers
        needed = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError):
        raise ValueError(
            f"{path} is no safetensors file, or was not fetched whole. Fetch it again."
        ) from None
    if size < needed:
        raise ValueError(
            f"{path} has {size:,} of its {needed:,} bytes: it was not fetched whole. Fetch it again."
        )
    return entries


def _no_weights(folder: Path) -> Exception:
    """What to say of a folder without safetensors."""
    if ggufs := sorted(folder.glob("*.gguf")):
        return ValueError(_gguf(ggufs[0]))
    if any((*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))):
        return ValueError(
            f"{folder} holds weights as PyTorch pickles alone. Give them in safetensors: most "
            "repositories have both, and transformers' save_pretrained writes them."
        )
    return FileNotFoundError(f"{folder} holds no weights: no .safetensors file is in it.")


def whole_set(folder: Path, names: list[str]) -> list[str]:
    """All files of the checkpoint that a list of names is a part of."""
    found = [_SHARD.fullmatch(name) for name in names]
    kinds = {(m["name"], m["count"], m["suffix"]) for m in found if m}
    if not all(found) or len(kinds) != 1:
        return shards if set(names) < set(shards := shards_of(folder)) else names
    ((stem, count, suffix),) = kinds
    if int(count) > 10_000:
        return names
    width = len(count)
    first = 0 if f"{stem}-{0:0{width}d}-of-{count}{suffix}" in names else 1
    numbers = range(first, first + int(count))
    return [f"{stem}-{number:0{width}d}-of-{count}{suffix}" for number in numbers]
