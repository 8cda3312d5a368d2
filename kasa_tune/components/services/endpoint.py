"""One call of ``/chat/completions``: who is asked, what may go wrong, and where the key never goes."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kasa_tune.json_text import parse_json

log = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PASSING = {408, 409, 425, 429}  # besides 5xx: the same call may succeed later
_OF_THE_CALL = {400, 413, 422}  # this call cannot succeed, others may
_MASK = "<key>"


@dataclass(frozen=True)
class Reply:
    """An answer that arrived.

    Args:
        text: the first choice's content; empty where the server gave none.
        finish_reason: why it ends, in the server's words.
        prompt_tokens, completion_tokens: as the server counts them; None where it does not.
    """

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class EndpointError(ValueError):
    """The server cannot be asked, and asking again would not help. Its text never holds the key."""


class CallRefusedError(Exception):
    """The server refuses this one call, as too long for instance."""


class PassingError(Exception):
    """A call failed in a way that may pass.

    Args:
        reason: in a word or two, to be counted by.
        wait: seconds that the server asks to wait; None where it names none.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Endpoint:
    """An OpenAI-compatible server. The address and the key come from the environment.

    The key is sent to this host alone: redirects are not followed. It is taken out of all that the server sends back
    before anything else sees that.

    Args:
        base_url_env: name of the variable with the address, such as ``http://127.0.0.1:8000/v1``.
        api_key_env: name of the variable with the key; None for a server that takes none.
        timeout: seconds until an answer must be complete.
        max_reply_bytes: the most bytes of an answer that are read.

    Raises:
        EndpointError: a variable is not set, or what it holds is no address.
    """

    def __init__(
        self,
        *,
        base_url_env: str,
        api_key_env: str | None,
        timeout: float = 120.0,
        max_reply_bytes: int = 1 << 22,
    ) -> None:
        self.base_url = _address(base_url_env)
        self._key = _secret(api_key_env) if api_key_env is not None else None
        self.timeout, self.max_reply_bytes = timeout, max_reply_bytes
        host = urllib.parse.urlsplit(self.base_url).hostname or ""
        handlers: list[Any] = [_NoRedirects()]
        if host in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        elif self._key and self.base_url.startswith("http:"):
            log.warning(f"The key goes to {host} unencrypted, as the address begins with http:.")
        self._opener = urllib.request.build_opener(*handlers)

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r})"

    def complete(self, body: Mapping[str, Any], identity: str) -> Reply:
        """Ask once.

        Args:
            body: the request, as OpenAI's API takes it.
            identity: sent as the header ``Idempotency-Key``, by which a server may know a call that is repeated.

        Raises:
            PassingError: no answer, part of one, or one that is no chat completion; the call may be repeated.
            CallRefusedError: the server refuses this call.
            EndpointError: the server refuses all calls: the key, the address or the model is wrong.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": identity}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        until = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content = self._read(response, until)
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure(error, until) from None
        except TimeoutError:
            raise PassingError("time-out") from None
        except urllib.error.URLError as error:
            timed_out = isinstance(error.reason, TimeoutError)
            raise PassingError("time-out" if timed_out else "no connection") from None
        except (http.client.HTTPException, OSError):
            raise PassingError("broken connection") from None
        return self._reply(content)

    def masked(self, text: str) -> str:
        """``text`` without the key."""
        return text.replace(self._key, _MASK) if self._key else text

    def _read(self, response: Any, until: float) -> bytes:
        """The whole body, if it has its announced length, is not too long and comes in time."""
        chunks, size = [], 0
        while chunk := response.read1(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > self.max_reply_bytes:
                raise PassingError("too large")
            if time.monotonic() > until:
                raise PassingError("time-out")
        if response.length:  # announced, and not come
            raise PassingError("truncated")
        return b"".join(chunks)

    def _failure(self, error: urllib.error.HTTPError, until: float) -> Exception:
        status = error.code
        if status in _PASSING or status >= 500:
            return PassingError(f"HTTP {status}", _seconds(error.headers.get("Retry-After")))
        if 300 <= status < 400:
            return EndpointError(
                f"{self.base_url} sends to another address (HTTP {status}), to which the key is not "
                "sent. Set the variable of base_url_env to the server's own address."
            )
        try:
            told = self._read(error, until)[:400].decode("utf-8", "replace")
        except (PassingError, OSError, http.client.HTTPException):
            told = ""
        told = self.masked(" ".join(told.split()))[:200]
        if status in _OF_THE_CALL:
            return CallRefusedError(f"HTTP {status}: {told}")
        return EndpointError(
            f"{self.base_url} refuses the calls (HTTP {status}): {told!r}. Look at the address, the key's variable "
            "and endpoint.model."
        )

    def _reply(self, content: bytes) -> Reply:
        try:
            tree = parse_json(content.decode("utf-8"))
            choice = tree["choices"][0]
            text = choice["message"].get("content")
            finish, usage = choice.get("finish_reason"), tree.get("usage")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise PassingError("no chat completion") from None
        if not isinstance(text, str | None):
            raise PassingError("no chat completion")
        counted = usage if isinstance(usage, dict) else {}
        finish = self.masked(finish)[:40] if isinstance(finish, str) else None
        counts = (_count(counted.get(f"{of}_tokens")) for of in ("prompt", "completion"))
        return Reply(self.masked(text or ""), finish, *counts)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _variable(key: str, name: str) -> str:
    # A name that is none may be the key itself, written into the config: it is not shown.
    if not _NAME.fullmatch(name):
        raise EndpointError(
            f"endpoint.{key} must be the name of an environment variable, of letters, digits and _. "
            "The value itself does not belong into a config."
        )
    if not (value := os.environ.get(name, "").strip()):
        raise EndpointError(f"endpoint.{key} is {name}, and that environment variable is not set.")
    return value


def _address(name: str) -> str:
    url = _variable("base_url_env", name).rstrip("/")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(
            f"The environment variable {name} must hold an address such as http://127.0.0.1:8000/v1."
        )
    if parts.username or parts.password or parts.query:
        raise EndpointError(
            f"The address in {name} holds a user, a password or a query. Give the key by api_key_env."
        )
    return url


def _secret(name: str) -> str:
    key = _variable("api_key_env", name)
    if not key.isprintable() or not key.isascii() or " " in key:
        raise EndpointError(f"The environment variable {name} holds no key: ASCII without spaces.")
    return key


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; dates are not read."""
    return float(header) if header and re.fullmatch(r"\d{1,6}(\.\d{1,3})?", header) else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 40 else None
