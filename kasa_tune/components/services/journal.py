"""A file of all answers that have arrived, so that none is asked for twice."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kasa_tune.components.services.endpoint import Reply

log = logging.getLogger(__name__)


def identity_of(body: Mapping[str, Any], sample: int, attempt: int) -> str:
    """The key of a call: SHA-256 of its request, of which sample of this request it is, and which attempt at it.

    The address is no part of it: a server that moves to another port goes on from the same journal.
    """
    content = json.dumps([body, sample, attempt], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


class Journal:
    """Answers by the keys of their calls. A line is on the disk before :meth:`add` returns.

    A line that a killed process left unfinished is dropped when the file is opened.

    Args:
        path: of the file, which is made where it is missing. It is locked against other processes until closed.

    Raises:
        ValueError: another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"Another run writes to {path.parent}. Wait until it ends, or set another output_dir."
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning(f"{path} cannot be locked ({error}). Let no other run write to it.")
        self._writing = threading.Lock()
        self.replies = dict(self._read())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def add(self, identity: str, reply: Reply) -> None:
        """Keep an answer. Threads may call it at the same time."""
        line = json.dumps({"key": identity, **asdict(reply)}) + "\n"
        with self._writing:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self.replies[identity] = reply

    def _read(self) -> Iterator[tuple[str, Reply]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        lost = 0
        for line in content[:whole].splitlines():
            with contextlib.suppress(ValueError, TypeError, LookupError):
                fields = json.loads(line)
                yield fields.pop("key"), Reply(**fields)
                continue
            lost += 1
        if lost:
            log.warning(f"{self.path} has {lost} damaged lines. Their calls will be repeated.")
