"""Patterns that a PEFT adapter's config holds, matched in bounded time.

``target_modules``, ``exclude_modules``, ``layers_pattern`` and the keys of ``rank_pattern`` and ``alpha_pattern`` are
regular expressions of whoever wrote the file. Some of those, ``(a+)+b`` is the shortest, take longer than anyone waits.
They are matched by Python's own ``re`` in a process of its own, which is ended when its time is over: whatever PEFT
understands is understood here, and means the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Mapping

SECONDS = 5.0  # the patterns of PEFT, of its guides and of unsloth take milliseconds on the largest models
LONGEST = 100_000  # characters of all patterns together

# Reads [patterns, names]; writes for each pattern the names that it matches whole, each with what its group `index`
# took, or what is wrong with it.
_MATCHER = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
found = []
for pattern in patterns:
    try:
        match = re.compile(pattern).fullmatch
        hits = {name: hit for name in names if (hit := match(name))}
        found.append({name: hit.groupdict().get("index") for name, hit in hits.items()})
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        found.append(f"{type(error).__name__}: {error}")
json.dump(found, sys.stdout)
"""


def match_all(
    patterns: Collection[str], names: Collection[str], *, key: str
) -> list[Mapping[str, str | None]]:
    """For each pattern, the names that it matches from end to end, with what its group ``index`` took.

    Args:
        patterns: regular expressions.
        names: of modules.
        key: of the config that holds the patterns, for messages.

    Raises:
        ValueError: a pattern is none, or matching takes longer than SECONDS.
    """
    patterns = list(patterns)
    if not patterns:
        return []
    if sum(map(len, patterns)) > LONGEST:
        raise ValueError(f"{key} is longer than {LONGEST:,} characters. List the modules' names.")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([patterns, list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{key} is a pattern that takes more than {SECONDS:.0f} seconds to match (one like "
            "(a+)+b does). Write the modules' names in its place."
        ) from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{key} cannot be matched: {error.stderr.strip()[-200:]}.") from None
    found = json.loads(done.stdout)
    for pattern, hits in zip(patterns, found, strict=True):
        if isinstance(hits, str):
            shown = pattern if len(pattern) < 80 else f"{pattern[:80]}..."
            raise ValueError(f"{shown!r} in {key} is no pattern ({hits}).")
    return found
