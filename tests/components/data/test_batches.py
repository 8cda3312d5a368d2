"""The order of samples and the batches: nothing lost, nothing random but the seed, exact resume, many ranks."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kasa_tune.components.data import batches
from kasa_tune.components.data import building as data

SIZES = {"n": st.integers(1, 40), "batch_size": st.integers(1, 7), "seed": st.integers(0, 2**70)}


class Numbers(torch.utils.data.Dataset):
    """Sample i has i % 5 + 1 tokens, all equal to i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        tokens = np.full(i % 5 + 1, i)
        return {"tokens": tokens, "labels": data.shift_labels(tokens)}


class Tokenizer:
    pad_id = -1


def flat(lists):
    return [i for some in lists for i in some]


def loader(dataset, **kwargs):
    defaults = {"tokenizer": Tokenizer(), "batch_size": 4, "seed": 7, "shuffle": True}
    return data.build_dataloader(dataset, **{**defaults, **kwargs})


# ---------------------------------------------------------------------------------------------------- order


@given(n=st.integers(0, 300), key=st.lists(st.integers(0, 2**64), max_size=3))
def test_permutation_holds_every_index_once(n, key):
    order = batches.permutation(n, *key)
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, batches.permutation(n, *key))


def test_permutation_is_uniform():
    """Over 6000 keys each of the 6 orders of three things comes up 1000 times, give or take 5 standard deviations."""
    seen = Counter(tuple(batches.permutation(3, key).tolist()) for key in range(6000))
    assert len(seen) == 6
    assert all(abs(count - 1000) < 5 * np.sqrt(6000 * 1 / 6 * 5 / 6) for count in seen.values())


@given(**SIZES, shuffle=st.booleans(), epoch=st.integers(0, 5))
def test_an_epoch_is_every_sample_once_and_keeps_the_last_partial_batch(
    n, batch_size, seed, shuffle, epoch
):
    sampler = batches.EpochBatches([n], batch_size=batch_size, seed=seed, shuffle=shuffle)
    sampler.set_position(epoch)
    got = list(sampler)
    assert sorted(flat(got)) == list(range(n))
    assert len(got) == len(sampler) == -(-n // batch_size)
    assert all(len(batch) == batch_size for batch in got[:-1])
    if not shuffle:
        assert flat(got) == list(range(n))


@given(**SIZES, start=st.integers(0, 50), epoch=st.integers(0, 5))
def test_resuming_in_the_middle_gives_the_rest_of_the_epoch(n, batch_size, seed, start, epoch):
    sampler = batches.EpochBatches([n], batch_size=batch_size, seed=seed, shuffle=True)
    sampler.set_position(epoch)
    whole = list(sampler)
    start = start % (len(whole) + 1)
    fresh = batches.EpochBatches([n], batch_size=batch_size, seed=seed, shuffle=True)
    fresh.set_position(epoch, start)
    assert list(fresh) == whole[start:]
    assert len(fresh) == len(whole)


@given(**SIZES, world_size=st.integers(1, 5), epoch=st.integers(0, 3))
def test_ranks_share_the_epoch_that_one_rank_sees(n, batch_size, seed, world_size, epoch):
    ranks = [
        batches.EpochBatches(
            [n], batch_size=batch_size, seed=seed, shuffle=True, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    for sampler in ranks:
        sampler.set_position(epoch)
    got = [list(sampler) for sampler in ranks]
    order = ranks[0].order(epoch).tolist()
    assert {len(per_rank) for per_rank in got} == {len(ranks[0])}
    joined = []
    for step in zip(*got):
        assert len({len(batch) for batch in step}) == 1
        joined += flat(step)
    assert joined == order + [batches.FILLER] * (-n % world_size)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.2, 3.0), min_size=3, max_size=3),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
)
def test_weights_are_counts_and_no_sample_is_favoured(lengths, weights, seed, shuffle):
    weights = [max(w, 1 / n) for w, n in zip(weights, lengths)]
    sampler = batches.EpochBatches(
        lengths, weights=weights, batch_size=3, seed=seed, shuffle=shuffle
    )
    seen = Counter(sampler.order(0).tolist())
    start = 0
    for n, w in zip(lengths, weights, strict=False):
        counts = [seen[start + i] for i in range(n)]
        assert sum(counts) == round(w * n)
        assert max(counts) - min(counts) <= 1
        start += n


@pytest.mark.parametrize("weight", [0.5, 1.5])
def test_half_a_dataset_is_another_half_in_every_epoch(weight):
    sampler = batches.EpochBatches([100], weights=[weight], batch_size=10, seed=1, shuffle=True)
    counts = [Counter(sampler.order(epoch).tolist()) for epoch in range(6)]
    halves = [
        frozenset(i for i, count in seen.items() if count == np.ceil(weight)) for seen in counts
    ]
    assert {len(half) for half in halves} == {50}
    assert len(set(halves)) == 6
    assert all(halves[e] | halves[e + 1] == set(range(100)) for e in (0, 2, 4))


def test_epochs_and_seeds_give_different_orders_the_same_key_the_same():
    def order(seed, epoch):
        return tuple(
            batches.EpochBatches([50], batch_size=5, seed=seed, shuffle=True).order(epoch).tolist()
        )

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25
    assert order(3, 4) == order(3, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"lengths": [0]}, "No samples"),
        ({"lengths": [3], "weights": [0.1]}, "No samples"),
    ],
)
def test_impossible_settings(kwargs, message):
    settings = {"lengths": [4], "batch_size": 2, "seed": 0, "shuffle": True, **kwargs}
    with pytest.raises(ValueError, match=message):
        batches.EpochBatches(settings.pop("lengths"), **settings)


@pytest.mark.parametrize("position", [(-1, 0), (0, 3), (0, -1)])
def test_impossible_position(position):
    sampler = batches.EpochBatches([4], batch_size=2, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="2 batches"):
        sampler.set_position(*position)


# ---------------------------------------------------------------------------------------------------- loader


def test_global_random_state_is_left_alone():
    def states():
        return (
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )

    before = states()
    list(loader(Numbers(11)))
    list(loader(Numbers(11), num_workers=2))
    assert states() == before
    torch.manual_seed(1)
    first = [batch["tokens"].tolist() for batch in loader(Numbers(11))]
    torch.manual_seed(2)
    assert [batch["tokens"].tolist() for batch in loader(Numbers(11))] == first


def test_worker_processes_give_the_same_batches_also_after_a_resume():
    here, there = loader(Numbers(23)), loader(Numbers(23), num_workers=2)
    for position in [(0, 0), (1, 0), (1, 3), (2, 6)]:
        here.batch_sampler.set_position(*position)
        there.batch_sampler.set_position(*position)
        pairs = list(zip(here, there, strict=True))
        assert len(pairs) == 6 - position[1]
        for a, b in pairs:
            assert torch.equal(a["tokens"], b["tokens"])
            assert torch.equal(a["labels"], b["labels"])


WORKERS = """
import sys
from kasa_tune.components.training.stop_signals import StopSignals
from tests.components.data.test_batches import Numbers, flat, loader
numbers = loader(Numbers(400), num_workers=2, batch_size=1)
"""

EPOCH = """
with StopSignals() as stop:
    tokens = []
    for i, batch in enumerate(numbers):
        tokens.append(batch["tokens"][0, 0].item())
        if i == 5:
            print("ready", flush=True)
            sys.stdin.readline()
assert sorted(tokens) == list(range(400))
print(stop.received)
"""

ERROR = """
kept = iter(numbers)
next(kept)
raise RuntimeError("while the workers run")
"""


def process(script):
    """A Python in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.skipif(
    not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal"
)
def test_workers_outlive_a_signal_to_the_whole_group(number):
    with process(WORKERS + EPOCH) as child:
        assert child.stdout.readline() == "ready\n"
        os.killpg(child.pid, number)
        out, err = child.communicate("\n", timeout=120)
    assert (child.returncode, out) == (0, f"{int(number)}\n"), err


@pytest.mark.slow
def test_workers_end_with_a_process_that_fails():
    with process(WORKERS + ERROR) as child:
        try:
            _, err = child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    assert child.returncode == 1
    assert "while the workers run" in err


def test_mixture_is_drawn_with_its_weights():
    mixed = data.MixedDataset([Numbers(6), Numbers(4)], [0.5, 2.0])
    tokens = Counter(
        int(row[0]) for batch in loader(mixed, batch_size=1) for row in batch["tokens"]
    )
    second = Counter(
        i % 6 if i < 6 else i - 6
        for i in batches.EpochBatches(
            mixed.lengths, weights=mixed.weights, batch_size=1, seed=7, shuffle=True
        )
        .order(0)
        .tolist()
    )
    assert tokens == second
    assert sum(tokens.values()) == 3 + 8


# ---------------------------------------------------------------------------------------------------- collate


def test_padding_is_on_the_right_and_learns_nothing():
    batch = data.collate([Numbers(9)[2], Numbers(9)[4], Numbers(9)[5]], pad_id=99)
    assert batch["tokens"].tolist() == [[2, 2, 2, 99, 99], [4, 4, 4, 4, 4], [5, 99, 99, 99, 99]]
    assert batch["labels"].tolist() == [[2, 2, -100, -100, -100], [4, 4, 4, 4, -100], [-100] * 5]
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    assert set(batch) == {"tokens", "labels"}


@pytest.mark.parametrize(("pad_id", "expected"), [(-1, 0), (None, 0), (5, 5)])
def test_padding_token_an_embedding_can_look_up(pad_id, expected):
    tokenizer = Tokenizer()
    tokenizer.pad_id = pad_id
    batch = next(iter(loader(Numbers(2), tokenizer=tokenizer, shuffle=False, batch_size=2)))
    assert batch["tokens"].tolist() == [[0, expected], [1, 1]]


def test_sample_without_tokens_is_a_row_of_padding():
    empty = {"tokens": np.zeros(0, dtype=np.int64), "labels": np.zeros(0, dtype=np.int64)}
    assert data.collate([empty], pad_id=3)["tokens"].tolist() == [[3]]
    assert data.collate([empty], pad_id=3)["labels"].tolist() == [[-100]]


def test_packed_rows_are_padded_to_full_width_and_masked_by_sample():
    row = {
        "tokens": np.array([7, 8, 9, 4, 5]),
        "labels": np.array([8, 9, -100, 5, -100]),
        "input_pos": np.array([0, 1, 2, 0, 1]),
        "seq_lens": np.array([3, 2]),
    }
    full = {key: np.arange(8) if key == "input_pos" else np.arange(8) + 1 for key in row} | {
        "seq_lens": np.array([8])
    }
    batch = data.collate([row, full], pad_id=0, width=8)
    assert batch["tokens"][0].tolist() == [7, 8, 9, 4, 5, 0, 0, 0]
    assert batch["labels"][0].tolist() == [8, 9, -100, 5, -100, -100, -100, -100]
    assert batch["input_pos"][0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    mask = batches.block_mask(batch["seq_lens"], "cpu")
    owner = [[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8]
    expected = [[[o[q] == o[k] and k <= q for k in range(8)] for q in range(8)] for o in owner]
    assert mask.tolist() == expected
    assert mask.dtype == torch.bool


def test_a_dense_mask_is_dense_even_for_a_gpu():
    """Without a GPU torchtune's own choice is dense too, so it must not even be asked."""
    seq_lens = [torch.tensor([3, 2, 1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "packed_block_causal_mask", lambda seq_lens: "a BlockMask")
        assert batches.block_mask(seq_lens, "cuda") == "a BlockMask"
        mask = batches.block_mask(seq_lens, "cuda", dense=True)
        assert torch.equal(mask, batches.block_mask(seq_lens, "cpu"))
        packed = [
            {key: np.arange(6) for key in ("tokens", "labels", "input_pos")}
            | {"seq_lens": np.array([4, 2])}
        ]
        (batch,) = loader(packed, dense_mask=True)
        assert batch["mask"].tolist() == batches.block_mask([torch.tensor([4, 2])], "cpu").tolist()
        (batch,) = loader(packed)
        assert batch["mask"] == "a BlockMask"


# ---------------------------------------------------------------------------------------------------- filler


class Packed(torch.utils.data.Dataset):
    """Rows of six tokens in two samples."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {key: np.arange(6) + i for key in ("tokens", "labels", "input_pos")} | {
            "seq_lens": np.array([4, 2])
        }


@pytest.mark.parametrize("dataset", [Numbers(7), Packed()])
def test_a_filler_is_a_sample_with_nothing_to_learn(dataset):
    filled = batches.WithFiller(dataset)
    for index in range(5):
        assert {k: v.tolist() for k, v in filled[index].items()} == {
            k: v.tolist() for k, v in dataset[index].items()
        }
    filler, first = filled[batches.FILLER], dataset[0]
    assert filler.keys() == first.keys()
    assert filler["labels"].tolist() == [-100] * len(first["labels"])
    assert all(filler[key].tolist() == first[key].tolist() for key in filler.keys() - {"labels"})


class Stored(torch.utils.data.Dataset):
    """Rows that are kept, and handed out as they are."""

    def __init__(self):
        self.rows = [{"tokens": np.arange(3), "labels": np.arange(3)} for _ in range(2)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_the_sample_that_stands_in_keeps_its_own_labels():
    stored = Stored()
    batches.WithFiller(stored)[batches.FILLER]
    assert stored.rows[0]["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_learn_from_every_token_once_and_take_batches_of_one_shape(world_size, num_workers):
    options = {
        "shuffle": True,
        "world_size": world_size,
        "batch_size": 2,
        "num_workers": num_workers,
    }
    per_rank = [list(loader(Numbers(11), rank=rank, **options)) for rank in range(world_size)]
    assert len({len(mine) for mine in per_rank}) == 1
    labels = Counter()
    for step in zip(*per_rank, strict=True):
        assert len({len(batch["tokens"]) for batch in step}) == 1
        for batch in step:
            labels.update(batch["labels"][batch["labels"] != -100].tolist())
    assert labels == Counter({i: i % 5 for i in range(11) if i % 5})
