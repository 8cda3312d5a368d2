"""Which errors of a run become a sentence, and what the sentence advises."""

import errno
import sys
from pathlib import Path

import pytest
import torch

from kasa_tune import cli, config
from kasa_tune.components.checkpoints import check_saveable
from kasa_tune.components.training import NonFiniteError
from kasa_tune.errors import is_expected, sentence

EXPECTED = {
    "value": (ValueError("bad value"), "bad value"),
    "file": (FileNotFoundError(2, "No such file", "x"), "No such file"),
    "non-finite": (NonFiniteError("step 3: the loss is nan"), "step 3"),
    "memory of a GPU": (torch.cuda.OutOfMemoryError("CUDA out of memory."), "batch_size"),
    "memory of a library": (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "batch_size"),
    "memory of the host": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        "batch_size",
    ),
    "memory of Python": (MemoryError(), "batch_size"),
    "files of Python": (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    "files of torch": (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), "Make room"),
}
FAULTS = (TypeError("x"), KeyError("x"), RuntimeError("x"), AssertionError(), AttributeError("x"))


def run(error: BaseException, monkeypatch, tmp_path: Path) -> object:
    @config.parse(None)
    def recipe_main(cfg):
        raise error

    monkeypatch.setattr(
        sys, "argv", ["mine.py", "--config", "tiny_kasa", f"output_dir={tmp_path}/out"]
    )
    return recipe_main()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_user_can_mend_is_told_in_a_sentence(name, monkeypatch, tmp_path, capsys):
    error, words = EXPECTED[name]
    with pytest.raises(SystemExit) as exited:
        run(error, monkeypatch, tmp_path)
    assert exited.value.code == 1
    told = capsys.readouterr().err
    assert words in told
    assert type(error).__name__ in told
    assert "Traceback" not in told
    monkeypatch.setenv("KASA_TUNE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run(error, monkeypatch, tmp_path)


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_a_fault_of_ours_keeps_its_traceback(error, monkeypatch, tmp_path):
    assert not is_expected(error)
    with pytest.raises(type(error)):
        run(error, monkeypatch, tmp_path)


def test_a_full_disk_told_by_safetensors_is_a_full_disk(tmp_path):
    from safetensors import SafetensorError

    error = SafetensorError('Error: Os { code: 28, message: "No space left on device" }')
    assert is_expected(error)
    assert "Make room" in sentence(error)


def test_a_state_that_no_checkpoint_can_hold_is_told_in_a_sentence():
    with pytest.raises(ValueError, match="cannot hold set") as caught:
        check_saveable({"seen": {1}})
    assert is_expected(caught.value)


def test_the_command_line_asks_the_same_place(monkeypatch, capsys):
    def fail(error):
        def validate_file(*arguments, **options):
            raise error

        monkeypatch.setattr(config, "validate_file", validate_file)
        return cli.main(["validate", "tiny_kasa"])

    assert fail(MemoryError()) == 2
    assert "kasa-tune validate" in capsys.readouterr().err
    with pytest.raises(KeyError):
        fail(KeyError("ours"))
