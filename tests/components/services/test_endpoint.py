"""One call: what is sent, what may come back, and that the key goes nowhere else."""

import logging
import time

import pytest

from kasa_tune.components.services.endpoint import (
    CallRefusedError,
    Endpoint,
    EndpointError,
    PassingError,
    Reply,
)
from tests.endpoints import KEY, completion, endpoint_of, serving

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def answered(monkeypatch, *response, **options):
    with serving(lambda body: response) as server:
        return endpoint_of(server, monkeypatch, **options).complete(BODY, "id")


def test_a_completion_is_read_and_the_key_is_a_header_alone(monkeypatch):
    reply = completion("Hi", prompt_tokens=3, completion_tokens=1)
    with serving(lambda body: (200, reply)) as server:
        endpoint = endpoint_of(server, monkeypatch)
        assert endpoint.complete(BODY, "id-1") == Reply("Hi", "stop", 3, 1)
        headers, body = server.seen[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (headers["Idempotency-Key"], body) == ("id-1", BODY)
    assert KEY not in repr(endpoint)
    assert KEY not in str(body)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ((429, b"", {"Retry-After": "7"}), "HTTP 429"),
        ((503, b""), "HTTP 503"),
        ((200, b"<html>Bad gateway</html>"), "no chat completion"),
        ((200, b"\xff\xfe\x00binary"), "no chat completion"),
        ((200, b"[" * 4_000), "no chat completion"),
        ((200, b'{"choices": []}'), "no chat completion"),
        ((200, b'{"choices": [{"message": {"content": 3}}]}'), "no chat completion"),
        ((200, completion("\ud800")), "no chat completion"),
        ((200, completion("x" * 5000)), "too large"),
        ((200, completion("Hi"), {}, 9999), "truncated"),
    ],
)
def test_what_may_pass_is_told_from_an_answer(response, reason, monkeypatch):
    with pytest.raises(PassingError) as error:
        answered(monkeypatch, *response, max_reply_bytes=4096)
    assert error.value.reason in (reason, "broken connection" if reason == "truncated" else reason)
    assert error.value.wait == (7.0 if "429" in reason else None)


def test_a_server_that_drips_or_sleeps_times_out(monkeypatch):
    def sleep(body):
        time.sleep(0.6)
        return 200, completion("late")

    with serving(sleep) as server, pytest.raises(PassingError, match="time-out"):
        endpoint_of(server, monkeypatch, timeout=0.2).complete(BODY, "id")


def test_no_server_is_a_failure_that_may_pass(monkeypatch):
    with serving(lambda body: (200, b"")) as server:
        endpoint = endpoint_of(server, monkeypatch)
    with pytest.raises(PassingError, match="no connection"):
        endpoint.complete(BODY, "id")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_key_is_never_sent_to_where_a_server_points(status, monkeypatch):
    with serving(lambda body: (200, completion("stolen"))) as other:
        target = {"Location": f"{other.url}/chat/completions"}
        with pytest.raises(EndpointError, match="another address"):
            answered(monkeypatch, status, b"", target)
        assert other.seen == []


@pytest.mark.parametrize(("status", "kind"), [(401, EndpointError), (400, CallRefusedError)])
def test_the_key_is_taken_out_of_what_a_server_echoes(status, kind, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    told = f"bad key {KEY} in Authorization: Bearer {KEY}".encode()
    with pytest.raises(kind) as error:
        answered(monkeypatch, status, told, {"X-Echo": f"Bearer {KEY}"})
    assert "bad key <key>" in str(error.value)
    shown = f"{error.value!r} {error.value} {error.value.__cause__!r} {caplog.text}"
    assert KEY not in shown


def test_the_key_is_taken_out_of_an_answer(monkeypatch):
    assert answered(monkeypatch, 200, completion(f"It is {KEY}.")).text == "It is <key>."


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        (None, "k", "TEST_URL, and that environment variable is not set"),
        ("http://h/v1", None, "TEST_KEY, and that environment variable is not set"),
        ("ftp://h", "k", "must hold an address"),
        ("http://user:pass@h/v1", "k", "holds a user"),
        ("http://h/v1", "two words", "holds no key"),
    ],
)
def test_what_the_environment_must_hold(url, key, message, monkeypatch):
    for name, value in (("TEST_URL", url), ("TEST_KEY", key)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(EndpointError) as error:
        Endpoint(base_url_env="TEST_URL", api_key_env="TEST_KEY")
    assert message in str(error.value)
    assert "pass" not in str(error.value).replace("password", "")


def test_a_key_in_place_of_its_variables_name_is_not_shown(monkeypatch):
    monkeypatch.setenv("TEST_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(EndpointError) as error:
        Endpoint(base_url_env="TEST_URL", api_key_env=KEY)
    assert KEY not in str(error.value)
