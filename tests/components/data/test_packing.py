"""Packed rows hold every sample exactly once, learn nothing across borders, and come back from disk or not at all."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kasa_tune.components.data import building as data
from kasa_tune.components.data import packing, tokenizing
from kasa_tune.components.data.fingerprints import fingerprint
from kasa_tune.components.data.sources import files_read

pytestmark = pytest.mark.usefixtures("datasets_offline")

E2E = "kasa_tune.components.data.e2e_dataset"


class Samples(torch.utils.data.Dataset):
    """Given samples; counts how often one is read."""

    def __init__(self, lengths, seed=0, learn=0.6):
        rng = np.random.default_rng(seed)
        self.samples, self.reads = [], 0
        for n in lengths:
            tokens = rng.integers(3, 500, n)
            labels = data.shift_labels(np.where(rng.random(n) < learn, tokens, data.IGNORE))
            self.samples.append({"tokens": tokens, "labels": labels})

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.reads += 1
        return self.samples[index]


def unpack(rows):
    """(sample index, token, label, position) of every token of every row, found through seq_lens alone."""
    found = []
    for r in range(len(rows)):
        row, start = rows[r], 0
        assert (
            row["seq_lens"].sum()
            == len(row["tokens"])
            == len(row["labels"])
            == len(row["input_pos"])
        )
        assert len(row["tokens"]) <= rows.max_seq_len
        for sample, n in zip(rows.samples_in_row(r), row["seq_lens"], strict=True):
            piece = slice(start, start + n)
            found.append(
                (
                    int(sample),
                    *(row[key][piece].tolist() for key in ("tokens", "labels", "input_pos")),
                )
            )
            start += n
    return found


LENGTHS = st.lists(st.integers(0, 16), min_size=1, max_size=60).filter(any)


# ---------------------------------------------------------------------------------------------------- rows


@given(lengths=LENGTHS, max_seq_len=st.integers(16, 40), seed=st.integers(0, 9))
def test_unpacking_gives_back_every_sample_once(lengths, max_seq_len, seed):
    dataset = Samples(lengths, seed)
    pieces = unpack(packing.pack(dataset, max_seq_len=max_seq_len))
    assert Counter(sample for sample, *_ in pieces) == Counter(
        i for i, n in enumerate(lengths) if n
    )
    for sample, tokens, labels, positions in pieces:
        assert tokens == dataset.samples[sample]["tokens"].tolist()
        assert labels == dataset.samples[sample]["labels"].tolist()
        assert labels[-1] == data.IGNORE
        assert positions == list(range(len(tokens)))


@given(lengths=LENGTHS, max_seq_len=st.integers(1, 40), seed=st.integers(0, 9))
def test_split_rows_are_full_and_join_to_the_samples(lengths, max_seq_len, seed):
    dataset = Samples(lengths, seed)
    rows = packing.pack(dataset, max_seq_len=max_seq_len, split_across_pack=True)
    joined = {}
    for sample, tokens, labels, positions in unpack(rows):
        assert positions == list(range(len(tokens)))
        whole = joined.setdefault(sample, ([], []))
        whole[0].extend(tokens)
        whole[1].extend(labels)
    for i, sample in enumerate(dataset.samples):
        if len(sample["tokens"]):
            assert joined[i] == (sample["tokens"].tolist(), sample["labels"].tolist())
    assert all(len(rows[r]["tokens"]) == max_seq_len for r in range(len(rows) - 1))


@given(lengths=LENGTHS)
def test_no_two_neighbouring_rows_would_fit_into_one(lengths):
    """Greedy at least this far: a row is opened only for a sample that no open row could take."""
    rows = packing.pack(Samples(lengths), max_seq_len=16)
    sizes = [len(rows[r]["tokens"]) for r in range(len(rows))]
    assert all(a + b > 16 for i, a in enumerate(sizes) for b in sizes[i + 1 :])


def test_room_is_used_in_files_sorted_by_length():
    """Lengths 1 to 15 in rows of 16 pair up without rest; taken in file order the short ones would fill rows first."""
    rows = packing.pack(Samples([n for n in range(1, 16) for _ in range(200)]), max_seq_len=16)
    assert 3000 * 8 / (len(rows) * 16) > 0.95


def test_max_packs_keeps_the_first_rows():
    dataset = Samples([9, 9, 9, 9])
    assert len(packing.pack(dataset, max_seq_len=16)) == 4
    assert (
        unpack(packing.pack(dataset, max_seq_len=16, max_packs=3))
        == unpack(packing.pack(dataset, max_seq_len=16))[:3]
    )


@pytest.mark.parametrize(
    ("lengths", "kwargs", "message"),
    [
        ([3, 17], {}, "Sample 1 has 17 tokens.*split_across_pack"),
        ([0, 0], {}, "Nothing to pack"),
        ([], {}, "Nothing to pack"),
        ([3], {"max_packs": 0}, "at least 1"),
        ([3], {"max_seq_len": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_packed(lengths, kwargs, message):
    with pytest.raises(ValueError, match=message):
        packing.pack(Samples(lengths), **{"max_seq_len": 16, **kwargs})


def test_processes_do_not_change_the_rows_and_progress_counts_samples(monkeypatch):
    monkeypatch.setattr(tokenizing, "_CHUNK", 16)
    dataset = Samples([1 + i % 13 for i in range(100)])
    calls = []
    alone = packing.pack(
        dataset, max_seq_len=32, num_workers=0, progress=lambda *args: calls.append(args)
    )
    together = packing.pack(dataset, max_seq_len=32, num_workers=3)
    assert all(np.array_equal(alone.arrays[key], together.arrays[key]) for key in alone.arrays)
    assert calls == [(min(16 * (i + 1), 100), 100) for i in range(7)]


def test_an_error_in_a_tokenizing_process_reaches_the_user(monkeypatch):
    class Broken(Samples):
        def __getitem__(self, index):
            if index == 40:
                raise ValueError("dataset: row 40 has no column 'output'")
            return super().__getitem__(index)

    monkeypatch.setattr(tokenizing, "_CHUNK", 8)
    with pytest.raises(ValueError, match="row 40"):
        packing.pack(Broken([3] * 60), max_seq_len=16, num_workers=2)


def test_a_dying_tokenizing_process_reaches_the_user(monkeypatch):
    class Deadly(Samples):
        def __getitem__(self, index):
            os._exit(1)

    monkeypatch.setattr(tokenizing, "_CHUNK", 8)
    with pytest.raises(RuntimeError, match="process"):
        packing.pack(Deadly([3] * 60), max_seq_len=16, num_workers=2)


# ---------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("split", [False, True])
def test_loss_over_packed_rows_is_the_loss_over_the_samples(split):
    """Sum of cross-entropies, toy Llama-2, fp32. Split samples lose context, so there each piece stands for itself."""
    from torchtune.models.llama2 import llama2

    torch.manual_seed(0)
    model = llama2(
        vocab_size=500, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64
    )
    dataset = Samples([5, 1, 12, 30, 7, 9, 22, 3, 3, 18], seed=3)
    rows = packing.pack(dataset, max_seq_len=32, split_across_pack=split)
    pieces = [{"tokens": np.array(t), "labels": np.array(label)} for _, t, label, _ in unpack(rows)]
    samples = pieces if split else dataset.samples

    def total(batch):
        logits = model(batch["tokens"], mask=batch.get("mask"), input_pos=batch.get("input_pos"))
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
        )

    class Tokenizer:
        pad_id = 0

    options = {
        "tokenizer": Tokenizer(),
        "batch_size": 3,
        "seed": 0,
        "shuffle": True,
        "device": "cpu",
    }
    with torch.no_grad():
        packed = sum(total(batch) for batch in data.build_dataloader(rows, **options))
        plain = sum(total(data.collate([sample], pad_id=0)) for sample in samples)
    learned = sum((sample["labels"] != data.IGNORE).sum() for sample in dataset.samples)
    assert learned > 50
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------- cache


def pack_cached(dataset, folder, key="samples", **kwargs):
    return packing.pack(
        dataset, **{"max_seq_len": 16, "cache_dir": folder, "fingerprint": key, **kwargs}
    )


def test_second_call_reads_the_file(tmp_path):
    dataset = Samples([3, 9, 4, 16])
    fresh = pack_cached(dataset, tmp_path)
    reads = dataset.reads
    again = pack_cached(dataset, tmp_path)
    assert (dataset.reads, unpack(again)) == (reads, unpack(fresh))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert isinstance(again.arrays["tokens"], np.memmap)


@pytest.mark.parametrize(
    "change",
    [{"key": "others"}, {"max_seq_len": 20}, {"split_across_pack": True}, {"max_packs": 1}],
)
def test_another_key_is_another_file(tmp_path, change):
    dataset = Samples([3, 9, 4, 16])
    pack_cached(dataset, tmp_path)
    reads = dataset.reads
    pack_cached(dataset, tmp_path, **change)
    assert dataset.reads > reads
    assert len(list(tmp_path.iterdir())) == 2


def array_header(shape, offsets):
    return json.dumps(
        {"tokens": {"dtype": "I64", "shape": shape, "data_offsets": offsets}}
    ).encode()


def with_header(header):
    """A safetensors file with this header and some bytes after it."""
    return len(header).to_bytes(8, "little") + header + bytes(64)


def flip_last_byte(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        flip_last_byte,
        lambda content: content[:-40],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: b"not a cache" * 100,
        lambda content: (10**15).to_bytes(8, "little") + content[8:],
        lambda content: content.replace(b'"key"', b'"kez"', 1),
        lambda content: content.replace(b'"tokens"', b'"tokenz"', 1),
        lambda content: with_header(b"[" * 200_000),
        lambda content: with_header(array_header([10**30], [0, 8])),
        lambda content: with_header(array_header([2**40], [-100, 8])),
        lambda content: with_header(array_header([1], [])),
    ],
)
def test_damaged_file_is_rebuilt(tmp_path, damage):
    dataset = Samples([3, 9, 4, 16])
    expected = unpack(pack_cached(dataset, tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    reads = dataset.reads
    assert unpack(pack_cached(dataset, tmp_path)) == expected
    assert dataset.reads > reads
    reads = dataset.reads
    pack_cached(dataset, tmp_path)
    assert dataset.reads == reads


def test_file_of_other_samples_under_this_name_is_rebuilt(tmp_path):
    dataset, other = Samples([3, 9, 4, 16]), Samples([5, 5], seed=1)
    pack_cached(dataset, tmp_path / "a")
    pack_cached(other, tmp_path / "b", key="other")
    (path,), (foreign,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    path.write_bytes(foreign.read_bytes())
    assert unpack(pack_cached(dataset, tmp_path / "a")) == unpack(
        packing.pack(dataset, max_seq_len=16)
    )


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "save_file", full_disk)
    with pytest.raises(OSError, match=r"No space left.*KASA_TUNE_CACHE"):
        pack_cached(Samples([3, 9]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_folder_is_noticed_before_tokenizing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    dataset = Samples([3, 9])
    with pytest.raises(OSError, match="KASA_TUNE_CACHE"):
        pack_cached(dataset, tmp_path / "file" / "cache")
    assert dataset.reads == 0


def test_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KASA_TUNE_CACHE", str(tmp_path / "here"))
    assert pack_cached(Samples([3, 9]), None).path.parent == tmp_path / "here"
    monkeypatch.delenv("KASA_TUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        pack_cached(Samples([3, 9]), None).path.parent
        == tmp_path / ".cache" / "kasa_tune" / "packed"
    )


def test_rows_travel_to_worker_processes_by_path(tmp_path):
    import pickle

    rows = pack_cached(Samples([3, 9, 4, 16] * 500), tmp_path)
    assert len(pickle.dumps(rows)) < 2000
    assert unpack(pickle.loads(pickle.dumps(rows))) == unpack(rows)


# ---------------------------------------------------------------------------------------------------- fingerprint


def e2e(path, tokenizer, **keys):
    cfg = {"_component_": E2E, "data_files": str(path), **keys}
    return cfg, data.build_dataset(cfg, tokenizer, name="dataset")


def test_fingerprint_follows_what_the_samples_are_made_of(char_tokenizer, write_rows):
    rows = [{"mr": f"name[{i}]", "ref": f"it is {i}"} for i in range(500)]
    path = write_rows(rows)

    def key(tokenizer=char_tokenizer, **keys):
        cfg, dataset = e2e(path, tokenizer, **keys)
        return fingerprint(cfg, dataset, tokenizer)

    first = key()
    assert key() == first
    keys = {first, key(template="{mr} -> "), key(train_on_input=True)}
    char_tokenizer.max_seq_len = 100
    keys.add(key())
    char_tokenizer.max_seq_len = None
    char_tokenizer.merges = {"a": 1}
    keys.add(key())
    del char_tokenizer.merges
    rows[37]["ref"] = "it is 73"  # a row no probe looks at
    write_rows(rows)
    keys.add(key())
    assert len(keys) == 6


def test_fingerprint_of_a_builder_whose_code_changed(char_tokenizer, write_rows, monkeypatch):
    from kasa_tune.components.data import datasets

    cfg, dataset = e2e(
        write_rows([{"mr": "name[A]", "ref": "A ."}]), char_tokenizer, detokenize=True
    )
    before = fingerprint(cfg, dataset, char_tokenizer)
    monkeypatch.setattr(datasets, "_PTB_RULES", [])
    cfg, dataset = e2e(cfg["data_files"], char_tokenizer, detokenize=True)
    assert fingerprint(cfg, dataset, char_tokenizer) != before


SCRIPT = """
import sys
from kasa_tune.components.data import building as data
from kasa_tune.components.data.fingerprints import fingerprint
from kasa_tune.components.data.sources import files_read
from torchtune.models.llama2 import llama2_tokenizer
tokenizer = llama2_tokenizer(sys.argv[1], max_seq_len=256, prompt_template=None)
cfg = {"_component_": sys.argv[3], "data_files": sys.argv[2]}
dataset = data.build_dataset(cfg, tokenizer, name="dataset")
print(fingerprint(cfg, dataset, tokenizer))
"""


@pytest.mark.slow
def test_fingerprint_is_the_same_in_another_process_and_for_a_used_tokenizer(
    real_data, story_tokenizer, tmp_path
):
    path = real_data / "datasets" / "e2e" / "dev.jsonl"
    model = real_data / "models" / "stories260K" / "hf" / "tokenizer.model"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1",
        "HF_HOME": str(tmp_path),
        "HF_DATASETS_OFFLINE": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(model), str(path), E2E]
    there = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    story_tokenizer.max_seq_len = 256
    fresh = copy.deepcopy(story_tokenizer)
    cfg, dataset = e2e(path, story_tokenizer)
    assert not hasattr(fresh._spm_model, "encoded_prefix")
    assert hasattr(story_tokenizer._spm_model, "encoded_prefix")
    assert fingerprint(cfg, dataset, story_tokenizer) == fingerprint(cfg, dataset, fresh) == there


def test_files_of_a_node(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    expected = [
        (None, []),
        (str(a), [a]),
        ([str(a), {"x": str(b)}], [a, b]),
        (str(tmp_path / "*.json"), [a, b]),
        ("https://host/c.json", []),
        ("hf://datasets/x/c.json", []),
    ]
    for data_files, files in expected:
        assert files_read({"data_files": data_files}) == files


# ---------------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize("split", [None, True])
def test_e2e_packed_is_e2e(real_data, story_tokenizer, tmp_path, split):
    story_tokenizer.max_seq_len = 256
    path = str(real_data / "datasets" / "e2e" / "dev.jsonl")
    cfg = {"_component_": E2E, "data_files": path, "split": "train[:600]"}
    plain = data.build_dataset(cfg, story_tokenizer, name="dataset")
    keys = {} if split is None else {"split_across_pack": split}
    rows = data.build_dataset(
        {**cfg, "packed": True, **keys}, story_tokenizer, name="dataset", cache_dir=tmp_path
    )
    joined = {}
    for sample, tokens, labels, _ in unpack(rows):
        old = joined.get(sample, ([], []))
        joined[sample] = (old[0] + tokens, old[1] + labels)
    assert len(joined) == len(plain) == 600
    assert all(
        joined[i] == (plain[i]["tokens"].tolist(), plain[i]["labels"].tolist()) for i in range(600)
    )
    batch = next(
        iter(
            data.build_dataloader(
                rows, tokenizer=story_tokenizer, batch_size=2, seed=0, shuffle=True
            )
        )
    )
    assert batch["tokens"].shape == batch["labels"].shape == batch["input_pos"].shape == (2, 256)


def test_packing_needs_a_length(char_tokenizer, write_rows):
    cfg = {"_component_": E2E, "data_files": write_rows([{"mr": "a", "ref": "b"}]), "packed": True}
    with pytest.raises(ValueError, match=r"dataset\.packed.*max_seq_len"):
        data.build_dataset(cfg, char_tokenizer, name="dataset")


def test_raw_text_is_split_by_default(char_tokenizer, write_rows, tmp_path):
    char_tokenizer.max_seq_len = 30
    cfg = {
        "_component_": "kasa_tune.components.data.completion_dataset",
        "data_files": write_rows([{"text": "abcdefghij"}] * 10),
        "packed": True,
    }
    rows = data.build_dataset(cfg, char_tokenizer, name="dataset", cache_dir=tmp_path)
    assert [len(rows[r]["tokens"]) for r in range(len(rows))] == [30, 30, 30, 30]
    assert json.dumps(rows.samples_in_row(0).tolist()) == "[0, 1, 2]"
