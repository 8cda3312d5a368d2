"""judge_responses from the command line, on files of evaluate_model."""

import json
import sys

import pytest

from kasa_tune.tiny_world.endpoint import Server
from tests.endpoints import completion, serving

ROWS = [
    {"index": i, "prompt": f"name[Place {i}]", "references": [f"The place {i} is good"]}
    for i in range(6)
]


@pytest.fixture
def evaluation(tmp_path):
    """Of a model that answers as the person did, and of one whose answers share no word."""
    folder = tmp_path / "evaluation"
    for name, answer in (("good", None), ("poor", "nothing")):
        path = folder / "samples" / "texts" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row | {"answer": answer or row["references"][0]} for row in ROWS]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = folder / "judge" / "mt" / "model_answer" / "good.jsonl"
    turns.parent.mkdir(parents=True)
    turns.write_text(json.dumps({"question_id": 1, "choices": [{"turns": ["a", "b"]}]}) + "\n")
    question = {"question_id": 1, "category": "writing", "turns": ["one", "two"]}
    (folder / "question.jsonl").write_text(json.dumps(question) + "\n")
    return folder


@pytest.fixture
def run(load_recipe, tmp_path, evaluation, monkeypatch, capsys):
    recipe = load_recipe("judge_responses")
    monkeypatch.setattr("kasa_tune.components.services.pace._FIRST_WAIT", 0.002)
    monkeypatch.setenv("OPENAI_API_KEY", "none")

    def run(url, *overrides):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        words = ["--config", "tiny_judge", f"output_dir={tmp_path / 'judged'}"]
        words += [f"evaluations=[{evaluation}]", *overrides]
        monkeypatch.setattr(sys, "argv", ["judge_responses", *words])
        status = recipe.recipe_main()
        path = tmp_path / "judged" / "scores.json"
        scores = json.loads(path.read_text()) if path.exists() else {}
        return status, capsys.readouterr().out, scores

    return run


def test_answers_get_both_scores_whatever_fails(run, tmp_path):
    with Server(faults=0.3, hang=0.3).start() as server:
        options = ["endpoint.timeout=0.15", "repeats=2"]
        status, printed, scores = run(server.base_url, *options)
        received = len(server.received)
        assert run(server.base_url, *options)[1:] != (printed, {})
        assert len(server.received) == received  # nothing is paid for twice
    assert status == 0
    assert scores["scores"]["texts"]["good"] == {"similarity": 10.0, "precision": 10.0}
    assert scores["scores"]["texts"]["poor"] == {"similarity": 1.0, "precision": 1.0}
    assert scores["verdicts"] == scores["outcomes"]["answered"] == 2 * 2 * 6
    assert scores["agreement"]["precision"] == {"equal": 1.0, "mean_difference": 0.0}
    lines = (tmp_path / "judged" / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 24
    assert received == 24 + scores["malformed_answers"]


def test_a_scale_of_a_hundred_and_a_limit(run):
    with Server().start() as server:
        scores = run(server.base_url, "scale=100", "limit=2", "models=[good]")[2]
    assert scores["scores"] == {"texts": {"good": {"similarity": 100.0, "precision": 100.0}}}
    assert scores["verdicts"] == 2


def test_pairs(run):
    with Server().start() as server:
        scores = run(server.base_url, "protocol=pairwise", "models=[good, poor]")[2]
    expected = {"wins": 1.0, "ties": 0.0, "losses": 0.0, "consistent": 1.0}
    assert scores["scores"]["texts"]["good over poor"] == expected
    first = completion("The first is better: [[A]]")
    with serving(lambda body: (200, first)) as server:  # a judge that looks at the order alone
        options = ["protocol=pairwise", "models=[good, poor]", "seed=7"]
        scores = run(server.url, *options)[2]
    assert scores["scores"]["texts"]["good over poor"] == expected | {
        "wins": 0.0,
        "ties": 1.0,
        "consistent": 0.0,
    }


def test_mt_bench(run, evaluation):
    with Server().start() as server:
        options = ["protocol=mt_bench", "tasks=[mt]", f"questions={evaluation / 'question.jsonl'}"]
        scores = run(server.base_url, *options)[2]
        assert len(server.received) == 2
    assert {*scores["scores"]["writing"]["good"]} == {"turn 1", "turn 2", "rating"}


def test_verdicts_that_cannot_be_read_are_counted_and_left_out(run):
    def respond(body):
        prompt = body["messages"][0]["content"]
        told = {"score": 5, "reason": "x"}
        tree = {f"{name}_assessment": told for name in ("similarity", "precision")}
        return 200, completion("I will not say." if "Place 3" in prompt else json.dumps(tree))

    with serving(respond) as server:
        _, printed, scores = run(server.url, "models=[good]")
        assert len(server.seen) == 5 + 5  # five attempts at the one
    assert scores["outcomes"] == {"answered": 5, "malformed": 1}
    assert scores["malformed_answers"] == 5
    assert scores["scores"]["texts"]["good"]["precision"] == 5.0
    row = next(line.split() for line in printed.splitlines() if line.startswith("texts"))
    assert row[-2:] == ["5", "1"]


def test_a_dry_run_prices_every_verdict(run):
    status, printed, scores = run("http://127.0.0.1:9/v1", "dry_run=true", "repeats=3")
    assert (status, scores) == (0, {})
    assert f"{3 * 12} calls" in printed
