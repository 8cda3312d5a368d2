"""Kills synthesize_data at random moments and looks at what it asks again, and at the set that comes out.

    python benchmarks/synthesis_kills.py                                # 20 kills, about a minute
    python benchmarks/synthesis_kills.py --kills 200 --seed 3

A run is started again after each kill. The server counts how often each call comes. A call whose answer is in the
journal must not come again, and the set must be that of a run that nobody killed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kasa_tune.tiny_world.endpoint import Server

ROOT = Path(__file__).resolve().parents[1]
DELAY, WORKERS = 0.04, 4


@dataclass
class Killed:
    """What was found.

    Args:
        kills: runs that were killed while they ran.
        answered: calls in the journal at the end.
        repeated: answered calls that came again after a kill. It must be 0.
        in_flight: calls under way at a kill, which had to be made again.
        torn: kills that left half a line in the journal.
        equal: whether the rows are those of a run that nobody killed, byte for byte.
    """

    kills: int = 0
    answered: int = 0
    repeated: int = 0
    in_flight: int = 0
    torn: int = 0
    equal: bool = False


def start(folder: Path, server: Server, num_rows: int) -> subprocess.Popen:
    """Start a run."""
    environment = os.environ | {
        "OPENAI_BASE_URL": server.base_url,
        "OPENAI_API_KEY": "none",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "kasa_tune", "run", "synthesize_data"]
    command += ["--config", "tiny_synthesize", f"output_dir={folder}", f"num_rows={num_rows}"]
    command += ["deduplication.minhash=null", f"endpoint.num_workers={WORKERS}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, **quiet)


def journaled(folder: Path) -> tuple[set[str], bool]:
    """The keys of whole lines, and whether there is half a line besides."""
    path = folder / "journal.jsonl"
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    keys = {json.loads(line)["key"] for line in content[:whole].splitlines()}
    return keys, whole < len(content)


def kill_at_random(folder: Path, kills: int, num_rows: int, seed: int, longest: float) -> Killed:
    """Kill a run so many times, let it end, and compare.

    Args:
        folder: for the runs.
        kills: how many.
        num_rows: rows wanted.
        seed: of the moments.
        longest: seconds after the start of a run, until which it is killed.
    """
    rng, found = random.Random(seed), Killed()
    with Server(delay=DELAY).start() as server:
        snapshots = []
        while found.kills < kills:
            run = start(folder / "killed", server, num_rows)
            time.sleep(rng.uniform(0.2, longest))
            if run.poll() is not None:
                raise SystemExit("The run ended before its kill: raise num_rows.")
            run.send_signal(signal.SIGKILL)
            run.wait()
            found.kills += 1
            time.sleep(3 * DELAY)  # until the server is done with what was under way
            keys, torn = journaled(folder / "killed")
            found.torn += torn
            snapshots.append({key: server.received[key] for key in keys})
        if start(folder / "killed", server, num_rows).wait():
            raise SystemExit("The last run failed.")
        found.repeated = sum(
            server.received[key] > count for seen in snapshots for key, count in seen.items()
        )
        found.answered = len(journaled(folder / "killed")[0])
        found.in_flight = sum(server.received.values()) - found.answered
    with Server().start() as server:
        start(folder / "whole", server, num_rows).wait()
    rows = [(folder / name / "rows.jsonl").read_bytes() for name in ("killed", "whole")]
    found.equal = rows[0] == rows[1] and rows[0].count(b"\n") == num_rows
    return found


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(kill_at_random(Path(folder), args.kills, args.rows, args.seed, longest=2.0))


if __name__ == "__main__":
    main()
