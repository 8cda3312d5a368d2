"""Journal, budgets, retries: each question is answered once, and what was answered is kept."""

import json
import threading

import pytest

from kasa_tune.components.services import Budget, EndpointError, Journal, MalformedError, Question
from kasa_tune.components.services.budget import Prices, estimated_tokens, priced
from kasa_tune.components.services.endpoint import Reply
from kasa_tune.components.services.journal import identity_of
from kasa_tune.components.services.pace import Pace, back_off
from kasa_tune.components.services.templates import Template
from tests.endpoints import KEY, asker_of, completion, serving

QUESTIONS = [Question(f"Question {i}") for i in range(12)]


def echo(body):
    return 200, completion(f"re {body['messages'][0]['content']}")


def asked(asker, questions=QUESTIONS, read=str):
    return [outcome for _, outcome in asker.ask(questions, read)]


# -------------------------------------------------------------------------------------------------------- journal


def test_answers_come_in_order_and_are_asked_for_once(tmp_path, monkeypatch):
    with serving(echo) as server:
        for arrived, known in ((12, 0), (0, 12)):
            with asker_of(server, monkeypatch, tmp_path) as asker:
                outcomes = asked(asker)
            assert [each.value for each in outcomes] == [f"re Question {i}" for i in range(12)]
            assert (asker.tally.arrived, asker.tally.from_journal) == (arrived, known)
        assert len(server.seen) == 12
    assert KEY not in (tmp_path / "journal.jsonl").read_text()


def test_a_torn_line_is_dropped_and_a_damaged_one_is_asked_again(tmp_path, monkeypatch, caplog):
    path = tmp_path / "journal.jsonl"
    with serving(echo) as server:
        with asker_of(server, monkeypatch, tmp_path) as asker:
            asked(asker, QUESTIONS[:4])
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + b"\0" * 30 + b"\n" + lines[2] + lines[3][:-9])
        with asker_of(server, monkeypatch, tmp_path) as asker:
            asked(asker, QUESTIONS[:4])
        assert asker.tally.arrived == 2
        assert len(server.seen) == 6
    assert "1 damaged lines" in caplog.text
    keys = [json.loads(line)["key"] for line in path.read_bytes().splitlines() if b"\0" not in line]
    assert len(keys) == len({*keys}) == 4


def test_a_journal_belongs_to_one_process(tmp_path):
    with Journal(tmp_path / "j"), pytest.raises(ValueError, match="Another run writes"):
        Journal(tmp_path / "j")
    with Journal(tmp_path / "j") as journal:
        journal.add("key", Reply("text"))
    with Journal(tmp_path / "j") as journal:
        assert journal.replies == {"key": Reply("text")}


def test_a_call_is_known_by_all_that_it_asks():
    bodies = [{"model": m, "messages": [p]} for m in "ab" for p in "xy"]
    keys = {identity_of(body, s, a) for body in bodies for s in (0, 1) for a in (0, 1)}
    assert len(keys) == 16
    assert identity_of({"a": 1, "b": 2}, 0, 0) == identity_of({"b": 2, "a": 1}, 0, 0)


# -------------------------------------------------------------------------------------------------------- attempts


def test_malformed_answers_are_asked_for_again_and_counted(tmp_path, monkeypatch):
    def respond(body):
        return 200, completion("good" if body["seed"] % 3 == 0 else "bad")

    def read(text):
        if text == "bad":
            raise MalformedError
        return text

    with serving(respond) as server:
        with asker_of(server, monkeypatch, tmp_path, max_attempts=3) as asker:
            outcomes = asked(asker, read=read)
        for outcome in outcomes:
            assert (outcome.why, outcome.value) in (("answered", "good"), ("malformed", None))
        assert {each.malformed for each in outcomes if each.value is None} == {3}
        assert {each.why for each in outcomes} == {"answered", "malformed"}
        assert len(server.seen) == sum(
            each.malformed + (each.value is not None) for each in outcomes
        )
        with asker_of(server, monkeypatch, tmp_path, max_attempts=3) as asker:
            assert asked(asker, read=read) == outcomes  # nor is a malformed answer paid for twice
        assert asker.tally.arrived == 0


def test_failures_that_pass_are_repeated_with_the_same_identity(tmp_path, monkeypatch):
    count, lock = {}, threading.Lock()

    def respond(body):
        prompt = body["messages"][0]["content"]
        with lock:
            count[prompt] = count.get(prompt, 0) + 1
        if count[prompt] < 3:
            return [(429, b"", {"Retry-After": "0.01"}), (500, b"")][count[prompt] - 1]
        return echo(body)

    with serving(respond) as server:
        with asker_of(server, monkeypatch, tmp_path) as asker:
            outcomes = asked(asker)
        identities = {headers["Idempotency-Key"] for headers, _ in server.seen}
    assert all(outcome.why == "answered" for outcome in outcomes)
    assert asker.tally.failures == {"HTTP 429": 12, "HTTP 500": 12}
    assert len(identities) == 12


def test_a_refused_call_ends_itself_and_a_refused_key_ends_the_run(tmp_path, monkeypatch):
    def respond(body):
        return (400, b"too long") if "3" in body["messages"][0]["content"] else echo(body)

    with serving(respond) as server, asker_of(server, monkeypatch, tmp_path) as asker:
        whys = [outcome.why for outcome in asked(asker)]
    assert whys == ["answered"] * 3 + ["refused"] + ["answered"] * 8
    with serving(lambda body: (401, b"no")) as server:
        with (
            asker_of(server, monkeypatch, tmp_path / "b", num_workers=1) as asker,
            pytest.raises(EndpointError, match="HTTP 401"),
        ):
            asked(asker)
        assert len(server.seen) == 1


def test_a_server_that_is_gone_ends_the_run(tmp_path, monkeypatch):
    with serving(lambda body: (500, b"")) as server:
        with (
            asker_of(server, monkeypatch, tmp_path, max_retries=1, num_workers=2) as asker,
            pytest.raises(EndpointError, match="in a row without an answer"),
        ):
            asked(asker)
        assert len(server.seen) <= 2 * (5 + 1)


# --------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("workers", [1, 4])
def test_a_budget_of_calls_is_never_exceeded_and_counts_earlier_runs(
    tmp_path, monkeypatch, workers
):
    with serving(echo) as server:
        for most in (5, 5, 9):
            options = {"budget": Budget(max_calls=most), "num_workers": workers}
            with asker_of(server, monkeypatch, tmp_path, **options) as asker:
                whys = [outcome.why for outcome in asked(asker)]
            assert asker.is_spent
            assert whys.count("answered") == most == len(server.seen)


def test_a_budget_of_tokens_is_never_exceeded(tmp_path, monkeypatch):
    each = estimated_tokens("Question 1") + 10  # the most that a call may take
    reply = completion("words", prompt_tokens=3, completion_tokens=2)
    with serving(lambda body: (200, reply)) as server:
        budget = Budget(max_tokens=4 * 5 + each)
        with asker_of(server, monkeypatch, tmp_path, budget=budget, num_workers=3) as asker:
            asked(asker)
        assert len(server.seen) == 5  # a sixth, after 25 tokens, might take each more
    assert budget.prompt_tokens + budget.completion_tokens <= budget.max_tokens


def test_a_price_is_that_of_the_tokens():
    assert Prices(2.0, 10.0).of(1_000_000, 500_000) == 7.0
    told = priced(["a" * 4_000_000], 1_000_000, Prices(2.0, 10.0))
    assert "1 calls" in told
    assert "2.00 to 12.00" in told


# ------------------------------------------------------------------------------------------------------------ pace


def test_turns_are_an_interval_apart_and_wait_when_a_server_asks(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace(per_minute=30)
    assert [pace.turn() for _ in range(3)] == [0.0, 2.0, 4.0]
    pace.hold(60)
    assert pace.turn() == 60.0
    assert Pace(None).turn() == 0.0


def test_waits_grow_to_a_minute_and_half_of_each_is_drawn():
    class Drawn:
        def uniform(self, low, high):
            self.bounds = low, high
            return high

    rng = Drawn()
    assert [back_off(n, rng) for n in (0, 1, 2, 10)] == [0.5, 1.0, 2.0, 60.0]
    assert rng.bounds == (0.5, 1.0)


# -------------------------------------------------------------------------------------------------------- templates


def test_places_are_filled_once(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("Q: $question A: $answer costs $5 $$ $questions")
    template = Template(path, ("question", "answer"))
    filled = template.filled(question="$answer", answer="{x} $question \\1")
    assert filled == "Q: $answer A: {x} $question \\1 costs $5 $$ $questions"
    with pytest.raises(ValueError, match=r"no place \$other"):
        Template(path, ("question", "other"))
    with pytest.raises(FileNotFoundError):
        Template(tmp_path / "none", ())
