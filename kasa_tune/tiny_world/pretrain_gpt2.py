"""Pretrains the embedded tiny GPT-2 on the synthetic world, and writes it in the Hugging Face layout.

    OMP_NUM_THREADS=1 python -m kasa_tune.tiny_world.pretrain_gpt2 --output /tmp/tiny_gpt2

It writes tokenizer.json, tokenizer_config.json, model.safetensors (float32), config.json and
generation_config.json. Corpus, questions and training loop are those of the tiny Llama. As with
GPT-2, one token ends each document and none begins it, words carry the space before them, and the
tokenizer reads any text, byte by byte if it must.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from kasa_tune import torchao_bridge
from kasa_tune.tiny_world import world
from kasa_tune.tiny_world.pretrain import IGNORE, SECOND_STAGE_PASS, TOKENIZER_PASSES, train

END = "<|endoftext|>"
VOCAB_SIZE = 1024
CONFIG: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB_SIZE,
    "n_embd": 128,
    "n_layer": 5,
    "n_head": 8,
    "n_positions": 256,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


Example = tuple[list[int], list[int]]  # tokens of a document, and labels


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE on the words of the corpus. Id 0 is the end of a document.

    Each word counts by the square root of its frequency, as in the tiny Llama's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (text for index in range(TOKENIZER_PASSES) for text in world.corpus(index))
    counts = Counter(word for text in documents for word in re.findall(r" ?\w+|\W", text))
    frequent = sorted(word for word, count in counts.items() if count > TOKENIZER_PASSES)
    words = (word for word in frequent for _ in range(math.isqrt(counts[word])))
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[Example]:
    """Return the tokens of every document, its end included, and their labels: tokens or `IGNORE`.

    In a document that opens with a question, only the answer has labels. The question is drawn at
    random, so that nothing can be learned from its words.
    """
    (colon,), (end,) = (tokenizer.encode(text).ids for text in (":", END))
    examples = []
    for text, encoding in zip(documents, tokenizer.encode_batch(documents), strict=True):
        ids = [*encoding.ids, end]
        asks = text.startswith(world.FACT_PROMPT[0])
        start = len(ids) - ids[::-1].index(colon) if asks else 0
        examples.append((ids, [IGNORE] * start + ids[start:]))
    return examples


def batches(
    tokenizer: Tokenizer, size: int, seed: int, first_pass: int = 0, lookups: bool = False
) -> Iterator[Tensor]:
    """Yield batches [2, b, s] int64 of about `size` tokens without end. The first half holds the
    inputs, the second the labels, shifted by one.

    Most batches are documents of similar lengths. Positions are learned, so a document is learned
    soonest where it will stand later: at the first position. In each eighth batch documents follow
    one another up to the last position, so that all of them are learned.
    """
    rng = random.Random(f"batches {seed}")
    index = first_pass
    while True:
        examples = encode(tokenizer, world.corpus(index, lookups=lookups))
        rng.shuffle(examples)
        cut = len(examples) // 8
        found = [*_of_documents(examples[cut:], size), *_of_rows(examples[:cut], size)]
        rng.shuffle(found)
        yield from map(_padded, found)
        index += 1


def _of_documents(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """Groups of documents of similar lengths."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example[0])):
        if (len(batch) + 1) * len(example[0]) > size:
            yield batch
            batch = []
        batch.append(example)
    yield batch


def _of_rows(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """Groups of rows of as many positions as the model has, each of whole documents."""
    length = CONFIG["n_positions"] + 1
    rows: list[Example] = [([], [])]
    for ids, labels in examples:
        if len(rows[-1][0]) + len(ids) > length:
            rows.append(([], []))
        rows[-1][0].extend(ids)
        rows[-1][1].extend(labels)
    count = max(1, size // length)
    yield from (rows[start : start + count] for start in range(0, len(rows), count))


def _padded(batch: list[Example]) -> Tensor:
    """A batch [2, b, s] of inputs and labels."""
    longest = max(len(ids) for ids, _ in batch)
    inputs = [(ids + [0] * (longest - len(ids)))[:-1] for ids, _ in batch]
    labels = [(labels + [IGNORE] * (longest - len(labels)))[1:] for _, labels in batch]
    return torch.tensor([inputs, labels])


def build_model() -> nn.Module:
    """Build the untrained model with small normal weights. The weights of residual outputs are
    scaled down by the depth.
    """
    torchao_bridge.quiet()
    from kasa_tune.architectures import architecture_of
    from kasa_tune.components.models.decoder import Decoder

    model = Decoder(architecture_of(CONFIG))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("output_proj.weight", "w2.weight"))
            std = 0.04 / math.sqrt(2 * CONFIG["n_layer"]) if residual else 0.04
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    model.position_embeddings.weight.data = waves(CONFIG["n_positions"], CONFIG["n_embd"]) * 0.04
    return model


def waves(length: int, width: int) -> Tensor:
    """Compute sines and cosines of the positions, `[length, width]` of mean square 1. Positions that
    start as these are told apart by their distance, which saves the model from learning that.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * frequencies  # [length, width / 2]
    return math.sqrt(2) * torch.cat((angles.sin(), angles.cos()), dim=1)


def hf_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by GPT-2's names, with q, k and v in one matrix and all matrices of layers
    (d_in, d_out).
    """
    state = model.state_dict()
    found = {"wte": state["tok_embeddings.weight"], "wpe": state["position_embeddings.weight"]}
    found = {f"transformer.{name}.weight": tensor for name, tensor in found.items()}
    names = {"attn.c_proj": "attn.output_proj", "mlp.c_fc": "mlp.w1", "mlp.c_proj": "mlp.w2"}
    for leaf in ("weight", "bias"):
        found[f"transformer.ln_f.{leaf}"] = state[f"norm.{leaf}"]
        for index in range(CONFIG["n_layer"]):
            ours, theirs = f"layers.{index}", f"transformer.h.{index}"
            qkv = [state[f"{ours}.attn.{name}_proj.{leaf}"] for name in "qkv"]
            found[f"{theirs}.attn.c_attn.{leaf}"] = torch.cat(qkv).T
            for name, other in names.items():
                found[f"{theirs}.{name}.{leaf}"] = state[f"{ours}.{other}.{leaf}"].T
            found[f"{theirs}.ln_1.{leaf}"] = state[f"{ours}.sa_norm.{leaf}"]
            found[f"{theirs}.ln_2.{leaf}"] = state[f"{ours}.mlp_norm.{leaf}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def save(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, tokenizer and their settings."""
    from safetensors.torch import save_file

    save_file(hf_weights(model), str(folder / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2TokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "add_prefix_space": False,
        "model_max_length": CONFIG["n_positions"],
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
    files = {"config": CONFIG, "generation_config": generation, "tokenizer_config": settings}
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded tiny GPT-2.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=3600, help="steps of the first stage")
    parser.add_argument("--second-steps", type=int, default=800, help="steps with lookup practice")
    parser.add_argument("--batch-size", type=int, default=1024, help="tokens per step")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak of the first stage")
    parser.add_argument("--second-lr", type=float, default=1.5e-3, help="peak of the second stage")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer, model = train_tokenizer(), build_model()
    stages = [
        (arguments.steps, arguments.lr, {}),
        (arguments.second_steps, arguments.second_lr, {"first_pass": SECOND_STAGE_PASS}),
    ]
    for index, (steps, peak_lr, more) in enumerate(stages):
        drawn = batches(
            tokenizer, arguments.batch_size, arguments.seed, lookups=bool(index), **more
        )
        train(model, drawn, steps=steps, peak_lr=peak_lr)
        save(model, tokenizer, arguments.output)
    print(f"Wrote {sum(p.numel() for p in model.parameters())} parameters to {arguments.output}.")


if __name__ == "__main__":
    main()
