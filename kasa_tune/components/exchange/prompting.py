"""How a client must write a prompt, so that the model gets the tokens that it was trained with.

Found by asking the run's own tokenizer, and believed only where text and tokens agree both ways: every prompt and every
chat template given here was encoded again, as a server does it, and gave the tokens of training.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torchtune.data import AlpacaToMessages, Message, QuestionAnswerTemplate

from kasa_tune.components.checkpoints import build_allowed, check_allowed
from kasa_tune.components.data.by_columns import builder_of_file
from kasa_tune.components.data.chat_templates import (
    TemplateRefusalError,
    load_chat_template,
    render_template,
)
from kasa_tune.components.data.tokenizer_files import local_files, read_in_place
from kasa_tune.components.models.base_files import read_object

SAID = "Name three colours."
_ANSWERS = ("", "0", "a", "Z", ".", "\n")  # beginnings that tokenizers merge with different things
ANSWER = "Red."
_DAMAGED = (ValueError, OSError, TypeError, KeyError, AttributeError)
_ONE_TURN = """{%- for message in messages if message['role'] == 'assistant' -%}
{{- raise_exception('Training had one question and one answer: send one message of the user.') -}}
{%- endfor -%}
"""
_SYSTEM_FIRST = """{%- if messages[0]['role'] != 'system' -%}
{{- raise_exception('Training began with a message of the system: send that first.') -}}
{%- endif -%}
"""
_ROLES = ("system", "user", "assistant")

Encode = Callable[[str], list[int]]


class NoPromptError(Exception):
    """Why nothing can be said of prompts."""


@dataclass(frozen=True)
class Prompting:
    """How a run's prompts are written.

    Attributes:
        form: the prompt of training around ``<your text>``, for people; None where it is more than text around text.
        ids: the tokens of an example.
        text: the example as text: encoded, with the token that begins texts, it gives ``ids``. None: no text does.
        chat_template: Jinja that renders the example's messages so that they give ``ids``; None: it cannot be written.
        turns: whether ``chat_template`` also renders more turns than one as training would.
        of_base: whether the base's own chat template already does.
    """

    form: str | None
    ids: list[int]
    text: str | None
    chat_template: str | None
    turns: bool = False
    of_base: bool = False


def prompting_of(config: Mapping[str, Any], folder: Path, source: Any) -> Prompting:
    """How to prompt the model of a run.

    Args:
        config: of the run.
        folder: of the base's files, where the tokenizer is looked for if it has moved.
        source: of the config, for messages.

    Raises:
        NoPromptError: the tokenizer cannot be read, or the config may not name it; the message says why.
    """
    node = config.get("tokenizer")
    if not isinstance(node, Mapping):
        raise NoPromptError("the run names no tokenizer")
    dataset = _first(config.get("dataset"))
    try:
        moved = moved_files(node, folder)
        check_allowed(moved, "tokenizer", source)
        moved |= local_files(moved)
        with read_in_place():
            tokenizer = build_allowed(moved, "tokenizer", source, max_seq_len=None)
        return _prompting(tokenizer, dataset, folder)
    except Exception as error:  # files of any content: an export does not fail for its card's sake
        raise NoPromptError(f"its tokenizer could not be read: {error}") from error


def put_chat_template(folder: Path, prompting: Prompting) -> None:
    """Let an exported folder have the chat template of training, and no other.

    Args:
        folder: of the adapter or model; the base's own template may lie in it.
        prompting: where the base's own is that of training, it stays.
    """
    if prompting.of_base:
        return
    path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    path.unlink(missing_ok=True)
    content = {}
    with contextlib.suppress(
        ValueError, FileNotFoundError
    ):  # no JSON: no one finds a template in it
        content = read_object(settings)
    had = content.pop("chat_template", None) is not None
    if prompting.chat_template is not None:
        path.write_text(prompting.chat_template, encoding="utf-8")
    if had:
        settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def moved_files(node: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A section ``tokenizer`` with the files that are gone looked for beside the base's weights.

    Args:
        node: the section.
        folder: of the base's files.
    """
    found = dict(node)
    if isinstance(node.get("checkpoint_dir"), str) and not Path(node["checkpoint_dir"]).is_dir():
        found["checkpoint_dir"] = str(folder)
    for key, value in node.items():
        if key != "_component_" and isinstance(value, str) and "/" in value and "\0" not in value:
            beside = folder / Path(value).name
            if not Path(value).is_file() and beside.is_file():
                found[key] = str(beside)
    return found


def _first(dataset: Any) -> Mapping[str, Any]:
    """The section of the data set, or of the first in a mixture."""
    first = dataset[0] if isinstance(dataset, list | tuple) and dataset else dataset
    first = first if isinstance(first, Mapping) else {}
    if _name(first) != "by_columns_dataset":
        return first
    try:
        return {**first, "_component_": builder_of_file(first)}
    except (ValueError, OSError, RecursionError) as error:
        raise NoPromptError(
            f"its data could not be looked at again, to see how prompts were made of it: {error}"
        ) from error


def _prompting(tokenizer: Any, dataset: Mapping[str, Any], folder: Path) -> Prompting:
    bos = _bos(tokenizer)
    server = _server_tokenizer(folder)
    encode_more, begins = _encoders(tokenizer, server, bos)
    if _is_completion(dataset):
        ids = tokenizer.encode(SAID, add_bos=bos is not None, add_eos=False)
        return Prompting("<your text>", ids, SAID if begins(SAID) == ids else None, None)
    said = _example(dataset)
    system = dataset.get("new_system_prompt")
    messages = [("system", str(system))] * bool(system) + [("user", said)]
    ids = _open_tokens(tokenizer, messages)
    rest = ids[1:] if ids[:1] == [bos] else ids
    candidates = [_plain_text(tokenizer, messages), *_decoded(tokenizer, server, rest)]
    text = next((t for t in candidates if t is not None and begins(t) == ids), None)
    more = [*messages, ("assistant", ANSWER), ("user", SAID)]
    wanted = [(messages, ids), (more, _open_tokens(tokenizer, more))]
    shown = text.replace(SAID, "<your text>") if text and SAID in text else None
    found = Prompting(shown, ids, text, None)
    for template, of_base in _templates(tokenizer, server, folder, messages):
        fits = [_renders(template, m, encode_more) == tokens for m, tokens in wanted]
        if all(fits):
            return replace(found, chat_template=template, turns=True, of_base=of_base)
        # One of our own that is right for the first turn refuses more; the base's could not.
        if fits[0] and not of_base and found.chat_template is None:
            found = replace(found, chat_template=_ONE_TURN + template)
    return found


def _example(dataset: Mapping[str, Any]) -> str:
    """What a data set's builder makes of a row that holds the example."""
    name = _name(dataset)
    template = "{}"
    if name in ("alpaca_dataset", "commonsense_dataset"):
        template = AlpacaToMessages().template["prompt_no_input"].replace("{instruction}", "{}")
    elif name == "gsm8k_dataset":
        template = "{}".join(QuestionAnswerTemplate().template["user"])
    elif name == "e2e_dataset" and isinstance(dataset.get("template", ""), str):
        template = dataset.get("template", "{mr}\n").replace("{mr}", "{}")
    return template.replace("{}", SAID)


def _name(dataset: Mapping[str, Any]) -> str:
    return str(dataset.get("_component_") or "").rpartition(".")[2]


def _is_completion(dataset: Mapping[str, Any]) -> bool:
    return _name(dataset) in ("completion_dataset", "text_completion_dataset")


# ---------------------------------------------------------------------------------------------- tokens of training


def _open_tokens(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> list[int]:
    """The tokens with which every sample of these messages begins, whatever is answered to the last."""
    rows = []
    for answer in _ANSWERS:
        turns = [
            Message(role=role, content=text) for role, text in [*messages, ("assistant", answer)]
        ]
        rows.append(tokenizer({"messages": turns}, inference=True)["tokens"])
    shared = 0
    while shared < min(map(len, rows)) and len({row[shared] for row in rows}) == 1:
        shared += 1
    return list(rows[0][:shared])


def _bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer begins texts with."""
    bos = getattr(tokenizer, "bos_id", None)
    ids = tokenizer.encode("a", add_bos=True, add_eos=False)
    return bos if bos is not None and ids[:1] == [bos] else None


# ---------------------------------------------------------------------------------------------- tokens of a server


def _server_tokenizer(folder: Path) -> Tokenizer | None:
    """The base's tokenizer as servers load it; None without a tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exception; the run's own tokenizer is asked instead
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encoders(tokenizer: Any, server: Tokenizer | None, bos: int | None) -> tuple[Encode, Encode]:
    """What a server makes of a rendered conversation, which holds all its tokens, and of a plain prompt, before which
    it puts the token that begins texts.
    """
    if server is not None:
        return (
            lambda text: server.encode(text, add_special_tokens=False).ids,
            lambda text: server.encode(text).ids,
        )
    begin = "" if bos is None else _token_text(tokenizer, None, bos)

    def encode_more(text: str) -> list[int]:
        begins = bool(begin) and text.startswith(begin)
        rest = text.removeprefix(begin) if begins else text
        return tokenizer.encode(rest, add_bos=begins, add_eos=False)

    return encode_more, lambda text: tokenizer.encode(text, add_bos=bos is not None, add_eos=False)


def _token_text(tokenizer: Any, server: Tokenizer | None, token: int) -> str:
    """How a special token is written."""
    if server is not None:
        return server.id_to_token(token) or ""
    if hasattr(tokenizer, "tokenizer"):  # ours
        return tokenizer.tokenizer.id_to_token(token) or ""
    pieces = getattr(getattr(tokenizer, "_spm_model", None), "spm_model", None)
    if pieces is not None:
        return pieces.id_to_piece(token)
    named = getattr(tokenizer, "special_tokens", None) or {}
    return next((text for text, id_ in named.items() if id_ == token), "")


def _decoded(tokenizer: Any, server: Tokenizer | None, ids: list[int]) -> list[str]:
    """Texts that tokens, without the one that begins texts, may have come from."""
    texts = [] if server is None else [server.decode(ids, skip_special_tokens=False)]
    for options in ({"skip_special_tokens": False}, {}):
        with contextlib.suppress(TypeError):  # not every tokenizer of torchtune has the option
            texts.append(tokenizer.decode(ids, **options))
    return texts


# ---------------------------------------------------------------------------------------------- templates


def _around(tokenizer: Any) -> dict[str, tuple[str, str]] | None:
    """What a prompt template puts before and after a message of each role; None where it is more than that."""
    template = getattr(tokenizer, "prompt_template", None)
    if template is None:
        return dict.fromkeys(_ROLES, ("", ""))
    around = getattr(template, "template", None)
    if not isinstance(around, Mapping):
        return None
    return {role: tuple(around.get(role) or ("", "")) for role in _ROLES}


def _plain_text(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> str | None:
    """Messages end to end with what the prompt template puts around them."""
    around = _around(tokenizer)
    if around is None:
        return None
    text = "".join(f"{around[role][0]}{said}{around[role][1]}" for role, said in messages)
    return (text + around["assistant"][0]).rstrip(" ")


def _templates(
    tokenizer: Any,
    server: Tokenizer | None,
    folder: Path,
    messages: Sequence[tuple[str, str]],
) -> Iterator[tuple[str, bool]]:
    """Chat templates that may be the run's, each with whether it is the base's own."""
    with contextlib.suppress(*_DAMAGED):  # what cannot be read is not the run's template
        settings = folder / "tokenizer_config.json"
        own = load_chat_template(folder, None, read_object(settings) if settings.is_file() else {})
        if isinstance(own, str):
            yield own, True
    if isinstance(given := getattr(tokenizer, "chat_template", None), str):
        yield given, False
    bos, eos = _bos(tokenizer), getattr(tokenizer, "eos_id", None)
    begin, end = (
        "" if token is None else _token_text(tokenizer, server, token) for token in (bos, eos)
    )
    for around in filter(None, (_around(tokenizer), _seen_around(tokenizer, server, messages))):
        # Tokenizers differ in whether they put a space before what follows a special token.
        for first in dict.fromkeys((begin, f"{begin} " if begin else "")):
            template = _jinja(around, first, end)
            yield (_SYSTEM_FIRST if messages[0][0] == "system" else "") + template, False


def _seen_around(
    tokenizer: Any, server: Tokenizer | None, messages: Sequence[tuple[str, str]]
) -> dict[str, tuple[str, str]] | None:
    """What stands around messages in the text of a sample: torchtune encodes tags and messages by themselves, which
    puts spaces where they meet.
    """
    turns = [Message(role=role, content=text) for role, text in [*messages, ("assistant", ANSWER)]]
    ids = list(tokenizer({"messages": turns}, inference=False)["tokens"])
    ids = ids[1:] if ids[:1] == [_bos(tokenizer)] else ids
    ids = ids[:-1] if ids[-1:] == [getattr(tokenizer, "eos_id", None)] else ids
    for text in _decoded(tokenizer, server, ids):
        around: dict[str, tuple[str, str]] = {}
        rest = text
        for role, said in [*messages, ("assistant", ANSWER)]:
            before, found, rest = rest.partition(said)
            if found:
                around[role] = (before, "")
        if len(around) == len(messages) + 1 and not rest.strip():
            return around
    return None


def _jinja(around: Mapping[str, tuple[str, str]], begin: str, end: str) -> str:
    """A chat template of texts around messages; the first message and each after an answer begin with ``begin``."""
    lines = ["{%- set ns = namespace(text='', open=true) -%}", "{%- for message in messages -%}"]
    lines.append(f"{{%- if ns.open -%}}{{%- set ns.text = ns.text + {begin!a} -%}}{{%- endif -%}}")
    lines.append("{%- set ns.open = message['role'] == 'assistant' -%}")
    for number, role in enumerate(around):
        before, after = (ascii(text) for text in around[role])
        said = f"{before} + message['content'] + {after}"
        said += f" + {end!a}" if role == "assistant" else ""
        lines.append(f"{{%- {'elif' if number else 'if'} message['role'] == '{role}' -%}}")
        lines.append(f"{{%- set ns.text = ns.text + {said} -%}}")
    lines += ["{%- else -%}{{ raise_exception('No such role in training.') }}{%- endif -%}"]
    lines += ["{%- endfor -%}", "{%- if add_generation_prompt -%}"]
    opened = f"(ns.text + {around['assistant'][0]!a})"
    lines.append(
        f"{{{{- {opened}.rstrip(' ') -}}}}{{%- else -%}}{{{{- ns.text -}}}}{{%- endif -%}}"
    )
    return "\n".join(lines) + "\n"


def _renders(
    template: str, messages: Sequence[tuple[str, str]], encode: Encode
) -> list[int] | None:
    """The tokens of a conversation rendered by a chat template; None where it refuses it."""
    dialogue = [{"role": role, "content": text} for role, text in messages]
    try:
        variables = {"messages": dialogue, "add_generation_prompt": True}
        (text,) = render_template(template, variables)
    except TemplateRefusalError:  # it takes no such conversation, so it is not that of training
        return None
    return encode(text)
