"""Runs mypy and compares its errors in each file with ``typecheck_baseline.txt``: they may only become fewer.

A file without a line in the baseline must be free of errors, and CLEAN folders may have no line. When a file got
better, the baseline must follow: ``python .ci/typecheck.py --write`` writes it, and refuses to raise a count.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASELINE = HERE / "typecheck_baseline.txt"
CLEAN = (
    "kasa_tune/components/linalg/",
    "kasa_tune/components/training/",
    "kasa_tune/config/",
    "kasa_tune/methods.py",
)
ERROR = re.compile(r"^(?P<file>[^:]+\.py):\d+: error: ")


def count_errors(output: str) -> Counter[str]:
    """Errors of each file in what mypy printed."""
    matches = map(ERROR.match, output.splitlines())
    return Counter(match["file"].replace("\\", "/") for match in matches if match)


def read_baseline(text: str) -> Counter[str]:
    """Allowed errors of each file, from lines of ``count path``."""
    pairs = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return Counter({path: int(count) for count, path in pairs})


def compare(errors: Counter[str], baseline: Counter[str]) -> list[str]:
    """One sentence for each file whose errors are not those of the baseline."""
    told = []
    for file in sorted({*errors, *baseline}):
        found, allowed = errors[file], baseline[file]
        if found > allowed:
            told.append(f"{file}: {found} type errors, {allowed} allowed. Correct the new ones.")
        elif found < allowed:
            told.append(
                f"{file}: {found} type errors, {allowed} in the baseline. "
                "Lower it: python .ci/typecheck.py --write"
            )
        if file.startswith(CLEAN) and allowed:
            told.append(f"{file}: must be free of type errors and may not be in the baseline.")
    return told


def write_baseline(errors: Counter[str], baseline: Counter[str]) -> str:
    """The baseline's text with what got better; a count that rose keeps its old value."""
    lowered = {file: min(count, baseline[file]) for file, count in errors.items()}
    return "".join(f"{n} {file}\n" for file, n in sorted(lowered.items()) if n)


def main() -> int:
    """Exit status 0 when the errors are those of the baseline, 2 when mypy itself fails."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=HERE.parent, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        print(done.stdout + done.stderr, file=sys.stderr)
        return 2
    errors, baseline = count_errors(done.stdout), read_baseline(BASELINE.read_text())
    if "--write" in sys.argv[1:]:
        text = write_baseline(errors, baseline)
        BASELINE.write_text(text)
        baseline = read_baseline(text)
    told = compare(errors, baseline)
    worse = {file for file in errors if errors[file] > baseline[file]}
    print("\n".join(line for line in done.stdout.splitlines() if line.split(":")[0] in worse))
    print(
        "\n".join(told)
        or f"mypy: {errors.total()} known errors in {len(errors)} files, no new ones"
    )
    return bool(told)


if __name__ == "__main__":
    sys.exit(main())
