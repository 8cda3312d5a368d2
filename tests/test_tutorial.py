"""The tutorial, its notebook, and the picture of the README: commands can be run, and what is shown is current."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from kasa_tune import config, registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]


def script(path):
    """A script that no package holds."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(text, start):
    """The recipe, config and overrides of each command in a text, whose lines a backslash may join."""
    found = re.findall(
        rf"^{start}(?:kasa-tune|tune) run (.*)", text.replace("\\\n", " "), re.MULTILINE
    )
    split = [shlex.split(line, comments=True) for line in found]
    return [(words[0], words[2], words[3:]) for words in split if words[1] == "--config"]


OF_PAGE = commands(PAGE, r"    \$? ?")
OF_NOTEBOOK = commands("\n".join(SOURCES), "!")


@pytest.mark.parametrize(
    ("recipe", "name", "overrides"), OF_PAGE + OF_NOTEBOOK, ids=lambda value: str(value)[:30]
)
def test_commands_are_valid(recipe, name, overrides):
    assert recipe in {found.name for found in registry.recipes()}
    if "model.rnk=4" in overrides:  # of which the page shows what is said
        with pytest.raises(config.ConfigError) as refused:
            config.load(name, overrides, check_files=False)
        said = [line.strip() for line in str(refused.value).splitlines()[1:]]
        assert len(said) == 2
        assert all(line in PAGE for line in said)
    elif not name.endswith(".yaml"):  # those of a run are written by it
        config.load(name, overrides, check_files=False)


def test_the_notebook_does_what_the_page_does():
    tiny = {(recipe, name) for recipe, name, _ in OF_PAGE if name.startswith("tiny_")}
    assert len(tiny) >= 4
    assert tiny <= {(recipe, name) for recipe, name, _ in OF_NOTEBOOK}


def test_the_notebook_is_executed_and_without_errors():
    assert NOTEBOOK["nbformat"] == 4
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "Traceback" not in json.dumps(outputs)


@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_cells_are_python(source):
    script("docs/run_notebook.py").as_python(source)


def test_a_notebook_is_run(tmp_path):
    """Cells share their names; what is printed, shown and said by commands is kept."""
    cells = [
        "x = 20\nprint('one')\n!printf '1%%\\r50%%\\r99%%\\ntwo\\n'",
        "class P:\n    def _repr_png_(self):\n        return b'png'\nP()",
        "x + 1",
        "",
    ]
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    content = {"cells": [{**code, "source": [cell]} for cell in cells], "nbformat": 4}
    path = tmp_path / "some.ipynb"
    path.write_text(json.dumps(content))
    script("docs/run_notebook.py").run_notebook(path)
    first, second, third, empty = json.loads(path.read_text())["cells"]
    assert first["outputs"][0]["text"] == ["one\n", "99%\n", "two\n"]
    assert second["outputs"][0]["data"]["image/png"] == "cG5n"
    assert third["outputs"][0]["data"]["text/plain"] == ["21"]
    assert empty["outputs"] == []
    assert [cell["execution_count"] for cell in (first, second, third, empty)] == [1, 2, 3, 4]
    content["cells"][0]["source"] = ["!exit 3"]
    path.write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="`exit 3` ended with 3"):
        script("docs/run_notebook.py").run_notebook(path)


def test_the_picture_shows_the_table():
    picture = script("benchmarks/readme_picture.py")
    drawn = picture.PICTURE.read_text(encoding="utf-8")
    figures = picture.read_table(picture.TABLE.read_text(encoding="utf-8"))
    assert picture.draw(figures) == drawn, "run python benchmarks/readme_picture.py"
    row = next(line for line in picture.TABLE.read_text().splitlines() if "| LoRA |" in line)
    cells = [cell.strip() for cell in row.split("|")]
    loss, kept = (float(cells[i].partition(" ± ")[0]) for i in (4, 6))
    assert figures["LoRA"][::2] == (loss, kept)
    point = re.search(r'cx="([\d.]+)" cy="([\d.]+)"[^>]*/><text[^>]*>LoRA<', drawn)
    x, y = map(float, point.groups())
    ticks = {
        text: (float(x), float(y))
        for x, y, text in re.findall(
            r'class="axis" x="([\d.]+)" y="([\d.]+)" [^>]*>([\d.]+%?)</text>', drawn
        )
    }
    low, high = ticks["0.40"][0], ticks["0.20"][0]
    assert (x - low) / (high - low) == pytest.approx((0.4 - loss) / 0.2, abs=0.003)
    bottom, top = ticks["0%"][1] - 5, ticks["100%"][1] - 5
    assert (y - bottom) / (top - bottom) == pytest.approx(kept, abs=0.003)
