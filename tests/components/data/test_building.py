"""From a dataset node to checked samples: every torchtune builder, every way a user's data can be wrong."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from kasa_tune.components.data import building as data
from kasa_tune.components.data import packing

pytestmark = pytest.mark.usefixtures("datasets_offline")

OURS = "kasa_tune.components.data."
PAIRS = [{"input": f"q{i}:", "output": f"answer {i}"} for i in range(6)]


def node(path, component=OURS + "instruct_dataset", **keys):
    return {
        "_component_": component,
        "source": "json",
        "data_files": path,
        "split": "train",
        **keys,
    }


def build(cfg, tokenizer):
    return data.build_dataset(cfg, tokenizer, name="dataset")


def learned(sample):
    """(position, token it has to predict) of every position that learns."""
    return [(t, int(label)) for t, label in enumerate(sample["labels"]) if label != data.IGNORE]


# ---------------------------------------------------------------------------------------------------- labels


def test_shift_labels():
    assert data.shift_labels(np.array([-100, -100, 7, 8])).tolist() == [-100, 7, 8, -100]
    assert data.shift_labels(np.array([5])).tolist() == [-100]
    assert data.shift_labels(np.array([], dtype=np.int64)).tolist() == []


def test_sample_predicts_the_response_and_its_end_and_nothing_else(char_tokenizer, write_rows):
    sample = build(node(write_rows([{"input": "ab", "output": "xy"}])), char_tokenizer)[0]
    a, b, x, y = (3 + ord(c) for c in "abxy")
    assert sample["tokens"].tolist() == [1, a, b, x, y, 2]
    assert sample["labels"].tolist() == [-100, -100, x, y, 2, -100]


def test_train_on_input_learns_the_prompt_too(char_tokenizer, write_rows):
    sample = build(
        node(write_rows([{"input": "ab", "output": "xy"}]), train_on_input=True), char_tokenizer
    )[0]
    assert sample["labels"].tolist() == [*sample["tokens"][1:].tolist(), -100]


@pytest.mark.parametrize(
    ("component", "rows", "keys"),
    [
        ("torchtune.datasets.instruct_dataset", PAIRS, {}),
        (
            "torchtune.datasets.instruct_dataset",
            [{"q": "why", "a": "so"}],
            {"column_map": {"input": "q", "output": "a"}, "new_system_prompt": "be brief"},
        ),
        (
            "torchtune.datasets.alpaca_dataset",
            [{"instruction": "do", "input": "", "output": "done"}],
            {},
        ),
        (
            "torchtune.datasets.chat_dataset",
            [{"talk": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}],
            {"conversation_column": "talk", "conversation_style": "sharegpt"},
        ),
        (
            "torchtune.datasets.chat_dataset",
            [
                {
                    "messages": [
                        {"role": "user", "content": "hi"},
                        {"role": "assistant", "content": "yo"},
                    ]
                }
            ],
            {"conversation_column": "messages", "conversation_style": "openai"},
        ),
        ("torchtune.datasets.text_completion_dataset", [{"text": "once upon"}], {"column": "text"}),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_torchtunes_builders_give_their_labels_shifted(
    char_tokenizer, write_rows, component, rows, keys, suffix
):
    from torchtune import config

    cfg = OmegaConf.create(node(write_rows(rows, f"rows.{suffix}"), component, **keys))
    dataset, theirs = build(cfg, char_tokenizer), config.instantiate(cfg, char_tokenizer)
    assert len(dataset) == len(rows)
    for i in range(len(rows)):
        assert dataset[i]["tokens"].tolist() == list(theirs[i]["tokens"])
        assert dataset[i]["labels"].tolist() == [*map(int, theirs[i]["labels"][1:]), -100]


def test_interpolations_and_our_keys_are_taken_out_before_the_call(char_tokenizer, write_rows):
    cfg = OmegaConf.create(
        {"file": write_rows(PAIRS), "dataset": {**node("${file}"), "packed": False, "weight": 1.0}}
    )
    assert len(build(cfg.dataset, char_tokenizer)) == len(PAIRS)


# ---------------------------------------------------------------------------------------------------- mixtures


def test_a_list_is_a_weighted_mixture(char_tokenizer, write_rows):
    first, second = write_rows(PAIRS, "a.jsonl"), write_rows(PAIRS[:4], "b.jsonl")
    dataset = build([node(first, weight=0.5), node(second, weight=2.0)], char_tokenizer)
    assert (dataset.lengths, dataset.weights, len(dataset)) == ([6, 4], [0.5, 2.0], 10)
    for i in range(10):
        row = (PAIRS + PAIRS[:4])[i]
        assert char_tokenizer.decode(dataset[i]["tokens"]) == row["input"] + row["output"]


def test_one_dataset_with_a_weight(char_tokenizer, write_rows):
    dataset = build(node(write_rows(PAIRS), weight=0.5), char_tokenizer)
    loader = data.build_dataloader(
        dataset, tokenizer=char_tokenizer, batch_size=1, seed=0, shuffle=True
    )
    assert (len(dataset), len(loader), len(list(loader))) == (6, 3, 3)


def test_packed_and_unpacked_are_not_mixed(char_tokenizer, write_rows):
    path = write_rows(PAIRS)
    with pytest.raises(ValueError, match="packed and unpacked"):
        build([node(path, packed=True), node(path)], char_tokenizer)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan"), "much", True, 1e-3])
def test_impossible_weight(char_tokenizer, write_rows, weight):
    with pytest.raises(ValueError, match="weight"):
        build(node(write_rows(PAIRS), weight=weight), char_tokenizer)


def test_an_empty_list_of_datasets(char_tokenizer):
    with pytest.raises(ValueError, match="_component_"):
        build([], char_tokenizer)


# ---------------------------------------------------------------------------------------------------- bad input


def test_missing_file(char_tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset\.data_files.*nowhere\.jsonl"):
        build(node(str(tmp_path / "nowhere.jsonl")), char_tokenizer)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("b.json", "[]")])
def test_empty_file(char_tokenizer, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"no samples|no data"):
        build(node(str(tmp_path / name)), char_tokenizer)


def test_empty_split(char_tokenizer, write_rows):
    with pytest.raises(ValueError, match=r"dataset: .*train\[:0\].*no data"):
        build({**node(write_rows(PAIRS)), "split": "train[:0]"}, char_tokenizer)


def test_broken_json_tells_where(char_tokenizer, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": oops}\n')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2 is no JSON"):
        build(node(str(tmp_path / "broken.jsonl")), char_tokenizer)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"split": "tran"}, 'Unknown split "tran"'),
        ({"colum": "text"}, "colum"),
        ({"_component_": OURS + "no_such_dataset"}, "no_such_dataset"),
        ({"_component_": "no_such_package.dataset"}, "no_such_package"),
    ],
)
def test_a_component_that_cannot_be_called_so(char_tokenizer, write_rows, keys, message):
    with pytest.raises(ValueError, match=message):
        build({**node(write_rows(PAIRS)), **keys}, char_tokenizer)


def test_hub_dataset_without_a_network(char_tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="data_files"):
        build({"_component_": OURS + "gsm8k_dataset"}, char_tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "only a question"}, "column 'output'; columns present: input"),
        ({"input": None, "output": "x"}, "null in column 'input'; columns present: output"),
        ({"question": "x"}, "column 'input'"),
    ],
)
@pytest.mark.parametrize(
    "component", [OURS + "instruct_dataset", "torchtune.datasets.instruct_dataset"]
)
def test_row_without_its_columns(char_tokenizer, write_rows, row, message, component):
    with pytest.raises(ValueError, match=rf"dataset: row 2 .*{message}"):
        build(node(write_rows([*PAIRS[:2], row]), component), char_tokenizer)


@pytest.mark.parametrize(
    ("component", "row", "missing", "keys"),
    [
        (OURS + "e2e_dataset", {"mr": "name[A]"}, "ref", {}),
        (OURS + "gsm8k_dataset", {"answer": "4"}, "question", {}),
        (OURS + "commonsense_dataset", {"input": "", "output": "x"}, "instruction", {}),
        (OURS + "alpaca_dataset", {"instruction": "a", "input": "b"}, "output", {}),
        (
            "torchtune.datasets.alpaca_dataset",
            {"instruction": None, "output": "b"},
            "instruction",
            {},
        ),
        (OURS + "completion_dataset", {"story": "a"}, "text", {}),
        (
            "torchtune.datasets.chat_dataset",
            {"talk": None},
            "messages",
            {"conversation_column": "messages", "conversation_style": "openai"},
        ),
    ],
)
def test_every_builder_names_the_missing_column(
    char_tokenizer, write_rows, component, row, missing, keys
):
    with pytest.raises(ValueError, match=f"dataset: row 0 .*column '{missing}'"):
        build(node(write_rows([row]), component, **keys), char_tokenizer)


def test_text_column_with_a_number(char_tokenizer, write_rows):
    with pytest.raises(ValueError, match="row 0: column 'output' must hold text, got int 4"):
        build(node(write_rows([{"input": "2 + 2", "output": 4}])), char_tokenizer)


def test_a_key_missing_inside_a_conversation(char_tokenizer, write_rows):
    rows = [{"talk": [{"from": "human", "text": "hi"}, {"from": "gpt", "text": "yo"}]}]
    cfg = node(write_rows(rows), "torchtune.datasets.chat_dataset")
    with pytest.raises(ValueError, match=r"row 0 lacks 'value'.*Columns present: talk"):
        build(
            {**cfg, "conversation_column": "talk", "conversation_style": "sharegpt"}, char_tokenizer
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_row_far_down_is_named_when_training_reaches_it(
    char_tokenizer, write_rows, num_workers
):
    rows = [*(PAIRS * 20), {"input": "only a question", "output": None}]
    dataset = build(node(write_rows(rows)), char_tokenizer)
    loader = data.build_dataloader(
        dataset,
        tokenizer=char_tokenizer,
        batch_size=50,
        seed=0,
        shuffle=False,
        num_workers=num_workers,
    )
    with pytest.raises(ValueError, match="dataset: row 120 holds null in column 'output'"):
        list(loader)


def test_nothing_to_learn_when_prompts_fill_the_length(char_tokenizer, write_rows):
    char_tokenizer.max_seq_len = 10
    path = write_rows([{"input": "a long question", "output": "x"}] * 3)
    with pytest.raises(
        ValueError, match=r"first 3 samples.*max_seq_len \(now 10\).*train_on_input"
    ):
        build(node(path), char_tokenizer)
    assert len(build(node(path, train_on_input=True), char_tokenizer)) == 3
    mixed = build(
        node(write_rows([{"input": "a long question", "output": "x"}, *PAIRS])), char_tokenizer
    )
    assert learned(mixed[0]) == []
    assert learned(mixed[1]) != []


def test_a_conversation_out_of_order_is_named(char_tokenizer, write_rows):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    cfg = node(
        write_rows([{"talk": talk}, {"talk": talk[::-1]}]), "torchtune.datasets.chat_dataset"
    )
    with pytest.raises(
        ValueError, match="dataset: row 1 cannot be tokenized: Assistant message before"
    ):
        build(
            {**cfg, "conversation_column": "talk", "conversation_style": "openai"}, char_tokenizer
        )


def test_images_are_refused(write_rows):
    class Multimodal:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"tokens": [1], "labels": [1], "encoder_input": {}}

    with pytest.raises(ValueError, match="text alone"):
        data.ShiftedDataset(Multimodal(), name="dataset", tokenizer=None)[0]


# ---------------------------------------------------------------------------------------------------- checks


def test_check_token_ids(char_tokenizer, write_rows):
    path = write_rows([{"input": "a", "output": "b"}, {"input": "a", "output": "z"}])
    dataset = build(node(path), char_tokenizer)
    largest = 3 + ord("z")
    data.check_token_ids(dataset, largest + 1)
    with pytest.raises(ValueError, match=f"sample 1 holds token id {largest}.*{largest} entries"):
        data.check_token_ids(dataset, largest)
    with pytest.raises(ValueError, match="does not fit"):
        data.check_token_ids(build([node(path), node(path)], char_tokenizer), largest)


def test_count_truncated_on_real_data(real_data, story_tokenizer):
    story_tokenizer.max_seq_len = 96
    path = real_data / "datasets" / "e2e" / "dev.jsonl"
    dataset = build(node(str(path), OURS + "e2e_dataset"), story_tokenizer)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:200]]
    spm = story_tokenizer._spm_model.spm_model
    lengths = [len(spm.encode(row["mr"] + "\n" + row["ref"])) + 2 for row in rows]
    expected = sum(n > 96 for n in lengths)
    assert 0 < expected < 200
    assert data.count_truncated(dataset, first=200) == expected
    assert story_tokenizer.max_seq_len == 96
    assert max(len(dataset[i]["tokens"]) for i in range(200)) == 96
    assert (
        data.count_truncated(data.MixedDataset([dataset, dataset], [1, 1]), first=200)
        == 2 * expected
    )
    assert data.count_truncated(packing.pack(dataset, max_seq_len=96), first=200) == expected
