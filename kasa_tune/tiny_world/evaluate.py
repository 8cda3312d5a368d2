"""Scores of a model on the facts of the synthetic world and on its fine-tuning task.

    python -m kasa_tune.tiny_world.evaluate [--model DIR] [--limit N]

It prints the exact match on facts_test.jsonl. On task_val.jsonl it prints the loss per token of the
response, the exact match, and the slot accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kasa_tune.tiny_world import task, world
from kasa_tune.tiny_world.pretrain import IGNORE, build_model, load

HERE = Path(__file__).parent


def load_rows(name: str) -> list[dict[str, str]]:
    """Read the rows of data/`name`."""
    return [
        json.loads(line) for line in (HERE / "data" / name).read_text(encoding="utf-8").splitlines()
    ]


def is_gpt2(folder: Path) -> bool:
    """Whether the model in `folder` is a GPT-2, and not a Llama."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config["model_type"] == "gpt2"


def load_model(folder: Path) -> nn.Module:
    """Read the model in `folder` in the Hugging Face layout, in float32 and evaluation mode. A
    Llama must have the sizes of MODEL.
    """
    if is_gpt2(folder):
        from kasa_tune.components.models import CheckpointFolder
        from kasa_tune.components.models.from_checkpoint import from_checkpoint

        decoder = from_checkpoint(folder)
        decoder.load_state_dict(dict(CheckpointFolder(folder).open()))
        return decoder.eval()
    model = build_model()
    load(model, Path(folder))
    return model.eval()


def load_tokenizer(folder: Path):
    """Read the tokenizer in `folder`: that of GPT-2, or of Llama 2, which is plain SentencePiece
    without a chat template.
    """
    if is_gpt2(folder):
        from kasa_tune.components.data import hf_tokenizer

        return hf_tokenizer(str(Path(folder) / "tokenizer.json"))
    from torchtune.models.llama2 import llama2_tokenizer

    return llama2_tokenizer(str(Path(folder) / "tokenizer.model"), prompt_template=None)


@torch.no_grad()
def greedy(
    model: nn.Module, prompts: list[list[int]], *, eos_id: int, max_new_tokens: int
) -> list[list[int]]:
    """Continue every prompt with its most likely tokens, up to `eos_id`, which is left out, or
    `max_new_tokens`.

    Rows are padded on the right. Under a causal mask the position that is read does not see the
    padding, so that no mask is needed. Finished rows leave the batch.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.zeros(
        len(prompts), int(lengths.max()) + max_new_tokens, dtype=torch.long
    )  # [n, longest]
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    starts = lengths.tolist()
    alive = torch.arange(len(prompts))
    for _ in range(max_new_tokens):
        ends = lengths[alive]
        logits = model(tokens[alive, : int(ends.max())])  # [alive, s, vocab]
        best = logits[torch.arange(len(alive)), ends - 1].argmax(-1)  # [alive]
        alive, best = alive[best != eos_id], best[best != eos_id]
        if len(alive) == 0:
            break
        tokens[alive, lengths[alive]] = best
        lengths[alive] += 1
    return [
        tokens[i, start:end].tolist()
        for i, (start, end) in enumerate(zip(starts, lengths.tolist(), strict=True))
    ]


def completer(
    model: nn.Module, tokenizer, *, max_new_tokens: int, batch_size: int = 64
) -> Callable:
    """Return a function from prompts to greedy completions, for world.exact_match and
    task.score.
    """

    def generate(prompts: list[str]) -> list[str]:
        completions = []
        for i in range(0, len(prompts), batch_size):
            ids = [
                tokenizer.encode(prompt, add_bos=True, add_eos=False)
                for prompt in prompts[i : i + batch_size]
            ]
            made = greedy(model, ids, eos_id=tokenizer.eos_id, max_new_tokens=max_new_tokens)
            completions += [tokenizer.decode(new) for new in made]
        return completions

    return generate


def task_example(tokenizer, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt, response and EOS of a row of the task, and their labels. Labels
    are shifted by one, and the prompt has the label IGNORE.
    """
    text = task.task_prompt(row["input"])
    prompt = tokenizer.encode(text, add_bos=True, add_eos=False)
    whole = tokenizer.encode(f"{text} {row['output']}", add_bos=True, add_eos=True)
    response = whole[len(prompt) :]
    return whole, [IGNORE] * (len(prompt) - 1) + response + [IGNORE]


def pad(examples: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Pad examples of different lengths on the right, and return their tokens and labels, both [b,
    s].
    """
    longest = max(len(tokens) for tokens, _ in examples)
    tokens = torch.tensor([t + [0] * (longest - len(t)) for t, _ in examples])
    labels = torch.tensor([y + [IGNORE] * (longest - len(y)) for _, y in examples])
    return tokens, labels


@torch.no_grad()
def task_loss(
    model: nn.Module, tokenizer, rows: list[dict[str, str]], batch_size: int = 50
) -> float:
    """Compute the mean cross-entropy in nats per token of the response, EOS included."""
    total, count = 0.0, 0
    for i in range(0, len(rows), batch_size):
        tokens, labels = pad([task_example(tokenizer, row) for row in rows[i : i + batch_size]])
        logits = model(tokens).flatten(0, 1)
        total += F.cross_entropy(
            logits, labels.flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
        count += int((labels != IGNORE).sum())
    return total / count


def evaluate(model: nn.Module, tokenizer, limit: int | None = None) -> dict[str, float]:
    """Compute all scores in the module's docstring, on the first `limit` rows of each file. The
    default is all rows.
    """
    facts, texts = load_rows("facts_test.jsonl")[:limit], load_rows("task_val.jsonl")[:limit]
    scores = task.score(completer(model, tokenizer, max_new_tokens=64), texts)
    return {
        "facts_exact_match": world.exact_match(
            completer(model, tokenizer, max_new_tokens=12), facts
        ),
        "task_loss": task_loss(model, tokenizer, texts),
        **{f"task_{name}": value for name, value in scores.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Score a model on the synthetic world's facts and task."
    )
    parser.add_argument(
        "--model", type=Path, default=HERE / "model", help="folder in the Hugging Face layout"
    )
    parser.add_argument("--limit", type=int, help="rows of each file, all by default")
    arguments = parser.parse_args()
    scores = evaluate(load_model(arguments.model), load_tokenizer(arguments.model), arguments.limit)
    for name, value in scores.items():
        print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main()
