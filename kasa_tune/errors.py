"""Which errors are a user's to mend, and are told in a sentence; all others are faults of ours and keep a traceback.

Nothing here imports torch: errors of other packages are known by the names of their classes.
"""

import errno

INTERRUPTED = "Interrupted (Ctrl-C). What had been saved before is kept."
STATUS_INTERRUPTED = 130  # 128 + SIGINT

_EXPECTED = (ValueError, OSError, MemoryError)
# Not a ValueError, and yet about the run: its numbers, its memory, a file that cannot be written or read.
_EXPECTED_NAMES = {"NonFiniteError", "OutOfMemoryError", "SafetensorError"}
# Texts of plain RuntimeErrors, by which torch says that memory or files have run out.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_INTERNAL_ERROR",
)
_TOO_MANY_FILES = ("Too many open files", "received 0 items of ancdata", "ulimit -n")

_LESS_MEMORY = (
    "The memory of the device or the host is full. Lower batch_size (and raise "
    "gradient_accumulation_steps) or tokenizer.max_seq_len, set enable_activation_checkpointing="
    "True, or choose a smaller model; dry_run=True counts what a run needs."
)
_MORE_FILES = (
    "The process may not open more files. Raise the limit with `ulimit -n 4096` in the shell that "
    "starts the run, or lower num_workers."
)
_MORE_SPACE = "The disk is full, or a quota is used up. Make room, or set another output_dir."


def is_expected(error: BaseException) -> bool:
    """Whether a user can mend what `error` says, so that its sentence is all they need."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        isinstance(error, _EXPECTED) or bool(names & _EXPECTED_NAMES) or _advice(error) is not None
    )


def sentence(error: BaseException) -> str:
    """What to print for an expected error: its class, its words, and what to set where they do not say it."""
    advice = _advice(error)
    words = f"{type(error).__name__}: {error}".strip().rstrip(":")
    return f"{words}\n{advice}" if advice else words


def _advice(error: BaseException) -> str | None:
    """What to do about memory, files or disk space that has run out; None for every other error."""
    text = str(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return _LESS_MEMORY
    if isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY):
        return _LESS_MEMORY
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        return _MORE_FILES
    if isinstance(error, RuntimeError) and any(words in text for words in _TOO_MANY_FILES):
        return _MORE_FILES
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return _MORE_SPACE
    return None
