"""Pretrains the embedded tiny Llama on the synthetic world, and writes it in the Hugging Face
layout.

    OMP_NUM_THREADS=2 python -m kasa_tune.tiny_world.pretrain --output /tmp/tiny_world_model

It writes tokenizer.model, model.safetensors (float32), config.json and generation_config.json.

Training is plain PyTorch on the CPU. Documents are packed into rows, and AdamW has a warm-up and a
cosine decay to zero. There are two stages. The second one adds practice in looking up words and has
a new optimizer.

A second call gives the same tokenizer, byte for byte. Weights can differ between machines, because
their kernels add in different orders.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kasa_tune import torchao_bridge
from kasa_tune.tiny_world import world

VOCAB_SIZE = 1024
IGNORE = -100
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "num_layers": 5,
    "num_heads": 8,
    "num_kv_heads": 4,
    "embed_dim": 128,
    "max_seq_len": 512,
    "intermediate_dim": 384,
    "rope_base": 10_000,
    "norm_eps": 1e-5,
}
TOKENIZER_PASSES = 3
SECOND_STAGE_PASS = 1000  # first pass of the second stage, which the first stage does not reach


def train_tokenizer() -> bytes:
    """Train a SentencePiece BPE model with byte fallback on the words of the corpus. Its ids are
    unk 0, bos 1 and eos 2.

    Each word counts by the square root of its frequency. The pieces then cover many words, and not
    only the most common ones.
    """
    documents = (text for index in range(TOKENIZER_PASSES) for text in world.corpus(index))
    counts = Counter(word for text in documents for word in re.findall(r"\w+|\W", text))
    frequent = sorted(word for word, count in counts.items() if count > TOKENIZER_PASSES)
    words = (word for word in frequent for _ in range(math.isqrt(counts[word])))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words,
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def encode(
    tokenizer: sentencepiece.SentencePieceProcessor, documents: list[str]
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens, BOS to EOS, and the labels of every document. Labels are tokens or
    `IGNORE`.

    In a document that opens with a question, only the answer has labels. The question is drawn at
    random, so that nothing can be learned from its words.
    """
    answers_at = tokenizer.piece_to_id(":")
    examples = []
    for text, ids in zip(
        documents, tokenizer.encode(documents, add_bos=True, add_eos=True), strict=True
    ):
        start = (
            len(ids) - ids[::-1].index(answers_at) if text.startswith(world.FACT_PROMPT[0]) else 1
        )
        examples.append((ids, [IGNORE] * start + ids[start:]))
    return examples


def packed_rows(
    tokenizer: sentencepiece.SentencePieceProcessor,
    length: int,
    seed: int,
    first_pass: int = 0,
    lookups: bool = False,
) -> Iterator[Tensor]:
    """Yield rows [2, length] int64 of whole documents without end. The first half holds the inputs,
    the second the labels, shifted by one.
    """
    rng = random.Random(f"rows {seed}")
    index = first_pass
    while True:
        rows: list[tuple[list[int], list[int]]] = [([], [])]
        for ids, labels in encode(tokenizer, world.corpus(index, lookups=lookups)):
            if len(rows[-1][0]) + len(ids) > length + 1:
                rows.append(([], []))
            rows[-1][0].extend(ids)
            rows[-1][1].extend(labels)
        rng.shuffle(rows)
        for ids, labels in rows:
            fill = length + 1 - len(ids)
            yield torch.tensor([(ids + [0] * fill)[:-1], (labels + [IGNORE] * fill)[1:]])
        index += 1


def build_model() -> nn.Module:
    """Build the untrained Llama 3 model with small normal weights. The weights of residual outputs
    are scaled down by the depth.
    """
    torchao_bridge.quiet()
    from torchtune.models.llama3 import llama3

    model = llama3(**MODEL)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("output_proj.weight", "w2.weight"))
            nn.init.normal_(
                parameter, std=0.04 / math.sqrt(2 * MODEL["num_layers"]) if residual else 0.04
            )
    return model


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Compute the learning rate of a step: a linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def stacked(rows: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Yield batches [2, batch_size, length] of rows [2, length]."""
    while True:
        yield torch.stack([next(rows) for _ in range(batch_size)], dim=1)


def train(model: nn.Module, batches: Iterator[Tensor], *, steps: int, peak_lr: float) -> None:
    """Train the model in place on batches [2, b, s] of inputs and labels, and print the mean loss
    per token every 100 steps.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embeddings" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)
    start, total, tokens = time.perf_counter(), 0.0, 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        inputs, labels = next(batches)  # [b, s] each
        logits = model(inputs)  # [b, s, vocab]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        tokens += int((inputs != 0).sum())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1}/{steps}: loss {total / 100:.4f}, {tokens} tokens, "
                f"{tokens / seconds:.0f} tokens/s, "
                f"{seconds * (steps - step - 1) / (step + 1):.0f} s to go",
                flush=True,
            )
            total = 0.0


def hf_config() -> dict:
    """Return the config.json from which transformers builds the same model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": MODEL["vocab_size"],
        "hidden_size": MODEL["embed_dim"],
        "intermediate_size": MODEL["intermediate_dim"],
        "num_hidden_layers": MODEL["num_layers"],
        "num_attention_heads": MODEL["num_heads"],
        "num_key_value_heads": MODEL["num_kv_heads"],
        "head_dim": MODEL["embed_dim"] // MODEL["num_heads"],
        "max_position_embeddings": MODEL["max_seq_len"],
        "rms_norm_eps": MODEL["norm_eps"],
        "rope_theta": float(MODEL["rope_base"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def save(model: nn.Module, folder: Path) -> None:
    """Write model.safetensors, config.json and generation_config.json. Weights get Hugging Face's
    names, and q and k are permuted as there.
    """
    from safetensors.torch import save_file
    from torchtune.models.convert_weights import tune_to_hf

    weights = tune_to_hf(
        model.state_dict(),
        num_heads=MODEL["num_heads"],
        num_kv_heads=MODEL["num_kv_heads"],
        dim=MODEL["embed_dim"],
    )
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, str(folder / "model.safetensors"), metadata={"format": "pt"})
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    (folder / "config.json").write_text(json.dumps(hf_config(), indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )


def load(model: nn.Module, folder: Path) -> None:
    """Load weights that `save` wrote into `model`."""
    from safetensors.torch import load_file
    from torchtune.models.convert_weights import hf_to_tune

    weights = load_file(str(folder / "model.safetensors"))
    sizes = {
        "num_heads": MODEL["num_heads"],
        "num_kv_heads": MODEL["num_kv_heads"],
        "dim": MODEL["embed_dim"],
    }
    model.load_state_dict(hf_to_tune(weights, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pretrain the embedded tiny Llama on the synthetic world."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=3600, help="steps of the first stage")
    parser.add_argument(
        "--second-steps", type=int, default=1200, help="steps of the second stage, with lookups"
    )
    parser.add_argument(
        "--start-from", type=Path, help="a model of the first stage: only run the second"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step")
    parser.add_argument("--row-length", type=int, default=128, help="tokens per row")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak of the first stage")
    parser.add_argument("--second-lr", type=float, default=1.5e-3, help="peak of the second stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "tokenizer.model").write_bytes(train_tokenizer())
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(arguments.output / "tokenizer.model")
    )
    model = build_model()
    batch_size, length, seed = arguments.batch_size, arguments.row_length, arguments.seed
    if arguments.start_from:
        load(model, arguments.start_from)
    else:
        batches = stacked(packed_rows(tokenizer, length, seed), batch_size)
        train(model, batches, steps=arguments.steps, peak_lr=arguments.lr)
        save(model, arguments.output)
    rows = packed_rows(tokenizer, length, seed, first_pass=SECOND_STAGE_PASS, lookups=True)
    batches = stacked(rows, batch_size)
    train(model, batches, steps=arguments.second_steps, peak_lr=arguments.second_lr)
    save(model, arguments.output)
    print(f"Wrote {sum(p.numel() for p in model.parameters())} parameters to {arguments.output}.")


if __name__ == "__main__":
    main()
