"""Any Hugging Face ``tokenizer.json`` as a torchtune tokenizer, with the model's own chat template.

The text of a conversation is rendered by the template and tokenized as a whole, as transformers does. Which tokens the
model has to learn follows from rendering prefixes: what an assistant turn adds to the rendered conversation before it
is the turn. A prompt given at generation time therefore gets exactly the tokens it had in training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.data import Message
from torchtune.data._prompt_templates import _get_prompt_template
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from kasa_tune.architectures import Vision
from kasa_tune.components.data.chat_spans import SeamEncoder, assistant_spans
from kasa_tune.components.data.chat_templates import (
    TemplateLimitError,
    load_chat_template,
    render_template,
)
from kasa_tune.components.data.conversations import ChatMessage, check_templated
from kasa_tune.components.data.paths import local_path
from kasa_tune.components.data.tokenizer_files import (
    generation_stops,
    load_settings,
    load_tokenizer,
    local_files,
    named_tokens,
    read_in_place,
    unfit,
)
from kasa_tune.components.data.tool_calls import arguments_as_text, check_rendered

Dialogue = Sequence[Mapping[str, Any]]


def build_tokenizer(node: Mapping[str, Any] | DictConfig, *, longest: int | None = None) -> Any:
    """The tokenizer of a config, which cuts samples at what the model takes or earlier.

    Args:
        node: the config's section ``tokenizer``. Without a ``max_seq_len`` the model's is taken.
        longest: tokens of the longest row that the model takes; None where samples are not cut.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: ``max_seq_len`` is more than ``longest``, or a file is none that the builder reads.
    """
    resolved = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    tokenizer = _instantiate(OmegaConf.create(dict(resolved)))
    if longest is None:
        return tokenizer
    limit = getattr(tokenizer, "max_seq_len", None)
    if limit is not None and limit > longest:
        raise ValueError(
            f"tokenizer.max_seq_len {limit} is more than the model takes, {longest}. Set it to at most "
            f"{longest}, or to null for that."
        )
    tokenizer.max_seq_len = limit or longest
    return tokenizer


def _instantiate(node: DictConfig) -> Any:
    """Call the builder and turn its ways of failing into sentences."""
    files = local_files(node)
    node.update(files)
    try:
        with read_in_place():
            return config.instantiate(node)
    except (
        Exception
    ) as error:  # of SentencePiece, tiktoken, tokenizers and json, each with its own types
        ours = (".hf_tokenizer", ".tokenizer_from_checkpoint", ".encoder_tokenizer")
        if isinstance(error, OSError) or node["_component_"].endswith(ours):
            raise
        reason = f"{node['_component_']} cannot be built: {error}."
        if "path" in files:
            reason += f" {unfit(node['path'])}."
        raise ValueError(f"tokenizer: {reason}") from error


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
        vision: of the LLaVA model whose folder the tokenizer was built from, else None.
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
        path = local_path(path, "tokenizer.path")
        if tokenizer_config_path is not None:
            tokenizer_config_path = local_path(
                tokenizer_config_path, "tokenizer.tokenizer_config_path"
            )
        if chat_template_path is not None:
            chat_template_path = local_path(chat_template_path, "tokenizer.chat_template_path")
        folder = Path(path).parent
        self.tokenizer = load_tokenizer(Path(path))
        self._seams = SeamEncoder(self.tokenizer)
        settings, settings_file = load_settings(folder, tokenizer_config_path)
        self.named_tokens = named_tokens(settings, settings_file)
        self.special_tokens = {
            token.content: id_ for id_, token in self.tokenizer.get_added_tokens_decoder().items()
        }
        self.chat_template = load_chat_template(folder, chat_template_path, settings)
        self.max_seq_len, self.prompt_template = max_seq_len, prompt_template
        self.vision: Vision | None = None
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

        self.eos_id = self._named_id("eos_token")
        if self.eos_id is None:
            self.eos_id = next(iter(generation_stops(folder, self.vocab_size)), None)
        if self.eos_id is None:
            raise ValueError(
                f"No end-of-sequence token: set eos_token in {settings_file}, or tokenizer_config_path."
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
        """Replace ``messages`` (and ``tools``) by ``tokens`` and ``mask``; ``inference`` leaves the last turn open."""
        sample = dict(sample)
        tokens, mask = self.tokenize_messages(
            sample.pop("messages"), add_end_tokens=not inference, tools=sample.pop("tools", None)
        )
        return {**sample, "tokens": tokens, "mask": mask}

    def tokenize_messages(
        self,
        messages: Sequence[Message],
        *,
        add_end_tokens: bool = True,
        tools: Sequence[Any] | None = None,
    ) -> tuple[list[int], list[bool]]:
        """Token ids [n] of a conversation and the mask [n]: True where nothing is to be learned.

        Args:
            messages: the conversation, text only.
            add_end_tokens: close the last turn. False leaves an assistant's last turn open, to be continued.
            tools: definitions of the tools that the assistant may call, for the chat template.

        Raises:
            ValueError: a message that is not text, a template that refuses the conversation or leaves something of it
                out, or one that renders the beginning of a conversation differently once it goes on.
        """
        if self.chat_template is None or self.prompt_template is not None:
            check_templated(messages, tools)
            if self.prompt_template is not None:
                messages = self.prompt_template(messages)
            tokens, mask = self._tokenize_plain(messages, add_end_tokens)
        else:
            tokens, mask = self._tokenize_chat(messages, add_end_tokens, tools)
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def _tokenize_chat(
        self, messages: Sequence[Message], close: bool, tools: Sequence[Any] | None
    ) -> tuple[list[int], list[bool]]:
        dialogue, text = self._dialogue_and_text(messages, close, tools)

        def render(*beginnings: tuple[Dialogue, bool]) -> list[str]:
            return self._render_all(beginnings, tools)

        learned = []  # of each span of text: before an answer, the answer, before the next answer
        gap: list[Message] = []
        for message in messages:
            if message.role == "assistant":
                learned += [any(not m.masked for m in gap), not message.masked]
                gap = []
            else:
                gap.append(message)
        learned.append(any(not m.masked for m in gap))
        seams = (seam for span in assistant_spans(dialogue, text, render) for seam in span)
        ids, cuts = self._seams.encode(text, seams, self.max_seq_len)
        return ids, _mask(cuts, learned[: len(cuts)], len(ids), rest=learned[len(cuts)])

    def _tokenize_plain(
        self, messages: Sequence[Message], close: bool
    ) -> tuple[list[int], list[bool]]:
        """Contents end to end; each turn, up to and including the assistant's answer, between bos and eos."""
        tokens: list[int] = []
        mask: list[bool] = []
        turn: list[Message] = []
        for i, message in enumerate(messages):
            if self.max_seq_len is not None and len(tokens) >= self.max_seq_len:
                break
            turn.append(message)
            last = i == len(messages) - 1
            if message.role != "assistant" and not last:
                continue
            texts = [_text(m) for m in turn]
            whole = "".join(texts)
            seams = [len("".join(texts[: k + 1]).rstrip(" ")) for k in range(len(turn) - 1)]
            open_turn = last and not close
            ids, cuts = self._seams.encode(whole.rstrip(" ") if open_turn else whole, seams)
            turn_mask = _mask(
                cuts, [not m.masked for m in turn[:-1]], len(ids), rest=not message.masked
            )
            bos = [self.bos_id] if self.bos_id is not None else []
            eos = [self.eos_id] if message.role == "assistant" and not open_turn else []
            tokens += bos + ids + eos
            mask += [turn[0].masked] * len(bos) + turn_mask + [message.masked] * len(eos)
            turn = []
        return tokens, mask

    # ------------------------------------------------------------------------------------------ template

    def _dialogue_and_text(
        self, messages: Sequence[Message], close: bool, tools: Sequence[Any] | None
    ) -> tuple[Dialogue, str]:
        """What the template gets and what it makes of it. Some templates take the arguments of calls as text alone."""
        dialogue: Dialogue = [_for_template(message) for message in messages]
        render = self._render if close else self._render_open
        try:
            text = render(dialogue, tools=tools)
        except ValueError:
            as_text = arguments_as_text(dialogue)
            if as_text == dialogue:
                raise
            dialogue, text = as_text, render(as_text, tools=tools)
        check_rendered(dialogue, tools, self._render)
        return dialogue, text

    def _render(
        self,
        dialogue: Dialogue,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        return self._render_all([(dialogue, add_generation_prompt)], tools)[0]

    def _render_all(
        self, beginnings: Sequence[tuple[Dialogue, bool]], tools: Sequence[Any] | None
    ) -> list[str]:
        assert self.chat_template is not None
        variables = [
            {
                **self.named_tokens,
                "messages": dialogue,
                "add_generation_prompt": opens,
                "tools": tools,
            }
            for dialogue, opens in beginnings
        ]
        try:
            return render_template(self.chat_template, *variables)
        except ValueError as error:
            longest = max((dialogue for dialogue, _ in beginnings), key=len)
            roles = ", ".join(message["role"] for message in longest[:12]) or "none"
            roles += ", ..." if len(longest) > 12 else ""
            raise ValueError(
                f"The chat template does not take a conversation of {roles}: {error}"
            ) from error

    def _render_open(self, dialogue: Dialogue, tools: Sequence[Any] | None = None) -> str:
        """The conversation up to the end of what the assistant has said so far, ready to be continued."""
        if not dialogue or dialogue[-1]["role"] != "assistant":
            return self._render(dialogue, add_generation_prompt=True, tools=tools).rstrip(" ")
        opened = self._render(dialogue[:-1], add_generation_prompt=True, tools=tools)
        said = (dialogue[-1]["content"] or "").strip()
        whole = self._render(dialogue, tools=tools)
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
        stops = generation_stops(folder, self.vocab_size)
        if self.chat_template is not None:
            said = "answer"
            try:
                whole = self._render(
                    [{"role": "user", "content": "ask"}, {"role": "assistant", "content": said}]
                )
            except ValueError as error:
                if isinstance(error.__cause__, TemplateLimitError):
                    raise
                whole = said
            after = self.encode(
                whole[whole.rfind(said) + len(said) :], add_bos=False, add_eos=False
            )
            stops += after[:1] if after[:1] and after[0] in self.special_tokens.values() else []
        return [id_ for id_ in dict.fromkeys(stops) if id_ != self.eos_id]


def _mask(cuts: Sequence[int], learned: Sequence[bool], length: int, *, rest: bool) -> list[bool]:
    """True where not learned: span k ends before id ``cuts[k]``; ``rest`` is whether the ids after them are learned."""
    mask: list[bool] = []
    for cut, learn in zip([*cuts, length], [*learned, rest], strict=True):
        mask += [not learn] * (cut - len(mask))
    return mask


def _for_template(message: Message) -> dict[str, Any]:
    if isinstance(message, ChatMessage):
        return message.for_template
    role = "tool" if message.role == "ipython" else message.role
    return {"role": role, "content": _text(message)}


def _text(message: Message) -> str:
    if message.contains_media:
        raise ValueError(
            f"A {message.role} message holds an image; this tokenizer takes text alone."
        )
    return message.text_content
