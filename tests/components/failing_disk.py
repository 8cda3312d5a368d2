"""Disks that fill and processes that are killed at a chosen operation."""

import errno
import os
import shutil
import signal
from pathlib import Path

import torch

from kasa_tune.components.checkpoints import writing


def at_each_call(monkeypatch, act):
    """Make the n-th call of anything that changes the disk do ``act`` first; returns a function that sets n."""
    state = {"left": 0}

    def guard(function):
        def guarded(*args, **kwargs):
            state["left"] -= 1
            if state["left"] == 0:
                act()
            return function(*args, **kwargs)

        return guarded

    for owner, name in (
        (os, "fsync"),
        (os, "rename"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "open"),
        (writing, "save_file"),
        (shutil, "rmtree"),
        (os, "unlink"),
    ):
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))
    return lambda n: state.update(left=n)


def disk_full():
    """As a write does on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def killed():
    """As from outside, without any clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_process_that_dies(work):
    """Run ``work`` in a forked process; returns its id. It ends without any clean-up of the test's."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(0)
    return child


def died_by_kill(child):
    """Wait for a process; whether a signal ended it."""
    return os.waitpid(child, 0)[1] == signal.SIGKILL
