"""What is written of an evaluation: signs of what was learned and forgotten, numbers that are none, hostile text."""

import json
import math

import numpy as np
import pytest

from kasa_tune.components.evaluation import Bootstrap, Metric, Results, Scores
from kasa_tune.components.evaluation.bootstrap import exponential, mean


class Named:
    """As much of a task as results need."""

    def __init__(self, name, measures=None, count=3):
        self.name, self.measures, self.data_file = name, measures, "data.jsonl"
        self.samples = [None] * count


def accuracy(*hits):
    records = [{"prompt": "p", "answer": str(hit)} for hit in hits]
    return Scores(records, {"accuracy": mean(hits), "second": mean([0, 0, 0])})


def perplexity(*losses):
    return Scores([{}] * 3, {"perplexity": exponential(losses, [1, 1, 1])})


@pytest.fixture
def results(tmp_path):
    tasks = [Named("task", "learned"), Named("facts", "kept"), Named("text", "kept"), Named("else")]
    results = Results(tmp_path, tasks, Bootstrap(num_resamples=200))
    base = accuracy(0, 0, 0), accuracy(1, 1, 1), perplexity(1.0, 1.0, 1.0), accuracy(1, 0, 1)
    run = accuracy(1, 1, 0), accuracy(1, 0, 0), perplexity(2.0, 2.0, 2.0), accuracy(1, 0, 1)
    for name, scores in {"base": base, "run": run}.items():
        for task, each in zip(tasks, scores, strict=True):
            results.add(name, task, each)
    return results


def test_learned_and_forgotten_are_positive_whichever_way_a_metric_counts(results):
    found = results.summary()
    assert list(found["learned"]["run"]) == ["task"]
    assert found["learned"]["run"]["task"]["value"] == pytest.approx(2 / 3)
    assert list(found["forgotten"]["run"]) == ["facts", "text"]
    facts, text = found["forgotten"]["run"].values()
    assert facts["metric"] == "accuracy"
    assert facts["value"] == pytest.approx(2 / 3)
    assert 0 <= facts["low"] <= facts["value"] <= facts["high"] <= 1
    assert text["metric"] == "perplexity"
    assert text["value"] == pytest.approx(math.exp(2) - math.exp(1))
    assert text["low"] == pytest.approx(text["high"])
    differences = found["tasks"]["facts"]["differences_to_base"]["run"]
    assert differences["accuracy"]["value"] == pytest.approx(-2 / 3)


def test_the_table_has_every_number_once(results):
    lines = results.table().splitlines()
    assert lines[0].split() == ["base", "run", "run", "-", "base"]
    assert [line for line in lines if not line.startswith(" ")] == ["learned", "kept", "other"]
    (task,) = [line for line in lines if line.startswith("  task ")]
    assert "accuracy" in task
    assert "+0.6667 [" in task
    assert sum("second" in line for line in lines) == 3


def test_a_base_alone_has_no_differences(tmp_path):
    task = Named("task", "learned")
    results = Results(tmp_path, [task], Bootstrap(num_resamples=0))
    results.add("base", task, accuracy(1, 0, 0))
    found = results.summary()
    assert found["learned"] == found["forgotten"] == {}
    assert found["tasks"]["task"]["differences_to_base"] == {}
    assert found["tasks"]["task"]["results"]["base"]["accuracy"]["low"] is None
    assert "0.3333" in results.table()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    task = Named("task")
    results = Results(tmp_path, [task], Bootstrap(num_resamples=0))
    endless = Metric(np.array([[np.inf]]), lambda sums: sums[..., 0])
    results.add("base", task, Scores([{}], {"perplexity": endless}))
    text = results.write(seconds=1).read_text()
    assert json.loads(text)["tasks"]["task"]["results"]["base"]["perplexity"]["value"] is None
    assert "Infinity" not in text


def test_answers_are_lines_whatever_they_hold(tmp_path):
    task, hostile = Named("task"), "a\nb\r\x1b[31m\x00 <script> ☃ \u2028"
    results = Results(tmp_path, [task], Bootstrap(num_resamples=0))
    results.add("base", task, Scores([{"answer": hostile}, {"answer": ""}], {}), num_cut=2)
    text = (tmp_path / "samples" / "task" / "base.jsonl").read_text()
    assert text.isascii()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == [{"index": 0, "answer": hostile}, {"index": 1, "answer": ""}]
    assert results.summary()["tasks"]["task"]["notes"] == {"base": {"num_cut_prompts": 2}}
