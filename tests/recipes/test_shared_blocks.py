"""Recipes are self-contained, so what they share is written out in each: word for word the same, and short."""

import re

import pytest

from .conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
BLOCK = re.compile(
    r"^( *)# --- shared: (?P<name>[^\n]+)\n(?P<body>.*?)^\1# --- end$", re.MULTILINE | re.DOTALL
)


def blocks_of(text: str) -> dict[str, str]:
    """Name to content of every shared block of a recipe."""
    found = {match["name"]: match["body"] for match in BLOCK.finditer(text)}
    assert len(found) == text.count("# --- shared: ") == text.count("# --- end"), (
        "a block has no end, or none begins"
    )
    return found


@pytest.mark.parametrize(
    ("kind", "prefix"), [("single_device", ""), ("distributed", "distributed ")]
)
def test_blocks_of_one_name_are_the_same_in_all_recipes(kind, prefix):
    copies: dict[str, dict[str, str]] = {}
    finetuning = [
        ROOT / "recipes" / f"{method}_finetune_{kind}.py" for method in ("kasa", "corda", "qcorda")
    ]
    assert sorted(finetuning) == [path for path in RECIPES if path.stem.endswith(kind)]
    for path in finetuning:
        for name, body in blocks_of(path.read_text()).items():
            copies.setdefault(name, {})[path.name] = body
    assert copies.keys() == {f"{prefix}data and resuming", f"{prefix}training loop"}
    for name, bodies in copies.items():
        assert bodies.keys() == {path.name for path in finetuning}, f"{name} is shared with nobody"
        for recipe, body in bodies.items():
            assert body == bodies[finetuning[0].name], f"{name} of {recipe} went its own way"


def test_no_other_recipe_has_blocks():
    assert not any(blocks_of(path.read_text()) for path in RECIPES if "finetune" not in path.name)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) < (500 if path.stem.endswith("distributed") else 400)


def test_a_difference_inside_a_block_would_be_seen():
    text = "class A:\n    # --- shared: x\n    a = 1\n    # --- end\n"
    assert blocks_of(text) == {"x": "    a = 1\n"}
    assert blocks_of(text) != blocks_of(text.replace("a = 1", "a = 2"))
    with pytest.raises(AssertionError, match="no end"):
        blocks_of(text.replace("    # --- end\n", ""))
