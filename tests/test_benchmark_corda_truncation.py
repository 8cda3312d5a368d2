"""The truncation benchmark on the real model: what it discards, and the one ordering that it exists to show."""

import importlib.util
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = Namespace(num_samples=16, rounds=2, seq_len=64)


@pytest.fixture(scope="module")
def benchmark(real_data):
    sys.path.insert(0, str(BENCHMARKS))  # the scripts import their neighbour
    try:
        spec = importlib.util.spec_from_file_location(
            "corda_truncation", BENCHMARKS / "corda_truncation.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def subject(benchmark):
    return benchmark.load_subject()


@pytest.fixture(scope="module")
def texts(benchmark, subject, real_data):
    return benchmark.load_texts(subject.tokenizer, real_data, SMALL.seq_len)


@pytest.fixture(scope="module")
def methods(benchmark, subject, texts):
    calibrations = [
        benchmark.calibrate(subject, text.rounds(subject.tokenizer, SMALL, 0), 0.01)
        for text in texts.values()
    ]
    return benchmark.all_methods(subject, *calibrations, SMALL.rounds)


def perplexity_without(benchmark, subject, texts, method, k):
    components, spectra = method
    with benchmark.discarded(subject, components, benchmark.counts(subject, k, spectra)):
        return benchmark.perplexity(subject.model, texts["TinyStories"].evaluation)


def test_the_model_is_whole_before_and_after_and_with_nothing_discarded(
    benchmark, subject, texts, methods
):
    base = benchmark.perplexity(subject.model, texts["TinyStories"].evaluation)
    weights = {name: linear.weight.clone() for name, linear in subject.linears.items()}
    assert len(weights) == 35
    assert set(methods) == set(benchmark.METHODS)
    for method in methods.values():
        assert perplexity_without(benchmark, subject, texts, method, 0) == base
    assert perplexity_without(benchmark, subject, texts, methods["SVD"], 8) > base
    for name, linear in subject.linears.items():
        assert torch.equal(linear.weight, weights[name])


def test_the_discarded_components_are_those_of_the_context(benchmark, subject, texts, methods):
    svd, co_svd = (
        perplexity_without(benchmark, subject, texts, methods[name], 8)
        for name in ("SVD", "CO-SVD")
    )
    assert co_svd < svd


def test_perplexity_is_that_of_every_row_alone(benchmark, subject, texts):
    batches = texts["TinyStories"].evaluation
    total, num_tokens = 0.0, 0
    for tokens, labels in (
        (row, wanted) for batch in batches for row, wanted in zip(batch["tokens"], batch["labels"])
    ):
        length = int((labels != -100).sum()) + 1
        assert torch.equal(labels[: length - 1], tokens[1:length])
        logits = subject.model.output(subject.model(tokens[None, :length]))
        total += F.cross_entropy(logits[0, :-1].double(), tokens[1:length], reduction="sum").item()
        num_tokens += length - 1
    expected = math.exp(total / num_tokens)
    assert benchmark.perplexity(subject.model, batches) == pytest.approx(expected, rel=1e-5)


def test_asvd_is_the_svd_of_the_scaled_weight(benchmark):
    generator = torch.Generator().manual_seed(0)
    weight, magnitudes = (
        torch.randn(7, 5, generator=generator),
        torch.rand(5, generator=generator) + 0.1,
    )
    S = magnitudes.double().sqrt().diag()
    U, values, Vt = torch.linalg.svd(weight.double() @ S, full_matrices=False)
    expected = U[:, 3:] @ values[3:].diag() @ Vt[3:] @ S.inverse()
    part = benchmark.asvd(weight, magnitudes).first(2)
    torch.testing.assert_close(
        part.vectors @ part.projection, expected.float(), rtol=1e-5, atol=1e-6
    )


def test_mean_magnitudes_leave_the_padding_out(benchmark, subject):
    rows = torch.arange(3, 15).reshape(2, 6)
    short = {"tokens": rows[:1, :4], "valid": torch.ones(1, 4, dtype=torch.bool)}
    whole = {"tokens": rows[1:], "valid": torch.ones(1, 6, dtype=torch.bool)}
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 4:] = False
    padded = benchmark.mean_magnitudes(subject, [{"tokens": rows, "valid": valid}])
    alone = [benchmark.mean_magnitudes(subject, [batch]) for batch in (short, whole)]
    for name, mean in padded.items():
        torch.testing.assert_close(
            mean, (4 * alone[0][name] + 6 * alone[1][name]) / 10, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("k", [1, 8])
def test_allocation_spends_the_parameters_of_k_everywhere(benchmark, subject, methods, k):
    linears = subject.linears
    sizes = {name: linear.in_dim + linear.out_dim for name, linear in linears.items()}
    spent = {}
    for name in ("CO-SVD", "allocated"):
        counts = benchmark.counts(subject, k, methods[name][1])
        spent[name] = sum(sizes[layer] * count for layer, count in counts.items())
    assert spent["CO-SVD"] <= spent["allocated"] <= spent["CO-SVD"] + max(sizes.values())


def test_evaluation_text_is_not_calibrated_on(benchmark, subject, texts, real_data):
    for read, text in (
        (benchmark.stories, texts["TinyStories"]),
        (benchmark.wikitext, texts["WikiText-2"]),
    ):
        known = set(text.calibration.inner._data["text"])
        held_out = read(subject.tokenizer, real_data, held_out=True).inner._data["text"]
        long = [
            row for row in held_out if len(row) > 100
        ]  # headings such as " = = Reception = = " are in both
        assert long
        assert not known & set(long)
