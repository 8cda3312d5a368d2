"""All samples are tokenized once before training: counted, kept for every epoch, and the same as at every visit."""

import logging
import pickle

import numpy as np
import pytest
from omegaconf import OmegaConf

from kasa_tune.components.data import building as data
from kasa_tune.components.data import counting, packing
from kasa_tune.components.data.training_data import TrainingData
from tests.components.data.test_building import OURS, PAIRS, build, node

pytestmark = pytest.mark.usefixtures("datasets_offline")

LONG = {"input": "a long question", "output": "x"}
LOG = logging.getLogger("of the test")


def check(dataset, caplog, name="dataset"):
    with caplog.at_level(logging.INFO, LOG.name):
        counting.check_all_samples(dataset, name=name, log=LOG)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def counted_visits(dataset, monkeypatch):
    """Indices of the samples that are tokenized from now on."""
    visits = []
    prepare = dataset._prepare

    def counted(index):
        visits.append(index)
        return prepare(index)

    monkeypatch.setattr(dataset, "_prepare", counted)
    return visits


@pytest.fixture
def small_limits(monkeypatch):
    """Data sets of a few samples count as large ones."""
    monkeypatch.setattr(counting, "FEW", 4)


# ---------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("packed", [False, True])
def test_cut_and_empty_samples_are_counted_over_all_rows(
    char_tokenizer, write_rows, caplog, tmp_path, packed
):
    """The first 64 rows are short; of the 40 after them the prompt alone fills the length."""
    char_tokenizer.max_seq_len = 15
    rows = [*PAIRS * 11, *[LONG] * 38, *[{"input": "a", "output": "b" * 20}] * 2]
    cfg = node(write_rows(rows), packed=packed)
    for _ in range(2):  # the second time packed rows are found on disk
        caplog.clear()
        dataset = data.build_dataset(cfg, char_tokenizer, name="dataset", cache_dir=tmp_path / "c")
        (line,) = check(dataset, caplog)
        assert line == (
            "WARNING",
            "dataset: 106 samples, 40 of them cut to tokenizer.max_seq_len (15), 38 with nothing to learn.",
        )


def test_nothing_cut_is_no_warning(char_tokenizer, write_rows, caplog):
    assert check(build(node(write_rows(PAIRS)), char_tokenizer), caplog) == [
        ("INFO", "dataset: 6 samples, 0 of them cut to tokenizer.max_seq_len (None), 0 with nothing to learn.")
    ]  # fmt: skip


def test_a_sample_that_just_fits_is_not_cut(char_tokenizer, write_rows, caplog):
    char_tokenizer.max_seq_len = len("q0:answer 0") + 2
    ((level, line),) = check(build(node(write_rows(PAIRS)), char_tokenizer), caplog)
    assert (level, "6 samples, 0 of them cut" in line) == ("INFO", True)


def test_cut_raw_text_is_counted(char_tokenizer, write_rows, caplog):
    char_tokenizer.max_seq_len = 8
    rows = [{"text": "x" * n} for n in (3, 5, 6, 7, 8, 20)]
    dataset = build(node(write_rows(rows), OURS + "completion_dataset"), char_tokenizer)
    expected = data.count_truncated(dataset)
    assert 0 < expected < 6
    ((_, line),) = check(dataset, caplog)
    assert f"6 samples, {expected} of them cut" in line


@pytest.mark.parametrize("packed", [False, True])
def test_more_than_half_without_anything_to_learn_is_refused(
    char_tokenizer, write_rows, tmp_path, packed
):
    char_tokenizer.max_seq_len = 12
    for rows, refused in (([*PAIRS[:3], *[LONG] * 4], True), ([*PAIRS[:4], *[LONG] * 4], False)):
        cfg = node(write_rows(rows), packed=packed)
        dataset = data.build_dataset(cfg, char_tokenizer, name="dataset", cache_dir=tmp_path)
        if refused:
            with pytest.raises(
                ValueError, match=r"4 with nothing to learn.*Raise tokenizer\.max_seq"
            ):
                counting.check_all_samples(dataset, name="dataset")
        else:
            counting.check_all_samples(dataset, name="dataset")


def test_each_part_of_a_mixture_is_counted(char_tokenizer, write_rows, caplog):
    char_tokenizer.max_seq_len = 14
    good, bad = write_rows(PAIRS, "good.jsonl"), write_rows([*PAIRS, LONG], "bad.jsonl")
    lines = check(build([node(good), node(bad)], char_tokenizer), caplog, "dataset_val")
    assert [(level, line.split(" of them")[0]) for level, line in lines] == [
        ("INFO", "dataset_val[0]: 6 samples, 0"),
        ("WARNING", "dataset_val[1]: 7 samples, 1"),
    ]


def test_a_broken_row_is_announced_and_still_raised_where_it_is_met(
    char_tokenizer, write_rows, caplog
):
    rows = [*PAIRS * 20, {"input": "only a question", "output": None}, *PAIRS]
    dataset = build(node(write_rows(rows)), char_tokenizer)
    _, (level, line) = check(dataset, caplog)
    assert level == "WARNING"
    assert "1 of 127 rows cannot be used" in line
    assert "dataset: row 120 holds null in column 'output'" in line
    assert dataset[126]["tokens"].tolist() == dataset[5]["tokens"].tolist()
    with pytest.raises(ValueError, match="row 120 holds null"):
        dataset[120]


def test_training_data_counts_what_it_trains_on(char_tokenizer, write_rows):
    import torch

    char_tokenizer.max_seq_len = 12
    cfg = OmegaConf.create(
        {
            "dataset": node(write_rows([PAIRS[0], LONG, LONG])),
            "dataset_val": None,
            "tokenizer": {"_component_": "x"},
            "seed": 0,
            "num_workers": 0,
            "batch_size": 1,
            "shuffle": False,
            "gradient_accumulation_steps": 1,
            "max_steps_per_epoch": None,
            "max_steps": None,
            "epochs": 1,
        }
    )
    with pytest.raises(ValueError, match=r"dataset: 3 samples.* 2 with nothing to learn"):
        TrainingData(cfg, char_tokenizer, vocab_size=1000, device=torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------- kept


@pytest.mark.parametrize("large", [False, True])
def test_samples_are_tokenized_once_and_stay_what_they_are(
    char_tokenizer, write_rows, tmp_path, monkeypatch, large
):
    monkeypatch.setattr(counting, "FEW", 4 if large else 100)
    rows = [*PAIRS, {"input": "", "output": ""}, {"input": "é€"[:1], "output": "z" * 40}]
    path = write_rows(rows)
    fresh = build(node(path), char_tokenizer)
    expected = [fresh[i] for i in range(8)]
    dataset = build(node(path), char_tokenizer)
    counting.tokenize_once(dataset, tmp_path / "cache")
    visits = counted_visits(dataset, monkeypatch)
    for _ in range(2):
        for sample, same in zip(dataset, expected, strict=True):
            assert all(np.array_equal(sample[key], same[key]) for key in ("tokens", "labels"))
            assert {sample[key].dtype for key in sample} == {np.dtype(np.int64)}
    assert visits == []
    copy = pickle.loads(pickle.dumps(dataset.kept))
    assert all(np.array_equal(copy[3][key], expected[3][key]) for key in expected[3])
    assert (tmp_path / "cache").exists() == large


def test_a_large_data_set_is_found_on_disk_by_the_next_run(
    char_tokenizer, write_rows, tmp_path, monkeypatch, small_limits
):
    path, cache = write_rows(PAIRS), tmp_path / "cache"
    counts = counting.tokenize_once(build(node(path), char_tokenizer), cache)
    (file,) = cache.iterdir()
    monkeypatch.setattr(counting, "tokenize_all", None)  # a call of it would fail
    again = build(node(path), char_tokenizer)
    assert counting.tokenize_once(again, cache) == counts
    assert again.kept.path == file


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[: len(b) // 2], lambda b: b""]
)
def test_a_damaged_file_is_made_anew(char_tokenizer, write_rows, tmp_path, small_limits, damage):
    path = write_rows(PAIRS)
    counting.tokenize_once(build(node(path), char_tokenizer), tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    dataset = build(node(path), char_tokenizer)
    expected = dataset[5]
    assert counting.tokenize_once(dataset, tmp_path / "cache").samples == 6
    assert dataset[5]["tokens"].tolist() == expected["tokens"].tolist()
    assert packing.load_arrays(file, file.name.split(".")[0]) is not None


def test_another_tokenizer_or_another_content_is_tokenized_again(
    char_tokenizer, write_rows, tmp_path, small_limits
):
    path = write_rows(PAIRS)
    counting.tokenize_once(build(node(path), char_tokenizer), tmp_path / "cache")
    char_tokenizer.max_seq_len = 9
    shorter = build(node(path), char_tokenizer)
    counting.tokenize_once(shorter, tmp_path / "cache")
    assert len(shorter[0]["tokens"]) == 9
    counting.tokenize_once(
        build(node(write_rows([*PAIRS[:5], LONG])), char_tokenizer), tmp_path / "cache"
    )
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_done_without(
    char_tokenizer, write_rows, tmp_path, monkeypatch, small_limits, caplog
):
    (tmp_path / "file").write_text("")
    dataset = build(node(write_rows(PAIRS)), char_tokenizer)
    counting.tokenize_once(dataset, tmp_path / "file" / "cache")
    assert "Tokens are kept in memory" in caplog.text
    visits = counted_visits(dataset, monkeypatch)
    assert len(dataset[3]["tokens"]) == len("q3:answer 3") + 2
    assert visits == []


def test_what_is_kept_is_bounded(char_tokenizer, write_rows, monkeypatch):
    monkeypatch.setattr(counting, "MOST_TOKENS", 20)
    dataset = build(node(write_rows(PAIRS)), char_tokenizer)
    assert counting.tokenize_once(dataset).samples == 6
    assert dataset.kept is None
    assert len(dataset[5]["tokens"]) == len("q5:answer 5") + 2


class Drawing:
    """A data set of somebody else that draws its samples anew at every visit."""

    def __init__(self, tokenizer):
        self.visits = 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        self.visits += 1
        return {"tokens": [1, self.visits], "labels": [-100, self.visits]}


def test_a_data_set_that_draws_its_samples_is_left_to_do_so(char_tokenizer):
    dataset = build({"_component_": f"{__name__}.Drawing"}, char_tokenizer)
    counting.check_all_samples(dataset, name="dataset")
    assert dataset[0]["tokens"].tolist() != dataset[0]["tokens"].tolist()


def test_packed_rows_without_counts_are_counted_anew(char_tokenizer, write_rows, tmp_path, caplog):
    """Files that were written before counts were kept with the rows."""
    cfg = node(write_rows(PAIRS), packed=True)
    char_tokenizer.max_seq_len = 20
    dataset = data.build_dataset(cfg, char_tokenizer, name="dataset", cache_dir=tmp_path)
    rows = packing.PackedRows(dataset.arrays, max_seq_len=20, source=dataset.source)
    assert check(rows, caplog) == check(dataset, caplog)[:1]


def test_empty_responses_are_told(char_tokenizer, write_rows, caplog):
    """They have the end of the sequence to learn, so they count as learned."""
    blank = [{"input": "a", "output": ""}, {"input": "b", "output": " \n"}]
    with pytest.raises(ValueError, match="the response of every row is empty"):
        check(build(node(write_rows(blank)), char_tokenizer), caplog)
    _, (level, told) = check(build(node(write_rows(PAIRS + blank)), char_tokenizer), caplog)
    assert level == "WARNING"
    assert "the response of 2 of 8 rows is empty" in told
    caplog.clear()
    assert len(check(build(node(write_rows(PAIRS)), char_tokenizer), caplog)) == 1


CHAT = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}
] * 4


@pytest.mark.parametrize(("template", "warns"), [(None, True), ("{{ messages }}", False)])
def test_conversations_without_a_template_are_a_warning(
    char_tokenizer, write_rows, caplog, template, warns
):
    char_tokenizer.chat_template = template
    dataset = build(node(write_rows(CHAT), OURS + "chat_dataset"), char_tokenizer)
    said = [text for level, text in check(dataset, caplog) if level == "WARNING"]
    assert bool(said) == warns
    assert all("no chat template" in text for text in said)


def test_rows_of_prompt_and_answer_need_no_template(char_tokenizer, write_rows, caplog):
    char_tokenizer.chat_template = None
    assert check(build(node(write_rows(PAIRS * 4)), char_tokenizer), caplog)[0][0] == "INFO"
    assert len(caplog.records) == 1
