"""How long the sentences of the documentation are: README.md, CONTRIBUTING.md and docs/**/*.md.

    python benchmarks/prose.py                 # this checkout
    python benchmarks/prose.py /path/to/other  # another checkout

Headings, code blocks, tables, images and comments are left out. A paragraph and a list item end a sentence even
without a full stop. An inline code span counts as one word, and a link counts as its text.
"""

import argparse
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

LONG = 25  # words; longer sentences are counted separately
_LIST_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[*)\"]*\s+(?=[A-Z`*(\"\[0-9])")


def blocks(markdown: str) -> Iterator[str]:
    """The paragraphs and list items of `markdown`, each as one line."""
    markdown = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)
    markdown = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    lines: list[str] = []
    in_list = False
    for line in [*markdown.splitlines(), ""]:
        is_item = _LIST_ITEM.match(line) is not None
        is_code = line.startswith("    ") and not in_list and not lines
        is_prose = line.strip() and not is_code and not line.lstrip().startswith(("|", "#", "!["))
        if lines and (is_item or not is_prose):
            yield " ".join(lines)
            lines = []
        if line.startswith("#"):
            in_list = False
        if is_prose:
            in_list = is_item or (in_list and (bool(lines) or line.startswith(" ")))
            lines.append(_LIST_ITEM.sub("", line, count=1).strip() if is_item else line.strip())


def sentences(markdown: str) -> list[str]:
    """The sentences of `markdown`, without code, tables and headings."""
    found = []
    for block in blocks(markdown):
        text = re.sub(r"`[^`]*`", "`code`", block)
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
        found += _SENTENCE_END.split(text)
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def num_words(sentence: str) -> int:
    """Words of a sentence; a lone dash, an operator or a bracket is none."""
    return sum(re.search(r"\w", word) is not None for word in sentence.split())


def row(name: str, lengths: list[int]) -> str:
    """One line of the table."""
    if not lengths:
        return f"{name:<40} {0:>9}"
    ordered = sorted(lengths)
    ninetieth = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    too_long = sum(length > LONG for length in lengths)
    return f"{name:<40} {len(lengths):>9} {statistics.median(lengths):>7g} {ninetieth:>5} {too_long:>8}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1])
    root = parser.parse_args().root
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    print(f"{'words a sentence':<40} {'sentences':>9} {'median':>7} {'p90':>5} {f'over {LONG}':>8}")
    everything: list[int] = []
    for page in pages:
        lengths = [num_words(sentence) for sentence in sentences(page.read_text(encoding="utf-8"))]
        everything += lengths
        print(row(str(page.relative_to(root)), lengths))
    print(row("all", everything))


if __name__ == "__main__":
    main()
