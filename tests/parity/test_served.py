"""A real OpenAI-compatible server, once: `transformers serve` with the tiny model on the loopback, as docs/synthesis.md
starts it.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kasa_tune.components.services import Asker, Budget, Endpoint, Journal, Question
from kasa_tune.registry import resource

pytestmark = pytest.mark.parity
# A fact is asked for as in pretraining: "Q: Where does ... live? A:".
TEMPLATE = "{% for message in messages %}{{ bos_token }}Q: {{ message.content }} A:{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of the tiny model with what a server needs besides."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(resource("kasa_tune://tiny_world/model"), folder, dirs_exist_ok=True)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def address(model):
    for name in ("transformers", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason=f"`transformers serve` needs the package {name}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **quiet)
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()


def test_a_served_model_answers_what_it_knows(address, model, tmp_path, monkeypatch):
    """It knows every fact of its pretraining, so the answers are known."""
    monkeypatch.setenv("SERVED", address)
    endpoint = Endpoint(base_url_env="SERVED", api_key_env=None, timeout=120)
    facts = resource("kasa_tune://tiny_world/data/facts_calibration.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in facts[:4]]
    settings = {"model": str(model), "max_tokens": 12, "temperature": 0.0}
    with Journal(tmp_path / "journal.jsonl") as journal:
        asker = Asker(endpoint, journal, Budget(), settings=settings, num_workers=2)
        questions = [Question(row["question"]) for row in rows]
        answers = [outcome.value for _, outcome in asker.ask(questions, str.strip)]
    assert answers == [row["answer"] for row in rows]
    assert asker.tally.failures == {}
    assert asker.budget.completion_tokens >= 4
