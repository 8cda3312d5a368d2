"""Stored decompositions: read where they fit, refused where they do not, never believed when damaged."""

import json
import math
import os

import pytest
import torch

from kasa_tune.components.corda import cache_files
from kasa_tune.components.corda.allocation import POOLED, LayerSpectrum
from kasa_tune.components.corda.cache import (
    OPTIONS,
    CacheError,
    DecompositionCache,
    decomposition_key,
    write_decomposition,
)
from kasa_tune.components.linalg.decomposition import Component, co_svd

CONDITIONS = {
    "method": "corda", "dtype": "bf16", "covariance_power": 1.0, "damping": 0.01, "damping_search": False,
    "normalization": "unit_mean_diag", "concatenate": False, "num_samples": 256, "max_seq_len": 2048, "rounds": 1,
    "seed": 0, "accumulate": "fp32", "max_selection_dim": None, "model": {"rope_base": 10_000, "rank": 8},
}  # fmt: skip
LAYERS = ["layers.0.attn.q_proj", "layers.0.mlp.w2"]


def key(**changes):
    return decomposition_key("base", LAYERS, "rows", CONDITIONS | changes)


def spectra(first=0.5):
    return {
        LAYERS[0]: LayerSpectrum(
            torch.tensor([3.0, 2.0, first], dtype=torch.float64), 2.5, 1, (0.25, 0.125)
        ),
        LAYERS[1]: LayerSpectrum(torch.tensor([9.0, 1e-9], dtype=torch.float64), 1 / 3, POOLED),
    }


def components(ranks=(3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {LAYERS[0]: (5, 6), LAYERS[1]: (4, 7)}
    return {
        name: co_svd(torch.randn(shapes[name], generator=generator), None, rank, "ipm")
        for name, rank in zip(LAYERS, ranks, strict=True)
    }


def ranks_of(*ranks):
    return dict(zip(LAYERS, ranks, strict=True))


def never():
    raise AssertionError("searched for what is stored")


def assert_same_components(found, expected):
    assert list(found) == list(expected)
    for name, component in found.items():
        assert component.solver == expected[name].solver
        for part in ("vectors", "singular_values", "projection"):
            actual, exact = getattr(component, part), getattr(expected[name], part)
            assert actual.dtype == exact.dtype
            assert torch.equal(actual, exact)


def assert_same_spectra(found, expected):
    assert list(found) == list(expected)
    for name, spectrum in found.items():
        assert torch.equal(spectrum.singular_values, expected[name].singular_values)
        assert spectrum.singular_values.dtype == torch.float64
        rest = (spectrum.log_compactness, spectrum.round, spectrum.scores)
        assert rest == (expected[name].log_compactness, expected[name].round, expected[name].scores)


# --------------------------------------------------------------------------------- found again


def test_what_is_found_once_is_read_by_the_next_run(tmp_path):
    first, expected = DecompositionCache(tmp_path / "a" / "b", key()), components()
    assert_same_components(
        first.components("ipm", ranks_of(3, 2), otherwise=lambda: expected), expected
    )
    assert_same_spectra(first.spectra(otherwise=spectra), spectra())
    second = DecompositionCache(tmp_path / "a" / "b", key())
    assert_same_components(second.components("ipm", ranks_of(3, 2), otherwise=never), expected)
    assert_same_spectra(second.spectra(otherwise=never), spectra())


@pytest.mark.parametrize("ranks", [(2, 1), (3, 1), (1, 2), (0, 0)])
def test_smaller_ranks_are_cut_from_larger_ones(tmp_path, ranks):
    expected = components()
    DecompositionCache(tmp_path, key()).components(
        "kpm", ranks_of(3, 2), otherwise=lambda: expected
    )
    found = DecompositionCache(tmp_path, key()).components("kpm", ranks_of(*ranks), otherwise=never)
    assert_same_components(
        found, {name: expected[name].first(rank) for name, rank in ranks_of(*ranks).items()}
    )


@pytest.mark.parametrize("ranks", [(4, 1), (1, 3), (4, 4)])
def test_a_larger_rank_anywhere_is_searched_for_and_stored(tmp_path, ranks):
    cache, whole = DecompositionCache(tmp_path, key()), components((4, 4))
    stored, larger = (
        {n: whole[n].first(rank) for n, rank in ranks_of(*of).items()} for of in ((3, 2), ranks)
    )
    cache.components("ipm", ranks_of(3, 2), otherwise=lambda: stored)
    assert_same_components(
        cache.components("ipm", ranks_of(*ranks), otherwise=lambda: larger), larger
    )
    assert_same_components(cache.components("ipm", ranks_of(*ranks), otherwise=never), larger)


def test_layers_of_rank_zero_are_stored_too(tmp_path):
    cache, expected = DecompositionCache(tmp_path, key()), components((0, 2))
    cache.components("ipm", ranks_of(0, 2), otherwise=lambda: expected)
    assert_same_components(cache.components("ipm", ranks_of(0, 2), otherwise=never), expected)


def test_modes_are_apart(tmp_path):
    cache, kpm = DecompositionCache(tmp_path, key()), components(seed=1)
    cache.components("ipm", ranks_of(3, 2), otherwise=components)
    assert_same_components(cache.components("kpm", ranks_of(3, 2), otherwise=lambda: kpm), kpm)
    assert_same_components(cache.components("ipm", ranks_of(3, 2), otherwise=never), components())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ipm.safetensors",
        "kpm.safetensors",
    ]


def test_what_is_read_does_not_change_when_the_file_does(tmp_path):
    cache = DecompositionCache(tmp_path, key())
    cache.components("ipm", ranks_of(3, 2), otherwise=components)
    found = cache.components("ipm", ranks_of(3, 2), otherwise=never)
    cache.components("ipm", ranks_of(4, 4), otherwise=lambda: components((4, 4), seed=5))
    assert_same_components(found, components())


# --------------------------------------------------------------------------------- of another run


@pytest.mark.parametrize("option", OPTIONS)
def test_other_conditions_are_refused_with_what_differs(tmp_path, option):
    for kind in ("components", "spectra"):
        cache = DecompositionCache(tmp_path / kind, key())
        if kind == "components":
            cache.components("ipm", ranks_of(3, 2), otherwise=components)
        else:
            cache.spectra(otherwise=spectra)
        # At once: not after a pass over the calibration rows that ends with another of the files.
        with pytest.raises(
            CacheError, match=f"{option}: stored {CONDITIONS[option]}, now another"
        ) as caught:
            DecompositionCache(tmp_path / kind, key(**{option: "another"}))
        assert str(caught.value).count("stored") == 1  # nothing else differs
        assert "calibration.cache_dir" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "counts"), [("rope_base", True), ("rank", False), ("num_heads", True)]
)
def test_the_models_constants_count_and_the_adapters_do_not(tmp_path, name, counts):
    DecompositionCache(tmp_path, key()).components("ipm", ranks_of(3, 2), otherwise=components)
    other = key(model=CONDITIONS["model"] | {name: 4})
    if counts:
        with pytest.raises(CacheError, match=f"model: stored .*, now .*'{name}': 4"):
            DecompositionCache(tmp_path, other)
    else:
        DecompositionCache(tmp_path, other).components("ipm", ranks_of(3, 2), otherwise=never)


def test_other_weights_data_and_layers_are_refused_with_what_differs(tmp_path):
    DecompositionCache(tmp_path, key()).components("ipm", ranks_of(3, 2), otherwise=components)
    others = {
        "base weights: stored base, now other": decomposition_key(
            "other", LAYERS, "rows", CONDITIONS
        ),
        "calibration data: stored rows, now other": decomposition_key(
            "base", LAYERS, "other", CONDITIONS
        ),
        "adapted layers": decomposition_key("base", LAYERS[:1], "rows", CONDITIONS),
    }
    for message, other in others.items():
        with pytest.raises(CacheError, match=message):
            DecompositionCache(tmp_path, other).components("ipm", ranks_of(3, 2), otherwise=never)


def test_another_version_of_the_format_is_refused(tmp_path, monkeypatch):
    DecompositionCache(tmp_path, key()).components("ipm", ranks_of(3, 2), otherwise=components)
    monkeypatch.setattr(cache_files, "FORMAT_VERSION", 999)
    with pytest.raises(CacheError):
        DecompositionCache(tmp_path, key()).components("ipm", ranks_of(3, 2), otherwise=never)


def test_the_key_holds_what_counts_and_nothing_else():
    same = decomposition_key(
        "base", reversed(LAYERS), "rows", CONDITIONS | {"batch_size": 7, "split": "paper"}
    )
    assert same == key()
    # Without calibration its settings do not count, and neither do those of the covariance.
    without = [
        decomposition_key("base", LAYERS, None, CONDITIONS | {"seed": seed, "damping": seed})
        for seed in (1, 2)
    ]
    assert without[0] == without[1]
    assert without[0] != decomposition_key("base", LAYERS, None, CONDITIONS | {"dtype": "fp32"})
    assert without[0] != decomposition_key("base", LAYERS, None, CONDITIONS | {"method": "pissa"})


# --------------------------------------------------------------------------------- damaged


@pytest.fixture
def stored(tmp_path):
    """A folder with spectra and components, small enough to damage at every byte."""
    one = {"w": Component(torch.ones(2, 1), torch.ones(1).double(), torch.ones(1, 2), "svd")}
    spectrum = {"w": LayerSpectrum(torch.tensor([2.0, 1.0]).double(), 2.5, 1, (0.25, 0.125))}
    cache = DecompositionCache(tmp_path, {"base weights": "b"})
    cache.components("ipm", {"w": 1}, otherwise=lambda: one)
    cache.spectra(otherwise=lambda: spectrum)
    return cache, one, spectrum


def read_back(cache, name):
    return (
        cache.spectra(otherwise=never)
        if name == "spectra"
        else cache.components("ipm", {"w": 1}, otherwise=never)
    )


@pytest.mark.parametrize("name", ["ipm", "spectra"])
def test_a_truncated_file_is_refused_at_any_length(stored, name):
    cache, _, _ = stored
    path = cache.files.folder / f"{name}.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CacheError, match=r"Delete it"):
            read_back(cache, name)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CacheError):
        read_back(cache, name)


@pytest.mark.parametrize("flip", [0x01, 0x80])
@pytest.mark.parametrize("name", ["ipm", "spectra"])
def test_a_flipped_byte_anywhere_is_refused_or_harmless(stored, name, flip):
    cache, one, spectrum = stored
    path = cache.files.folder / f"{name}.safetensors"
    whole, believed = path.read_bytes(), []

    def same(found):
        try:
            assert_same_spectra(found, spectrum) if name == "spectra" else assert_same_components(
                found, one
            )
        except AssertionError:
            return False
        return True

    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :])
        try:
            found = read_back(cache, name)
        except CacheError:
            continue
        if not same(found):
            believed.append(whole[max(0, position - 20) : position + 5])
    assert not believed


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "ipm.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CacheError, match="no readable decomposition"):
        DecompositionCache(tmp_path, key()).components("ipm", ranks_of(3, 2), otherwise=never)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "ipm.safetensors")
    with pytest.raises(CacheError, match="no readable decomposition"):
        DecompositionCache(tmp_path, key()).components("ipm", ranks_of(3, 2), otherwise=never)


@pytest.mark.parametrize("name", ["ipm", "spectra"])
def test_a_file_with_the_right_digest_and_another_form_is_refused(stored, name):
    """Somebody made it up, or another program wrote it."""
    cache, _, _ = stored
    tensors, about = cache.files.read(name)
    first = next(iter(tensors))
    for changed, words in (
        ({key: value for key, value in tensors.items() if key != first}, f"it lacks '{first}'"),
        (tensors | {first: torch.ones(2, 2, 2)}, "w"),
    ):
        cache.files.write(name, changed, about)
        with pytest.raises(CacheError, match=f"no readable decomposition .*{words}.*Delete it"):
            read_back(cache, name)
    cache.files.write(name, tensors, {"w": {}})
    with pytest.raises(CacheError, match=r"no readable decomposition .*it lacks"):
        read_back(cache, name)


def test_a_half_written_file_of_a_killed_run_is_not_read(tmp_path):
    (tmp_path / ".ipm.12345.safetensors").write_bytes(b"half")
    cache = DecompositionCache(tmp_path, key())
    assert_same_components(
        cache.components("ipm", ranks_of(3, 2), otherwise=components), components()
    )
    assert_same_components(cache.components("ipm", ranks_of(3, 2), otherwise=never), components())


@pytest.mark.parametrize("step", ["write_synced", "save"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, caplog, step):
    cache = DecompositionCache(tmp_path, key())
    cache.components("ipm", ranks_of(3, 2), otherwise=components)

    def full(path, *args, **options):
        if step == "write_synced":
            path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_files, step, full)
    found = cache.components("ipm", ranks_of(4, 4), otherwise=lambda: components((4, 4)))
    assert_same_components(found, components((4, 4)))  # the run goes on with what it has
    assert "No space left" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["ipm.safetensors"]
    assert_same_components(cache.components("ipm", ranks_of(3, 2), otherwise=never), components())


def test_a_search_that_fails_stores_nothing(tmp_path):
    cache = DecompositionCache(tmp_path / "cache", key())
    with pytest.raises(AssertionError):
        cache.components("ipm", ranks_of(3, 2), otherwise=never)
    with pytest.raises(AssertionError):
        cache.spectra(otherwise=never)
    assert not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------------- for people and plots


def test_what_was_chosen_is_written_down(tmp_path):
    path = tmp_path / "out" / "decomposition.json"
    found = components((1, 2))
    write_decomposition(path, found, spectra(), mode="kpm")
    assert json.loads(path.read_text()) == {
        "mode": "kpm",
        "layers": {
            LAYERS[0]: {
                "rank": 1,
                "solver": "svd",
                "round": 1,
                "scores": [0.25, 0.125],
                "log_compactness": 2.5,
                "singular_values": [3.0, 2.0, 0.5],
            },
            LAYERS[1]: {
                "rank": 2,
                "solver": "svd",
                "round": POOLED,
                "scores": [],
                "log_compactness": 1 / 3,
                "singular_values": [9.0, 1e-9],
            },
        },
    }
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("none", [None, {}])
def test_without_spectra_the_singular_values_are_the_adapted_ones(tmp_path, none):
    path, found = tmp_path / "decomposition.json", components((1, 2))
    path.write_text("of an earlier run")
    write_decomposition(path, found, none, mode="ipm")
    written = json.loads(path.read_text())
    assert written["mode"] == "ipm"
    for name, component in found.items():
        layer = written["layers"][name]
        assert set(layer) == {"rank", "solver", "singular_values"}
        assert layer["singular_values"] == component.singular_values.tolist()
        assert layer["rank"] == len(layer["singular_values"])
        assert all(math.isfinite(value) for value in layer["singular_values"])


def test_two_runs_of_different_ranks_share_a_folder(tmp_path):
    """Each keeps the longer of the stored and the found component, so that neither has to search again."""
    cache, whole = DecompositionCache(tmp_path, key()), components((4, 4))
    cut = {
        ranks: {n: whole[n].first(r) for n, r in zip(LAYERS, ranks, strict=True)}
        for ranks in [(4, 1), (2, 3)]
    }
    for ranks, found in cut.items():
        assert_same_components(
            cache.components("ipm", ranks_of(*ranks), otherwise=lambda found=found: found), found
        )
    for ranks, found in cut.items():
        assert_same_components(cache.components("ipm", ranks_of(*ranks), otherwise=never), found)
    both = cache.components("ipm", ranks_of(4, 3), otherwise=never)
    assert_same_components(
        both, {LAYERS[0]: whole[LAYERS[0]], LAYERS[1]: whole[LAYERS[1]].first(3)}
    )


def test_who_does_not_write_finds_and_reads_all_the_same(tmp_path):
    folder = tmp_path / "cache"
    reader = DecompositionCache(folder, key(), writes=False)
    found = components()
    assert_same_spectra(reader.spectra(otherwise=spectra), spectra())
    assert_same_components(reader.components("ipm", ranks_of(3, 2), otherwise=lambda: found), found)
    assert not folder.exists()
    writer = DecompositionCache(folder, key())
    writer.spectra(otherwise=spectra)
    writer.components("ipm", ranks_of(3, 2), otherwise=lambda: found)
    assert_same_spectra(reader.spectra(otherwise=never), spectra())
    assert_same_components(reader.components("ipm", ranks_of(3, 2), otherwise=never), found)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    reader.components("ipm", ranks_of(4, 2), otherwise=lambda: components((4, 2)))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_content_tells_folders_apart(tmp_path):
    empty, one = (DecompositionCache(tmp_path / name, key()) for name in ("empty", "one"))
    assert empty.content() == one.content() == ""
    one.components("kpm", ranks_of(1, 1), otherwise=lambda: components((1, 1)))
    small = one.content()
    size = (tmp_path / "one" / "kpm.safetensors").stat().st_size
    assert small == f"kpm.safetensors:{size}"
    one.spectra(otherwise=spectra)
    assert one.content().startswith(f"{small} spectra.safetensors:")
    (tmp_path / "one" / ".ipm.123.safetensors").write_bytes(b"of a run that was killed")
    (tmp_path / "one" / "notes.txt").write_text("of the user")
    assert one.content().count(":") == 2
    one.components("kpm", ranks_of(3, 2), otherwise=components)
    assert one.content().split()[0] not in ("", small)
