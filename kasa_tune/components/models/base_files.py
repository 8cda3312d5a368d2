"""The files of a base model, looked at before any of them is opened as weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtune.training import FormattedCheckpointFiles

from kasa_tune.components.checkpoints.files import parse_json

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<name>.+)-\d+-of-(?P<count>\d+)(?P<suffix>\.\w+)")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON, or JSON that is no object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing.") from None
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 among them
        raise ValueError(f"{path} is damaged: it is no JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object.")
    return content


def listed_files(given: Any) -> list[str]:
    """The names that ``checkpoint_files`` gives, as a list or as torchtune's pattern.

    Raises:
        ValueError: it gives none, or one that leads out of the folder.
    """
    try:
        names = (
            FormattedCheckpointFiles.from_dict(dict(given)).build_checkpoint_filenames()
            if isinstance(given, Mapping)
            else list(given or [])
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint_files is {given!r}: give a list of names, or filename_format and "
            f"max_filename ({error})."
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"checkpoint_files names {name!r}, which is no file in the folder.")
    if not names:
        raise ValueError("checkpoint_files names no file.")
    return names


def check_base_files(folder: Path, given: Any) -> None:
    """See that the listed files are weights, and all of them.

    Args:
        folder: of the checkpoint.
        given: the value of ``checkpoint_files``.

    Raises:
        ValueError: an index or another JSON file is listed as weights, or some shards are left out; the message gives
            the list to set.
    """
    names = listed_files(given)
    for name in names:
        if name.endswith(".json"):
            shards = shards_of(folder) if name == INDEX else []
            raise ValueError(
                f"checkpoint_files names {name}, which lists weights and holds none. "
                f"Set checkpointer.checkpoint_files={json.dumps(shards)}."
                if shards
                else f"checkpoint_files names {name}, which holds no weights: list the .safetensors."
            )
    needed = _whole_set(folder, names)
    if missing := sorted(set(needed) - set(names)):
        raise ValueError(
            f"checkpoint_files names {len(names)} of the {len(needed)} files of {folder}; "
            f"{missing[0]} is left out. Set checkpointer.checkpoint_files={json.dumps(needed)}."
        )


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
        if name in ("", ".", "..") or name != Path(name).name or "\0" in name:
            raise ValueError(
                f"{folder / INDEX} is damaged: its weight_map names {name!r:.80}, which is no file "
                "of this folder."
            )
    return names


def checked_config(folder: Path) -> dict[str, Any]:
    """config.json of a base, with the numbers that the conversion of its weights needs.

    Without ``num_key_value_heads`` there are as many as heads, as transformers has it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object, or a number is missing or is none.
    """
    config = read_object(folder / "config.json")
    if (folder / "original_repo_id.json").is_file():
        read_object(folder / "original_repo_id.json")  # torchtune reads it, and does not name it
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    needed = ["num_attention_heads", "num_key_value_heads", "hidden_size"]
    needed += ["head_dim"] * (config.get("head_dim") is not None)
    for key in needed:
        value = config.get(key)
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(
                f"{folder / 'config.json'}: {key} is {str(value)[:60]!r}; it is a whole number above 0."
            )
    return config


def _whole_set(folder: Path, names: list[str]) -> list[str]:
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
