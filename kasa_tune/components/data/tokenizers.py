"""Any Hugging Face ``tokenizer.json`` as a torchtune tokenizer, with the model's own chat template.

The text of a conversation is rendered by the template and tokenized as a whole, as transformers does. Which tokens the
model has to learn follows from rendering prefixes: what an assistant turn adds to the rendered conversation before it
is the turn. A prompt given at generation time therefore gets exactly the tokens it had in training.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer
from torchtune.data import Message
from torchtune.data._prompt_templates import _get_prompt_template
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from kasa_tune.components.data.chat_templates import compile_template, load_chat_template

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def hf_tokenizer(
    path: str,
    tokenizer_config_path: str | None = None,
    chat_template_path: str | None = None,
    max_seq_len: int | None = None,
    prompt_template: str | dict[str, tuple[str, str]] | None = None,
) -> "HFTokenizer":
    """Build an :class:`HFTokenizer` from config values.

    Args:
        path: ``tokenizer.json``.
        tokenizer_config_path: names the special tokens; default ``tokenizer_config.json`` beside ``path``, else
            ``special_tokens_map.json`` there.
        chat_template_path: a Jinja file; default ``chat_template.jinja`` beside ``path``, else the template in the
            tokenizer's config, else none.
        max_seq_len: longer conversations are cut to this many tokens.
        prompt_template: dotted path of a torchtune prompt template, or ``{role: (before, after)}``; takes the place of
            the chat template.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that is not what it should be, or no end-of-sequence token.
    """
    template = None if prompt_template is None else _get_prompt_template(prompt_template)
    return HFTokenizer(
        path,
        tokenizer_config_path=tokenizer_config_path,
        chat_template_path=chat_template_path,
        max_seq_len=max_seq_len,
        prompt_template=template,
    )


class HFTokenizer(ModelTokenizer, Transform):
    """torchtune's ``ModelTokenizer`` over the ``tokenizers`` library. Arguments as in :func:`hf_tokenizer`.

    Attributes:
        bos_id: id of the token every text begins with, or None if this tokenizer begins texts with none.
        eos_id, pad_id: ids; padding falls back to ``eos_id``.
        stop_tokens: ids that end a generated turn: ``eos_id``, those of ``generation_config.json``, and the special
            token the chat template closes an assistant turn with.
        vocab_size: largest id + 1, added tokens included.
        special_tokens: added tokens -> id.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer_config_path: str | None = None,
        chat_template_path: str | None = None,
        max_seq_len: int | None = None,
        prompt_template: Any = None,
    ) -> None:
        folder = Path(path).parent
        self.tokenizer = _load_tokenizer(Path(path))
        settings = _load_settings(folder, tokenizer_config_path)
        self.named_tokens = {
            key: _token_text(settings[key]) for key in _NAMED_TOKENS if settings.get(key)
        }
        self.special_tokens = {
            token.content: id_ for id_, token in self.tokenizer.get_added_tokens_decoder().items()
        }
        self.chat_template = load_chat_template(folder, chat_template_path, settings)
        self.max_seq_len, self.prompt_template = max_seq_len, prompt_template
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

        self.eos_id = self._named_id("eos_token")
        if self.eos_id is None:
            where = tokenizer_config_path or folder / "tokenizer_config.json"
            raise ValueError(
                f"No end-of-sequence token: set eos_token in {where}, or tokenizer_config_path."
            )
        pad_id = self._named_id("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        named_bos = self._named_id("bos_token")
        begins = named_bos is not None and self.tokenizer.encode("").ids[:1] == [named_bos]
        self.bos_id = (
            named_bos
            if begins or (named_bos is not None and settings.get("add_bos_token"))
            else None
        )
        self.stop_tokens = [self.eos_id, *self._other_stop_tokens(folder)]

    # ------------------------------------------------------------------------------------------ text

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it count as such."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        bos = [self.bos_id] if add_bos and self.bos_id is not None else []
        return bos + ids + ([self.eos_id] if add_eos else [])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(
            [int(i) for i in token_ids], skip_special_tokens=skip_special_tokens
        )

    # ------------------------------------------------------------------------------------------ conversations

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> Mapping[str, Any]:
        """Replace ``messages`` in the sample by ``tokens`` and ``mask``; ``inference`` leaves the last turn open."""
        sample = dict(sample)
        tokens, mask = self.tokenize_messages(sample.pop("messages"), add_end_tokens=not inference)
        return {**sample, "tokens": tokens, "mask": mask}

    def tokenize_messages(
        self, messages: Sequence[Message], *, add_end_tokens: bool = True
    ) -> tuple[list[int], list[bool]]:
        """Token ids [n] of a conversation and the mask [n]: True where nothing is to be learned.

        Args:
            messages: the conversation, text only.
            add_end_tokens: close the last turn. False leaves an assistant's last turn open, to be continued.

        Raises:
            ValueError: a message that is not text, a template that refuses the conversation, or one that renders the
                beginning of a conversation differently once it goes on.
        """
        if self.prompt_template is not None:
            messages = self.prompt_template(messages)
        tokens, mask = (
            self._tokenize_plain(messages, add_end_tokens)
            if self.chat_template is None or self.prompt_template is not None
            else self._tokenize_chat(messages, add_end_tokens)
        )
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def _tokenize_chat(
        self, messages: Sequence[Message], close: bool
    ) -> tuple[list[int], list[bool]]:
        dialogue = [{"role": _role(message), "content": _text(message)} for message in messages]
        text = self._render(dialogue) if close else self._render_open(dialogue)
        seams, learned = [], []  # where a span of text ends, and whether it is learned
        gap: list[Message] = []
        for i, message in enumerate(messages):
            if message.role != "assistant":
                gap.append(message)
                continue
            opened = self._render(dialogue[:i], add_generation_prompt=True).rstrip(" ")
            closed = text if i == len(messages) - 1 else self._render(dialogue[: i + 1])
            if not (closed.startswith(opened) and text.startswith(closed)):
                raise ValueError(
                    f"The chat template renders the conversation up to message {i} differently once message {i} is "
                    "answered or followed by others, so it cannot be told which tokens to learn. "
                    "Set chat_template_path to a template that only appends."
                )
            seams += [len(opened), len(closed)]
            learned += [any(not m.masked for m in gap), not message.masked]
            gap = []
        ids, cuts = self._encode_at_seams(text, seams)
        return ids, _mask(cuts, learned, len(ids), rest=any(not m.masked for m in gap))

    def _tokenize_plain(
        self, messages: Sequence[Message], close: bool
    ) -> tuple[list[int], list[bool]]:
        """Contents end to end; each turn, up to and including the assistant's answer, between bos and eos."""
        tokens: list[int] = []
        mask: list[bool] = []
        turn: list[Message] = []
        for i, message in enumerate(messages):
            turn.append(message)
            last = i == len(messages) - 1
            if message.role != "assistant" and not last:
                continue
            texts = [_text(m) for m in turn]
            whole = "".join(texts)
            seams = [len("".join(texts[: k + 1]).rstrip(" ")) for k in range(len(turn) - 1)]
            open_turn = last and not close
            ids, cuts = self._encode_at_seams(whole.rstrip(" ") if open_turn else whole, seams)
            turn_mask = _mask(
                cuts, [not m.masked for m in turn[:-1]], len(ids), rest=not message.masked
            )
            bos = [self.bos_id] if self.bos_id is not None else []
            eos = [self.eos_id] if message.role == "assistant" and not open_turn else []
            tokens += bos + ids + eos
            mask += [turn[0].masked] * len(bos) + turn_mask + [message.masked] * len(eos)
            turn = []
        return tokens, mask

    def _encode_at_seams(self, text: str, seams: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids of a text, and the number of ids before each seam (a position in the text).

        The text is tokenized as a whole; only where a token would reach across a seam is the text cut there, because
        generation starts from exactly the tokens before a seam.
        """
        ids: list[int] = []
        cuts = []
        start, rest = 0, self._encode_piece(text, first=True)
        for seam in seams:
            head = self._encode_piece(text[start:seam], first=start == 0)
            if rest[: len(head)] == head:
                cuts.append(len(ids) + len(head))
                continue
            ids += head
            cuts.append(len(ids))
            start, rest = seam, self._encode_piece(text[seam:], first=False)
        return ids + rest, cuts

    def _encode_piece(self, text: str, *, first: bool) -> list[int]:
        """Ids of a piece; a later piece must not get the space that SentencePiece-like tokenizers put before a text."""
        if first:
            return self.encode(text, add_bos=False, add_eos=False)
        marker = self.encode("\n", add_bos=False, add_eos=False)
        marked = self.encode("\n" + text, add_bos=False, add_eos=False)
        joined = marked[: len(marker)] != marker
        return self.encode(text, add_bos=False, add_eos=False) if joined else marked[len(marker) :]

    # ------------------------------------------------------------------------------------------ template

    def _render(
        self, dialogue: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> str:
        try:
            return compile_template(self.chat_template).render(
                messages=dialogue, add_generation_prompt=add_generation_prompt, **self.named_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in dialogue) or "none"
            raise ValueError(
                f"The chat template does not take a conversation of {roles}: {error}"
            ) from error

    def _render_open(self, dialogue: Sequence[Mapping[str, str]]) -> str:
        """The conversation up to the end of what the assistant has said so far, ready to be continued."""
        if not dialogue or dialogue[-1]["role"] != "assistant":
            return self._render(dialogue, add_generation_prompt=True).rstrip(" ")
        opened = self._render(dialogue[:-1], add_generation_prompt=True)
        said = dialogue[-1]["content"].strip()
        whole = self._render(dialogue)
        end = whole.rfind(said) + len(said)
        return whole[:end] if said and end > len(opened.rstrip(" ")) else opened.rstrip(" ")

    # ------------------------------------------------------------------------------------------ special tokens

    def _named_id(self, key: str) -> int | None:
        text = self.named_tokens.get(key)
        id_ = None if text is None else self.tokenizer.token_to_id(text)
        if text is not None and id_ is None:
            raise ValueError(f"{key} {text!r} of the tokenizer's config is not in tokenizer.json.")
        return id_

    def _other_stop_tokens(self, folder: Path) -> list[int]:
        stops = []
        if (folder / "generation_config.json").is_file():
            ids = _load_json(folder / "generation_config.json").get("eos_token_id")
            stops += ids if isinstance(ids, list) else [ids]
        if self.chat_template is not None:
            said = "answer"
            try:
                whole = self._render(
                    [{"role": "user", "content": "ask"}, {"role": "assistant", "content": said}]
                )
            except ValueError:
                whole = said
            after = self.encode(
                whole[whole.rfind(said) + len(said) :], add_bos=False, add_eos=False
            )
            stops += after[:1] if after[:1] and after[0] in self.special_tokens.values() else []
        return [id_ for id_ in dict.fromkeys(stops) if id_ is not None and id_ != self.eos_id]


def _mask(cuts: Sequence[int], learned: Sequence[bool], length: int, *, rest: bool) -> list[bool]:
    """True where not learned: span k ends before id ``cuts[k]``; ``rest`` is whether the ids after them are learned."""
    mask: list[bool] = []
    for cut, learn in zip([*cuts, length], [*learned, rest], strict=True):
        mask += [not learn] * (cut - len(mask))
    return mask


def _role(message: Message) -> str:
    return "tool" if message.role == "ipython" else message.role


def _text(message: Message) -> str:
    if message.contains_media:
        raise ValueError(
            f"A {message.role} message holds an image; this tokenizer takes text alone."
        )
    return message.text_content


# ---------------------------------------------------------------------------------------------------- files


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"Tokenizer file not found: {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _load_tokenizer(path: Path) -> Tokenizer:
    content = _load_json(path)
    if "model" not in content:
        raise ValueError(
            f"{path} is no Hugging Face tokenizer.json (no 'model' in it). Give the path of tokenizer.json."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} cannot be read by the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_settings(folder: Path, path: str | None) -> dict[str, Any]:
    if path is not None:
        return _load_json(Path(path))
    beside = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    return next((_load_json(file) for file in beside if file.is_file()), {})


def _token_text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
