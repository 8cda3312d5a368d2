"""Conversations in the rows of a data set: checked message by message, then made into torchtune's messages.

Two layouts are known, OpenAI's (``role``, ``content``, ``tool_calls``) and ShareGPT's (``from``, ``value``). Nothing in
a message is left out without a word: what cannot be learned as it stands is refused, with the message and the part.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torchtune.data import Message
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.datasets import SFTDataset
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.modules.transforms import Transform

_OURS = "kasa_tune.components.data.chat_dataset"
_NEEDS_TEMPLATE = ("tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_NOT_TEXT = ("audio", "refusal", "function_call")


class Layout(NamedTuple):
    """Names that a layout of conversations uses."""

    column: str
    role: str
    content: str
    roles: Mapping[str, str]  # as written -> system, user, assistant or tool


LAYOUTS = {
    "openai": Layout(
        "messages",
        "role",
        "content",
        {
            "system": "system",
            "developer": "system",
            "user": "user",
            "assistant": "assistant",
            "tool": "tool",
        },
    ),
    "sharegpt": Layout(
        "conversations",
        "from",
        "value",
        {
            "system": "system",
            "human": "user",
            "user": "user",
            "gpt": "assistant",
            "assistant": "assistant",
            "tool": "tool",
        },
    ),
}


class MissingKeyError(KeyError):
    """A message lacks a key."""

    def __str__(self) -> str:
        return f"{self.args[0]!r} in message {self.args[1]}"


class ChatMessage(Message):
    """A message of text and what else its row says, for the chat template.

    Args:
        role: system, user, assistant or tool.
        content: its text; None in a message that only calls tools.
        masked: nothing of it is learned.
        fields: the other keys of the row's message, such as ``tool_calls``, ``tool_call_id`` or ``name``.
    """

    def __init__(
        self, role: str, content: str | None, *, masked: bool, fields: Mapping[str, Any]
    ) -> None:
        known: Any = "ipython" if role == "tool" else role  # what torchtune calls it
        super().__init__(known, content or "", masked=masked)
        self.for_template = {"role": role, "content": content, **fields}


class ConversationToMessages(Transform):
    """Row -> ``messages`` and, where the row has them, ``tools``.

    Args:
        layout: ``openai`` or ``sharegpt``.
        column: the column with the conversation; default ``messages`` or ``conversations``.
        tools_column: the column with the tools that the assistant may call, a list of OpenAI's definitions or the
            same as JSON text.
        train_on_input: learn what is not the assistant's too.
        new_system_prompt: a system message in place of the row's own.

    Raises:
        ValueError: an unknown layout; on a call, a conversation that cannot be learned as it stands.
    """

    def __init__(
        self,
        layout: str,
        *,
        column: str | None = None,
        tools_column: str = "tools",
        train_on_input: bool = False,
        new_system_prompt: str | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(
                f"conversation_style must be one of {', '.join(LAYOUTS)}, got {layout!r}."
            )
        self.layout = LAYOUTS[layout]
        self.column, self.tools_column = column or self.layout.column, tools_column
        self.train_on_input, self.new_system_prompt = train_on_input, new_system_prompt

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        turns = checked_turns(sample[self.column], self.layout)
        check_order(turns)
        if self.new_system_prompt is not None:
            turns = [turn for turn in turns if turn["role"] != "system"]
            turns.insert(0, {"role": "system", "content": self.new_system_prompt, "weight": 1})
        messages = []
        for turn in turns:
            role, content, weight = turn.pop("role"), turn.pop("content"), turn.pop("weight")
            masked = weight == 0 or (role != "assistant" and not self.train_on_input)
            messages.append(ChatMessage(role, content, masked=masked, fields=turn))
        return {"messages": messages, "tools": _tools(sample.get(self.tools_column))}

    def says_nothing(self, conversation: Any) -> bool:
        """Whether the assistant says nothing in a message that is learned. A conversation that cannot be learned at
        all does not count.
        """
        try:
            turns = checked_turns(conversation, self.layout)
        except (ValueError, KeyError):
            return False
        return any(
            turn["role"] == "assistant"
            and turn["weight"]
            and not (turn["content"] or "").strip()
            and "tool_calls" not in turn
            for turn in turns
        )


class ChatDataset(SFTDataset):
    """torchtune's dataset of conversations, with this file's checks of their order in place of torchtune's.

    Those know no tools. A tokenizer that is not ours gets no more than it can render.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._prepare_sample = self._tokenized

    def _tokenized(self, row: Mapping[str, Any]) -> dict[str, Any]:
        sample = self._message_transform(row)
        if not hasattr(self._model_transform, "chat_template"):
            check_templated(sample["messages"], sample.pop("tools", None))
        tokenized = dict(self._model_transform(sample))
        tokens, mask = np.asarray(tokenized["tokens"]), np.asarray(tokenized["mask"], dtype=bool)
        return {**tokenized, "labels": np.where(mask, IGNORE, tokens)}


def check_templated(messages: Sequence[Message], tools: Any) -> None:
    """Raise ValueError if messages hold what only a chat template could render."""
    advice = "; only kasa_tune.components.data.hf_tokenizer with a chat template can render it"
    if tools:
        raise ValueError(f"The row defines tools{advice}")
    for i, message in enumerate(messages):
        for key in _NEEDS_TEMPLATE:
            if key in getattr(message, "for_template", {}):
                raise ValueError(f"message {i} holds {key}{advice}")
        if message.role == "ipython":
            raise ValueError(f"message {i} has role 'tool'{advice}")


# ---------------------------------------------------------------------------------------------------- checks


def checked_turns(conversation: Any, layout: Layout) -> list[dict[str, Any]]:
    """The messages of a conversation with ``role``, ``content`` (text or None), ``weight`` and their other keys.

    Keys that hold null count as absent: the reader of data sets gives every message the keys of all others.

    Raises:
        MissingKeyError: a message without its role or content.
        ValueError: anything in a message that is not text and no tool call.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError(f"a conversation must be a list of messages, got {conversation!r:.60}")
    return [_checked_turn(message, i, layout) for i, message in enumerate(conversation)]


def _checked_turn(message: Any, i: int, layout: Layout) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise ValueError(f"message {i} must be an object with its role and text, got {kind}")
    for key in (layout.role, layout.content):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            raise MissingKeyError(key, i)
    given = {key: value for key, value in message.items() if value is not None}
    written = given.pop(layout.role, None)
    if not isinstance(written, str) or written not in layout.roles:
        raise ValueError(f"message {i} has role {written!r}; known are {', '.join(layout.roles)}")
    role = layout.roles[written]
    for key in _NOT_TEXT:
        if given.get(key):
            raise ValueError(f"message {i} holds {key}, which cannot be learned as text")
    turn = {"role": role, "content": None, "weight": _weight(given.pop("weight", 1), i)}
    content = given.pop(layout.content, None)
    if "tool_calls" in given:
        given["tool_calls"] = _tool_calls(given["tool_calls"], role, i)
    if not given.get("tool_calls", True):
        del given["tool_calls"]
    if content is not None or "tool_calls" not in given:
        turn["content"] = _text(content, i, layout.content)
    return {**given, **turn}  # a stray `role` or `content` beside `from` and `value` does not count


def _text(content: Any, i: int, key: str) -> str:
    """The text of a message, given as such or as parts."""
    if content is None:
        raise ValueError(f"message {i} holds null in {key}")
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"message {i} must hold text in {key}, got {type(content).__name__}")
    if not content:
        raise ValueError(f"message {i} holds no parts in {key}")
    texts = []
    for k, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise ValueError(
                f"message {i}, part {k} has type {kind!r}; only parts of type 'text' can be learned"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {i}, part {k} must hold text, got {part.get('text')!r:.60}")
        texts.append(part["text"])
    return "".join(texts)


def _weight(given: Any, i: int) -> int:
    if given not in (0, 1):
        raise ValueError(f"message {i} has weight {given!r:.60}; it must be 0 (not learned) or 1")
    return int(given)


def _tool_calls(given: Any, role: str, i: int) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, their arguments as objects, as templates expect them."""
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"message {i} must hold a list in tool_calls, got {given!r:.60}")
    if given and role != "assistant":
        raise ValueError(f"message {i} of the {role} holds tool_calls; only the assistant calls")
    calls = []
    for k, call in enumerate(given):
        call = _without_null(call)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"message {i}, tool call {k} names no function: {call!r:.60}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"message {i}, tool call {k}: arguments is no JSON ({error})"
                ) from error
        if not isinstance(arguments, Mapping):
            raise ValueError(f"message {i}, tool call {k}: arguments must be a JSON object")
        entry = {"type": "function", "function": {"name": name, "arguments": arguments}}
        calls.append({**({"id": call["id"]} if "id" in call else {}), **entry})
    return calls


def _tools(given: Any) -> list[Any] | None:
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools is no JSON: {error}") from error
    if not given:
        return None
    tools = _without_null(given)
    for k, tool in enumerate(tools if isinstance(tools, list) else [tools]):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tools, entry {k} names no function: {tool!r:.60}")
    return tools if isinstance(tools, list) else [tools]


def _without_null(value: Any) -> Any:
    """Without the keys that hold null, which the reader of data sets adds to objects of one column."""
    if isinstance(value, Mapping):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_order(turns: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless users, tools and the assistant take turns as they do in a conversation."""
    calling, last = False, "assistant"
    for i, turn in enumerate(turns):
        role = turn["role"]
        wrong = {
            "system": i > 0 and "system messages come first",
            "user": last == "user" and "two messages of the user follow one another",
            "assistant": last not in ("user", "tool") and "nothing before it asks the assistant",
            "tool": not calling and "the assistant has called no tool before it",
        }[role]
        if wrong:
            raise ValueError(f"message {i} ({role}) is out of order: {wrong}")
        calling = "tool_calls" in turn or (calling and role == "tool")
        last = role if role != "system" else last
    if all(turn["role"] != "assistant" for turn in turns):
        raise ValueError("no message is the assistant's, so there is nothing to learn")


def check_for_torchtune(conversation: Any, layout: Layout) -> None:
    """Raise ValueError where torchtune's own message transforms would change what a conversation says.

    They take null for the message before it, leave out unknown parts, and know neither tools nor weights.
    """
    advice = f"torchtune's data set leaves that out; set _component_ to {_OURS}"
    for i, turn in enumerate(checked_turns(conversation, layout)):
        if "tool_calls" in turn or turn["role"] == "tool":
            raise ValueError(f"message {i} calls or answers a tool, and {advice}")
        if turn["weight"] == 0:
            raise ValueError(f"message {i} has weight 0, and {advice}")


def runs_turns_together(transform: Any, tokenizer: Any) -> bool:
    """Whether conversations become plain text in which nothing marks who speaks: the tokenizer has no template.

    Args:
        transform: of a data set.
        tokenizer: its tokenizer. Those of torchtune that have a format of their own mark each turn.
    """
    is_plain = isinstance(tokenizer, Llama2Tokenizer) or hasattr(tokenizer, "chat_template")
    given = (getattr(tokenizer, name, None) for name in ("chat_template", "prompt_template"))
    return isinstance(transform, ConversationToMessages) and is_plain and not any(given)
