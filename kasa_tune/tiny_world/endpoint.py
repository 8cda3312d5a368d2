"""An OpenAI-compatible server of the tiny world, for the demo and for tests: it recombines the world's slots, judges by
shared words, and fails as often as it is told to.

    python -m kasa_tune.tiny_world.endpoint --port 8123 --faults 0.3
    export OPENAI_BASE_URL=http://127.0.0.1:8123/v1 OPENAI_API_KEY=none
    python -m kasa_tune.tiny_world.endpoint --port 0 --run kasa-tune run synthesize_data --config tiny_synthesize

The last line serves while a command runs, and tells it the address.
An answer depends on the request alone. Whether a call fails depends on the request and on how often it came.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kasa_tune.json_text import read_json_lines
from kasa_tune.tiny_world import task

FAULTS = ("429", "500", "time-out", "truncated", "no JSON", "HTML", "malformed")
_MARKED = r"<<<{name}\n(.*?)\n>>>"
_TESTS = Path(__file__).parent / "data" / "task_val.jsonl"


class Server(ThreadingHTTPServer):
    """The server. It listens when it is made; :meth:`start` lets a thread of it answer.

    Args:
        port: on the loopback; 0: any free one.
        faults: share of calls that fail, in a way drawn of ``FAULTS``.
        duplicates, contaminated: shares of written rows that repeat a popular one, or are of the test set.
        delay: seconds that an answer takes.
        hang: seconds that a call hangs which is to time out.
        seed: of all draws.

    Attributes:
        received: how often each call came, by its header ``Idempotency-Key``.
        answered: how often each was answered in full.
        base_url: its address.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        port: int = 0,
        *,
        faults: float = 0.0,
        duplicates: float = 0.1,
        contaminated: float = 0.02,
        delay: float = 0.0,
        hang: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.faults, self.delay, self.hang, self.seed = faults, delay, hang, seed
        self.duplicates, self.contaminated = duplicates, contaminated
        self.received: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.base_url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def start(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone."""

    def content(self, body: dict[str, Any]) -> str:
        """The answer to a request."""
        prompt = body["messages"][-1]["content"]
        rng = random.Random(f"{self.seed} {prompt} {body.get('seed')}")
        if "similarity_assessment" in prompt:
            return _single(prompt)
        if "[[A]]" in prompt:
            return _pairwise(prompt)
        if "[[" in prompt:
            return f"The answer is rated by its length. Rating: [[{1 + len(prompt) % 10}]]"
        return json.dumps({"contents": [self._row(rng) for _ in range(_wanted(prompt))]})

    def _row(self, rng: random.Random) -> dict[str, str]:
        drawn = rng.random()
        if drawn < self.contaminated:
            return _as_pair(rng.choice(read_json_lines(_TESTS)))
        if drawn < self.contaminated + self.duplicates:
            rng = random.Random(f"popular {rng.randrange(20)}")
        slots = task.draw_slots(rng, task.place_names("train"))
        return _as_pair({"input": task.write_representation(slots), "output": task.describe(slots)})


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server, body = self.server, json.loads(raw)
        identity = self.headers.get("Idempotency-Key") or hashlib.sha256(raw).hexdigest()
        with server.lock:
            times = server.received[identity]
            server.received[identity] += 1
        rng = random.Random(f"{server.seed} {hashlib.sha256(raw).hexdigest()} {times}")
        time.sleep(server.delay)
        fault = rng.choice(FAULTS) if rng.random() < server.faults else None
        if fault in _BROKEN:
            return _BROKEN[fault](self)
        content = server.content(body)
        if fault == "malformed":  # the call is answered, and the answer is cut
            content = content[: len(content) // 2]
        reply = _completion(body, content)
        if fault == "truncated":
            return self.send(200, reply[: len(reply) // 2], length=len(reply))
        self.send(200, reply)
        with server.lock:
            server.answered[identity] += 1

    def send(
        self, status: int, content: bytes, *, length: int | None = None, **headers: str
    ) -> None:
        """Send a response, of which the announced length may be wrong."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        if length is not None:
            self.close_connection = True

    def hang(self) -> None:
        """Answer too late."""
        time.sleep(self.server.hang)
        self.send(200, b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


_BROKEN: dict[str | None, Callable[[_Handler], None]] = {
    "429": lambda handler: handler.send(429, b"slow down", Retry_After="0.05"),
    "500": lambda handler: handler.send(500, b"oops"),
    "time-out": _Handler.hang,
    "no JSON": lambda handler: handler.send(200, b"\x00\xff\xfe binary"),
    "HTML": lambda handler: handler.send(200, b"<html><body>Bad gateway</body></html>"),
}


def _completion(body: dict[str, Any], content: str) -> bytes:
    prompt = body["messages"][-1]["content"]
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(content.split())}
    choice = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": content}}
    return json.dumps({"model": body.get("model"), "choices": [choice], "usage": usage}).encode()


def _as_pair(row: dict[str, str]) -> dict[str, str]:
    return {"instruction": row["input"], "response": row["output"]}


def _wanted(prompt: str) -> int:
    found = re.search(r"\b(\d{1,3}) (?:new|entries)", prompt)
    return int(found[1]) if found else 1


def _between(prompt: str, name: str) -> str:
    found = re.search(_MARKED.format(name=name), prompt, re.DOTALL)
    return found[1] if found else ""


def _likeness(one: str, other: str) -> float:
    """The words that two texts share, of all of both, 0 to 1."""
    left, right = set(one.lower().split()), set(other.lower().split())
    return len(left & right) / max(len(left | right), 1)


def _single(prompt: str) -> str:
    highest = 100 if "1 to 100" in prompt else 10
    share = _likeness(_between(prompt, "answer"), _between(prompt, "human"))
    told = {"score": round(1 + (highest - 1) * share), "reason": f"{share:.0%} of the words"}
    return json.dumps({"similarity_assessment": told, "precision_assessment": told})


def _pairwise(prompt: str) -> str:
    human = _between(prompt, "human")
    a, b = (_likeness(_between(prompt, name), human) for name in ("answer A", "answer B"))
    return f"By the words that they share: [[{'A' if a > b else 'B' if b > a else 'C'}]]"


def main() -> None:
    """Serve until interrupted, or while a command runs."""
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server of the tiny world.")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--faults", type=float, default=0.0, help="share of calls that fail")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that an answer takes")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="serve while this command runs")
    args = parser.parse_args()
    with Server(args.port, faults=args.faults, delay=args.delay).start() as server:
        if args.run:
            told = {"OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "none"}
            sys.exit(subprocess.run(args.run, env=os.environ | told, check=False).returncode)
        print(f"Serving at {server.base_url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
