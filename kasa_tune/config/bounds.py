"""The bounds of values in our schemas; which key has which, parts.py and schemas.py say."""

import os
import re

from kasa_tune.config.entries import Check, above, at_least

POSITIVE, NOT_NEGATIVE = at_least(1), at_least(0)
# Bounds above every value that has a use, and below those that no machine has room for.
COUNT = at_least(1, 1_000_000)
SEEDS = at_least(0, 2**32 - 1)  # what NumPy's generators take
WEIGHT = at_least(0, 1_000_000)
SCALE = above(0, 1_000_000)
FRACTION = Check("at least 0 and below 1", lambda value: 0 <= value < 1)
RATIO = Check("between 0 and 1", lambda value: 0 <= value <= 1)
TWO_FRACTIONS = Check("each at least 0 and below 1", lambda values: all(map(FRACTION, values)))
ONE_DEVICE = Check(
    "cpu, cuda or cuda:<index>",
    lambda value: re.fullmatch(r"cpu|cuda(:\d{1,3})?", value) is not None,
)
BF16_OR_FP32 = Check(
    "bf16 or fp32",
    lambda value: value in ("bf16", "fp32"),
    dict.fromkeys(
        ("fp16", "float16", "half"),
        "fp16 needs gradient scaling, which the recipes do not do; use bf16 or fp32",
    ),
)
EVEN = Check("even and at least 2, at most 1000000", lambda v: 2 <= v <= 1_000_000 and v % 2 == 0)
TOLERANCE = Check("above 0 and below 1", lambda value: 0 < value < 1)
SHARD_SIZE = Check(
    "as 5GB or 500MB", lambda value: re.fullmatch(r"[1-9]\d{0,8}(KB|MB|GB)", value) is not None
)
NOT_EMPTY = Check("not empty", lambda value: bool(value.strip()))
FILE_NAME = Check(
    "the name of a file without a folder",
    lambda value: os.path.basename(value) == value and value not in ("", ".", "..", "config.yaml"),
    {"config.yaml": "the run's config is written there"},
)
TEMPERATURE = Check(
    "0, or at least 0.001 and at most 1000", lambda value: value == 0 or 0.001 <= value <= 1000
)
BY_RESUME = Check(
    "which must be False",
    lambda value: not value,
    {"True": "resume_from_checkpoint of the top level decides"},
)
NO_STREAM = Check(
    "which must be False",
    lambda value: not value,
    {"True": "the number of samples must be known; leave it out"},
)
