"""What a user with messy files is told, and what is read of them."""

import gzip
import json
import logging

import pytest
import torch
from omegaconf import OmegaConf

from kasa_tune.components.data import counting, file_faults
from kasa_tune.components.data.training_data import TrainingData
from tests.components.data.test_building import OURS, PAIRS, build, node

pytestmark = pytest.mark.usefixtures("datasets_offline")


BROKEN = {"input": "a", "output": None}


# ------------------------------------------------------------------------------- broken rows


def training_data(path, tokenizer, **settings):
    cfg = {"dataset": node(path), "dataset_val": None, "tokenizer": {"_component_": "x"}}
    cfg |= {"seed": 0, "num_workers": 0, "batch_size": 1, "shuffle": False, "epochs": 1}
    cfg |= {"gradient_accumulation_steps": 1, "max_steps": None, "max_steps_per_epoch": None}
    device = torch.device("cpu")
    return TrainingData(
        OmegaConf.create(cfg | settings), tokenizer, vocab_size=10**6, device=device
    )


def test_a_broken_row_that_the_run_comes_to_is_refused_at_the_start(char_tokenizer, write_rows):
    path = write_rows([*PAIRS * 14, PAIRS[0], BROKEN, *PAIRS * 200])
    with pytest.raises(ValueError, match=r"1 of 1286 rows cannot be used.* It is line 86 of ") as e:
        training_data(path, char_tokenizer)
    assert str(e.value).endswith(f"{path}.")
    assert training_data(path, char_tokenizer, max_steps=80).total_steps == 80


# ------------------------------------------------------------------------------- places


def message(char_tokenizer, path, index, **options):
    dataset = build(node(path, **options), char_tokenizer)
    with pytest.raises(ValueError, match="'output'") as error:
        dataset[index]
    return str(error.value)


@pytest.mark.parametrize("packed", [False, True])
def test_the_file_and_the_line_of_a_row_are_named(char_tokenizer, tmp_path, packed):
    rows = [json.dumps(row) for row in [*PAIRS * 11, BROKEN]]
    text = ("\n\n".join(rows) + "\n").encode()  # blank lines are no rows
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    second.write_bytes(gzip.compress(text) if packed else text)
    said = message(char_tokenizer, [str(first), str(second)], 6 + 66)
    assert said.startswith("dataset: row 72 holds null in column 'output'")
    assert said.endswith(f"It is line 133 of {second}.")


def test_rows_of_a_part_and_of_an_array_are_counted_from_0(char_tokenizer, write_rows):
    rows = [*PAIRS * 11, BROKEN]
    array = write_rows(rows, "rows.json")
    assert message(char_tokenizer, array, 66).endswith("Rows count from 0.")
    lines = write_rows(rows)
    said = message(char_tokenizer, lines, 65, split="train[1:]")
    assert said.endswith("Rows count from 0.")


def test_the_line_of_a_csv_row_is_where_it_begins(char_tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("input,output\n" + '"a\nb",c\n' * 64 + "d,\n")
    said = message(char_tokenizer, str(path), 64, source="csv")
    assert said.endswith(f"It is line 130 of {path}.")


# ------------------------------------------------------------------------------- CSV


def test_cells_of_a_csv_are_text_as_it_is_written(char_tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("input,output\n007,1.50\n1e3,2026-12-01\ntrue,NA\n")
    dataset = build(node(str(path), source="csv"), char_tokenizer)
    rows = [tuple(dataset._rows[i].values()) for i in range(3)]
    assert rows == [("007", "1.50"), ("1e3", "2026-12-01"), ("true", "NA")]
    texts = build(
        node(str(path), OURS + "completion_dataset", source="csv", column="output"), char_tokenizer
    )
    assert texts._rows[0]["output"] == "1.50"


def test_an_empty_cell_is_null_still(char_tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("input,output\n1,\n")
    with pytest.raises(ValueError, match="row 0 holds null in column 'output'"):
        build(node(str(path), source="csv"), char_tokenizer)


def test_two_columns_of_one_name_are_refused(char_tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("input,output,input\na,b,c\n")
    with pytest.raises(ValueError, match=r"rows\.csv has 2 columns with the name 'input'"):
        build(node(str(path), source="csv"), char_tokenizer)
    path.write_text("input;output;input\na;b;c\n")
    with pytest.raises(ValueError, match="2 columns"):
        build(node(str(path), source="csv", sep=";"), char_tokenizer)


# ------------------------------------------------------------------------------- folders


def test_files_of_a_folder_are_not_left_out_in_silence(char_tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    cfg = {"_component_": OURS + "instruct_dataset", "source": str(folder), "split": "train"}
    lines = "".join(json.dumps(row) + "\n" for row in PAIRS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "README.md").write_text("about")
    assert len(build(cfg, char_tokenizer)) == 6
    (folder / "b.csv").write_text("input,output\na,b\n")
    with pytest.raises(ValueError, match=r"several kinds \(1 like a\.jsonl, 1 like b\.csv\)"):
        build(cfg, char_tokenizer)


# ------------------------------------------------------------------------------- columns, answers


@pytest.mark.parametrize("component", ["instruct_dataset", "alpaca_dataset"])
def test_one_column_for_prompt_and_response_is_refused(char_tokenizer, write_rows, component):
    columns = {"input": "input", "output": "input"}
    with pytest.raises(ValueError, match="input and output are both the column 'input'"):
        build(node(write_rows(PAIRS), OURS + component, column_map=columns), char_tokenizer)


def chat(*answers):
    turns = [
        ({"role": "user", "content": "q"}, {"role": "assistant", "content": a}) for a in answers
    ]
    return {"messages": [message for turn in turns for message in turn]}


def test_an_empty_answer_inside_a_chat_is_counted(char_tokenizer, write_rows, caplog):
    rows = [chat("a", "b"), chat("a", " ", "b"), chat("c")]
    rows[2]["messages"][1] |= {"content": "", "weight": 0}  # it is not learned
    dataset = build(node(write_rows(rows), OURS + "chat_dataset"), char_tokenizer)
    counting.check_all_samples(dataset, name="dataset", log=logging.getLogger("of the test"))
    assert "the response of 1 of 3 rows is empty" in caplog.text


# ------------------------------------------------------------------------------- memory


def test_a_large_array_is_not_read_again_to_find_its_fault(tmp_path, monkeypatch):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b"[" + b'{"input": "a"},' * 100 + b"nonsense]"))
    assert "its array is no JSON" in file_faults._json_fault(path)
    monkeypatch.setattr(file_faults, "_LARGEST_ARRAY", 1000)
    assert file_faults._json_fault(path) is None
