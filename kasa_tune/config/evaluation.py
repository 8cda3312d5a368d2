"""The schema of `evaluate_model`."""

from dataclasses import replace
from typing import Literal

from kasa_tune.config.bounds import COUNT, NOT_EMPTY, SCALE
from kasa_tune.config.entries import (
    Check,
    Component,
    FilePath,
    Key,
    OneOrMany,
    Schema,
    Section,
    at_least,
)
from kasa_tune.config.parts import (
    CHECKPOINT_DIR,
    CHECKPOINTER,
    DEVICE,
    DTYPE,
    MODEL,
    SEED,
    TOKENIZER,
)

_DECODING = Literal[
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "length_penalty",
    "no_repeat_ngram_size",
    "early_stopping",
    "stop_tokens",
]
_CONFIDENCE = Check("above 0 and below 1", lambda value: 0 < value < 1)
TASK = Component(
    values={
        "name": Key(str, check=NOT_EMPTY, help="the task's name in the results"),
        "data_file": Key(
            FilePath, help="a local file of JSON Lines or JSON; for `Perplexity` also a text file"
        ),
        "limit": Key(int | None, None, COUNT, help="only take so many rows; null: all"),
        "measures": Key(
            Literal["learned", "kept"],
            None,
            help="whether the task is what was fine-tuned for (learned), or what should not be "
            "forgotten (kept); results.json and the printed table sum up both",
        ),
        "prompt": Key(
            str | None,
            help="the text that is completed, with columns of the data in braces; "
            "null: the task's usual one",
        ),
        "chat": Key(
            bool,
            help="put prompts into the tokenizer's form of a user's message, as in training; "
            "False: take them as they are",
        ),
        "max_new_tokens": Key(int, check=COUNT, help="the most tokens of an answer"),
        "stop": Key(list[str] | None, help="texts before which an answer ends"),
        "decoding": Key(
            dict[_DECODING, int | float | bool | list[int]],
            None,
            help="how tokens are chosen, in transformers' words; null: greedily "
            "(docs/evaluation.md)",
        ),
        "num_samples": Key(int, check=COUNT, help="`CodeProblems`: programs for each problem"),
        "seconds": Key(float, check=SCALE, help="`CodeProblems`: time limit of a program"),
        "memory_mib": Key(int, check=COUNT, help="`CodeProblems`: memory limit of a program"),
        "num_processes": Key(
            int, check=at_least(1, 1024), help="`CodeProblems`: programs that run at a time"
        ),
    },
    help="a task of `kasa_tune.components.evaluation`, and what it takes (docs/evaluation.md)",
)
_OF_RUN = " Null: as the first run of `adapters` says, or the folder `checkpoint_dir`"
EVALUATE: Schema = {
    "checkpoint_dir": CHECKPOINT_DIR,
    "output_dir": Key(FilePath, help="folder for `results.json` and all answers"),
    "tokenizer": replace(TOKENIZER, default=None, help=f"{TOKENIZER.help}.{_OF_RUN}"),
    "model": replace(
        MODEL,
        default=None,
        help="a builder of the model, of torchtune or with adapters of ours, which are left out: "
        f"each adapter's checkpoint says what it is.{_OF_RUN}",
    ),
    "checkpointer": replace(
        CHECKPOINTER,
        default=None,
        help=f"reads the base model's weights, or those of a merged model.{_OF_RUN}",
    ),
    "adapters": Key(
        dict[str, FilePath] | None,
        None,
        help="what is measured besides the base: names of your choice, each with a run's "
        "`output_dir`, one of its checkpoints, or a native adapter",
    ),
    "tasks": OneOrMany(TASK, help="what is measured (docs/evaluation.md)"),
    "bootstrap": Section(
        {
            "num_resamples": Key(
                int, 1000, at_least(0, 1_000_000), help="resamples for intervals; 0: no intervals"
            ),
            "confidence": Key(
                float, 0.95, _CONFIDENCE, help="share of the resamples inside an interval"
            ),
        },
        help="confidence intervals of all numbers, and of paired differences to the base",
    ),
    "seed": SEED,
    "batch_size": Key(
        int, 16, COUNT, help="number of prompts or texts in a forward pass; beams multiply it"
    ),
    "device": replace(DEVICE, help="device to evaluate on"),
    "dtype": replace(
        DTYPE, default=None, help="precision of the base model; null: that of the run, or bf16"
    ),
}
