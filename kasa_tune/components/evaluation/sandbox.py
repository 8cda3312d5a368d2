"""Runs a program that a model wrote, in a process of its own with little time, memory, disk and no network.

This keeps a clumsy program from doing harm. It does not hold against one that wants to do harm: run code of models that
you do not trust in a container or a virtual machine. Limits are the kernel's (``setrlimit``); the network is cut off by
a network namespace where the kernel lets a user make one; and an audit hook in the process refuses sockets, other
programs, and writing outside of a temporary folder that is removed afterwards.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 2**20
_LONGEST_OUTPUT = 2000


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: of wall-clock time; processor time is bounded by it too.
        memory_mib: of address space.
        file_mib: the largest file that it may write.
        num_files: that it may have open.
    """

    seconds: float = 5.0
    memory_mib: int = 1024
    file_mib: int = 4
    num_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``passed``, ``failed`` or ``timed out``, and the end of what it said to stderr."""

    result: str
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran to its last line."""
        return self.result == "passed"


# Runs in the process of the program, after its limits are set. It reads a secret and the program from stdin. The secret
# is printed after the program's last line, so that one that ends the process early has not passed.
_RUNNER = r"""
import os, sys

def guard():
    root = os.path.realpath(os.getcwd()) + os.sep
    forbidden = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork",
                 "os.kill", "os.chown", "os.chmod", "ctypes.", "pty.", "os.listxattr", "os.setxattr",
                 "shutil.", "ftplib.", "http.", "smtplib.", "urllib.", "webbrowser.", "signal.pthread_kill")
    changing = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime")

    def inside(path):
        if isinstance(path, int):
            return True
        return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(root)

    def hook(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if path is not None and writes and not inside(path):
                raise PermissionError(f"writing outside of the working folder: {path}")
        elif event.startswith(changing):
            if not all(inside(path) for path in arguments if isinstance(path, (str, bytes))):
                raise PermissionError(f"{event} outside of the working folder")
        elif event.startswith(forbidden):
            raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)

secret, program = sys.stdin.readline().strip(), sys.stdin.read()
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
sys.stdin.close()
code = compile(program, "program", "exec")
guard()
exec(code, {"__name__": "__main__"})
os.write(out, secret.encode())
"""


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program to its end.

    Args:
        program: its source.
        limits: what it may use.

    Raises:
        OSError: no process could be started.
    """
    secret = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="kasa_tune_program_") as folder,
        tempfile.TemporaryFile() as errors,  # of bounded size, which a pipe is not
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", "-c", _STARTER, *map(str, _numbers(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        text = f"{secret}\n{program}".encode("utf-8", errors="replace")
        try:
            said, _ = process.communicate(text, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome("timed out", f"It ran for more than {limits.seconds:g} seconds.")
        finally:
            _end(process)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - _LONGEST_OUTPUT))
        error = errors.read().decode("utf-8", errors="replace")
    if process.returncode == 0 and said.decode("ascii", errors="replace") == secret:
        return Outcome("passed")
    if process.returncode == -signal.SIGXCPU:
        return Outcome("timed out", "It used up its processor time.")
    ended = f"It ended with status {process.returncode} before its last line."
    return Outcome("failed", error or ended)


def _numbers(limits: Limits) -> tuple[int, int, int, int]:
    """The limits as the starter takes them: seconds of the processor, bytes of memory and of a file, open files."""
    seconds = int(limits.seconds) + 1
    return seconds, limits.memory_mib * MEBIBYTE, limits.file_mib * MEBIBYTE, limits.num_files


def _end(process: subprocess.Popen) -> None:
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


# Sets the limits of its own process, then becomes the runner. In a process of its own, as running Python between fork
# and exec is not safe in a program with threads, which torch has.
_STARTER = (
    r"""
import ctypes, resource, sys

seconds, memory, size, files = map(int, sys.argv[1:])
limits = {"CPU": seconds, "AS": memory, "FSIZE": size, "NOFILE": files, "CORE": 0}
for name, value in limits.items():
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
try:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000) != 0:  # CLONE_NEWNET, as root
        libc.unshare(0x10000000 | 0x40000000)  # with a user namespace
    if hasattr(libc, "prctl"):
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
except (OSError, AttributeError):
    pass  # not Linux: the audit hook alone refuses sockets
del libc, ctypes
"""
    + _RUNNER
)


def has_network_namespaces() -> bool:
    """Whether programs are cut off from the network by the kernel, and not by the audit hook alone."""
    if not Path("/proc/self/ns/net").exists():
        return False
    check = "import ctypes; l = ctypes.CDLL(None); raise SystemExit(l.unshare(0x40000000) and l.unshare(0x50000000))"
    return subprocess.run([sys.executable, "-I", "-c", check], capture_output=True).returncode == 0
