"""Whether a chat template renders what a conversation says about tools; templates may leave it out without a word."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Dialogue = Sequence[Mapping[str, Any]]


def arguments_as_text(dialogue: Dialogue) -> list[Mapping[str, Any]]:
    """The same conversation with the arguments of tool calls as JSON text."""
    return [_with_arguments(turn) if "tool_calls" in turn else turn for turn in dialogue]


def _with_arguments(turn: Mapping[str, Any]) -> dict[str, Any]:
    calls = []
    for call in turn["tool_calls"]:
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**turn, "tool_calls": calls}


def check_rendered(
    dialogue: Dialogue, tools: Sequence[Any] | None, render: Callable[..., str]
) -> None:
    """Raise ValueError if the template leaves out a tool, a call, its arguments or the answer of a tool.

    The conversation is rendered once more with a word of its own in each of these places.
    """
    words: dict[str, str] = {}  # a word that must be rendered -> what it stands for

    def word(what: str) -> str:
        words[f"kasaprobe{len(words)}x"] = what
        return f"kasaprobe{len(words) - 1}x"

    probe = []
    for i, turn in enumerate(dialogue):
        if turn["role"] == "tool":
            turn = {**turn, "content": word(f"message {i} (tool)")}
        if "tool_calls" in turn:
            calls = [
                _marked(call, f"message {i}, tool call {k}", word)
                for k, call in enumerate(turn["tool_calls"])
            ]
            turn = {**turn, "tool_calls": calls}
        probe.append(turn)
    marked_tools = [
        _marked_tool(tool, word(f"tools, entry {k}")) for k, tool in enumerate(tools or ())
    ]
    if not words:
        return
    text = render(probe, tools=marked_tools or None)
    for key, what in words.items():
        if key not in text:
            raise ValueError(
                f"The chat template leaves out {what}. Set chat_template_path to a template that renders it"
            )


def _marked(call: Mapping[str, Any], what: str, word: Callable[[str], str]) -> dict[str, Any]:
    name = word(what)
    arguments: Any = {word(f"the arguments of {what}"): 1}
    if isinstance(call["function"]["arguments"], str):
        arguments = json.dumps(arguments)
    return {**call, "function": {"name": name, "arguments": arguments}}


def _marked_tool(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "function" in tool:
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}
