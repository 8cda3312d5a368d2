"""One writer for one output folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def check_unlocked(folder: Path) -> None:
    """Raise ValueError if another process holds the lock of ``folder``; nothing is made or changed.

    Several processes may ask at once, as those of one run do.
    """
    with contextlib.suppress(FileNotFoundError), (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(folder) from None
        except OSError:  # some network file systems know no locks; run_lock says so
            return
        fcntl.flock(file, fcntl.LOCK_UN)


def _locked(folder: Path) -> ValueError:
    return ValueError(
        f"Cannot start: another run is writing to {folder}. Wait for its end or set another "
        "output_dir."
    )


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to ``folder`` (made if missing) until the end of the block or of this process.

    Raises:
        ValueError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(folder) from None
        except OSError as error:  # some network file systems know no locks
            log.warning(
                f"{folder} cannot be locked ({error}); make sure that no other run writes to it."
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(
                    file, fcntl.LOCK_UN
                )  # at once, even if a data worker still has the file open
