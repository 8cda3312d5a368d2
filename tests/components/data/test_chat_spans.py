"""Finding the turns of the assistant is linear in a conversation's length and gives what full renderings give."""

import jinja2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchtune.data import Message

from kasa_tune.components.data import chat_templates
from tests.components.data.test_tokenizers import CHATML, INST, LLAMA3, folder, tokenizer

__all__ = ["folder"]

PLAIN = (
    "{% for m in messages %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
THIRD_TURN_IS_SPECIAL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{{ '[third]' if loop.index == 6 else '' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMS_AND_CLOSES_THE_LAST = (
    "{% for m in messages %}{{ m.role + '> ' + m.content | trim + '\n' }}{% endfor %}"
    "{{ '' if add_generation_prompt else '<|eot_id|>' if messages[-1].role == 'user' else '' }}"
    "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
)
TEMPLATES = [CHATML, LLAMA3, INST, PLAIN, THIRD_TURN_IS_SPECIAL, TRIMS_AND_CLOSES_THE_LAST]
WORDS = st.text(alphabet="aLby .\n<é€x", max_size=12) | st.sampled_from(
    ["Lily ", " in the park", "<|im_end|>", "assistant", "", "  "]
)


def full_renderings(tok, template, messages, limit):
    """The definition, written down plainly: every beginning is rendered, and the text before each seam is encoded."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    compiled = environment.from_string(template)
    dialogue = [{"role": m.role, "content": m.text_content} for m in messages]

    def render(end, opens):
        return compiled.render(
            messages=dialogue[:end], add_generation_prompt=opens, **tok.named_tokens
        )

    text = render(len(dialogue), False)
    seams = []
    for i, message in enumerate(messages):
        if message.role == "assistant":
            closed = text if i == len(messages) - 1 else render(i + 1, False)
            seams += [(len(render(i, True).rstrip(" ")), False), (len(closed), not message.masked)]
    ids, mask, start, rest = [], [], 0, encode(tok, text, True)
    for seam, learned in seams:
        head = encode(tok, text[start:seam], start == 0)
        if rest[: len(head)] != head:
            ids, start, rest = ids + head, seam, encode(tok, text[seam:], False)
            head = []
        mask += [not learned] * (len(ids) + len(head) - len(mask))
    ids += rest
    mask += [True] * (len(ids) - len(mask))
    return ids[:limit], mask[:limit]


def encode(tok, text, first):
    def ids(text):
        return tok.tokenizer.encode(text, add_special_tokens=False).ids

    marker, marked = ids("\n"), ids("\n" + text)
    return ids(text) if first or marked[: len(marker)] != marker else marked[len(marker) :]


def conversation(texts):
    roles = ["user", "assistant"] * len(texts)
    return [
        Message(role=role, content=text, masked=role == "user") for role, text in zip(roles, texts)
    ]


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    texts=st.lists(WORDS, min_size=2, max_size=13),
    template=st.sampled_from(TEMPLATES),
    limit=st.sampled_from([None, None, 5, 40]),
)
def test_they_are_those_of_full_renderings(folder, texts, template, limit):
    tok = tokenizer(folder, template, max_seq_len=limit)
    messages = conversation(texts)
    assert tok.tokenize_messages(messages) == full_renderings(tok, template, messages, limit)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, INST, PLAIN])
@pytest.mark.parametrize("limit", [None, 64])
def test_the_cost_is_in_proportion_to_the_length(folder, template, limit, monkeypatch):
    """Counted in characters that are rendered and encoded, which do not depend on the machine."""
    tok = tokenizer(folder, template, max_seq_len=limit)
    cost = 0

    def counted(source, *variables):
        nonlocal cost
        texts = chat_templates.render_template(source, *variables)
        cost += sum(map(len, texts))
        return texts

    class Counting:
        def encode(self, text, **options):
            nonlocal cost
            cost += len(text)
            return tok.tokenizer.encode(text, **options)

    monkeypatch.setattr("kasa_tune.components.data.tokenizers.render_template", counted)
    tok._seams.tokenizer = Counting()
    costs = []
    for turns in (10, 20, 40):
        cost = 0
        tok.tokenize_messages(
            conversation(["tell me more about Lily.", "She is in the park."] * turns)
        )
        costs.append(cost)
    assert costs[1] < 2.2 * costs[0]
    assert costs[2] < 2.2 * costs[1]


def test_turns_after_the_limit_are_left_alone(folder, monkeypatch):
    tok = tokenizer(folder, CHATML, max_seq_len=64)
    calls = []

    def counted(source, *variables):
        calls.append(len(variables))
        return chat_templates.render_template(source, *variables)

    monkeypatch.setattr("kasa_tune.components.data.tokenizers.render_template", counted)
    tok.tokenize_messages(conversation(["tell me more about Lily.", "She is in the park."] * 100))
    assert len(calls) < 10


def test_a_template_that_rewrites_the_past_late_is_refused(folder):
    """Only from the fifth message on is the beginning dropped."""
    template = (
        "{% for m in messages %}{% if messages | length < 5 or loop.revindex < 3 %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
    )
    tok = tokenizer(folder, template)
    assert tok.tokenize_messages(conversation(["a", "b", "c", "d"]))[0]
    with pytest.raises(ValueError, match="differently"):
        tok.tokenize_messages(conversation(["a", "b", "c", "d", "e", "f"]))
