"""Files that the reader cannot take are named, with the line and what to do about it."""

import gzip

import pytest

from tests.components.data.test_building import build, node

pytestmark = pytest.mark.usefixtures("datasets_offline")

ROW = b'{"input": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b,c\nd,e,f\n", "more cells than the header"),
        (b"a,b,\nc,d,\n", "more cells than the header"),
        ("a,caf\u00e9\n".encode("latin-1"), r"rows\.csv, line 2 is not in UTF-8"),
        (b'"a,b\nc,d\n"e,f\n"g,h\n', r"rows\.csv"),
    ],
    ids=["shifted", "trailing comma", "latin-1", "quote"],
)
def test_a_csv_that_would_be_misread(char_tokenizer, tmp_path, content, message):
    (tmp_path / "rows.csv").write_bytes(b"input,output\n" + content)
    with pytest.raises(ValueError, match=message):
        build(node(str(tmp_path / "rows.csv"), source="csv"), char_tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW + b"\n" + ROW[:20], r"rows\.jsonl, line 3 is no JSON at column 16"),
        (ROW + ROW[:-1] + b",\n" + ROW, r"rows\.jsonl, line 2 ends in a comma"),
        (ROW + b'{"input": "a", "input": "b"}', "line 2 holds the key 'input' twice"),
        (ROW + b'{"input": "a", "output": "\\ud83d"}', "line 2 holds half of a surrogate pair"),
        (b"[" + ROW + b",]", r"rows\.jsonl, its array is no JSON at line 2, column 2"),
        (ROW.decode().encode("utf-16"), r"rows\.jsonl is not in UTF-8 but in UTF-16"),
        (b"\n  \n", r"rows\.jsonl holds no rows"),
        (b"{}\n{}\n", r"rows\.jsonl holds no rows"),
        (b"[]", r"rows\.jsonl holds no rows"),
        (b"PAR1\x15\x04PAR1", r"rows\.jsonl is a Parquet file"),
    ],
    ids=[
        "cut off",
        "comma",
        "twice",
        "surrogate",
        "array",
        "UTF-16",
        "blank",
        "no keys",
        "empty",
        "Parquet",
    ],
)
def test_json_that_cannot_be_read_is_named_with_its_line(
    char_tokenizer, tmp_path, content, message
):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(node(str(tmp_path / "rows.jsonl")), char_tokenizer)


def test_the_file_at_fault_of_several(char_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ROW)
    (tmp_path / "b.jsonl").write_bytes(ROW + b"{")
    with pytest.raises(ValueError, match=r"^dataset: \S+b\.jsonl, line 2 is no JSON"):
        build(node(str(tmp_path / "*.jsonl")), char_tokenizer)


def test_a_csv_taken_for_json(char_tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"input,output\na,b\n")
    with pytest.raises(ValueError, match=r"rows\.csv is no JSON\. Set source: csv"):
        build(node(str(tmp_path / "rows.csv")), char_tokenizer)


def test_a_file_that_can_be_read_is_not_blamed(char_tokenizer, tmp_path):
    (tmp_path / "a.json").write_bytes(b'{\n"input": "a",\n"output": "b"\n}\n')
    (tmp_path / "b.json").write_bytes(gzip.compress(ROW * 2))
    (tmp_path / "bb.json").write_bytes(b"\n\n")
    (tmp_path / "c.json").write_bytes(ROW + b"{")
    with pytest.raises(ValueError, match=r"c\.json, line 2 is no JSON"):
        build(node(str(tmp_path / "*.json")), char_tokenizer)
