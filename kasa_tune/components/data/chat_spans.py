"""Where the turns of the assistant lie in a rendered conversation, and where they lie among its tokens.

Templates only know whole conversations, so where a turn begins and ends follows from rendering what comes before it.
Doing that for every turn would cost the square of a conversation's length. Here a turn is rendered behind a short
beginning of the conversation instead, and the text it adds is compared with what stands in the whole text. Where that
differs, all that comes before the turn is rendered.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

Turn = Mapping[str, Any]  # role, content and whatever else a template may read
Render = Callable[..., list[str]]  # (*(dialogue, add_generation_prompt)) -> one text each


def assistant_spans(
    dialogue: Sequence[Turn], text: str, render: Render
) -> Iterator[tuple[int, int]]:
    """Begin and end in ``text`` of what each assistant turn adds to the conversation before it, one after the other.

    Args:
        dialogue: the conversation.
        text: its rendering; the last turn may be left open.
        render: renders beginnings of the conversation, each given as (turns, whether to open an assistant turn).

    Raises:
        ValueError: the beginning of the conversation is rendered differently once it goes on.
    """
    answers = [i for i, turn in enumerate(dialogue) if turn["role"] == "assistant"]
    if not answers:
        return
    before = [_shortened(turn) for turn in dialogue[: answers[0] + 1]]
    span, is_sure = _in_full(dialogue, answers[0], text, render), True
    for answer, following in zip(answers, [*answers[1:], len(dialogue)], strict=True):
        turns = dialogue[answer + 1 : following + 1]
        reaches_end = following >= len(dialogue) - 1
        found = _behind(before, turns, text, span[1], reaches_end, render)
        if found is None and not is_sure:  # perhaps the text of this answer ends elsewhere
            span = _in_full(dialogue, answer, text, render)
            found = _behind(before, turns, text, span[1], reaches_end, render)
        yield span
        if following < len(dialogue):
            is_sure = found is None
            span = found or _in_full(dialogue, following, text, render)


def _behind(
    before: Sequence[Turn],
    turns: Sequence[Turn],
    text: str,
    position: int,
    reaches_end: bool,
    render: Render,
) -> tuple[int, int] | None:
    """The span of the last of ``turns``, if ``text`` holds at ``position`` what they add to ``before``, else None."""
    if not turns:
        return (position, position) if position == len(text) else None
    try:
        base, opened, closed = render(
            (before, False), ([*before, *turns[:-1]], True), ([*before, *turns], False)
        )
    except ValueError:
        return None
    opened = opened.rstrip(" ") if turns[-1]["role"] == "assistant" else base
    added = closed[len(base) :]
    end = position + len(added)
    appends = closed.startswith(opened) and opened.startswith(base)
    fits = text.startswith(added, position) and (end == len(text) or not reaches_end)
    return (position + len(opened) - len(base), end) if appends and fits else None


def _in_full(dialogue: Sequence[Turn], i: int, text: str, render: Render) -> tuple[int, int]:
    if i == len(dialogue) - 1:
        (opened,), closed = render((dialogue[:i], True)), text
    else:
        opened, closed = render((dialogue[:i], True), (dialogue[: i + 1], False))
    opened = opened.rstrip(" ")
    if not (closed.startswith(opened) and text.startswith(closed)):
        raise ValueError(
            f"The chat template renders the conversation up to message {i} differently once message {i} is "
            "answered or followed by others, so it cannot be told which tokens to learn. "
            "Set chat_template_path to a template that only appends."
        )
    return len(opened), len(closed)


def _shortened(turn: Turn) -> Turn:
    return {**turn, "content": "x"} if isinstance(turn["content"], str) else turn


class SeamEncoder:
    """Tokenizes a text as a whole, except where a token would reach across a seam: there the text is cut.

    Generation starts from exactly the tokens before a seam, so a seam must lie between two tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # The text on both sides of such a token is tokenized by itself, whatever it is.
        self._dividers = {
            id_
            for id_, token in tokenizer.get_added_tokens_decoder().items()
            if not (token.normalized or token.single_word)
        }

    def encode(
        self, text: str, seams: Iterable[int], limit: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of a text, and the number of ids before each seam (a position in the text).

        Seams behind the first ``limit`` ids may be left out.
        """
        ids: list[int] = []
        cuts: list[int] = []
        islands = self._islands(text)
        rest, start, end = next(islands)
        first, last, matched = start, start, 0  # rest[:matched] are the ids of text[start:last]
        for seam in seams:
            while seam > end:
                ids += rest
                rest, start, end = next(islands)
                first, last, matched = start, start, 0
            if limit is not None and len(ids) >= limit:
                break
            piece = self._piece(text[last:seam], first=last == first)
            if rest[matched : matched + len(piece)] == piece:
                matched += len(piece)
            else:
                head = self._piece(text[start:seam], first=start == first)
                matched = len(head)
                if rest[:matched] != head:
                    ids += head
                    rest, start, matched = self._piece(text[seam:end], first=False), seam, 0
            cuts.append(len(ids) + matched)
            last = max(last, seam)
        ids += rest
        for rest, _, _ in islands:
            ids += rest
        return ids, cuts

    def _islands(self, text: str) -> Iterator[tuple[list[int], int, int]]:
        """Parts of a text that are tokenized each by itself: ids, begin and end in the text."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        token = position = 0
        for i, id_ in enumerate(ids):
            if id_ in self._dividers and i > token:
                yield ids[token:i], position, offsets[i][0]
                token, position = i, offsets[i][0]
        yield ids[token:], position, len(text)

    def _piece(self, text: str, *, first: bool) -> list[int]:
        """Ids of a piece; a later piece must not get the space that SentencePiece-like tokenizers put before a text."""
        if first:
            return self._ids(text)
        marker, marked = self._ids("\n"), self._ids("\n" + text)
        joined = marked[: len(marker)] != marker
        return self._ids(text) if joined else marked[len(marker) :]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids
