"""Conversations row by row: what is learned of them, and what is refused with its message and part."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasa_tune.components.data import building as data
from kasa_tune.components.data.conversations import (
    LAYOUTS,
    ConversationToMessages,
    MissingKeyError,
)
from kasa_tune.components.data.tokenizers import hf_tokenizer
from tests.components.data.test_building import OURS, build, node
from tests.components.data.test_tokenizers import CHATML, folder, tokenizer
from tests.fuzzing import bounded

__all__ = ["folder"]

pytestmark = pytest.mark.usefixtures("datasets_offline")

TORCHTUNES = "torchtune.datasets.chat_dataset"
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells the weather."}}
TEXT = {"type": "text", "text": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
WITH_TOOLS = (
    "{% if tools is not none %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content if m.content else '' }}"
    "{% for call in m.tool_calls %}{{ '[' + call.function.name + call.function.arguments | tojson + ']' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ARGUMENTS = "+ call.function.arguments | tojson "
NO_CALLS = CHATML.replace("message['content']", "(message['content'] or '')")


def user(content="Hi", **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content="Yo", **keys):
    return {"role": "assistant", "content": content, **keys}


def tool(content="Sunny", **keys):
    return {"role": "tool", "content": content, **keys}


def chat(write_rows, *conversations, component=OURS + "chat_dataset", **keys):
    rows = [c if isinstance(c, dict) else {"messages": c} for c in conversations]
    if component == TORCHTUNES:
        keys = {"conversation_column": "messages", "conversation_style": "openai"} | keys
    return node(write_rows(rows), component, **keys)


def learned(tok, sample):
    return tok.decode([i for i in sample["labels"] if i != data.IGNORE])


# ---------------------------------------------------------------------------------------------------- learned


def test_the_answers_are_learned(char_tokenizer, write_rows):
    talk = [user("Hi"), assistant("Yo"), user("and"), assistant("so")]
    sample = build(chat(write_rows, talk), char_tokenizer)[0]
    assert char_tokenizer.decode(sample["tokens"]) == "HiYoandso"
    assert learned(char_tokenizer, sample) == "Yoso"
    everything = build(chat(write_rows, talk, train_on_input=True), char_tokenizer)[0]
    assert learned(char_tokenizer, everything) == "HiYoandso"


def test_both_layouts_give_the_same_samples(char_tokenizer, write_rows):
    openai = [{"role": "system", "content": "Be."}, user("Hi"), assistant("Yo")]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in openai]
    one = build(chat(write_rows, openai), char_tokenizer)[0]
    cfg = node(write_rows([{"talk": sharegpt}]), OURS + "chat_dataset", conversation_column="talk")
    other = build({**cfg, "conversation_style": "sharegpt"}, char_tokenizer)[0]
    assert {key: value.tolist() for key, value in one.items()} == {
        key: value.tolist() for key, value in other.items()
    }
    prompted = build(chat(write_rows, openai, new_system_prompt="Do."), char_tokenizer)[0]
    assert char_tokenizer.decode(prompted["tokens"]) == "Do.HiYo"


def test_samples_are_those_of_torchtune_where_it_knows_a_conversation(folder, write_rows):
    tok = tokenizer(folder, CHATML)
    talk = [user("Who was there?"), assistant("Lily"), user("Why?"), assistant("So.")]
    ours = build(chat(write_rows, talk), tok)[0]
    theirs = build(chat(write_rows, talk, component=TORCHTUNES), tok)[0]
    assert ours["tokens"].tolist() == theirs["tokens"].tolist()
    assert ours["labels"].tolist() == theirs["labels"].tolist()


def test_parts_of_text_are_joined(char_tokenizer, write_rows):
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    sample = build(chat(write_rows, [user([parts[0]]), assistant(parts)]), char_tokenizer)[0]
    assert learned(char_tokenizer, sample) == "one, two"


def test_a_message_of_weight_0_is_not_learned(char_tokenizer, write_rows):
    talk = [user("a"), assistant("bad", weight=0), user("b"), assistant("good", weight=1)]
    dataset = build(chat(write_rows, talk), char_tokenizer)
    assert char_tokenizer.decode(dataset[0]["tokens"]) == "abadbgood"
    assert learned(char_tokenizer, dataset[0]) == "good"
    dataset = build(
        chat(write_rows, [user(weight=0), assistant()], train_on_input=True), char_tokenizer
    )
    assert learned(char_tokenizer, dataset[0]) == "Yo"


def test_tool_calls_are_learned_as_the_template_renders_them(folder, write_rows):
    tok = tokenizer(folder, WITH_TOOLS)
    talk = [
        user("Rain?"),
        assistant(None, tool_calls=[CALL]),
        tool("Sunny", tool_call_id="1"),
        assistant("No."),
    ]
    sample = build(chat(write_rows, {"messages": talk, "tools": [TOOL]}), tok)[0]
    text = tok.decode(sample["tokens"], skip_special_tokens=False)
    assert '"description": "Tells the weather."' in text
    assert "<|im_start|>tool\nSunny<|im_end|>" in text
    said = learned(tok, sample).split("\n")
    assert said == ['[weather{"city": "Rome"}]', "No.", ""]


@pytest.mark.parity
def test_tool_conversations_have_the_ids_of_transformers(folder, write_rows):
    transformers = pytest.importorskip("transformers")
    talk = [
        user("Rain?"),
        assistant(None, tool_calls=[CALL, CALL]),
        tool("Sunny"),
        tool("Dry"),
        assistant("No."),
        user("Sure?"),
        assistant("Yes."),
    ]
    sample = build(
        chat(write_rows, {"messages": talk, "tools": json.dumps([TOOL])}),
        tokenizer(folder, WITH_TOOLS),
    )[0]
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    ] * 2
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [talk[0], {**talk[1], "tool_calls": calls}, *talk[2:]],
        tools=[TOOL],
        chat_template=WITH_TOOLS,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    assert sample["tokens"].tolist() == expected


def test_a_template_that_takes_arguments_as_text(folder, write_rows):
    template = WITH_TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    sample = build(
        chat(write_rows, [user(), assistant(None, tool_calls=[CALL])]), tokenizer(folder, template)
    )[0]
    assert '[weather{"city": "Rome"}]' in learned(tokenizer(folder, template), sample)


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("component", [OURS + "chat_dataset", TORCHTUNES])
@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([user(None), assistant()], "message 0 holds null in content"),
        ([user(), assistant(None)], "message 1 holds null in content"),
        ([user(), assistant(None, tool_calls=[])], "message 1 holds null in content"),
        ([user([IMAGE]), assistant()], "message 0, part 0 has type 'image_url'"),
        ([user([TEXT, {"type": "input_audio"}]), assistant()], "message 0, part 1 has type 'input_a"),
        ([user(), assistant([{"type": "refusal"}])], "message 1, part 0 has type 'refusal'"),
        ([user([{"type": "text", "text": None}]), assistant()], "message 0, part 0 must hold text"),
        ([user(), assistant([])], "message 1 holds no parts"),
        ([user(3), assistant(4)], "message 0 must hold text in content, got int"),
        ([user(), {"role": "narrator", "content": "x"}], "message 1 has role 'narrator'; known are"),
        ([user(), {"role": None, "content": "x"}], "message 1 has role None"),
        ([user(), assistant("x", refusal="no")], "message 1 holds refusal"),
        ([user(), assistant("x", function_call={"name": "f"})], "message 1 holds function_call"),
        ([user(), assistant("x", weight=0.5)], "message 1 has weight 0.5"),
        (["a", "b"], "message 0 must be an object"),
        ([], "a conversation must be a list of messages"),
        ("a", "a conversation must be a list of messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused_by_message_and_part(
    char_tokenizer, write_rows, component, talk, message
):
    with pytest.raises(ValueError, match=f"dataset: row 0 cannot be tokenized: {message}"):
        build(chat(write_rows, talk, component=component), char_tokenizer)


@pytest.mark.parametrize("component", [OURS + "chat_dataset", TORCHTUNES])
def test_the_row_is_named_after_the_first_ones_too(char_tokenizer, write_rows, component):
    rows = [*[[user(), assistant()]] * 70, [user(), assistant(None)]]
    dataset = build(chat(write_rows, *rows, component=component), char_tokenizer)
    with pytest.raises(ValueError, match="row 70 cannot be tokenized: message 1 holds null"):
        dataset[70]


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([user(), assistant(None, tool_calls=[CALL])], "message 1 calls or answers a tool.*chat_dataset"),
        ([user(), assistant("x", tool_calls=[CALL])], "message 1 calls or answers a tool"),
        ([user(), assistant("", tool_calls=[CALL]), tool(), assistant()], "message 1 calls"),
        ([user(), assistant("x", weight=0)], "message 1 has weight 0.*chat_dataset"),
    ],
)  # fmt: skip
def test_what_torchtunes_transforms_would_leave_out(char_tokenizer, write_rows, talk, message):
    with pytest.raises(ValueError, match=f"row 0 cannot be tokenized: {message}"):
        build(chat(write_rows, talk, component=TORCHTUNES), char_tokenizer)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("weather", "message 1 must hold a list in tool_calls"),
        ([{"type": "function"}], "message 1, tool call 0 names no function"),
        (
            [{"function": {"name": "", "arguments": "{}"}}],
            "message 1, tool call 0 names no function",
        ),
        ([{"function": {"name": "f", "arguments": "{"}}], "tool call 0: arguments is no JSON"),
        ([{"function": {"name": "f", "arguments": "[" * 10**5}}], "call 0: arguments is no JSON"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], "arguments must be a JSON object"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_calls_that_are_none(folder, write_rows, calls, message):
    talk = [user(), assistant(None, tool_calls=calls)]
    with pytest.raises(ValueError, match=message):
        build(chat(write_rows, talk), tokenizer(folder, WITH_TOOLS))


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([user(), user(), assistant()], r"message 1 \(user\).* two messages of the user"),
        ([assistant(), user()], r"message 0 \(assistant\) is out of order: nothing before it asks"),
        ([user(), assistant(), assistant()], r"message 2 \(assistant\)"),
        ([user(), tool(), assistant()], r"message 1 \(tool\).*has called no tool"),
        ([user(), {"role": "system", "content": "x"}, assistant()], r"message 1 \(system\)"),
        ([user()], "no message is the assistant's"),
    ],
)
def test_conversations_out_of_order(char_tokenizer, write_rows, talk, message):
    with pytest.raises(ValueError, match=f"row 0 cannot be tokenized: {message}"):
        build(chat(write_rows, talk), char_tokenizer)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (NO_CALLS, "calls", "leaves out message 1, tool call 0"),
        (WITH_TOOLS.replace(ARGUMENTS, ""), "calls", "leaves out the arguments of message 1"),
        (WITH_TOOLS.replace("tools | tojson", "''"), "tools", "leaves out tools, entry 0"),
        (WITH_TOOLS.replace("if m.content", "if m.role != 'tool'"), "calls", r"message 2 \(tool\)"),
        (CHATML, "calls", "does not take a conversation of user, assistant, tool"),
    ],
)  # fmt: skip
def test_a_template_that_leaves_tools_out(folder, write_rows, template, row, message):
    rows = {
        "calls": [user(), assistant(None, tool_calls=[CALL]), tool(), assistant()],
        "tools": {"messages": [user(), assistant()], "tools": [TOOL]},
    }
    with pytest.raises(ValueError, match=message):
        build(chat(write_rows, rows[row]), tokenizer(folder, template))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [user(), assistant(None, tool_calls=[CALL])],
            "message 1 holds tool_calls; only .*hf_tokenizer",
        ),
        (
            [user(), assistant("x", reasoning_content="y")],
            "message 1 holds reasoning_content; only",
        ),
        (
            {"messages": [user(), assistant()], "tools": [TOOL]},
            "defines tools; only .*hf_tokenizer",
        ),
    ],
)
def test_tokenizers_without_a_chat_template(char_tokenizer, folder, write_rows, row, message):
    for tok in (char_tokenizer, hf_tokenizer(str(folder / "tokenizer.json"))):
        with pytest.raises(ValueError, match=message):
            build(chat(write_rows, row), tok)


def test_an_unknown_layout(char_tokenizer, write_rows):
    with pytest.raises(ValueError, match="conversation_style must be one of openai, sharegpt"):
        build(chat(write_rows, [user(), assistant()], conversation_style="chatml"), char_tokenizer)


# ---------------------------------------------------------------------------------------------------- anything


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGES = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "name", "audio"]),
    st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt"]) | JSON,
)
CALLS = st.fixed_dictionaries({"function": st.dictionaries(st.sampled_from(["name", "arguments"]), JSON)})  # fmt: skip


def test_stray_keys_of_the_other_layout_do_not_count(char_tokenizer, write_rows):
    stray = {"role": "tool", "content": "never"}
    talk = [{"from": "human", "value": "Hi"} | stray, {"from": "gpt", "value": "Yo"} | stray]
    cfg = node(write_rows([{"talk": talk}]), OURS + "chat_dataset", conversation_column="talk")
    sample = build(cfg | {"conversation_style": "sharegpt"}, char_tokenizer)[0]
    assert char_tokenizer.decode(sample["tokens"]) == "HiYo"


@pytest.mark.parametrize("levels", [990, 10**5])
def test_tools_nested_without_end_are_refused_in_a_sentence(folder, write_rows, levels):
    nested = '{"a": ' * levels + "1" + "}" * levels
    row = {"messages": [user(), assistant()], "tools": nested}
    with pytest.raises(ValueError, match=r"row 0 cannot be tokenized: .*recursion"):
        build(chat(write_rows, row), tokenizer(folder, WITH_TOOLS))


@pytest.mark.fuzz
@bounded("files", quick=300)
@given(
    conversation=st.lists(MESSAGES | JSON, max_size=4) | JSON,
    calls=st.none() | st.lists(CALLS | JSON, max_size=2),
    tools=JSON | st.lists(CALLS, max_size=2),
    layout=st.sampled_from(["openai", "sharegpt"]),
)
def test_any_row_gives_messages_of_text_or_a_sentence(conversation, calls, tools, layout):
    if isinstance(conversation, list) and conversation and calls is not None:
        conversation = [*conversation, {"role": "assistant", "tool_calls": calls}]
    try:
        sample = ConversationToMessages(layout)(
            {LAYOUTS[layout].column: conversation, "tools": tools}
        )
    except (ValueError, MissingKeyError) as error:
        said = str(error)
    else:
        said = ""
        assert all(isinstance(message.text_content, str) for message in sample["messages"])
        json.dumps([message.for_template for message in sample["messages"]])
        json.dumps(sample["tools"])
    assert len(said) < 400
