"""Covariances found block by block against explicit float64 sums over the inputs of ordinary forwards."""

import contextlib
import logging
import weakref
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune import modules, training

from kasa_tune.components.adapters import CorDALinear, sharing
from kasa_tune.components.adapters.attach import ATTN_MODULES
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.corda import calibration
from kasa_tune.components.corda.allocation import POOLED, input_spectra, layer_spectra
from kasa_tune.components.corda.calibration import (
    calibration_bytes,
    covariances,
    damped_covariances,
    shared_inputs,
)
from kasa_tune.components.corda.calibration_data import batched, draw_rounds, rows_digest
from kasa_tune.components.corda.covariance import Covariance, damped, shortage
from kasa_tune.components.data.packing import pack
from kasa_tune.components.linalg.decomposition import co_svd, co_svd_workspace, input_component
from kasa_tune.components.models.loading import build_on_meta, load_base_weights, weights_loaded
from kasa_tune.components.quantized.base import quantized_linears
from tests.live_bytes import peak_bytes
from tests.toy_models import FAMILIES, SIZES, VOCAB, randomized

CPU = torch.device("cpu")
ALL_ATTENTION = list(ATTN_MODULES)
LENGTHS = (12, 5, 9, 1, 12, 7)

# A covariance sums some hundred products of float32 activations, which other batch shapes round in another order.
ROUNDING = 2e-5


def build(name="llama2", *, attention=ALL_ATTENTION, mlp=True, output=None, **sizes):
    """A toy with CorDA linears, all parameters random (adapters too), and which of its linears share an input."""
    family = FAMILIES[name]
    output = not family.tied if output is None else output
    options = {"apply_to_mlp": mlp, "apply_to_output": output, "rank": 1} | family.sizes | sizes
    make = partial(family.corda, attention, **options)
    return randomized(make()).eval(), shared_inputs(build_on_meta(make, dtype=torch.float32))


def rows_of(lengths=LENGTHS, seed=0):
    generator = np.random.default_rng(seed)
    return [{"tokens": generator.integers(0, VOCAB, n)} for n in lengths]


def batches_of(rows, batch_size=2, **options):
    return batched(
        rows, tokenizer=SimpleNamespace(pad_id=0), batch_size=batch_size, device=CPU, **options
    )


def run(model, groups, rounds, wanted=lambda name, round: round == 0, **options):
    """All covariances by first layer and round, accumulated in float64."""
    found = covariances(
        model, groups, rounds, wanted=wanted, **({"dtype": torch.float64} | options)
    )
    return {(each.layers[0], each.round): each for each in found}


def inputs_by_full_forwards(name, model, layers, rows):
    """What each layer reads when the base alone, as torchtune builds it, runs over one row at a time: ``[t, d]``."""
    base = FAMILIES[name].base(**FAMILIES[name].sizes).eval()
    base.load_state_dict(
        {key: value for key, value in model.state_dict().items() if ".lora_" not in key}
    )
    seen = {layer: [] for layer in layers}
    for layer in layers:
        base.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0][0])
        )
    with torch.no_grad():
        for row in rows:
            base(torch.from_numpy(row["tokens"])[None])
    return seen


def explicit(inputs):
    return sum(x.double().T @ x.double() for x in inputs)


def relative_error(actual, exact):
    return (torch.linalg.vector_norm(actual - exact) / torch.linalg.vector_norm(exact)).item()


# --------------------------------------------------------------------------------- which inputs are shared


@pytest.mark.parametrize("name", FAMILIES)
def test_what_reads_the_same_tensor_is_together(name):
    _, groups = build(name)
    expected = []
    for layer in range(SIZES["num_layers"]):
        attn, mlp = f"layers.{layer}.attn", f"layers.{layer}.mlp"
        expected += [
            {f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"},
            {f"{attn}.output_proj"},
        ]
        expected += [{f"{mlp}.w1", f"{mlp}.w3"}, {f"{mlp}.w2"}]
    assert [set(group) for group in groups] == expected + [{"output"}] * (not FAMILIES[name].tied)
    assert sum(map(len, groups)) == len(set().union(*groups))  # each once


def test_of_what_is_adapted_alone():
    _, groups = build(attention=["v_proj", "output_proj"], mlp=["w3"], output=False, num_layers=1)
    assert groups == [
        ("layers.0.attn.v_proj",),
        ("layers.0.attn.output_proj",),
        ("layers.0.mlp.w3",),
    ]


@pytest.mark.parametrize(
    ("count", "words"), [(1, "^spare_0: never reached"), (3, "^spare_0 and 2 others: never")]
)
def test_a_linear_that_no_forward_reaches_is_an_error(count, words):
    model = build_on_meta(
        partial(FAMILIES["llama2"].corda, ["q_proj"], rank=1, **SIZES), dtype=torch.float32
    )
    for index in range(count):
        model.add_module(f"spare_{index}", CorDALinear(4, 4, 1).to("meta"))
    with pytest.raises(ValueError, match=words):
        shared_inputs(model)


# --------------------------------------------------------------------------------- the sums


@pytest.mark.parametrize("name", FAMILIES)
def test_block_by_block_is_the_sum_over_a_full_forward_of_every_row(name):
    model, groups = build(name)
    found = run(model, groups, [batches_of(rows_of(), 4)])
    seen = inputs_by_full_forwards(
        name, model, [layer for group in groups for layer in group], rows_of()
    )
    assert [each.layers for each in found.values()] == groups
    for each in found.values():
        assert each.num_tokens == sum(LENGTHS)
        assert each.matrix.dtype == torch.float64
        assert not each.matrix.requires_grad
        assert torch.equal(each.matrix, each.matrix.T)
        for layer in each.layers:
            assert relative_error(each.matrix, explicit(seen[layer])) < ROUNDING


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str
)
def test_float64_sums_are_exact_and_float32_ones_nearly(dtype, tolerance):
    model, groups = build()
    rows = rows_of([7, 7, 7])
    seen = inputs_by_full_forwards("llama2", model, [group[0] for group in groups], rows)
    for (layer, _), each in run(
        model, groups, [batches_of(rows, 1)], dtype=dtype
    ).items():  # the very same forwards
        assert each.matrix.dtype == dtype
        assert relative_error(each.matrix.double(), explicit(seen[layer])) < tolerance


@pytest.fixture(scope="module")
def reference():
    """Covariances of LENGTHS' rows one at a time, without padding."""
    model, groups = build()
    return model, groups, run(model, groups, [batches_of(rows_of(), 1)])


def assert_same(found, reference):
    assert found.keys() == reference.keys()
    for key, each in found.items():
        assert each.num_tokens == reference[key].num_tokens
        assert relative_error(each.matrix, reference[key].matrix) < ROUNDING, key


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_batch_size_and_offload_change_nothing(reference, batch_size, offload):
    model, groups, expected = reference
    assert_same(run(model, groups, [batches_of(rows_of(), batch_size)], offload=offload), expected)


def test_padding_changes_nothing(reference):
    model, groups, expected = reference
    rounds = [batches_of(rows_of(), 3)]
    for batch in rounds[0]:  # ten more columns, and other ids in them
        more = torch.full((len(batch["tokens"]), 10), 7)
        batch["tokens"] = torch.cat((batch["tokens"].where(batch["valid"], 9), more), dim=1)
        batch["valid"] = torch.cat((batch["valid"], more == 0), dim=1)
    assert_same(run(model, groups, rounds), expected)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", ["llama2", "gemma2"])
def test_packing_changes_nothing(name, batch_size):
    model, groups = build(name)
    rows = rows_of()
    samples = [row | {"labels": row["tokens"]} for row in rows]
    packed = pack(samples, max_seq_len=20)
    assert len(packed) < len(rows)
    drawn = draw_rounds(
        packed,
        num_samples=len(packed),
        max_seq_len=20,
        concatenate=False,
        rounds=1,
        seed=0,
        longest=64,
    )
    found = run(model, groups, [batches_of(part, batch_size, dense_mask=True) for part in drawn])
    assert_same(found, run(model, groups, [batches_of(rows, 1)]))


def test_batches_of_only_some_rows_are_other_sums(reference):
    model, groups, expected = reference  # the comparisons above can fail
    found = run(model, groups, [batches_of(rows_of()[:-1], 2)])
    assert all(
        relative_error(each.matrix, expected[key].matrix) > 100 * ROUNDING
        for key, each in found.items()
    )


def test_training_mode_and_dropout_do_not_reach_the_sums_and_the_mode_comes_back():
    model, groups = build(attn_dropout=0.5, dropout=0.5)
    expected = run(model, groups, [batches_of(rows_of())])
    assert not model.training
    model.train()
    assert_same(run(model, groups, [batches_of(rows_of())]), expected)
    assert all(module.training for module in model.modules())


def test_activation_checkpointing_changes_nothing(reference):
    _, _, expected = reference
    model, groups = build()
    training.set_activation_checkpointing(model, {modules.TransformerSelfAttentionLayer})
    assert_same(run(model, groups, [batches_of(rows_of(), 1)]), expected)


def left_as_it_was(model):
    hooks = [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]
    has_own = all(hook is sharing._open for hook in hooks)  # those that it was built with
    return has_own and not any(getattr(m, "disabled", False) for m in model.modules())


@pytest.mark.parametrize("taken", [0, 1, 3, 100])
def test_stopping_anywhere_leaves_the_model_as_it_was(taken):
    model, groups = build()
    model.train()
    found = covariances(model, groups, [batches_of(rows_of())], wanted=lambda *_: True)
    for _ in zip(range(taken), found):
        assert left_as_it_was(model)  # also for who decomposes between two blocks
    found.close()
    assert model.training
    assert left_as_it_was(model)


def test_only_the_output_is_adapted():
    model, groups = build(attention=[], mlp=False, output=True)
    ((layer, each),) = run(model, groups, [batches_of(rows_of(), 4)]).items()
    seen = inputs_by_full_forwards("llama2", model, ["output"], rows_of())
    assert layer == ("output", 0)
    assert relative_error(each.matrix, explicit(seen["output"])) < ROUNDING


@pytest.mark.parametrize(("num_tokens", "width"), [(50, 3), (7, 383), (9, 384), (600, 801)])
def test_widths_around_those_that_are_summed_in_halves(num_tokens, width):
    x = torch.randn(2, num_tokens, width, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, num_tokens, dtype=torch.bool)
    valid[0, -1] = False
    total = Covariance(("layer",), 0, torch.zeros(width, width, dtype=torch.float64))
    for part in range(2):
        total.add(x[part : part + 1], valid[part : part + 1], per_sample=False)
    total.finish(per_sample=False)
    rows = x[valid].double()
    assert total.num_tokens == len(rows) == 2 * num_tokens - 1
    torch.testing.assert_close(total.matrix, rows.T @ rows, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------- rounds

ROUNDS = [[12, 3, 8], [5, 5, 9], [2, 12, 10]]


def three_rounds():
    return [rows_of(lengths, seed) for seed, lengths in enumerate(ROUNDS)]


def test_each_round_is_as_if_it_were_alone_and_the_pool_is_their_sum():
    model, groups = build()
    rounds = [batches_of(rows) for rows in three_rounds()]
    found = run(model, groups, rounds, wanted=lambda *_: True)
    assert set(found) == {(group[0], round) for group in groups for round in (0, 1, 2, POOLED)}
    for round in range(3):
        for (layer, _), alone in run(model, groups, rounds[round : round + 1]).items():
            torch.testing.assert_close(found[layer, round].matrix, alone.matrix)
    for group in groups:
        pooled = found[group[0], POOLED]
        torch.testing.assert_close(
            pooled.matrix, sum(found[group[0], round].matrix for round in range(3))
        )
        assert pooled.num_tokens == sum(map(sum, ROUNDS))


def test_only_what_is_wanted_is_given():
    model, groups = build(num_layers=1)
    wanted = {
        ("layers.0.attn.k_proj", 1),
        ("layers.0.mlp.w2", POOLED),
        ("layers.0.mlp.w3", 2),
        ("output", 0),
    }
    rounds = [batches_of(rows) for rows in three_rounds()]
    found = covariances(model, groups, rounds, wanted=lambda *which: which in wanted)
    given = [(each.layers, each.round) for each in found]
    first = [
        ({"q_proj", "k_proj", "v_proj"}, 1),
        ({"w1", "w3"}, 2),
        ({"w2"}, POOLED),
        ({"output"}, 0),
    ]
    assert [
        ({layer.rpartition(".")[2] for layer in layers}, round) for layers, round in given
    ] == first


@pytest.mark.parametrize("batch_size", [1, 3])
def test_published_normalization_is_that_of_the_published_code(batch_size):
    model, groups = build()
    rounds = three_rounds()
    parts = [batches_of(rows, batch_size) for rows in rounds]
    found = run(model, groups, parts, wanted=lambda *_: True, per_sample=True)
    seen = [
        inputs_by_full_forwards("llama2", model, [group[0] for group in groups], rows)
        for rows in rounds
    ]
    for group in groups:
        pooled = 0
        for round, rows in enumerate(rounds):
            expected = 0
            for x in seen[round][group[0]]:
                x = x.float()
                x = x / torch.max(x).abs()
                expected = expected + x.T @ x / len(rows)
            assert relative_error(found[group[0], round].matrix, expected.double()) < ROUNDING
            pooled = pooled + expected.double() / len(rounds)
        assert relative_error(found[group[0], POOLED].matrix, pooled) < ROUNDING


def test_the_largest_entry_of_a_sample_is_signed_and_not_one_of_the_padding():
    x = torch.tensor([[[-8.0, 2.0], [1.0, -4.0], [99.0, 99.0]]])
    total = Covariance(("layer",), 0, torch.zeros(2, 2))
    total.add(x, torch.tensor([[True, True, False]]), per_sample=True)
    total.finish(per_sample=True)
    torch.testing.assert_close(total.matrix, torch.tensor([[65.0, -20.0], [-20.0, 20.0]]) / 4)


def test_half_precision_inputs_are_normalized_in_the_precision_of_the_sums():
    x = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = Covariance(("layer",), 0, torch.zeros(4, 4))
    total.add(x, torch.ones(1, 50, dtype=torch.bool), per_sample=True)
    total.finish(per_sample=True)
    scaled = x[0].double() / x.double().max()
    torch.testing.assert_close(total.matrix.double(), scaled.T @ scaled, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------- memory


@pytest.fixture
def peak(monkeypatch):
    """The largest number of covariances that were alive at once."""
    alive, most = weakref.WeakSet(), [0]

    class Counted(Covariance):
        __hash__ = object.__hash__

        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most[0] = max(most[0], len(alive))

    monkeypatch.setattr(calibration, "Covariance", Counted)
    return most


@pytest.mark.parametrize(
    ("rounds", "wanted"),
    [
        (1, lambda name, round: round == 0),
        (3, lambda name, round: round >= 0),
        (3, lambda name, round: True),
    ],
    ids=["one round", "three rounds", "pooled too"],
)
def test_a_deeper_model_holds_no_more_covariances_at_once(rounds, wanted, peak):
    peaks = []
    for num_layers in (2, 11):
        model, groups = build(num_layers=num_layers, output=False)
        parts = [batches_of(rows) for rows in three_rounds()[:rounds]]
        peak[0], given = 0, []
        for layers, _, _ in damped_covariances(
            model, groups, parts, wanted=wanted, damping=0.01, damping_search=False, normalization="unit_mean_diag",
            progress=iter,
        ):  # fmt: skip
            given.append(layers[0].split(".")[1])
        assert given == sorted(given, key=int)  # block after block; layers.1 is not layers.10
        assert set(given) == {str(index) for index in range(num_layers)}
        peaks.append(peak[0])
    assert peaks[0] == peaks[1]
    # Four inputs a block, their pools, and the last one in the receiver's hands: no two rounds or blocks at once.
    assert peaks[1] <= 4 * (1 + wanted("", POOLED)) + 1


def test_bytes_by_hand():
    meta = build_on_meta(
        partial(FAMILIES["llama2"].corda, ["q_proj"], apply_to_mlp=["w2"], rank=1, **SIZES),
        dtype=torch.bfloat16,
    )
    rounds = [batches_of(rows, 3) for rows in three_rounds()[:2]]
    bytes_of = calibration_bytes(
        meta, shared_inputs(meta), rounds, dtype=torch.float64, offload=False
    )
    width, hidden = SIZES["embed_dim"], SIZES["intermediate_dim"]
    assert bytes_of == {
        "calibration hidden states": 3 * (12 + 9) * width * 2,  # padded to the longest row
        "covariances of one block": (width**2 + hidden**2) * 8,
        # of the wider input, which takes more than the other: a damped copy, and the CO-SVD under it
        "CO-SVD workspace": hidden**2 * 8 + co_svd_workspace(width, hidden),
    }
    pooled = calibration_bytes(
        meta, shared_inputs(meta), rounds, dtype=torch.float64, offload=False, spectra=True,
        pooled_above=width,
    )  # fmt: skip
    assert pooled["covariances of one block"] == (width**2 + 2 * hidden**2) * 8
    on_host = calibration_bytes(
        meta, shared_inputs(meta), rounds, dtype=torch.float64, offload=True
    )
    assert on_host["calibration hidden states"] == 3 * 12 * width * 2  # of the batch at work


ROADS = {
    "co_svd": {},
    "half a covariance": {"covariance_power": 0.5},
    "damping_search": {"damping_search": True},
    "CorDA++": {"spectra": True},
    "EVA": {"spectra": True, "of_inputs": True},
    "all": {"covariance_power": 0.5, "damping_search": True, "spectra": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", ROADS.values(), ids=ROADS)
@pytest.mark.parametrize("layer", ["q_proj", "w1", "w2"])
def test_the_workspace_holds_the_whole_road_of_one_layer(layer, options, dtype, monkeypatch):
    """From a sum to a component, on real tensors; w1 is tall, w2 wide. Widths take Lanczos' way."""
    monkeypatch.setattr("kasa_tune.components.corda.covariance.ALL_BELOW", 0)
    monkeypatch.setattr("kasa_tune.components.corda.covariance.LANCZOS_STEPS", 8)
    sizes = SIZES | {"embed_dim": 128, "intermediate_dim": 448}
    places = {"q_proj": [["q_proj"]], "w1": [[], ["w1"]], "w2": [[], ["w2"]]}[layer]
    build = partial(FAMILIES["llama2"].corda, *places, rank=4, **sizes)
    meta = build_on_meta(build, dtype=torch.bfloat16)
    groups = shared_inputs(meta)
    batches = [batches_of(three_rounds()[0])]
    counted = calibration_bytes(meta, groups, batches, dtype=dtype, offload=False, **options)
    d_out, d_in = next(iter(adapter_linears(meta)))[1].weight.shape
    weight = torch.randn(d_out, d_in, dtype=torch.bfloat16)
    x = torch.randn(2 * d_in, d_in, dtype=dtype)
    total = Covariance((layer,), 0, x.T @ x, len(x), 1)
    power = options.get("covariance_power", 1.0)

    def road():
        total.finish(per_sample=False)
        shortage(total)
        covariance = damped(total.matrix, 0.01, search=options.get("damping_search", False))
        if options.get("of_inputs"):
            input_spectra({layer: weight}, covariance, 0)
            input_component(weight, covariance, 4)
            return
        if options.get("spectra"):
            layer_spectra({layer: weight}, covariance, 0, power)
        co_svd(weight, covariance, 4, "ipm", covariance_power=power)

    taken, room = peak_bytes(road), counted["CO-SVD workspace"]
    assert taken <= room
    # The rest of it is what the solvers of a GPU allocate inside, which is not seen here.
    assert room <= 3 * taken


# --------------------------------------------------------------------------------- damage


def test_a_damaged_weight_is_named_by_the_first_layer_that_it_reaches():
    model, groups = build()
    with torch.no_grad():
        model.get_parameter("layers.1.attn.v_proj.weight")[3, 4] = float("nan")
    model.train()
    rounds = [batches_of(rows) for rows in three_rounds()[:2]]
    with pytest.raises(
        ValueError, match=r"^layers\.1\.attn\.output_proj: .*NaN or infinity in calibration round 1"
    ):
        run(model, groups, rounds)
    assert model.training
    assert left_as_it_was(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_is_seen_wherever_it_is(bad):
    for row, column in ((0, 0), (3, 1), (1, 3)):
        x = torch.ones(1, 6, 4)
        x[0, row, column] = bad
        total = Covariance(("layers.3.mlp.w1",), 4, torch.zeros(4, 4))
        total.add(x, torch.ones(1, 6, dtype=torch.bool), per_sample=False)
        with pytest.raises(ValueError, match=r"layers\.3\.mlp\.w1: .* round 5"):
            total.finish(per_sample=False)


def test_no_token_at_all_is_an_error_that_names_the_layer():
    model, groups = build()
    rounds = [batches_of(rows_of([4]))]
    rounds[0][0]["valid"][:] = False
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.q_proj: no calibration token"):
        run(model, groups, rounds)


def test_inputs_that_are_all_zero_are_an_error_that_names_the_layer():
    model, groups = build()
    with torch.no_grad():
        model.get_parameter("layers.1.mlp_norm.scale").zero_()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.w1.*zero"):
        list(damp(model, groups, [batches_of(rows_of())]))


# --------------------------------------------------------------------------------- damped, with a bar


class Bar:
    """Stands in for tqdm: counts what was taken and whether the bar was driven to its end."""

    def __call__(self, steps):
        self.total, self.done, self.ended = len(steps), 0, False
        for step in steps:
            yield step
            self.done += 1
        self.ended = True


def damp(model, groups, rounds, wanted=lambda name, round: round == 0, progress=iter, **options):
    options = {
        "damping": 0.01,
        "damping_search": False,
        "normalization": "unit_mean_diag",
    } | options
    return damped_covariances(model, groups, rounds, wanted=wanted, progress=progress, **options)


@pytest.mark.parametrize(("search", "damping"), [(False, 0.25), (True, 1e-8)])
@pytest.mark.parametrize("normalization", ["unit_mean_diag", "published"])
def test_scaled_and_damped(normalization, search, damping):
    model, groups = build(num_layers=1)
    rounds = [batches_of(rows_of(), 3)]
    options = {
        "damping": damping,
        "damping_search": search,
        "normalization": normalization,
        "dtype": torch.float64,
    }
    raw = run(model, groups, rounds, per_sample=normalization == "published")
    given, all_doublings = list(damp(model, groups, rounds, **options)), []
    assert [tuple(layers) for layers, _, _ in given] == groups
    for layers, _, matrix in given:
        covariance, eye = raw[layers[0], 0].matrix, torch.eye(len(matrix), dtype=torch.float64)
        unit = covariance.diagonal().mean()
        if normalization == "unit_mean_diag":
            covariance, unit = covariance / unit, 1.0
        added = (matrix - covariance).diagonal().mean()
        torch.testing.assert_close(matrix, covariance + added * eye, rtol=1e-12, atol=1e-12)
        doublings = torch.log2(added / unit / damping).item()
        assert doublings == pytest.approx(round(doublings), abs=1e-4)
        all_doublings.append(round(doublings))
    assert min(all_doublings) >= 0
    assert (
        max(all_doublings) > 5
    ) is search  # fewer tokens than the inputs of w2: there is no inverse without damping


def test_each_covariance_comes_with_the_layers_that_want_it():
    model, groups = build(num_layers=1)
    wanted = {("layers.0.attn.k_proj", 0), ("layers.0.attn.v_proj", 1), ("layers.0.mlp.w2", POOLED)}
    rounds = [batches_of(rows) for rows in three_rounds()[:2]]
    given = [
        (names, round)
        for names, round, _ in damp(model, groups, rounds, wanted=lambda *which: which in wanted)
    ]
    assert given == [
        (["layers.0.attn.k_proj"], 0),
        (["layers.0.attn.v_proj"], 1),
        (["layers.0.mlp.w2"], POOLED),
    ]


@pytest.mark.parametrize(
    ("where", "num_blocks"),
    [
        ({"num_layers": 3}, 4),  # and the output
        ({"num_layers": 3, "output": False}, 3),
        ({"num_layers": 2, "attention": [], "mlp": False, "output": True}, 3),
    ],
    ids=["all", "without the output", "the output alone"],
)
def test_the_bar_ends_exactly_at_its_total(where, num_blocks):
    model, groups = build(**where)
    rounds, bar = [batches_of(rows, 2) for rows in three_rounds()], Bar()
    for _ in damp(model, groups, rounds, wanted=lambda *_: True, progress=bar):
        assert not bar.ended
    assert bar.total == num_blocks * 3 * 2  # three rows a round in batches of two
    assert (bar.done, bar.ended) == (bar.total, True)


def test_rounds_that_no_layer_wants_are_not_run():
    model, groups = build(num_layers=1, output=False)
    rounds, bar, ran = [batches_of(rows, 1) for rows in three_rounds()], Bar(), []
    model.layers[0].register_forward_pre_hook(lambda _, args: ran.append(args[0].shape[1]))
    chosen = {"layers.0.attn.q_proj": 2, "layers.0.mlp.w2": 0}
    given = list(
        damp(model, groups, rounds, lambda name, round: chosen.get(name) == round, progress=bar)
    )
    assert [(names, round) for names, round, _ in given] == [
        (["layers.0.mlp.w2"], 0),
        (["layers.0.attn.q_proj"], 2),
    ]
    assert sorted(ran) == sorted(ROUNDS[0] + ROUNDS[2])
    assert (bar.total, bar.done, bar.ended) == (6, 6, True)
    for names, round, matrix in given:
        first = (names[0], 0)
        ((_, _, alone),) = damp(
            model, groups, rounds[round : round + 1], lambda *which, first=first: which == first
        )
        torch.testing.assert_close(matrix, alone)


# --------------------------------------------------------------------------------- thin data


def covariance_of(x, num_tokens=None):
    return Covariance(("layer",), 0, x.T @ x, len(x) if num_tokens is None else num_tokens)


def test_shortages_in_words():
    x = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0))
    assert shortage(covariance_of(x)) is None
    assert shortage(covariance_of(x[:19])) == "19 tokens for 20 inputs"
    narrow = x.double()
    narrow[:, 12:] = narrow[:, :8]  # twelve directions
    found = shortage(covariance_of(narrow))
    assert found == "inputs of deficient rank: number 13 of 20 follows from those before it"
    dead = x.clone()
    dead[:, 4] = 0.0  # an input that no token moves
    assert (
        shortage(covariance_of(dead))
        == "inputs of deficient rank: number 5 of 20 follows from those before it"
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.floats(1e-4, 1e4), st.sampled_from([torch.float32, torch.float64]))
def test_full_rank_is_no_shortage_at_any_scale(width, scale, dtype):
    x = scale * torch.randn(4 * width, width, generator=torch.Generator().manual_seed(width)).to(
        dtype
    )
    total = covariance_of(x)
    before = total.matrix.clone()
    assert shortage(total) is None
    assert torch.equal(total.matrix, before)


def test_one_warning_sums_up_the_shortages(caplog):
    model, groups = build(num_layers=1)
    with caplog.at_level(logging.WARNING, logger=calibration.__name__):
        list(damp(model, groups, [batches_of(rows_of([9]))]))
    (record,) = caplog.records
    message = record.getMessage()
    assert "layers.0.attn.q_proj (and 4 other inputs) saw 9 tokens for 32 inputs" in message
    for key in ("calibration.num_samples", "max_seq_len", "calibration.concatenate=True"):
        assert key in message


def test_no_warning_where_the_data_suffice(caplog):
    model, groups = build(num_layers=1, attention=["q_proj"], mlp=False, output=False)
    with caplog.at_level(logging.WARNING, logger=calibration.__name__):
        list(damp(model, groups, [batches_of(rows_of([60] * 10), 10)]))
    assert not caplog.records


# --------------------------------------------------------------------------------- the rows


def samples(count, length=4):
    """Sample i is the tokens 100 i, 100 i + 1, ...; a row tells where each of its tokens comes from."""
    return [{"tokens": 100 * i + np.arange(length)} for i in range(count)]


def draw(dataset, **options):
    defaults = {
        "num_samples": 4,
        "max_seq_len": 8,
        "concatenate": False,
        "rounds": 1,
        "seed": 0,
        "longest": 64,
    }
    return draw_rounds(dataset, **(defaults | options))


def tokens_of(rounds):
    return [[row["tokens"].tolist() for row in rows] for rows in rounds]


@pytest.mark.parametrize("concatenate", [False, True])
def test_rounds_are_disjoint_and_the_same_for_the_same_seed(concatenate):
    options = {"num_samples": 3, "rounds": 4, "max_seq_len": 5, "concatenate": concatenate}
    drawn = draw(samples(30), **options)
    assert [len(rows) for rows in drawn] == [3, 3, 3, 3]
    everything = [token for rows in tokens_of(drawn) for row in rows for token in row]
    assert len(everything) == len(set(everything))
    assert set(everything) <= {
        token for sample in samples(30) for token in sample["tokens"].tolist()
    }
    assert tokens_of(draw(samples(30), **options)) == tokens_of(drawn)
    assert tokens_of(draw(samples(30), **options, seed=1)) != tokens_of(drawn)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    draw(samples(30), **options)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]


def test_samples_come_from_all_over_the_dataset():
    drawn = {row[0] // 100 for row in tokens_of(draw(samples(1000), num_samples=50))[0]}
    assert max(drawn) > 800
    assert min(drawn) < 200


def test_datasets_are_mixed_by_their_weights():
    class Mixed(list):
        lengths, weights = [10, 20], [1.0, 0.25]

    (rows,) = tokens_of(draw(Mixed(samples(30)), num_samples=15))
    drawn = [row[0] // 100 for row in rows]
    assert sorted(drawn)[:10] == list(range(10))
    assert len(set(drawn)) == 15  # and 5 of the other 20


def test_long_samples_are_cut_and_empty_ones_left_out():
    dataset = [*samples(2, 20), {"tokens": np.arange(0)}]
    (rows,) = tokens_of(draw(dataset, num_samples=2, max_seq_len=6))
    assert all(row in ([*range(6)], [*range(100, 106)]) for row in rows)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_windows_are_one_stream_of_whole_samples_cut_without_a_gap(
    lengths, width, rounds, num_samples
):
    dataset = [{"tokens": 100 * i + np.arange(n)} for i, n in enumerate(lengths)]
    possible = sum(lengths) // width
    if possible < rounds:
        with pytest.raises(
            ValueError,
            match=rf"holds {possible} windows of {width} tokens.*lower calibration.max_seq_len",
        ):
            draw(
                dataset, max_seq_len=width, rounds=rounds, num_samples=num_samples, concatenate=True
            )
        return
    drawn = tokens_of(
        draw(dataset, max_seq_len=width, rounds=rounds, num_samples=num_samples, concatenate=True)
    )
    assert [len(rows) for rows in drawn] == [min(num_samples, possible // rounds)] * rounds
    stream = [token for rows in drawn for row in rows for token in row]
    assert all(len(row) == width for rows in drawn for row in rows)
    for before, after in pairwise(stream):
        ends = before % 100 == lengths[before // 100] - 1
        assert after % 100 == 0 if ends else after == before + 1


def test_no_more_samples_are_read_than_windows_need():
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            Counting.reads += 1
            return super().__getitem__(index)

    draw(Counting(samples(1000, 4)), num_samples=3, max_seq_len=6, concatenate=True)
    assert Counting.reads == 5  # 18 tokens


def test_fewer_rows_than_asked_for_are_shared_evenly_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="kasa_tune.components.corda.calibration_data"):
        drawn = draw(samples(11), num_samples=5, rounds=3)
    assert [len(rows) for rows in drawn] == [3, 3, 3]
    (record,) = caplog.records
    assert "11 rows instead of 3 x 5: each round has 3" in record.getMessage()


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (
            samples(2),
            {"rounds": 3},
            "holds 2 samples, fewer than one for each of 3 rounds.*calibration.rounds",
        ),
        ([], {}, "No samples"),
        ([], {"concatenate": True}, "No samples"),
        ([{"tokens": np.arange(0)}], {"concatenate": True}, "holds 0 windows"),
        ([{"tokens": np.arange(0)}] * 3, {}, "holds 0 samples"),
        (
            samples(9),
            {"max_seq_len": 65},
            "calibration.max_seq_len 65 is more than the model takes, 64",
        ),
    ],
)
def test_data_that_give_no_rounds_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        draw(dataset, **options)


def test_packed_rows_are_cut_with_their_borders():
    row = {
        "tokens": np.arange(10),
        "labels": np.arange(10),
        "input_pos": np.r_[0:4, 0:3, 0:3],
        "seq_lens": [4, 3, 3],
    }
    for length, lens in ((3, [3]), (4, [4]), (5, [4, 1]), (10, [4, 3, 3]), (12, [4, 3, 3])):
        ((cut,),) = draw([row], num_samples=1, max_seq_len=length)
        assert cut["seq_lens"].tolist() == lens
        assert cut["tokens"].tolist() == list(range(min(10, length)))
        assert cut["input_pos"].tolist() == row["input_pos"][:length].tolist()
        assert set(cut) == {"tokens", "input_pos", "seq_lens"}


def test_the_digest_tells_rows_apart():
    def row(*tokens, **more):
        return {"tokens": np.array(tokens)} | {key: np.array(value) for key, value in more.items()}

    different = [
        [[row(1, 2, 3)]],
        [[row(1, 2, 4)]],
        [[row(1, 2)]],
        [[row(1, 2), row(3)]],
        [[row(1), row(2, 3)]],
        [[row(1)], [row(2, 3)]],
        [[row(2, 3)], [row(1)]],
        [[row(1, 2, 3)], []],
        [[row(1, 2, 3, input_pos=[0, 1, 2], seq_lens=[3])]],
        [[row(1, 2, 3, input_pos=[0, 0, 1], seq_lens=[1, 2])]],
        [],
    ]
    digests = [rows_digest(rounds) for rounds in different]
    assert len(set(digests)) == len(different)
    as_int32 = [[{"tokens": np.array([1, 2, 3], dtype=np.int32)}]]
    assert rows_digest(as_int32) == digests[0]


# --------------------------------------------------------------------------------- the batches


@pytest.mark.parametrize(("pad_id", "filled"), [(5, 5), (0, 0), (-1, 0), (None, 0)])
def test_batches_are_padded_on_the_right_and_say_where(pad_id, filled):
    rows = [{"tokens": np.array(tokens)} for tokens in ([7, 8, 9], [1], [2, 3], [4, 6])]
    batches = batched(rows, tokenizer=SimpleNamespace(pad_id=pad_id), batch_size=3, device=CPU)
    assert [batch["tokens"].tolist() for batch in batches] == [
        [[1, filled], [2, 3], [4, 6]],
        [[7, 8, 9]],
    ]
    assert batches[0]["valid"].tolist() == [[True, False], [True, True], [True, True]]
    assert all(set(batch) == {"tokens", "valid"} for batch in batches)


def test_a_tokenizer_without_padding_gets_zeros():
    (batch,) = batched(rows_of([1, 3]), tokenizer=object(), batch_size=2, device=CPU)
    assert batch["tokens"][0, 1:].tolist() == [0, 0]


def test_packed_batches_see_within_samples_alone():
    row = {
        "tokens": np.arange(5),
        "input_pos": np.array([0, 1, 0, 1, 2]),
        "seq_lens": np.array([2, 3]),
    }
    short = {"tokens": np.arange(3), "input_pos": np.array([0, 0, 1]), "seq_lens": np.array([1, 2])}
    (batch,) = batches_of([row, short], 2)
    assert set(batch) == {"tokens", "valid", "input_pos", "mask"}
    assert batch["valid"].sum(dim=1).tolist() == [3, 5]
    assert batch["input_pos"][1].tolist() == [0, 1, 0, 1, 2]
    sample = torch.tensor([[0, 1, 1, 2, 2], [0, 0, 1, 1, 1]])  # the padding is one more sample
    sees = (sample[:, :, None] == sample[:, None]) & torch.ones(5, 5).tril().bool()
    assert torch.equal(batch["mask"], sees)


def test_every_row_is_in_one_batch():
    rows = rows_of(range(1, 12))
    batches = batches_of(rows, 4)
    given = [
        tokens[kept].tolist()
        for batch in batches
        for tokens, kept in zip(batch["tokens"], batch["valid"])
    ]
    assert sorted(given) == sorted(row["tokens"].tolist() for row in rows)
    assert [len(batch["tokens"]) for batch in batches] == [4, 4, 3]


def test_names_are_those_of_the_adapter_linears():
    model, groups = build("phi3")
    assert {name for group in groups for name in group} == {
        name for name, _ in adapter_linears(model)
    }


# --------------------------------------------------------------------------------- one block's weights at a time


@pytest.fixture(params=["llama2", "gemma2", "qwen2"])
def streamed(request):
    """A toy with all weights, and the same one whose blocks' linears get theirs only while their block is visited."""
    name = request.param
    model, groups = build(name)
    weights = {key: value for key, value in model.state_dict().items() if ".lora_" not in key}
    family = FAMILIES[name]
    options = {"apply_to_mlp": True, "apply_to_output": not family.tied, "rank": 1} | family.sizes
    waiting = build_on_meta(partial(family.corda, ALL_ATTENTION, **options), dtype=torch.float32)
    linears = quantized_linears(waiting, 2)
    without = {f"{path}.weight" for path in linears}
    load_base_weights(waiting, weights, device=CPU, adapter_dtype=torch.float32, without=without)
    return model, waiting, groups, linears, weights


def one_at_a_time(linears, weights, visited):
    """What :func:`covariances` enters; it fails if another block still has its weights."""

    @contextlib.contextmanager
    def loaded(prefix):
        assert all(linear.weight.is_meta for linear in linears.values())
        with weights_loaded(linears, weights, prefix, device=CPU):
            visited.append(prefix)
            yield
        assert all(linear.weight.is_meta for linear in linears.values())

    return loaded


ROUND_CHOICES = {
    "dense": (1, lambda name, round: round == 0),
    "every round": (3, lambda name, round: round >= 0),
    "wide ones pooled": (3, lambda name, round: (round == POOLED) == name.endswith("w2")),
}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("num_rounds", "wanted"), ROUND_CHOICES.values(), ids=ROUND_CHOICES)
def test_with_one_block_loaded_the_sums_are_those_with_all(streamed, num_rounds, wanted, offload):
    model, waiting, groups, linears, weights = streamed
    rounds = [batches_of(rows) for rows in three_rounds()[:num_rounds]]
    expected = run(model, groups, rounds, wanted, offload=offload)
    visited, found = [], {}
    loaded = one_at_a_time(linears, weights, visited)
    for each in covariances(
        waiting, groups, rounds, wanted=wanted, dtype=torch.float64, offload=offload, loaded=loaded
    ):
        found[each.layers[0], each.round] = each
        present = {path for path, linear in linears.items() if not linear.weight.is_meta}
        assert present == {path for path in linears if path.startswith(visited[-1])}
        if visited[-1] != "output":  # for who decomposes now
            assert set(each.layers) <= present
            assert all(
                torch.equal(linears[layer].weight, weights[f"{layer}.weight"])
                for layer in each.layers
            )
    assert visited == ["layers.0.", "layers.1."] + ["output"] * (groups[-1] == ("output",))
    assert found.keys() == expected.keys()
    for key, each in found.items():
        assert each.num_tokens == expected[key].num_tokens
        assert torch.equal(each.matrix, expected[key].matrix), key


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_stopping_anywhere_leaves_no_weights(streamed, taken):
    _, waiting, groups, linears, weights = streamed
    loaded = one_at_a_time(linears, weights, [])
    found = covariances(
        waiting, groups, [batches_of(rows_of())], wanted=lambda *_: True, loaded=loaded
    )
    for _ in zip(range(taken), found):
        pass
    found.close()
    assert all(linear.weight.is_meta for linear in linears.values())
    assert left_as_it_was(waiting)


def test_damping_and_scaling_pass_the_loader_on(streamed):
    model, waiting, groups, linears, weights = streamed
    options = {
        "damping": 0.01,
        "damping_search": False,
        "normalization": "unit_mean_diag",
        "progress": lambda r: r,
    }
    options |= {"wanted": lambda name, round: round == 0}
    rounds = [batches_of(rows_of())]
    loaded = one_at_a_time(linears, weights, [])
    found = list(damped_covariances(waiting, groups, rounds, **options, loaded=loaded))
    expected = list(damped_covariances(model, groups, rounds, **options))
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    assert all(torch.equal(each[2], other[2]) for each, other in zip(found, expected, strict=True))
