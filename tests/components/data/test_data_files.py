"""Data files made at random: each gives samples, or is refused in a sentence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.components.data.test_building import OURS, build, node
from tests.components.data.test_conversations import JSON, MESSAGES
from tests.fuzzing import bounded

pytestmark = pytest.mark.usefixtures("datasets_offline")

WORDS = st.text(max_size=8) | st.sampled_from(["NA", "null", "", "\0", "a,b", '"', "\ud83d\ude00"])
ROWS = st.one_of(
    st.fixed_dictionaries({"input": WORDS, "output": WORDS}),
    st.fixed_dictionaries({"input": WORDS | JSON, "output": WORDS | JSON}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGES, max_size=3) | JSON}),
    JSON,
)
COMPONENTS = [
    (OURS + "instruct_dataset", {}),
    (OURS + "chat_dataset", {}),
    ("torchtune.datasets.text_completion_dataset", {"column": "input"}),
]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_table(rows):
    cells = [row.values() if isinstance(row, dict) else [row] for row in rows]
    return "input,output\n" + "".join(",".join(map(str, row)) + "\n" for row in cells)


@pytest.mark.fuzz
@bounded("files", quick=40)
@given(
    rows=st.lists(ROWS, max_size=4)
    | st.lists(ROWS, min_size=1, max_size=1).map(lambda row: row * 3),
    form=st.sampled_from([("json", as_lines), ("json", json.dumps), ("csv", as_table)]),
    component=st.sampled_from(COMPONENTS),
    cut=st.none() | st.integers(0, 60),
    junk=st.just(b"") | st.binary(max_size=8),
)
def test_any_file_gives_samples_or_a_sentence(
    rows, form, component, cut, junk, tmp_path_factory, char_tokenizer
):
    source, write = form
    content = write(rows).encode("utf-8", "surrogatepass")
    if cut is not None:
        content = content[:cut] + junk + content[cut + 1 :]
    path = tmp_path_factory.mktemp("rows") / f"rows.{source}"
    path.write_bytes(content)
    name, keys = component
    said = ""
    try:
        dataset = build(node(str(path), name, source=source, **keys), char_tokenizer)
        samples = [dataset[i] for i in range(len(dataset))]
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        assert all(len(sample["tokens"]) == len(sample["labels"]) for sample in samples)
    assert len(said) < 1500
