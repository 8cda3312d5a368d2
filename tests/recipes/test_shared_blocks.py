"""Recipes are self-contained, so what they share is written out in each: word for word the same, and short."""

import re

import pytest

from .conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
BLOCK = re.compile(r"^( *)# --- shared: (?P<name>[^\n]+)\n(?P<body>.*?)^\1# --- end$", re.MULTILINE | re.DOTALL)


def blocks_of(text: str) -> dict[str, str]:
    """Name to content of every shared block of a recipe."""
    found = {match["name"]: match["body"] for match in BLOCK.finditer(text)}
    assert len(found) == text.count("# --- shared: ") == text.count("# --- end"), "a block has no end, or none begins"
    return found


def test_blocks_of_one_name_are_the_same_in_all_recipes():
    copies: dict[str, dict[str, str]] = {}
    for path in RECIPES:
        for name, body in blocks_of(path.read_text()).items():
            copies.setdefault(name, {})[path.name] = body
    finetuning = {f"{method}_finetune_single_device.py" for method in ("kasa", "corda", "qcorda")}
    assert finetuning == {path.name for path in RECIPES if "finetune" in path.name}
    assert copies.keys() >= {"data and resuming", "training loop"}
    for name, bodies in copies.items():
        assert bodies.keys() >= finetuning, f"{name} is shared with nobody"
        for recipe, body in bodies.items():
            assert body == bodies["kasa_finetune_single_device.py"], f"{name} of {recipe} went its own way"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) < 400


def test_a_difference_inside_a_block_would_be_seen():
    text = "class A:\n    # --- shared: x\n    a = 1\n    # --- end\n"
    assert blocks_of(text) == {"x": "    a = 1\n"}
    assert blocks_of(text) != blocks_of(text.replace("a = 1", "a = 2"))
    with pytest.raises(AssertionError, match="no end"):
        blocks_of(text.replace("    # --- end\n", ""))
