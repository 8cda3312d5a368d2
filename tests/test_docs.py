"""The pages of the documentation against the repository: links, anchors, and the names in commands."""

import re
from pathlib import Path

import pytest

from kasa_tune import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
}


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page, re.MULTILINE)
    kept = (re.sub(r"[^\w\s-]", "", heading.strip().lower()) for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in kept}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", PAGES)
def test_commands_name_what_there_is(name):
    scripts = re.findall(r"\b((?:benchmarks|tests)/[\w/]+\.py)", PAGES[name])
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    recipes = {recipe.name for recipe in registry.recipes()}
    configs = {shipped.name for shipped in registry.configs()}
    for recipe, config in re.findall(
        r"^    .*tune run .*?(\w+) --config (\S+)", PAGES[name], re.MULTILINE
    ):
        assert recipe in recipes or recipe == "py", recipe
        assert config in configs or config.endswith(".yaml"), config


def test_every_page_is_linked():
    linked = {
        ((ROOT / name).parent / link.partition("#")[0]).resolve()
        for name, text in PAGES.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if not link.startswith("http")
    }
    assert [
        name for name in PAGES if (ROOT / name).resolve() not in linked and name != "README.md"
    ] == []
