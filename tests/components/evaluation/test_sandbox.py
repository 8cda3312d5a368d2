"""Programs of models in their process: what passes, what is stopped, and what never reaches the machine."""

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest

from kasa_tune.components.evaluation.sandbox import Limits, run_program

pytestmark = pytest.mark.slow
LIMITS = Limits(seconds=30.0, memory_mib=512)


def failed(program, limits=LIMITS):
    outcome = run_program(program, limits)
    assert outcome.result == "failed", outcome
    return outcome.error


def test_a_program_passes_when_it_runs_to_its_end():
    assert run_program("x = 1\nassert x == 1\nprint('noise')", LIMITS).passed
    assert run_program("import math, re, collections, json, random, itertools", LIMITS).passed
    assert run_program("def f(n):\n    return 'ä' * n\nassert f(2) == 'ää'", LIMITS).passed


@pytest.mark.parametrize(
    "program",
    ["import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()", "exit(0)"],
)
def test_ending_early_is_no_pass(program):
    failed(program)


def test_errors_are_told():
    assert "AssertionError: no" in failed("assert False, 'no'")
    assert "SyntaxError" in failed("def f(:")
    assert "NUL" in failed("x = '\0'") or "null" in failed("x = '\0'")


def test_time_is_limited():
    start = time.monotonic()
    for program in ("while True: pass", "import time; time.sleep(60)"):
        assert run_program(program, Limits(seconds=2.0)).result == "timed out"
    assert time.monotonic() - start < 30


def test_memory_is_limited():
    assert "MemoryError" in failed("x = bytearray(2 ** 30)")


def test_output_is_limited():
    error = failed("import sys\nfor _ in range(10 ** 6): sys.stderr.write('x' * 1000)")
    assert len(error) <= 2000


def test_files_outside_are_safe(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    for program in (
        f"open({str(victim)!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.rename({str(victim)!r}, 'mine')",
        f"import os; os.truncate({str(victim)!r}, 0)",
        f"import pathlib; pathlib.Path({str(tmp_path / 'new')!r}).touch()",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.symlink({str(victim)!r}, 'link'); open('link', 'w')",
    ):
        assert "PermissionError" in failed(program), program
    assert victim.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_a_program_may_write_small_files_of_its_own():
    assert run_program("open('a', 'w').write('x'); assert open('a').read() == 'x'", LIMITS).passed
    assert "File too large" in failed("open('a', 'w').write('x' * 10_000_000)")
    assert not list(Path("/tmp").glob("kasa_tune_program_*/a"))


@pytest.mark.parametrize(
    "program",
    [
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(1, 0)",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_no_other_programs_are_started(program):
    assert "PermissionError" in failed(program)


def test_the_network_cannot_be_reached():
    """A listener of ours on the loopback address hears nothing."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1.0)
        port = server.getsockname()[1]

        def listen():
            with contextlib.suppress(TimeoutError):
                heard.append(server.accept())

        listener = threading.Thread(target=listen)
        listener.start()
        error = failed(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)")
        listener.join()
    assert "PermissionError" in error
    assert heard == []


def test_the_environment_holds_no_secrets(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert run_program("import os; assert 'MY_TOKEN' not in os.environ", LIMITS).passed
