"""synthesize_data from the command line: faults, kills, budgets, the key, and what is left behind."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kasa_tune.tiny_world.endpoint import FAULTS, Server
from tests.endpoints import KEY

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(load_recipe, tmp_path, monkeypatch, capsys):
    """Run the recipe with the config of the tiny world; the exit status and what was printed."""
    recipe = load_recipe("synthesize_data")
    monkeypatch.setattr("kasa_tune.components.services.pace._FIRST_WAIT", 0.002)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(server, *overrides):
        monkeypatch.setenv(
            "OPENAI_BASE_URL", server.base_url if server else "http://127.0.0.1:9/v1"
        )
        words = ["--config", "tiny_synthesize", f"output_dir={tmp_path}", *overrides]
        monkeypatch.setattr(sys, "argv", ["synthesize_data", *words])
        try:
            status = recipe.recipe_main()
        except SystemExit as stopped:
            status = stopped.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def rows(folder, name="rows.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_thirty_percent_faults_end_in_a_complete_set(run, tmp_path):
    with Server(faults=0.3, hang=0.4).start() as server:
        status, printed = run(
            server, "num_rows=400", "endpoint.timeout=0.2", "endpoint.num_workers=8"
        )
        answered = sum(server.answered.values())
    assert status == 0
    assert "The set is complete." in printed
    counts = json.loads((tmp_path / "counts.json").read_text())
    made, rejected = rows(tmp_path), rows(tmp_path, "rejected.jsonl")
    assert len(made) == counts["kept"] == 400
    assert {*counts["calls"]["failures"]} >= {"HTTP 429", "HTTP 500", "no chat completion"}
    assert counts["malformed"] > 0
    # Every row that was asked for is accounted for.
    dropped = sum(counts["duplicates"].values()) + sum(counts["contaminated"].values())
    assert dropped == len(rejected)
    lost = counts["unanswered"] + counts["missing"] + counts["bad"]
    assert counts["asked"] == lost + counts["parsed"]
    assert counts["parsed"] == dropped + counts["over"] + counts["kept"]
    assert f"{'rows asked for':<24}{counts['asked']:>9,}" in printed
    assert {each["reason"] for each in rejected} == {"duplicate", "contaminated"}
    # A run on top of it asks nothing.
    with Server().start() as server:
        assert run(server, "num_rows=400")[0] == 0
        assert not server.received
    assert rows(tmp_path) == made
    assert answered <= counts["calls"]["arrived"]


def test_every_fault_is_one_that_a_run_survives(run, tmp_path, monkeypatch):
    for number, fault in enumerate(FAULTS):
        monkeypatch.setattr("kasa_tune.tiny_world.endpoint.FAULTS", (fault,))
        with Server(faults=0.4, hang=0.3, seed=number).start() as server:
            options = ["num_rows=30", "endpoint.timeout=0.15", "deduplication.minhash=null"]
            folder = f"output_dir={tmp_path / fault.replace(' ', '_')}"
            assert run(server, *options, folder)[0] == 0, fault


def test_a_spent_budget_ends_the_run_and_a_larger_one_goes_on(run, tmp_path):
    with Server().start() as server:
        status, printed = run(server, "num_rows=100", "budget.max_calls=7")
        assert (status, sum(server.received.values())) == (3, 7)
        assert "Raise it and run the command again" in printed
        few = rows(tmp_path)
        assert 0 < len(few) < 36
        assert run(server, "num_rows=100")[0] == 0
        assert max(server.received.values()) == 1
    assert rows(tmp_path)[: len(few)] == few
    assert len(rows(tmp_path)) == 100


def test_a_dry_run_needs_no_server_and_no_key(run, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    status, printed = run(None, "dry_run=true", "num_rows=50", "budget.completion_price=1000000")
    assert status == 0
    assert "10 calls" in printed
    assert f"{10 * 2048:,}.00 at" in printed.replace(f"{10 * 2048}.00", f"{10 * 2048:,}.00")
    assert not [*tmp_path.iterdir()]
    status, printed = run(None)
    assert status == 1
    assert "OPENAI_API_KEY, and that environment variable is not set" in printed


def test_the_key_is_in_no_file_and_in_nothing_printed(run, tmp_path):
    with Server(faults=0.3, hang=0.3).start() as server:
        server.content, plain = lambda body: f"{KEY} {plain(body)}", server.content
        printed = run(server, "num_rows=20", "endpoint.timeout=0.2")[1]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert not [content for content in files if KEY.encode() in content]
    assert b"<key>" in (tmp_path / "journal.jsonl").read_bytes()
    assert KEY not in printed


def test_an_edited_template_makes_new_calls_and_is_named_in_the_rows(run, tmp_path):
    template = tmp_path / "mine.txt"
    template.write_text("Write 5 new rows like $instruction -> $response")
    with Server().start() as server:
        run(server, "num_rows=10", f"template={template}")
        first = {row["template"] for row in rows(tmp_path)}
        calls = len(server.received)
        template.write_text("Write 5 new other rows like $instruction -> $response")
        run(server, "num_rows=10", f"template={template}")
        assert len(server.received) == 2 * calls
    assert first != {row["template"] for row in rows(tmp_path)}


def test_killed_runs_repeat_no_answered_call_and_lose_no_row(tmp_path):
    spec = importlib.util.spec_from_file_location("kills", ROOT / "benchmarks/synthesis_kills.py")
    module = sys.modules["kills"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.kill_at_random(tmp_path, kills=3, num_rows=1800, seed=5, longest=1.2)
    assert (found.kills, found.repeated, found.equal) == (3, 0, True)
    assert found.in_flight <= 3 * module.WORKERS


def test_it_starts_without_torch():
    code = (
        "import sys\nfrom kasa_tune.cli import main\n"
        "try:\n    main(['run', 'synthesize_data', '--config', 'tiny_synthesize', 'dry_run=true'])\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
