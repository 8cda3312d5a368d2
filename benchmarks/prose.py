"""How long the sentences of the documentation are: README.md, CONTRIBUTING.md and docs/**/*.md.

    python benchmarks/prose.py                 # this checkout
    python benchmarks/prose.py /path/to/other  # another checkout
    python benchmarks/prose.py --python        # docstrings and comments, by room

Headings, code blocks, tables, images and comments are left out. A paragraph and a list item end a
sentence even without a full stop. An inline code span counts as one word, and a link counts as its
text. An entry of a docstring's section (`name: text`) counts without the name.

With `--python`, the last columns count the public functions whose signature names a tensor, and how
many of them have a docstring that gives a shape, such as `(d_out, rank)`, `[b, s]`, "scalar" or
"any shape".
"""

import argparse
import ast
import inspect
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

LONG = 25  # words; longer sentences are counted separately
_LIST_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Note|Shape|Example|Examples):$")
_ENTRY = re.compile(r"^ {4}(\*{0,2}[\w.]+(?:, \*{0,2}\w+)*(?: \([^)]*\))?:\s+)?(?=\S)")
_SHAPE = re.compile(
    r"[(\[]\s*[\w.]+(?:\s*[,+*/]\s*\w*)+\s*[)\]]|\[\w+\]|\bscalars?\b|\bany shapes?\b"
)
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


def docstring_blocks(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring and the entries of its sections, each as Markdown text."""
    in_section, entry = False, ""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        rest: list[str] = []
        for line in paragraph.splitlines():
            if _SECTION.match(line):
                in_section = True
            elif in_section and line.startswith("    "):
                starts = line[4:5] != " " and _ENTRY.match(line)
                if starts and starts[1]:
                    yield entry
                    entry = line[starts.end() :]
                else:
                    entry += " " + line.strip()
            else:
                in_section = False
                rest.append(line)
        yield entry
        entry = ""
        yield "\n".join(rest)


def comments(source: str) -> Iterator[str]:
    """The comments of a Python file. Comments on consecutive lines are one. Directives are left
    out.
    """
    text, last = "", 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(
            r"#(!|: |\s*(noqa|type:))", token.string
        ):
            if token.start[0] != last + 1:
                yield text
                text = ""
            text, last = f"{text} {token.string.lstrip('# ')}", token.start[0]
    yield text


def documented(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """The nodes of a Python file that may have a docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield node


def tensor_functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """The public functions and methods whose signature names `Tensor`, nested functions
    left out.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from tensor_functions(node)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            signature = ast.unparse(node.args) + " -> " + ast.unparse(node.returns or ast.Tuple([]))
            if re.search(r"\bTensor\b", signature):
                yield node


def measure_python(root: Path) -> None:
    """Print the table of docstrings and comments by room."""
    rooms: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("kasa_tune/**/*.py"), *root.glob("recipes/*.py")]):
        rooms.setdefault(str(path.relative_to(root).parent), []).append(path)
    header = (
        f"{'words a sentence':<40} {'sentences':>9} {'median':>7} {'p90':>5} {f'over {LONG}':>8}"
    )
    print(f"{header} {'tensor fns':>11} {'with shape':>11} {'lines > 100':>12}")
    total: list[int] = []
    counts = [0, 0, 0]
    for room, paths in rooms.items():
        lengths, room_counts = [], [0, 0, 0]
        for path in paths:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
            docstrings = [ast.get_docstring(node, clean=False) for node in documented(tree)]
            prose = [block for text in docstrings if text for block in docstring_blocks(text)]
            prose += comments(source)
            for block in prose:
                text = re.sub(r"``[^`]*``|:\w+:`[^`]*`", "`code`", block)
                lengths += [num_words(sentence) for sentence in sentences(text)]
            found = list(tensor_functions(tree))
            room_counts[0] += len(found)
            room_counts[1] += sum(
                bool(_SHAPE.search(ast.get_docstring(node) or "")) for node in found
            )
            room_counts[2] += sum(len(line) > 100 for line in source.splitlines())
        total += lengths
        counts = [a + b for a, b in zip(counts, room_counts)]
        print(row(room, lengths) + "{:>12} {:>11} {:>12}".format(*room_counts))
    print(row("all", total) + "{:>12} {:>11} {:>12}".format(*counts))


def num_words(sentence: str) -> int:
    """Count the words of a sentence. A lone dash, an operator or a bracket is none."""
    return sum(re.search(r"\w", word) is not None for word in sentence.split())


def row(name: str, lengths: list[int]) -> str:
    """Make one line of the table."""
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
    parser.add_argument("--python", action="store_true", help="docstrings and comments, by room")
    args = parser.parse_args()
    root = args.root
    if args.python:
        measure_python(root)
        return
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
