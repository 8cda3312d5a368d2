"""Servers on the loopback that answer as a test says."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kasa_tune.components.services import Asker, Budget, Endpoint, Journal

KEY = "sk-very/secret+0123456789"


def completion(text, **usage):
    """The body of an answer."""
    tree = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return json.dumps(tree | ({"usage": usage} if usage else {})).encode()


class Answering(BaseHTTPRequestHandler):
    """Answers with (status, body[, headers[, announced length]]) of the server's ``respond(body)``."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((dict(self.headers), json.loads(raw)))
        status, body, *rest = self.server.respond(json.loads(raw))
        headers = rest[0] if rest else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(rest[1] if len(rest) > 1 else len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args):
        pass


@contextmanager
def serving(respond):
    """A server; ``seen`` has the headers and bodies of all requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.daemon_threads = True
    server.respond, server.seen = respond, []
    server.handle_error = lambda *args: None
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def endpoint_of(server, monkeypatch, **options):
    monkeypatch.setenv("TEST_URL", server.url)
    monkeypatch.setenv("TEST_KEY", KEY)
    options = {"timeout": 5.0} | options
    return Endpoint(base_url_env="TEST_URL", api_key_env="TEST_KEY", **options)


@contextmanager
def asker_of(server, monkeypatch, folder, *, budget=None, timeout=5.0, **options):
    """An asker with a journal in the folder, that waits no longer than it must."""
    monkeypatch.setattr("kasa_tune.components.services.pace._FIRST_WAIT", 0.001)
    endpoint = endpoint_of(server, monkeypatch, timeout=timeout)
    settings = {"model": "m", "max_tokens": 10}
    with Journal(folder / "journal.jsonl") as journal:
        yield Asker(endpoint, journal, budget or Budget(), settings=settings, **options)
