"""Chat templates are somebody else's code: what they may read, and how long and how much they may compute."""

import os
import signal

import pytest

from kasa_tune.components.data import chat_templates
from kasa_tune.components.data.chat_templates import (
    TemplateLimitError,
    load_chat_template,
    render_template,
)

HI = {"messages": [{"role": "user", "content": "Hi"}]}

ENDLESS = {
    "one product": "{{ 'a' * 10**10 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "padding": "{{ 'a' | center(10**10) }}",
    "a format": "{{ '%10000000000d' | format(1) }}",
    "a method": "{{ 'a'.ljust(10**10) }}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that only assign": (
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% set x = c %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "doubling": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "nested lists": (
        "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}"
    ),
    "long output": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a macro that calls itself twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_time_and_size_are_bounded(source):
    with pytest.raises(TemplateLimitError, match=r"more than|without end|limit is|out of memory"):
        render_template(source, HI)
    assert render_template("{{ messages[0].content }}", HI) == ["Hi"]


def test_all_conversations_together_are_bounded(monkeypatch):
    """Each stays below its own limit, and a million of them would take weeks."""
    monkeypatch.setattr(chat_templates, "_FREE_SECONDS", 0.2)
    slow = "{% for a in range(9999) %}{% for b in range(99) %}{% set x = b %}{% endfor %}{% endfor %}ok"
    monkeypatch.setattr(chat_templates, "_MEAN_SECONDS", 0.005)

    def render_all(source):
        return [render_template(source, HI) for _ in range(50)]

    with pytest.raises(TemplateLimitError, match=r"conversations; the limit is 0\.005 s for each"):
        render_all(slow)
    assert render_all("{{ messages[0].content }}") == [["Hi"]] * 50


def test_tools_and_documents_are_none_as_in_transformers():
    source = (
        "{% if tools is not none %}[TOOLS]{{ tools | tojson }}{% endif %}{{ documents is none }}"
    )
    assert render_template(source, HI) == ["True"]
    tools = [{"name": "weather"}]
    assert render_template(source, HI | {"tools": tools}) == ['[TOOLS][{"name": "weather"}]True']


def test_what_a_template_gives_and_gets_travels_unchanged():
    text = "é € 你好 \n\r\u2028 \"'<>& \ud83d \x00 {{ x }}"
    variables = [{"messages": [{"content": text}], "n": n} for n in (1, 2.5, None, True)]
    assert render_template("{{ messages[0].content }}|{{ n }}", *variables) == [
        f"{text}|{n}" for n in ("1", "2.5", "None", "True")
    ]


def test_a_template_does_not_see_the_last_conversation():
    source = "{{ seen | default('nothing') }}{% set seen = 'something' %}"
    assert [render_template(source, HI), render_template(source, HI)] == [["nothing"]] * 2


def test_a_process_that_was_killed_is_started_anew():
    render_template("a", HI)
    running = chat_templates._process()._running
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert render_template("{{ messages[0].role }}", HI) == ["user"]


def test_a_forked_process_has_one_of_its_own():
    assert render_template("a", HI) == ["a"]
    child = os.fork()
    if child == 0:
        os._exit(0 if render_template("b", HI) == ["b"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render_template("c", HI) == ["c"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "must be text.*got int 3"),
        ({"default": "x"}, "must be text.*got dict"),
        (["x"], "must be text.*got list"),
        ([{"name": "default"}], "must be text.*got list"),
        ([{"name": 3, "template": "x"}], "must be text"),
        ("{% for %}", "is broken"),
        ("x" * (1 << 21), "2,097,152 characters"),
    ],
)
def test_templates_of_wrong_types(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        load_chat_template(tmp_path, None, {"chat_template": given})


def test_a_template_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_chat_template(tmp_path, None, {})
