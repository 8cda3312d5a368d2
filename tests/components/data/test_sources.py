"""Local data: what a node means, what the reader cannot take, and that what is read is what is digested."""

import json
import shutil

import pytest

from kasa_tune.components.data import building as data
from kasa_tune.components.data.fingerprints import data_fingerprint, fingerprint
from kasa_tune.components.data.sources import files_read
from tests.components.data.test_building import OURS, PAIRS, build, node

pytestmark = pytest.mark.usefixtures("datasets_offline")

ROW = json.dumps(PAIRS[0]) + "\n"


# ---------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "name", ["rows[1].jsonl", "a*b.jsonl", "a?.jsonl", "a[!b].jsonl", "**.jsonl", "a b#%20.jsonl"]
)
@pytest.mark.parametrize("folder", ["plain", "f[1]", "f*"])
def test_a_file_that_is_there_is_no_pattern(char_tokenizer, tmp_path, name, folder):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / name
    path.write_text(ROW)
    for other in ("rows1.jsonl", "axb.jsonl", "ax.jsonl", "aa.jsonl", "z.jsonl"):
        (path.parent / other).write_text(ROW * 3)
    cfg = node(str(path))
    assert len(build(cfg, char_tokenizer)) == 1
    assert files_read(cfg) == [path]
    relative = {**node(name), "data_dir": str(path.parent)}
    assert len(build(relative, char_tokenizer)) == 1
    assert files_read(relative) == [path]


@pytest.mark.parametrize("folder", ["plain", "f[1]"])
def test_patterns_still_are(char_tokenizer, tmp_path, folder):
    (tmp_path / folder).mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (tmp_path / folder / name).write_text(ROW)
    cfg = node(str(tmp_path / folder / "*.jsonl"))
    assert len(build(cfg, char_tokenizer)) == 2
    assert [path.name for path in files_read(cfg)] == ["a.jsonl", "b.jsonl"]


def test_a_tilde_is_the_home_folder(char_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(ROW)
    for keys in (
        {"data_files": "~/data/train.jsonl"},
        {"data_files": "train.jsonl", "data_dir": "~/data"},
        {"data_files": None, "data_dir": "~/data"},
        {"data_files": None, "source": "~/data"},
    ):
        cfg = {key: value for key, value in (node(None) | keys).items() if value is not None}
        assert len(build(cfg, char_tokenizer)) == 1
        assert files_read(cfg) == [tmp_path / "data" / "train.jsonl"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_files": ""}, r"dataset\.data_files must be a path, got '', which is empty"),
        ({"data_files": ["  "]}, "which is empty"),
        ({"data_files": "a\0b"}, "NUL byte"),
        ({"data_files": {"train": 3}}, "must be a path, got int 3"),
        ({"source": ""}, r"dataset\.source must be a path"),
        ({"data_dir": ""}, r"dataset\.data_dir must be a path"),
        ({"data_dir": 3}, r"dataset\.data_dir must be a path, got int 3"),
    ],
)
def test_what_is_no_path(char_tokenizer, keys, message):
    with pytest.raises(ValueError, match=message):
        build({**node("x.jsonl"), **keys}, char_tokenizer)


def test_folders(char_tokenizer, tmp_path):
    folder = tmp_path / "f[1]"
    folder.mkdir()
    (folder / "train.jsonl").write_text(ROW)
    with pytest.raises(ValueError, match=r"dataset\.data_files: .* is a folder\. Set data_dir"):
        build(node(str(folder)), char_tokenizer)
    with pytest.raises(
        ValueError, match=r"dataset\.source: .* pattern\. Set source: json and data_"
    ):
        build({"_component_": OURS + "instruct_dataset", "source": str(folder)}, char_tokenizer)
    with pytest.raises(FileNotFoundError, match=r"dataset\.data_dir: no such folder: .*nowhere"):
        build({**node("x.jsonl"), "data_dir": str(tmp_path / "nowhere")}, char_tokenizer)
    cfg = {"_component_": OURS + "instruct_dataset", "source": "json", "data_dir": str(folder)}
    assert len(build(cfg, char_tokenizer)) == 1


def test_files_of_the_hub_are_not_looked_for_here():
    assert data.sources.prepared(
        {"source": "org/name", "data_files": "train.parquet"}, "dataset"
    ) == {
        "source": "org/name",
        "data_files": "train.parquet",
    }
    assert files_read({"source": "org/name", "data_files": "train.parquet"}) == []


# ---------------------------------------------------------------------------------------------------- digests


def by_folder(folder):
    component = {"_component_": OURS + "instruct_dataset", "split": "train"}
    return [
        component | {"source": str(folder)},
        component | {"source": "json", "data_dir": str(folder)},
        component | {"source": "json", "data_dir": str(folder), "data_files": "train.jsonl"},
        component | {"source": str(folder), "data_files": {"train": "train.jsonl"}},
    ]


@pytest.mark.parametrize("kind", range(4))
def test_data_given_by_folder_is_part_of_the_fingerprint(char_tokenizer, tmp_path, kind):
    def both(folder):
        cfg = by_folder(folder)[kind]
        dataset = build(cfg, char_tokenizer)
        options = {"nodes": cfg, "tokenizer": {"_component_": "x"}, "probes": 1}
        return data_fingerprint(dataset, **options), files_read(cfg)

    rows = [{"input": f"q{i}:", "output": f"answer {i}"} for i in range(9)]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("read me")
    before, files = both(folder)
    assert files == [folder / "train.jsonl"]
    shutil.copytree(folder, tmp_path / "elsewhere")
    (folder / "README.md").write_text("another")
    assert both(folder)[0] == before
    assert both(tmp_path / "elsewhere")[0] == before
    rows[4]["output"] = "answer x"  # as long as before and not the one sample that is looked at
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert both(folder)[0] != before


def test_packed_rows_of_a_folder_are_found_again_only_for_the_same_content(
    char_tokenizer, tmp_path
):
    (tmp_path / "train.jsonl").write_text(ROW)
    cfg = by_folder(tmp_path)[1]
    key = fingerprint(cfg, build(cfg, char_tokenizer), char_tokenizer, probes=0)
    (tmp_path / "train.jsonl").write_text(ROW.replace("answer", "ANSWER"))
    assert fingerprint(cfg, build(cfg, char_tokenizer), char_tokenizer, probes=0) != key


def test_only_the_files_of_the_split_are_digested(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(ROW)
    cfg = {"source": str(tmp_path)}
    assert [path.name for path in files_read(cfg)] == ["train.jsonl"]
    assert [path.name for path in files_read({**cfg, "split": "test[:50%]"})] == ["test.jsonl"]
    both = files_read({**cfg, "split": "train[10:20]+test"})
    assert sorted(path.name for path in both) == ["test.jsonl", "train.jsonl"]


# ---------------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("null", "as its first"),
        ("null\n" + ROW, "as its first"),
        ("\n\n  null\n" + ROW, "as its first"),
        ("[null, " + ROW.strip() + "]", "as its first"),
        ("[\n  null\n]", "as its first"),
        ("\ufeffnull", "as its first"),
        (ROW + "null\n" + ROW, "at byte"),
        (ROW + "\n null\n" + ROW + "null", "at byte"),
    ],
)
def test_json_with_null_in_place_of_a_row(char_tokenizer, tmp_path, text, where):
    """The reader ends the process on such a file, with a segmentation fault."""
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"dataset: .*rows\.jsonl holds null .*{where}"):
        build(node(str(tmp_path / "rows.jsonl")), char_tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        '{"input": "null", "output": "null\\nnull", "x":\nnull}\n' + ROW,
        '{"input": "a", "output": "b", "x": [\nnull\n]}',
        '{"input": "nullify", "output": "b"}\n',
    ],
)
def test_null_inside_a_row_is_the_row_s_own(char_tokenizer, tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    assert len(build(node(str(tmp_path / "rows.jsonl")), char_tokenizer)) >= 1


def test_a_pointer_in_place_of_data(char_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="pointer of a git-lfs file"):
        build(node(str(tmp_path / "a.jsonl")), char_tokenizer)


def test_na_in_a_csv_is_a_word(char_tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("input,output\nWhat is sodium?,NA\nis it?,None\nand,nan\n")
    dataset = build({**node(str(tmp_path / "a.csv")), "source": "csv"}, char_tokenizer)
    said = [char_tokenizer.decode(sample["tokens"]) for sample in dataset]
    assert said == ["What is sodium?NA", "is it?None", "andnan"]
    (tmp_path / "b.csv").write_text("input,output\nWhat is sodium?,\n")
    with pytest.raises(ValueError, match="row 0 holds null in column 'output'"):
        build({**node(str(tmp_path / "b.csv")), "source": "csv"}, char_tokenizer)


def test_streaming_is_refused(char_tokenizer, write_rows):
    with pytest.raises(ValueError, match=r"dataset\.streaming: True is not supported"):
        build({**node(write_rows(PAIRS)), "streaming": True}, char_tokenizer)
    assert len(build({**node(write_rows(PAIRS)), "streaming": False}, char_tokenizer)) == len(PAIRS)


class WithoutLength:
    def __init__(self, tokenizer):
        pass


def test_a_dataset_without_a_length(char_tokenizer):
    cfg = {"_component_": f"{__name__}.WithoutLength"}
    with pytest.raises(ValueError, match="WithoutLength, which has no length"):
        build(cfg, char_tokenizer)


def test_iteration_ends_where_the_dataset_does(char_tokenizer, write_rows):
    one = build(node(write_rows(PAIRS)), char_tokenizer)
    assert [len(sample["tokens"]) for sample in one] == [len(one[i]["tokens"]) for i in range(6)]
    assert len(list(build([node(write_rows(PAIRS))] * 2, char_tokenizer))) == 12
    for dataset in (one, build([node(write_rows(PAIRS))] * 2, char_tokenizer)):
        with pytest.raises(IndexError):
            dataset[len(dataset)]
    assert one[-1]["tokens"].tolist() == one[5]["tokens"].tolist()
