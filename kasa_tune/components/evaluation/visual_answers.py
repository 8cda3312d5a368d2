"""Short answers about images, held against those of several people, and letters of options.

Answers are normalized as the script of VQA v2 (Goyal et al. 2017, visualqa.org/evaluation.html) does
it. That script leaves the references' articles and number words as they are, and some versions of
it leave everything as it is where all people agree. Here both sides are always normalized.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ENOUGH = 3  # people who must have given an answer for it to count in full
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
# Words that the script brings to one spelling, wherever their apostrophes are left out.
_SPELLINGS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's i'd've isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've
    shouldn't shouldn't've that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {word.replace("'", ""): word for word in _SPELLINGS}


def vqa_normalized(text: str) -> str:
    """As the script of VQA compares answers: lower case, no articles, digits for the words up to ten, apostrophes in
    contractions, and no punctuation. A mark inside a word becomes a space, unless the same mark stands beside a space
    somewhere, or the text has a number such as 1,000.
    """
    text = " ".join(text.split())
    joined = _NUMBER_WITH_COMMA.search(text)
    spaced = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if beside_space or joined else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", spaced).lower().split()]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in kept)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """How many people gave this answer: ``min(n / 3, 1)``, n of all people but one, averaged over who is left out.

    Args:
        answer: the model's.
        references: of each person one; at least four, that the value may reach 1.
    """
    given = vqa_normalized(answer)
    same = [given == vqa_normalized(reference) for reference in references]
    total = sum(same)
    return sum(min((total - one) / ENOUGH, 1.0) for one in same) / len(same)


def chosen_letter(answer: str, texts: Sequence[str]) -> int | None:
    """Which option an answer names, from 0; None if it names none.

    It names one by its letter, alone or before a mark, as in ``B``, ``(b)`` and ``B. a dog``; by what follows "answer
    is"; or by the option's whole text.

    Args:
        answer: the model's.
        texts: of the options, called A, B and so on.
    """
    words = vqa_normalized(answer)
    for number, text in enumerate(texts):
        if words and words == vqa_normalized(text):
            return number
    said = re.fullmatch(r"\W*([A-Za-z])(?:\W*|\s*[.:),].*)", answer, re.DOTALL)
    said = said or re.search(r"\banswer is:?\s*\(?([A-Z])\b", answer)
    if said is None:
        return None
    number = ord(said[1].upper()) - ord("A")
    return number if number < len(texts) else None
