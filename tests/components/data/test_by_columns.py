"""Rows of a kind that their columns tell: as the other builders read them, or a sentence where they tell nothing."""

import json

import pytest

from kasa_tune.components.data import build_dataset, build_tokenizer
from kasa_tune.components.data.by_columns import builder_of_file
from kasa_tune.registry import resource

OURS = "kasa_tune.components.data"
CHAT = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
ALPACA = {"instruction": "Say a.", "input": "", "output": "a"}
# A row, and the node that reads it besides.
KINDS = {
    "openai": ({"messages": CHAT}, {"_component_": f"{OURS}.chat_dataset"}),
    "sharegpt": (
        {"conversations": SHARED},
        {"_component_": f"{OURS}.chat_dataset", "conversation_style": "sharegpt"},
    ),
    "openai in conversations": (
        {"conversations": CHAT},
        {"_component_": f"{OURS}.chat_dataset", "conversation_column": "conversations"},
    ),
    "alpaca": (ALPACA, {"_component_": f"{OURS}.alpaca_dataset"}),
    "alpaca without input": (
        {key: ALPACA[key] for key in ("instruction", "output")},
        {"_component_": f"{OURS}.alpaca_dataset"},
    ),
    "prompt": (
        {"prompt": "a?", "completion": "b"},
        {
            "_component_": f"{OURS}.instruct_dataset",
            "column_map": {"input": "prompt", "output": "completion"},
        },
    ),
    "input": (
        {"input": "a?", "output": "b", "text": "c"},
        {"_component_": f"{OURS}.instruct_dataset"},
    ),
    "text": ({"text": "a and b", "id": 3}, {"_component_": f"{OURS}.completion_dataset"}),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(
        {
            "_component_": "torchtune.models.llama2.llama2_tokenizer",
            "path": str(resource("kasa_tune://tiny_world/model/tokenizer.model")),
            "max_seq_len": 128,
            "prompt_template": None,
        }
    )


def built(path, tokenizer, rows, **node):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    node = {"_component_": f"{OURS}.by_columns_dataset", "data_files": str(path)} | node
    return build_dataset(node, tokenizer, name="dataset")


def same(one, other):
    return all((one[key] == other[key]).all() for key in ("tokens", "labels"))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_as_the_builder_of_their_kind_reads_them(kind, tokenizer, tmp_path):
    row, node = KINDS[kind]
    path = tmp_path / "rows.jsonl"
    ours, theirs = built(path, tokenizer, [row]), built(path, tokenizer, [row], **node)
    assert len(ours) == 1
    assert same(ours[0], theirs[0])
    named = builder_of_file({"data_files": str(path)})
    assert f"{OURS}.{named}" == node["_component_"]


def test_columns_of_other_names_are_given(tokenizer, tmp_path):
    rows = [{"question": "a?", "answer": "b"}]
    column_map = {"input": "question", "output": "answer"}
    ours = built(tmp_path / "a.jsonl", tokenizer, rows, column_map=column_map)
    theirs = built(tmp_path / "b.jsonl", tokenizer, [{"input": "a?", "output": "b"}])
    assert same(ours[0], theirs[0])


def test_a_column_map_chooses_among_several_kinds(tokenizer, tmp_path):
    rows = [{"messages": CHAT, "body": "a and b"}]
    ours = built(tmp_path / "a.jsonl", tokenizer, rows, column_map={"text": "body"})
    assert same(ours[0], built(tmp_path / "b.jsonl", tokenizer, [{"text": "a and b"}])[0])


@pytest.mark.parametrize(
    ("column_map", "words"),
    [
        (None, "the columns are question, answer, which tell no kind of rows. Known are messages;"),
        ({"input": "question", "output": "reply"}, "column_map names reply, and the columns are"),
        ({"input": "question"}, "column_map has the keys input. It must have all of one kind"),
    ],
)
def test_columns_that_tell_nothing_are_named(column_map, words, tokenizer, tmp_path):
    rows = [{"question": "a?", "answer": "b"}]
    node = {"column_map": column_map} if column_map else {}
    with pytest.raises(ValueError, match="dataset: ") as error:
        built(tmp_path / "rows.jsonl", tokenizer, rows, **node)
    assert words in str(error.value)


@pytest.mark.parametrize("given", [None, "nowhere.jsonl", ["nowhere.jsonl"], "{folder}"])
def test_a_file_that_is_gone_tells_no_builder(given, tmp_path):
    if isinstance(given, str):
        given = given.format(folder=tmp_path)
    with pytest.raises(ValueError, match="is no JSON file on this machine"):
        builder_of_file({"data_files": given})


def test_an_array_tells_its_builder_too(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ALPACA, ALPACA], indent=1))
    assert builder_of_file({"data_files": str(path)}) == "alpaca_dataset"
