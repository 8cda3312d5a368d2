"""Rows made at random: every kind of task takes them or refuses them in a sentence that names the row."""

import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kasa_tune.components.evaluation import (
    CodeProblems,
    CommonsenseAnswers,
    CommonsenseChoices,
    DataToText,
    MathProblems,
    MTBenchAnswers,
    MultipleChoice,
    Perplexity,
    QuestionAnswering,
)
from tests.fuzzing import bounded

pytestmark = pytest.mark.fuzz

KINDS = {
    "qa": QuestionAnswering,
    "gsm8k": MathProblems,
    "math": partial(MathProblems, answers="math"),
    "generated": CommonsenseAnswers,
    "chosen": CommonsenseChoices,
    "choices": MultipleChoice,
    "e2e": partial(DataToText, metrics=["cider"], tokenization="python"),
    "humaneval": partial(CodeProblems, allow_code_execution=True),
    "mbpp": partial(CodeProblems, allow_code_execution=True, problems="mbpp"),
    "mt_bench": MTBenchAnswers,
    "perplexity": Perplexity,
}
COLUMNS = (
    "question answer problem solution instruction input choices mr ref prompt test entry_point text "
    "test_list test_setup_code turns category question_id task"
).split()
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "#### 7",
            r"\boxed{1",
            r"\boxed{}",
            "question: a Answer1: b Answer2: c Answer format: answer1/answer2",
            "question: is it Answer format: true/false",
            "sentence: a _ b Option1: c Option2: d Answer format: option1/option2",
            "Answer format: (/)",
            "answer1",
            "{question}",
            "\ud800",
        ]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["text", "label", "value", "aliases"]), inner, max_size=3),
    ),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_taken_or_refused(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    refused = []

    @bounded("files", quick=40)
    @given(ROWS)
    def check(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            task = KINDS[kind](name="t", data_file=str(path))
        except ValueError as error:
            refused.append(str(error))
        else:
            assert task.samples
            json.dumps([getattr(sample, "references", None) for sample in task.samples])

    check()
    assert refused
    assert all(text.startswith("Task t") and len(text) < 2000 for text in refused)


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes_are_no_traceback(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "rows.jsonl"

    @bounded("files", quick=20)
    @given(st.binary(max_size=60))
    def check(content):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^Task t"):
            KINDS[kind](name="t", data_file=str(path))

    check()
