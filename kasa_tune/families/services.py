"""The text of the configs that ask a model behind an address: synthesis and the judge."""

from __future__ import annotations

from collections.abc import Iterator

from kasa_tune.families.headers import paragraph

_ENDPOINT = """\
endpoint:
  base_url_env: OPENAI_BASE_URL  # environment variables: the address, such as http://127.0.0.1:8000/v1,
  api_key_env: OPENAI_API_KEY  # and the key; null: the server takes none
  model: {model}
  temperature: {temperature}
  max_tokens: 2048
  num_workers: {workers}
  requests_per_minute: {rate}
  max_attempts: {attempts}  # answers to a question until one can be used
  timeout: 120.0
budget:
  max_calls: null
  max_tokens: null
  prompt_price: {prices[0]}  # of a million tokens; put the price of your model here
  completion_price: {prices[1]}
"""
_SERVER = "#   export OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none     # any server"
_TINY_SERVER = (
    "#   python -m kasa_tune.tiny_world.endpoint --port 8123 --faults 0.3 &\n"
    "#   export OPENAI_BASE_URL=http://127.0.0.1:8123/v1 OPENAI_API_KEY=none"
)
_PUBLISHED = {"model": "gpt-4o", "workers": 8, "rate": 60, "prices": (2.5, 10.0)}
_TINY = {"model": "tiny_world", "workers": 4, "rate": "null", "prices": (0.0, 0.0)}


def service_texts() -> Iterator[tuple[str, str]]:
    """Names and texts of the configs."""
    yield (
        "synthesize",
        _synthesis(
            "A training set from a few seeds: a model writes pairs like them, and what is new is kept. The "
            "number of rows and the generator are those of KaSA's paper (arXiv 2412.06071), which had 245 "
            "to 395 seeds for each task.",
            "synthesize",
            (
                f"{_SERVER}",
                ("seeds=seeds.jsonl", "dry_run=true     # what it will cost"),
                ("seeds=seeds.jsonl tests=tests.jsonl", ""),
                ("seeds=seeds.jsonl", "template=kasa_tune://prompts/synthesis_summarization.txt"),
            ),
            "seeds: null  # yours: JSON Lines with messages, instruction and response, prompt and completion ...\n"
            "num_seeds: null\n"
            "tests: null  # pairs that no row may be similar to",
            128000,
            _PUBLISHED | {"temperature": "null", "attempts": 10},
        ),
    )
    yield (
        "tiny_synthesize",
        _synthesis(
            "Data for the embedded tiny Llama from 40 seeds, by a server of the tiny world that fails as often as it "
            "is told to. It takes seconds and downloads nothing.",
            "tiny_synthesize",
            (_TINY_SERVER, ("", ""), ("num_rows=200 rows_per_prompt=2", "")),
            "seeds: kasa_tune://tiny_world/data/task_train.jsonl\n"
            "num_seeds: 40\n"
            "tests: kasa_tune://tiny_world/data/task_val.jsonl",
            1600,
            _TINY | {"temperature": "1.0", "attempts": 10},
        ),
    )
    yield from _judges()


def _judges() -> Iterator[tuple[str, str]]:
    """Those of judging."""
    yield (
        "judge",
        _judge(
            "What evaluate_model wrote, judged by a model: similarity to a person's response and precision, ratings of "
            "MT-Bench, or which of two models' answers is better.",
            "judge",
            (
                _SERVER,
                (
                    "'evaluations=[/tmp/evaluation]' 'tasks=[texts]'",
                    "dry_run=true     # what it will cost",
                ),
                ("'evaluations=[/tmp/evaluation]' 'tasks=[texts]'", "repeats=3"),
                (
                    "'evaluations=[/tmp/evaluation]' 'tasks=[mt_bench]'",
                    "protocol=mt_bench questions=question.jsonl references=gpt-4.jsonl",
                ),
                (
                    "'evaluations=[/tmp/evaluation]' 'tasks=[texts]'",
                    "protocol=pairwise 'models=[kasa, lora]'",
                ),
            ),
            "evaluations: null  # yours: folders of evaluate_model; several give several answers to each prompt\n"
            "tasks: null  # yours: names of their tasks",
            _PUBLISHED | {"temperature": "0.0", "attempts": 5},
        ),
    )
    yield (
        "tiny_judge",
        _judge(
            "What tiny_evaluate wrote, judged by a server of the tiny world. It takes seconds and downloads nothing.",
            "tiny_judge",
            (_TINY_SERVER, ("", ""), ("protocol=pairwise", "'models=[kasa, base]'")),
            "evaluations: [/tmp/kasa_tune/tiny_evaluate]\ntasks: [texts]",
            _TINY | {"temperature": "0.0", "attempts": 5},
        ),
    )


def _synthesis(about: str, name: str, commands: tuple, data: str, rows: int, asked: dict) -> str:
    return f"""\
{_header(about, "synthesize_data", name, commands)}

output_dir: /tmp/kasa_tune/{name}

{data}
template: kasa_tune://prompts/synthesis.txt
topic: as in the example
category: ""
num_rows: {rows}
rows_per_prompt: 5
deduplication:
  minhash: 0.8  # Jaccard similarity of 5-character shingles; null: only equal instructions count as duplicates
  rouge_l: null  # 0.7: also ROUGE-L of instructions, as in Self-Instruct; slow above some ten thousand rows
seed: 42

{_ENDPOINT.format(**asked)}"""


def _judge(about: str, name: str, commands: tuple, data: str, asked: dict) -> str:
    return f"""\
{_header(about, "judge_responses", name, commands)}

output_dir: /tmp/kasa_tune/{name}

protocol: single  # mt_bench: both turns; pairwise: two models, in both orders
{data}
models: null  # all
questions: null  # mt_bench: FastChat's question.jsonl
references: null  # mt_bench: reference answers in its layout
templates: kasa_tune://prompts/judge
scale: 10  # 100: as LlamaDuo asks
repeats: 1
limit: null
seed: 42

{_ENDPOINT.format(**asked)}"""


def _header(about: str, recipe: str, name: str, commands: tuple) -> str:
    server, *runs = commands
    lines = [paragraph(about), "#", server]
    lines += [
        " ".join(filter(None, (f"#   tune run {recipe} --config {name}", *run))) for run in runs
    ]
    return "\n".join(lines)
