"""The files of a tokenizer: what kind each is, and whether it holds what it should."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kasa_tune.components.data.paths import local_path

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Arguments of tokenizer builders, ours and torchtune's, that name a file.
FILE_KEYS = (
    "path",
    "vocab_path",
    "merges_path",
    "merges_file",
    "special_tokens_path",
    "tokenizer_json_path",
    "tokenizer_config_json_path",
    "tokenizer_config_path",
    "chat_template_path",
)
MOST_BYTES = 256_000_000  # of a JSON file; the largest of published tokenizers have 35,000,000
_LFS = b"version https://git-lfs"
_FITTING = {
    "json": "a Hugging Face tokenizer.json: set tokenizer._component_ to "
    "kasa_tune.components.data.hf_tokenizer",
    "other json": "JSON, but no Hugging Face tokenizer.json, or a damaged one: fetch it again, or give "
    "the path of tokenizer.json",
    "sentencepiece": "a SentencePiece model: set tokenizer._component_ to a builder that reads one, such "
    "as torchtune.models.llama2.llama2_tokenizer",
    "tiktoken": "a tiktoken file: set tokenizer._component_ to a builder that reads one, such as "
    "torchtune.models.llama3.llama3_tokenizer",
    "pointer": "the pointer of a git-lfs file, not the file: fetch it with `git lfs pull` or `tune download`",
    "empty": "empty: fetch it again",
    "unknown": "no tokenizer file that is known, or it is damaged: fetch it again",
}


def local_files(node: Mapping[str, Any]) -> dict[str, str]:
    """Return the paths of the files that a section ``tokenizer`` names, by key.

    A builder must not be given anything else. tiktoken fetches a URL, and a device such as
    ``/dev/zero`` or a pipe is read without end.

    Raises:
        FileNotFoundError: there is no regular file at one of the paths.
        ValueError: a value is no path.
    """
    given = {key: node[key] for key in FILE_KEYS if node.get(key) is not None}
    files = {key: local_path(value, f"tokenizer.{key}") for key, value in given.items()}
    for key, path in files.items():
        if not Path(path).is_file():
            raise FileNotFoundError(f"tokenizer.{key}: no such file: {path}")
    return files


@contextlib.contextmanager
def read_in_place() -> Iterator[None]:
    """While active, tiktoken reads a vocabulary from its own path.

    By default, tiktoken copies every vocabulary to ``data-gym-cache`` in the folder for temporary
    files. Afterwards it reads the copy, even if the vocabulary has changed or if another user has
    written the copy.
    """
    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def unfit(path: str | Path) -> str:
    """What the file at ``path`` is, and which key to set; for a tokenizer builder that cannot read it."""
    return f"{path} is {_FITTING[file_kind(path)]}"


def file_kind(path: str | Path) -> str:
    """What a tokenizer file is: json, other json, sentencepiece, tiktoken, pointer, empty or unknown."""
    with open(path, "rb") as file:
        head = file.read(256)
    if head.startswith(_LFS):
        return "pointer"
    if not head.strip():
        return "empty"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        return "json" if _holds_model(path) else "other json"
    fields = head.split(b"\n", 1)[0].split()  # base64 of a token and its rank
    if len(fields) == 2 and fields[1].isdigit():
        return "tiktoken"
    return "sentencepiece" if _is_sentencepiece(path) else "unknown"


def _holds_model(path: str | Path) -> bool:
    try:
        content = json.loads(_text(Path(path)))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "model" in content


def _is_sentencepiece(path: str | Path) -> bool:
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor().LoadFromSerializedProto(Path(path).read_bytes())
    except (RuntimeError, OSError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------- JSON


def _text(path: Path) -> str:
    """What is in a file. Raises ValueError if it is larger than any tokenizer's, before it is read."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(
            f"it has {size:,} bytes, and the limit for a tokenizer's files is {MOST_BYTES:,}"
        )
    return path.read_text(encoding="utf-8")


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError or ValueError with its name."""
    try:
        content = json.loads(_text(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"Tokenizer file not found: {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; give the path of a file in it.") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply.") from None
    except ValueError as error:
        hint = ""
        if file_kind(path) in ("sentencepiece", "tiktoken", "pointer", "empty"):
            hint = f" {unfit(path)}."
        raise ValueError(f"{path} is not valid JSON: {error}.{hint}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``, neither cutting nor padding."""
    content = load_json(path)
    if "model" not in content:
        raise ValueError(
            f"{path} is no Hugging Face tokenizer.json (no 'model' in it). Give the path of tokenizer.json."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # bare Exception, and on some files a panic of Rust
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"{path} cannot be read by the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_settings(folder: Path, path: str | None) -> tuple[dict[str, Any], Path]:
    """The tokenizer's config and the file it is from."""
    if path is not None:
        return load_json(Path(path)), Path(path)
    beside = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    file = next((file for file in beside if file.is_file()), beside[0])
    return (load_json(file) if file.is_file() else {}), file


def named_tokens(settings: Mapping[str, Any], file: Path) -> dict[str, str]:
    """The texts of the special tokens that a tokenizer's config names: ``bos_token``, ``eos_token`` and so on."""
    texts = {}
    for key in _NAMED_TOKENS:
        token = settings.get(key)
        text = token.get("content") if isinstance(token, Mapping) else token
        if token is None or text == "":
            continue
        if not isinstance(text, str):
            raise ValueError(
                f"{key} in {file} must be text, or an object with text in content, got {token!r:.60}."
            )
        texts[key] = text
    return texts


def generation_stops(folder: Path, vocab_size: int) -> list[int]:
    """The ids of ``eos_token_id`` in ``generation_config.json``, or without such a file in ``config.json``; none where
    neither has the key.
    """
    files = (folder / "generation_config.json", folder / "config.json")
    file = next((file for file in files if file.is_file()), None)
    content = {} if file is None else load_json(file)
    given = content.get("eos_token_id")
    if given is None and isinstance(content.get("text_config"), Mapping):
        given = content["text_config"].get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for id_ in ids:
        if isinstance(id_, bool) or not isinstance(id_, int) or not 0 <= id_ < vocab_size:
            raise ValueError(
                f"eos_token_id in {file} must be a token id (0 to {vocab_size - 1}) or a list of them, "
                f"got {given!r:.60}."
            )
    return ids
