"""One process after another, also when who started the first has been killed."""

import subprocess
import sys
import time

SCRIPT = """
import sys
from pathlib import Path
from kasa_tune.components.processes.child import Children
log, work = sys.argv[1:]
children = Children()
told = lambda: print("waiting", flush=True)
status, gib = children.run([sys.executable, "-c", work], Path(log), waiting=told)
print(status, gib > 0, flush=True)
"""
FIRST = """
import time
from pathlib import Path
print("first begins", flush=True)
while not Path({!r}).exists():
    time.sleep(0.02)
print("first ends")
"""
SECOND = "print('second'); raise SystemExit(7)"


def parent(log, work):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(log), work], stdout=subprocess.PIPE, text=True
    )


def test_the_child_of_a_killed_parent_is_waited_for(tmp_path):
    log, go = tmp_path / "log.txt", tmp_path / "go"
    killed = parent(log, FIRST.format(str(go)))
    while not log.exists() or "begins" not in log.read_text():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    second = parent(log, SECOND)
    assert second.stdout.readline() == "waiting\n"
    go.touch()
    said, _ = second.communicate(timeout=60)
    assert said == "7 True\n"
    assert log.read_text().splitlines() == ["first begins", "first ends", "second"]
