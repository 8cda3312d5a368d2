"""Run a notebook's code cells in their order, and write what they print and show into the notebook.

    python docs/run_notebook.py docs/tutorial.ipynb

It needs no Jupyter. It knows what the tutorial needs: Python, lines that begin with ``!`` for the shell, and a value
on the last line that has a ``_repr_png_`` or a ``repr``. Jupyter runs the same notebook. A cell that fails ends it.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def shell(command: str) -> None:
    """Run a line of a cell as a command, and print what it says.

    Raises:
        RuntimeError: it fails.
    """
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = as_a_terminal(done.stdout.decode(errors="replace"))
    print(said, end="")
    if done.returncode:
        raise RuntimeError(f"`{command}` ended with {done.returncode}:\n{said}")


def as_a_terminal(text: str) -> str:
    """Return what stays on a terminal: of a line that is written again and again, the last state."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return "\n".join(lines)


def as_python(source: str) -> ast.Module:
    """Parse a cell. A line that begins with ``!`` is a call of :func:`shell`.

    Raises:
        SyntaxError: the cell is no Python.
    """
    lines = (
        f"__shell__({line[1:].strip()!r})" if line.startswith("!") else line
        for line in source.splitlines()
    )
    return ast.parse("\n".join(lines))


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell, and return its outputs in the notebook's format."""
    tree, printed, value = as_python(source), io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        lines = text.splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if value is not None:
        data: dict[str, Any] = {"text/plain": [repr(value)]}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode()
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def run_notebook(path: Path) -> None:
    """Run all code cells in a new folder, and write the notebook with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__shell__": shell, "__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for number, cell in enumerate(code, start=1):
                print(f"[{number}/{len(code)}]", file=sys.stderr, flush=True)
                cell["outputs"] = run_cell("".join(cell["source"]), names)
                cell["execution_count"] = number
        finally:
            os.chdir(before)
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text.replace(folder, "."), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", type=Path)
    run_notebook(parser.parse_args().notebook.resolve())
