"""The digest of whole weights: every byte counts, shards do not, and what is kept is trusted as long as files rest."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from kasa_tune.components.models import digests
from kasa_tune.components.models.base_weights import (
    read_base_weights,
    weights_digest,
    weights_fingerprint,
)
from tests.toy_checkpoints import checkpointer, write_checkpoint


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def base(tmp_path, name="base", **options):
    files = write_checkpoint(tmp_path / name, "llama2", **options)
    return tmp_path / name, files


def digest_of(folder, files):
    return weights_digest(read_base_weights(checkpointer(folder, files, "LLAMA2")))


def by_hand(folder):
    """The definition, from the files alone."""
    lines = []
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                dtype = {"F32": "torch.float32", "BF16": "torch.bfloat16"}[entry["dtype"]]
                sha = hashlib.sha256(raw[start + first : start + last]).hexdigest()
                lines.append(f"{name} {dtype} {entry['shape']} {sha}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_it_is_what_its_definition_says_whatever_the_shards(dtype, shards, tmp_path):
    folder, files = base(tmp_path, dtype=dtype, shards=shards)
    assert digest_of(folder, files) == by_hand(folder)
    again, one = base(tmp_path, "again", dtype=dtype)
    assert by_hand(again) == digest_of(again, one) == by_hand(folder)


def flipped(path, position):
    """The file with one byte other than it was, a moment later."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**6))


def test_every_flipped_byte_is_found_also_where_the_sample_does_not_look(tmp_path):
    folder, files = base(tmp_path)
    path = folder / files[0]
    digest = digest_of(folder, files)
    size = path.stat().st_size
    missed = 0
    sample = {"sample": 8}
    weights = read_base_weights(checkpointer(folder, files, "LLAMA2"))
    fingerprint = weights_fingerprint(weights, **sample)
    for position in range(size - 4000, size, 333):
        flipped(path, position)
        assert digest_of(folder, files) != digest
        weights = read_base_weights(checkpointer(folder, files, "LLAMA2"))
        missed += weights_fingerprint(weights, **sample) == fingerprint
        flipped(path, position)
        assert digest_of(folder, files) == digest
    assert missed > 0


def test_a_file_that_did_not_change_is_read_once(tmp_path, monkeypatch):
    folder, files = base(tmp_path, shards=2)
    read = []
    line_of = digests._line_of
    monkeypatch.setattr(
        digests, "_line_of", lambda path, name: read.append(path.name) or line_of(path, name)
    )
    digest = digest_of(folder, files)
    assert len(read) == sum(len(load_file(folder / file)) for file in files)
    read.clear()
    assert digest_of(folder, files) == digest
    assert not read
    flipped(folder / files[1], -1)
    assert digest_of(folder, files) != digest
    assert set(read) == {files[1]}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b'{"x": 3}', b'{"x": {"a": "other"}}', b"[" * 10**5]
)
def test_a_damaged_cache_costs_time_alone(content, tmp_path):
    folder, files = base(tmp_path)
    expected = by_hand(folder)
    path = tmp_path / "cache" / "kasa_tune" / "weights_digests.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert digest_of(folder, files) == expected
    assert digest_of(folder, files) == expected
    assert len(json.loads(path.read_text())) == 1


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path):
    folder, files = base(tmp_path)
    (tmp_path / "cache").write_text("a file")
    assert digest_of(folder, files) == by_hand(folder)


def test_weights_without_files_have_one_too(tmp_path):
    weights = {"b": torch.ones(2, 3), "a": torch.tensor(2.0, dtype=torch.bfloat16)}
    lines = [
        f"a torch.bfloat16 [] {hashlib.sha256(bytes([0, 0x40])).hexdigest()}\n",
        f"b torch.float32 [2, 3] {hashlib.sha256(bytes([0, 0, 0x80, 0x3F] * 6)).hexdigest()}\n",
    ]
    assert weights_digest(weights) == hashlib.sha256("".join(lines).encode()).hexdigest()
    pickled = write_checkpoint(tmp_path / "base", "llama2", save=torch.save)
    first = digest_of(tmp_path / "base", pickled)
    pickled = write_checkpoint(
        tmp_path / "base",
        "llama2",
        save=torch.save,
        change=lambda state: state["model.norm.weight"].add_(1),
    )
    assert digest_of(tmp_path / "base", pickled) != first
