"""Rows of texts with labels: what is read, and what is refused with row and column."""

import json

import numpy as np
import pytest

from kasa_tune.components.data import EncodedTexts, encoder_tokenizer
from kasa_tune.registry import resource

COMPONENT = "kasa_tune.components.data.labelled_texts"
GOOD = [{"text": "A goose follows Bela.", "label": 0}, {"text": "Bela likes bread.", "label": 1}]


@pytest.fixture(scope="module")
def tokenizer():
    return encoder_tokenizer(str(resource("kasa_tune://tiny_world/roberta")), max_seq_len=16)


def node_of(path, rows, **more):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"_component_": COMPONENT, "source": "json", "data_files": str(path), **more}


def read(path, rows, tokenizer, num_labels=2, **more):
    return EncodedTexts(node_of(path, rows, **more), tokenizer, num_labels, name="dataset")


def test_texts_are_padded_to_the_longest_of_their_batch(tmp_path, tokenizer):
    texts = read(tmp_path / "rows.jsonl", GOOD, tokenizer)
    batch = texts.batch([1, 0], pad_id=1)
    lengths = [len(tokenizer(row["text"])) for row in GOOD]
    assert batch["tokens"].shape == (2, max(lengths))
    assert batch["tokens"][0].tolist()[: lengths[1]] == tokenizer(GOOD[1]["text"]).tolist()
    assert batch["labels"].tolist() == [1, 0]


def test_long_rows_are_cut_at_the_longer_text(tmp_path, tokenizer):
    row = {"text": "bread " * 40, "text_pair": "a goose", "label": 1}
    columns = {"text": "text", "text_pair": "text_pair", "label": "label"}
    tokens = read(tmp_path / "rows.jsonl", [row], tokenizer, columns=columns).tokens[0]
    alone = tokenizer("a goose").tolist()[1:]
    assert len(tokens) == 16
    assert tokens.tolist()[-len(alone) :] == alone


def test_csv_and_labels_as_texts(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text("review,mood\nIt is bad.,sad\nIt is good.,happy\n")
    node = {
        "_component_": COMPONENT, "source": "csv", "data_files": str(path),
        "columns": {"text": "review", "label": "mood"}, "labels": ["sad", "happy"],
    }  # fmt: skip
    assert EncodedTexts(node, tokenizer, 2, name="dataset").labels.tolist() == [0, 1]


def test_scores_of_a_regression(tmp_path, tokenizer):
    rows = [{"text": "a", "label": 2}, {"text": "b", "label": 3.5}]
    labels = read(tmp_path / "rows.jsonl", rows, tokenizer, num_labels=1).labels
    assert labels.dtype == np.float32
    assert labels.tolist() == [2.0, 3.5]


BAD = [
    ({"text": "a", "label": 2}, 2, {}, r"row 2, column 'label': label 2 is outside 0 to 1"),
    ({"text": "a", "label": -1}, 2, {}, r"row 2, column 'label': label -1 is outside 0 to 1"),
    ({"text": "a", "label": 0.5}, 2, {}, r"row 2, column 'label': label 0.5 is no whole number"),
    ({"text": "a", "label": None}, 2, {}, r"row 2, column 'label': the label is missing"),
    ({"text": " ", "label": 1}, 2, {}, r"row 2, column 'text': the text is empty"),
    ({"text": None, "label": 1}, 2, {}, r"row 2, column 'text': None is no text"),
    ({"text": "a</s>b", "label": 1}, 2, {}, r"row 2, column 'text': the text holds a special"),
    ({"text": "a", "label": float("nan")}, 1, {}, r"row 2, column 'label'"),
    ({"text": "a", "label": 1}, 2, {"columns": {"text": "sentence"}}, r"no column 'sentence'"),
    ({"text": "a", "label": 1}, 2, {"columns": {"label": "label"}}, r"columns is"),
    ({"text": "a", "label": 1}, 2, {"columns": {"text": "text"}}, r"names no column for label"),
    ({"text": "a", "label": 1}, 2, {"labels": ["0", "1", "2"]}, r"3 labels, .* head has 2"),
    ({"text": "a", "label": 1}, 2, {"labels": ["0", "2"]}, r"row 1.*label 1 is none of 0, 2"),
    ({"text": "a", "label": 1}, 2, {"labels": ["0", "0"]}, r"each label stands there once"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "num_labels", "more", "message"), BAD)
def test_bad_rows_are_refused(row, num_labels, more, message, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "rows.jsonl", [*GOOD, row], tokenizer, num_labels, **more)
    if "row 2" in message:
        assert "It is line 3 of" in str(error.value)


def test_texts_without_labels_do_for_a_calibration(tmp_path, tokenizer):
    node = node_of(tmp_path / "rows.jsonl", [{"text": "a"}], columns={"text": "text"})
    texts = EncodedTexts(node, tokenizer, 2, name="calibration.dataset", labelled=False)
    assert len(texts) == 1


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor spm.model"):
        encoder_tokenizer(str(tmp_path))
