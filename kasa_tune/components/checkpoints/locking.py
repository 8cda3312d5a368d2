"""A lock on a run's output folder, so that two runs never write to the same folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def check_unlocked(folder: Path) -> None:
    """Raise ValueError if another process holds the lock of ``folder``. Nothing is created or
    changed.

    The processes of one run may call this at the same time.
    """
    with contextlib.suppress(FileNotFoundError), (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(folder) from None
        except OSError:  # some network file systems have no locks; `run_lock` logs a warning
            return
        fcntl.flock(file, fcntl.LOCK_UN)


def _locked(folder: Path) -> ValueError:
    return ValueError(
        f"Cannot start: another run is writing to {folder}. Wait until it ends, or set another "
        "output_dir."
    )


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other processes until the block ends or this process dies. A missing
    folder is created.

    Raises:
        ValueError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(folder) from None
        except OSError as error:  # some network file systems have no locks
            log.warning(
                f"{folder} cannot be locked ({error}). Make sure that no other run writes to it."
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                # Closing the file would not unlock it while a data worker still has it open.
                fcntl.flock(file, fcntl.LOCK_UN)
