"""Folders as transformers saves them: small random models of three families, each with a tokenizer."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

transformers = pytest.importorskip("transformers", reason="needs transformers (extra `parity`)")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
MARKS = ["<|end|>", "<|user|>", "<|assistant|>", "<|stop|>"]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|stop|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# transformers' class, and what its config has besides.
KINDS = {
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3Text",
        {"query_pre_attn_scalar": 32, "sliding_window": 16, "layer_types": None},
    ),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}),
}
ROWS = [
    {"prompt": f"What is {a} and {b}?", "completion": f"It is {a + b}."}
    for a in range(6)
    for b in range(6)
]


def write_tokenizer(folder: Path, *, chat: bool) -> int:
    """tokenizer.json and what belongs to it; returns the number of tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=MARKS, show_progress=False
    )
    tokenizer.train_from_iterator((text for row in ROWS for text in row.values()), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    return tokenizer.get_vocab_size()


def write_folder(folder: Path, kind: str, *, chat: bool = True) -> Path:
    """A checkpoint of a small random model with its tokenizer."""
    folder.mkdir(parents=True)
    vocab_size = write_tokenizer(folder, chat=chat)
    name, more = KINDS[kind]
    torch.manual_seed(0)
    more = {key: value for key, value in more.items() if value is not None}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocab_size,
        eos_token_id=[0, 3],
        bos_token_id=None,
        pad_token_id=0,
        **SIZES | more,
    )
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    for parameter in (p for n, p in model.named_parameters() if "norm" in n):
        torch.nn.init.normal_(parameter, 0.0 if kind == "gemma3" else 1.0, 0.1)
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict] | None = None) -> Path:
    """JSON Lines."""
    rows = ROWS if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
