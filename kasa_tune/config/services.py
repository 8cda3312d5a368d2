"""The schemas of `synthesize_data` and `judge_responses`, which ask a model behind an address."""

from typing import Any, Literal

from kasa_tune.config.bounds import COUNT, NOT_EMPTY, NOT_NEGATIVE, RATIO, SEEDS, TEMPERATURE
from kasa_tune.config.entries import FilePath, Key, Schema, Section, above, at_least

_PROMPTS = "kasa_tune://prompts"
_TOKENS = at_least(1, 10**15)


def _endpoint(max_tokens: int, temperature: float | None) -> Section:
    return Section(
        {
            "base_url_env": Key(
                str,
                "OPENAI_BASE_URL",
                help="name of the environment variable with the server's address, such as "
                "http://127.0.0.1:8000/v1",
            ),
            "api_key_env": Key(
                str | None,
                "OPENAI_API_KEY",
                help="name of the environment variable with the key; null: the server takes none",
            ),
            "model": Key(str, check=NOT_EMPTY, help="the model's name, as the server calls it"),
            "temperature": Key(
                float | None, temperature, TEMPERATURE, help="null: the server's default"
            ),
            "max_tokens": Key(int, max_tokens, COUNT, help="the most tokens of an answer"),
            "extra": Key(
                dict[str, Any] | None, None, help="further keys of each request, such as top_p"
            ),
            "send_seed": Key(
                bool,
                True,
                help="send each call a seed of its own; False for servers that refuse it",
            ),
            "num_workers": Key(int, 4, at_least(1, 1024), help="calls at a time"),
            "requests_per_minute": Key(
                float | None, None, above(0, 1_000_000), help="calls started in a minute; null: any"
            ),
            "max_retries": Key(
                int,
                6,
                at_least(0, 100),
                help="repetitions of a call that failed in a way that may pass (429, 5xx, time-outs "
                "...), with longer and longer waits",
            ),
            "max_attempts": Key(
                int, 10, at_least(1, 100), help="answers to a question until one can be used"
            ),
            "timeout": Key(
                float, 120.0, above(0, 86_400), help="seconds until an answer is complete"
            ),
            "max_reply_bytes": Key(
                int, 1 << 22, at_least(1024, 1 << 30), help="the most bytes of an answer"
            ),
        },
        help="an OpenAI-compatible server (docs/synthesis.md)",
    )


_BUDGET = Section(
    {
        "max_calls": Key(
            int | None,
            None,
            _TOKENS,
            help="the most answers, those of earlier runs into `output_dir` included; null: any number",
        ),
        "max_tokens": Key(
            int | None, None, _TOKENS, help="the most tokens of prompts and answers together"
        ),
        "prompt_price": Key(
            float, 0.0, NOT_NEGATIVE, help="of a million tokens of prompts, for a dry run"
        ),
        "completion_price": Key(
            float, 0.0, NOT_NEGATIVE, help="of a million tokens of answers, for a dry run"
        ),
    },
    help="what calls may cost; a run that has spent it ends with status 3 and can be gone on with",
)
_DRY_RUN = Key(bool, False, help="count and price the calls, and make none")

SYNTHESIZE: Schema = {
    "output_dir": Key(FilePath, help="folder for the journal of answers, the rows and the counts"),
    "seeds": Key(
        FilePath, help="JSON Lines with pairs to write similar ones to (docs/synthesis.md)"
    ),
    "num_seeds": Key(int | None, None, COUNT, help="only take so many of them; null: all"),
    "tests": Key(
        FilePath | None,
        None,
        help="pairs that no row may be similar to; null: contamination is not looked for",
    ),
    "template": Key(FilePath, f"{_PROMPTS}/synthesis.txt", help="text file of the prompt"),
    "topic": Key(str, "as in the example", help="fills `$topic` of the template"),
    "category": Key(str, "", help="what the rows say of themselves"),
    "num_rows": Key(int, check=at_least(1, 10_000_000), help="rows wanted"),
    "rows_per_prompt": Key(int, 5, at_least(1, 100), help="rows that one call asks for"),
    "deduplication": Section(
        {
            "minhash": Key(
                float | None,
                0.8,
                RATIO,
                help="Jaccard similarity of 5-character shingles from which on two rows count as one; "
                "null: not compared. It needs the extra `synthesis`",
            ),
            "rouge_l": Key(
                float | None,
                None,
                RATIO,
                help="ROUGE-L F1 of two instructions from which on they count as one; Self-Instruct: 0.7; "
                "null: not compared",
            ),
            "num_permutations": Key(int, 128, at_least(16, 1024), help="of the MinHash index"),
        },
        help="when two rows count as one; equal instructions always do",
    ),
    "seed": Key(int, 42, SEEDS, help="seed of the draws"),
    "endpoint": _endpoint(2048, None),
    "budget": _BUDGET,
    "dry_run": _DRY_RUN,
}

JUDGE: Schema = {
    "output_dir": Key(FilePath, help="folder for the journal of verdicts and the scores"),
    "protocol": Key(
        Literal["single", "mt_bench", "pairwise"],
        "single",
        help="single: similarity and precision of each answer; mt_bench: a rating of each turn; "
        "pairwise: which of two models' answers is better, in both orders",
    ),
    "evaluations": Key(
        list[FilePath],
        help="output folders of evaluate_model; several give several answers to each prompt",
    ),
    "tasks": Key(list[str], help="names of their tasks to judge, a row of the table each"),
    "models": Key(
        list[str] | None, None, help="whose answers are judged; pairwise: two; null: all there are"
    ),
    "questions": Key(
        FilePath | None, None, help="mt_bench: FastChat's question.jsonl, with turns and categories"
    ),
    "references": Key(
        FilePath | None, None, help="mt_bench: reference answers in FastChat's layout"
    ),
    "templates": Key(FilePath, f"{_PROMPTS}/judge", help="folder of the judge's prompts"),
    "scale": Key(
        Literal[10, 100],
        10,
        help="single: the highest score; the paper reports 10, LlamaDuo asks for 100",
    ),
    "repeats": Key(int, 1, at_least(1, 100), help="verdicts on each answer, for their agreement"),
    "limit": Key(int | None, None, COUNT, help="only judge so many answers of a task and model"),
    "seed": Key(int, 42, SEEDS, help="seed of the waits, and sent with the calls"),
    "endpoint": _endpoint(2048, 0.0),
    "budget": _BUDGET,
    "dry_run": _DRY_RUN,
}
