"""Pairs of an instruction and a response made from a few seeds: prompts, parsing, duplicates, contamination, counts.

It imports no torch.
"""

from kasa_tune.components.synthesis.duplicates import Likeness, Similar
from kasa_tune.components.synthesis.pairs import Pair, read_pairs
from kasa_tune.components.synthesis.parsing import ParsedReply, parse_reply
from kasa_tune.components.synthesis.rows import Counts, write_rows
from kasa_tune.components.synthesis.synthesizer import Synthesizer

__all__ = [
    "Counts",
    "Likeness",
    "Pair",
    "ParsedReply",
    "Similar",
    "Synthesizer",
    "parse_reply",
    "read_pairs",
    "write_rows",
]
