"""Singular subspaces against full float64 SVDs, on well and badly behaved matrices."""

import logging
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_tune.components.linalg import solvers
from kasa_tune.components.linalg.fallback import on_cpu_if_no_room
from kasa_tune.components.linalg.solvers import (
    gram_matrix,
    mirror_lower,
    smallest_singular_subspace,
)

SOLVERS = ("gram_eigh", "inverse_krylov")

# The search stops at corrections of 1e-6; the subspace is then off by about that over the relative gap, which the
# matrices below keep above a few per cent where vectors are compared.
SUBSPACE = 1e-4
# Eigenvalues are off by the square of that; what remains is float64 rounding of G, relative to its largest eigenvalue.
GRAM_ROUNDING = 1e-13


def with_spectrum(n, m, values, seed=0):
    """A float64 ``(n, m)`` matrix with the given n singular values, and its left vectors in the same order."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q
    return (left * torch.as_tensor(values, dtype=torch.float64)) @ right.T, left


def assert_orthonormal(vectors):
    identity = torch.eye(vectors.shape[1], dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-12)


def energy(vectors, matrix):
    """``‖UᵀW‖_F²``: for the right subspace the sum of its squared singular values, for any other one more."""
    return (vectors.T @ matrix.double()).square().sum().item()


@st.composite
def cases(draw):
    """``(n, m, k, values)`` that both solvers can take: flat, power-law and exponential spectra, square and wide."""
    k = draw(st.integers(1, 4))
    n = draw(st.integers(4 * (k + solvers.OVERSAMPLING), 80))
    m = n + draw(st.sampled_from([0, 0, 1, 7, 2 * n]))
    index = torch.arange(n, 0, -1, dtype=torch.float64)  # ascending values, the wanted ones first
    kind = draw(st.sampled_from(["linear", "power", "exponential", "edge"]))
    values = {
        "linear": 1.0 / index + 0.01,
        "power": index ** -draw(st.floats(0.3, 3.0)),
        "exponential": torch.exp(-index * draw(st.floats(0.01, 0.2))),
        "edge": 2.0 - torch.cos(torch.pi * (n - index) / n),
    }[kind]
    return n, m, k, values * draw(st.sampled_from([1e-4, 1.0, 1e3]))


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 99))
def test_no_other_subspace_carries_less(solver, case, seed):
    n, m, k, values = case
    matrix, _ = with_spectrum(n, m, values, seed)
    found = smallest_singular_subspace(matrix, k, solver=solver)
    assert found.solver == solver
    assert_orthonormal(found.vectors)
    floor = GRAM_ROUNDING * values.max().item() ** 2
    assert energy(found.vectors, matrix) == pytest.approx(
        values[:k].square().sum().item(), rel=1e-6, abs=floor
    )
    torch.testing.assert_close(
        found.singular_values.square(), values[:k].square(), rtol=1e-6, atol=floor
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("n", "m"), [(64, 64), (64, 65), (64, 200)])
@pytest.mark.parametrize("ratio", [1.0, 1e-3, 1e-5])
def test_the_vectors_are_those_of_the_svd(solver, n, m, ratio):
    # eight wanted values `ratio` below the others, which themselves span a factor of five: a clear gap, any condition
    values = torch.cat((torch.linspace(0.5, 0.8, 8) * ratio, torch.linspace(1.0, 5.0, n - 8)))
    matrix, left = with_spectrum(n, m, values)
    found = smallest_singular_subspace(matrix, 8, solver=solver)
    off = found.vectors - left[:, :8] @ (left[:, :8].T @ found.vectors)
    assert torch.linalg.vector_norm(off, ord=float("inf")) < SUBSPACE
    assert (found.singular_values.diff() > 0).all()
    exact = torch.linalg.svdvals(matrix).flip(0)[:8]
    torch.testing.assert_close(
        found.singular_values, exact, rtol=1e-6, atol=5.0 * GRAM_ROUNDING**0.5
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("m", [96, 300])
@pytest.mark.parametrize("copies", [4, 6, 30])
def test_repeated_values_give_some_vectors_of_their_space(solver, m, copies):
    n, k = 96, 4
    values = torch.cat((torch.full((copies,), 0.5), torch.linspace(1.0, 2.0, n - copies)))
    matrix, left = with_spectrum(n, m, values)
    found = smallest_singular_subspace(matrix, k, solver=solver)
    assert energy(found.vectors, matrix) == pytest.approx(k * 0.25, rel=1e-6)
    inside = (
        left[:, :copies].T @ found.vectors
    )  # the projector onto the whole space leaves them as they are
    torch.testing.assert_close(
        inside.square().sum(dim=0), torch.ones(k, dtype=torch.float64), rtol=0, atol=SUBSPACE
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("m", [96, 300])
@pytest.mark.parametrize("deficiency", [1, 4, 50])
def test_rank_deficient_matrices(solver, m, deficiency, caplog):
    n, k = 96, 4
    values = torch.cat((torch.zeros(deficiency), torch.linspace(1.0, 2.0, n - deficiency)))
    matrix, _ = with_spectrum(n, m, values)
    found = smallest_singular_subspace(matrix, k, solver=solver)
    assert_orthonormal(found.vectors)
    expected = values[:k].double().square().sum().item()
    assert energy(found.vectors, matrix) == pytest.approx(expected, rel=1e-6, abs=1e-11)
    assert not caplog.records  # no detour through the exact method


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("m", [64, 100])
def test_zero_rows_and_an_all_zero_matrix(solver, m):
    matrix = torch.randn(64, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix[[3, 10, 11]] = 0.0
    found = smallest_singular_subspace(matrix, 3, solver=solver)
    assert energy(found.vectors, matrix) < 1e-20
    nothing = smallest_singular_subspace(torch.zeros(64, m), 3, solver=solver)
    assert_orthonormal(nothing.vectors)
    assert not nothing.singular_values.any()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_input_is_used_as_it_is(solver, dtype):
    weight = torch.randn(60, 90, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = smallest_singular_subspace(weight, 3, solver=solver)
    assert found.vectors.dtype == found.singular_values.dtype == torch.float64
    exact = torch.linalg.svdvals(weight.double()).flip(0)[:3]
    torch.testing.assert_close(found.singular_values, exact, rtol=1e-6, atol=0)


def test_strides_do_not_matter_and_the_input_stays():
    matrix = torch.randn(90, 60, generator=torch.Generator().manual_seed(1))
    before = matrix.clone()
    for solver in SOLVERS:
        transposed = smallest_singular_subspace(matrix.T, 3, solver=solver)
        copied = smallest_singular_subspace(matrix.T.contiguous(), 3, solver=solver)
        torch.testing.assert_close(
            transposed.singular_values, copied.singular_values, rtol=1e-9, atol=0
        )
    assert torch.equal(matrix, before)


def test_the_same_matrix_gives_the_same_vectors_whatever_the_random_state():
    matrix = torch.randn(64, 100, generator=torch.Generator().manual_seed(1))
    first = smallest_singular_subspace(matrix, 3, solver="inverse_krylov")
    before = torch.get_rng_state()
    torch.randn(5)
    after_draw = torch.get_rng_state()
    second = smallest_singular_subspace(matrix, 3, solver="inverse_krylov")
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(torch.get_rng_state(), after_draw)
    torch.set_rng_state(before)


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (383, 20), (384, 20), (900, 33)])
def test_gram_matrix_is_w_wt(shape, chunk):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    exact = matrix.double() @ matrix.double().T
    torch.testing.assert_close(
        gram_matrix(matrix, column_chunk=chunk), exact, rtol=1e-12, atol=1e-12
    )


def test_the_solver_is_chosen_by_shape(monkeypatch):
    monkeypatch.setattr(solvers, "EXACT_BELOW", 50)
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    assert smallest_singular_subspace(matrix, 4).solver == "inverse_krylov"
    assert (
        smallest_singular_subspace(matrix, 5).solver == "gram_eigh"
    )  # more than a sixteenth of 64
    assert smallest_singular_subspace(matrix[:49], 1).solver == "gram_eigh"


@pytest.mark.parametrize("m", [64, 100])
def test_a_search_that_does_not_converge_is_answered_exactly_and_logged(m, monkeypatch, caplog):
    monkeypatch.setattr(solvers, "MAX_STEPS", 1)
    matrix = torch.randn(64, m, generator=torch.Generator().manual_seed(4))
    with caplog.at_level(logging.WARNING, logger="kasa_tune.components.linalg"):
        found = smallest_singular_subspace(matrix, 3, solver="inverse_krylov")
    assert found.solver == "gram_eigh"
    exact = torch.linalg.svdvals(matrix.double()).flip(0)[:3]
    torch.testing.assert_close(found.singular_values, exact, rtol=1e-6, atol=1e-8)
    (record,) = caplog.records
    assert "no convergence" in record.getMessage()
    assert f"64 x {m}" in record.getMessage()


# As torch 2.13 passes them on: its own, that of a handle or a workspace that finds no room, and the driver's.
FULL = {
    "torch": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.53 GiB."),
    "cublas handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cublas": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasDgemm(...)`"
    ),
    "cusolver handle": RuntimeError(
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"
    ),
    "cusolver": RuntimeError(
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd(...)`"
    ),
    "driver": RuntimeError("CUDA error: out of memory"),
}


def full_once(error, work):
    """``work``, which fails the first time it is called; and the list of its calls."""
    calls = []

    def full_the_first_time(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise error
        return work(*args, **options)

    return full_the_first_time, calls


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_every_word_for_a_full_card_is_answered_on_the_cpu(error, caplog):
    work, calls = full_once(error, torch.square)
    with caplog.at_level(logging.WARNING, logger="kasa_tune.components.linalg"):
        found = on_cpu_if_no_room(work, torch.tensor(3.0), what="a square")
    assert (found, len(calls)) == (9, 2)
    (record,) = caplog.records
    assert "no room for a square" in record.getMessage()
    matrix = torch.randn(8, 20, generator=torch.Generator().manual_seed(5))
    work, calls = full_once(error, solvers._gram_eigh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "_gram_eigh", work)
        found = smallest_singular_subspace(matrix, 1)
    assert len(calls) == 2
    expected = torch.linalg.svdvals(matrix.double())[-1:]
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.linalg.LinAlgError("no convergence"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_other_errors_are_no_full_card(error):
    work, calls = full_once(error, torch.square)
    with pytest.raises(type(error), match=str(error)):
        on_cpu_if_no_room(work, torch.tensor(3.0), what="a square")
    assert len(calls) == 1


def test_nothing_of_the_first_try_is_alive_in_the_second():
    alive = []

    def work(x):
        if not alive:
            held = x + 1
            alive.append(weakref.ref(held))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return alive[0]() is None

    assert on_cpu_if_no_room(work, torch.ones(3), what="a sum")


@pytest.mark.parametrize("n", [1, 5, 7, 12])
def test_a_lower_triangle_is_mirrored_in_place(n):
    given = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    lower = given.tril()
    assert mirror_lower(given, chunk=5) is given
    assert torch.equal(given, lower + lower.tril(-1).T)


@pytest.mark.parametrize("solver", SOLVERS)
def test_out_of_memory_on_the_gpu_is_answered_on_the_cpu_and_logged(solver, monkeypatch, caplog):
    method, calls = getattr(solvers, f"_{solver}"), []

    def full_the_first_time(matrix, k):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return method(matrix, k)

    monkeypatch.setattr(solvers, f"_{solver}", full_the_first_time)
    matrix = torch.randn(64, 100, generator=torch.Generator().manual_seed(5))
    with caplog.at_level(logging.WARNING, logger="kasa_tune.components.linalg"):
        found = smallest_singular_subspace(matrix, 3, solver=solver)
    assert len(calls) == 2
    assert found.solver == solver
    (record,) = caplog.records
    assert "64 x 100" in record.getMessage()
    assert "doing it on the CPU" in record.getMessage()
    expected = torch.linalg.svdvals(matrix.double()).flip(0)[:3]
    torch.testing.assert_close(found.singular_values, expected, rtol=1e-6, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("solver", SOLVERS)
def test_cuda_gives_what_the_cpu_gives(solver):
    matrix = torch.randn(64, 100, generator=torch.Generator().manual_seed(6))
    found = smallest_singular_subspace(matrix.cuda(), 3, solver=solver)
    assert found.vectors.is_cuda
    expected = smallest_singular_subspace(matrix, 3, solver=solver).singular_values
    torch.testing.assert_close(found.singular_values.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "k", "solver", "message"),
    [
        ((4, 3), 1, "auto", "n <= m"),
        ((3, 4), 0, "auto", "k <= n"),
        ((3, 4), 4, "auto", "k <= n"),
        ((3, 4), 1, "lanczos", "Unknown solver 'lanczos'"),
        ((40, 40), 3, "inverse_krylov", "Use gram_eigh"),
    ],
)
def test_impossible_requests_are_refused(shape, k, solver, message):
    with pytest.raises(ValueError, match=message):
        smallest_singular_subspace(torch.ones(shape), k, solver=solver)
