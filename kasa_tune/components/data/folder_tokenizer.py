"""The tokenizer of a checkpoint's folder: its file, special tokens, chat template and stop tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtune.data._prompt_templates import _get_prompt_template
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.utils import get_logger

from kasa_tune.architectures import read_architecture
from kasa_tune.components.data.chat_templates import load_chat_template
from kasa_tune.components.data.paths import local_path
from kasa_tune.components.data.tokenizer_files import file_kind, load_settings, unfit
from kasa_tune.components.data.tokenizers import HFTokenizer, hf_tokenizer

log = get_logger("INFO")

_MAKE_JSON = (
    "Write a tokenizer.json there with transformers, "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), or set tokenizer to a section "
    "of its own"
)
# Files of tokenizers that cannot be read here.
_OTHERS = ("tekken.json", "vocab.json", "tokenizer.model", "tokenizer.model.v3")


def tokenizer_from_checkpoint(
    checkpoint_dir: str,
    max_seq_len: int | None = None,
    prompt_template: str | dict[str, tuple[str, str]] | None = None,
    chat_template_path: str | None = None,
) -> Any:
    """Build the tokenizer that lies in a checkpoint's folder.

    It is read from tokenizer.json, with the special tokens of tokenizer_config.json, the folder's
    chat template and the stop tokens of generation_config.json or config.json. A folder without
    tokenizer.json may have a SentencePiece model instead, if it has no chat template.

    Without a chat template, prompts and answers are plain text, and each answer ends in the
    end-of-sequence token.

    Args:
        checkpoint_dir: the folder, with config.json and the tokenizer's files.
        max_seq_len: longer samples are cut to this many tokens, and to those that the model takes.
            None stands for the latter.
        prompt_template: dotted path of a torchtune prompt template, or ``{role: (before, after)}``.
            It takes the place of the chat template.
        chat_template_path: a Jinja file that takes the place of the folder's chat template.

    Raises:
        FileNotFoundError: the folder has no config.json or no tokenizer.
        ValueError: a file is damaged or of a kind that cannot be read, or the model is of no
            supported family.
    """
    folder = Path(local_path(checkpoint_dir, "tokenizer.checkpoint_dir"))
    architecture = read_architecture(folder)
    length = _length(max_seq_len, architecture.max_seq_len)
    if not (folder / "tokenizer.json").is_file():
        return _from_sentencepiece(folder, length, prompt_template, chat_template_path)
    tokenizer = hf_tokenizer(
        str(folder / "tokenizer.json"),
        chat_template_path=chat_template_path,
        max_seq_len=length,
        prompt_template=prompt_template,
    )
    tokenizer.vision = architecture.vision
    if tokenizer.chat_template is None and prompt_template is None:
        _log_plain(folder, tokenizer)
    return tokenizer


def _length(given: int | None, longest: int) -> int:
    """Tokens at which samples are cut."""
    if given is not None and given > longest:
        log.info(
            f"tokenizer.max_seq_len is {given:,}, and the model takes {longest:,} tokens: samples "
            f"are cut at {longest:,}."
        )
    return longest if given is None else min(given, longest)


def _from_sentencepiece(
    folder: Path, length: int, prompt_template: Any, chat_template_path: str | None
) -> Llama2Tokenizer:
    """A base model's SentencePiece tokenizer.

    Raises:
        FileNotFoundError: there is no tokenizer in the folder.
        ValueError: it is of another kind, or the folder has a chat template, which needs the
            special tokens that only tokenizer.json has.
    """
    path = folder / "tokenizer.model"
    if not path.is_file() or file_kind(path) != "sentencepiece":
        raise _unreadable(folder)
    settings, _ = load_settings(folder, None)
    if prompt_template is None and load_chat_template(folder, chat_template_path, settings):
        raise ValueError(
            f"{folder} has a chat template, and no tokenizer.json with its special tokens. "
            f"{_MAKE_JSON}."
        )
    template = None if prompt_template is None else _get_prompt_template(prompt_template)
    tokenizer = Llama2Tokenizer(str(path), max_seq_len=length, prompt_template=template)
    if template is None:
        _log_plain(folder, tokenizer)
    return tokenizer


def _unreadable(folder: Path) -> Exception:
    """What to say of a folder without tokenizer.json and without a SentencePiece model."""
    others = [name for name in _OTHERS if (folder / name).is_file()]
    if not others:
        return FileNotFoundError(
            f"{folder} holds no tokenizer: there is no tokenizer.json. Fetch it; it belongs beside "
            "the weights."
        )
    if others[0] == "tokenizer.model" and file_kind(folder / others[0]) != "unknown":
        return ValueError(f"{unfit(folder / others[0])}. {_MAKE_JSON}.")
    return ValueError(f"{folder} has {others[0]} and no tokenizer.json. {_MAKE_JSON}.")


def _log_plain(folder: Path, tokenizer: HFTokenizer | Llama2Tokenizer) -> None:
    end = str(tokenizer.eos_id)
    if isinstance(tokenizer, HFTokenizer) and tokenizer.eos_id is not None:
        end = f"{tokenizer.decode([tokenizer.eos_id], skip_special_tokens=False)} ({end})"
    log.info(
        f"{folder} has no chat template, so prompts and answers are plain text, and turns of a "
        f"conversation follow one another as they are. Each answer ends in the end-of-sequence "
        f"token, {end}. tokenizer.chat_template_path=<a Jinja file> gives it a template."
    )
