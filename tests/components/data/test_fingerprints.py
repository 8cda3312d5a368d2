"""Digests that processes compare: the same where the values are, other where one bit is."""

import hashlib
from importlib import metadata

import pytest
import torch

from kasa_tune import __version__
from kasa_tune.components.data.fingerprints import tensors_digest, versions


def random_tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (), (0, 2), (2, 1, 3))
    ]


def test_it_is_the_sha256_of_the_values_in_their_order():
    tensors = random_tensors()
    expected = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()
    assert tensors_digest(tensors) == tensors_digest(iter(tensors)) == expected
    assert tensors_digest(tensors[::-1]) != expected
    assert tensors_digest([]) == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool]
)
def test_a_single_bit_of_any_dtype_counts(dtype):
    tensor = torch.ones(4, 3).to(dtype)
    other = tensor.clone()
    other.view(torch.uint8)[2, 1] ^= 1
    assert tensors_digest([tensor]) == tensors_digest([tensor.clone()])
    assert tensors_digest([tensor]) != tensors_digest([other])


def test_values_count_and_not_how_they_lie_in_memory():
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    digest = tensors_digest([tensor])
    assert tensors_digest([tensor.T.contiguous().T]) == digest
    assert tensors_digest([torch.cat((tensor, tensor), dim=1)[:, :6]]) == digest
    assert tensors_digest([torch.nn.Parameter(tensor)]) == digest
    assert tensors_digest([tensor.T]) != digest


def test_versions_of_what_decides_a_result():
    expected = {"kasa_tune": __version__} | {
        name: metadata.version(name) for name in ("torch", "torchtune", "torchao")
    }
    assert versions() == ", ".join(f"{name} {version}" for name, version in expected.items())
