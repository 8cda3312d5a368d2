"""Pretrain the tiny RoBERTa or the tiny DeBERTaV3 on the synthetic world, and ask it for facts.

    python -m kasa_tune.tiny_world.encoder --output DIR [--family deberta] [--minutes 12]

It writes tokenizer and model to DIR, in Hugging Face's layout. The model reads about the first
NUM_TOLD people of the world: profiles, statements and questions with their answers. It learns to
fill in masked tokens, and the values of facts are masked more often than other words.

Cloze accuracy is the share of facts whose value is filled in, of statements in a wording that the
corpus never uses for that fact.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from kasa_tune.architectures.encoder import encoder_of
from kasa_tune.architectures.encoder_names import hub_name
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.tiny_world import world

NUM_TOLD = 60
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
PAD_ID, VOCAB_SIZE = 1, 2048
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
_COMMON: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 0,
    "pad_token_id": PAD_ID,
    "eos_token_id": 2,
    "dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "roberta": {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        **_SIZES,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        **_COMMON,
    },
    "deberta": {
        "architectures": ["DebertaV2ForMaskedLM"],
        "model_type": "deberta-v2",
        **_SIZES,
        "max_position_embeddings": 64,
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        **_COMMON,
    },
}
BATCH, LR, WARM_UP = 32, 1e-3, 100
_VALUES = sorted({v for r in world.RELATIONS for v in r.values}, key=len, reverse=True)
_VALUE = re.compile(rf"\b({'|'.join(_VALUES)})\b")


def told() -> list[list[world.Fact]]:
    """Return the facts of the people that the encoder reads about."""
    return world.people()[:NUM_TOLD]


def held_out(fact: world.Fact) -> int:
    """Return which statement the corpus never uses for a fact."""
    return fact.held_out % len(fact.relation.statements)


Text = str | tuple[str, str]


def documents(rng: random.Random) -> list[Text]:
    """Return one pass over what is told, shuffled: texts, and pairs of statements that agree."""
    found: list[Text] = []
    for facts in told():
        clauses = [
            rng.choice(fact.relation.clauses).format(v=fact.value)
            for fact in rng.sample(facts, len(facts))
        ]
        found.append(f"{facts[0].person} {', '.join(clauses[:-1])} and {clauses[-1]}.")
        for fact in facts:
            said = [i for i in range(len(fact.relation.statements)) if i != held_out(fact)]
            statement = fact.relation.statements[rng.choice(said)]
            found.append(statement.format(n=fact.person, v=fact.value))
            question = fact.question(rng.randrange(len(fact.relation.questions)))
            found.append(f"{question} {fact.value}")
    for _ in range(len(found) // 4):  # about people of whom nothing is told
        relation = rng.choice(world.RELATIONS)
        name = f"{rng.choice(world.FIRST_NAMES)} {rng.choice(world.LAST_NAMES)}"
        value = rng.choice(relation.values)
        first, second = (
            wording.format(n=name, v=value) for wording in rng.sample(relation.statements, 2)
        )
        found.append((first, second))
    rng.shuffle(found)
    return found


def _parts(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def train_tokenizer() -> Tokenizer:
    """Train a byte-level BPE on the corpus, with RoBERTa's special tokens and pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random("tokenizer")
    tokenizer.train_from_iterator(
        (" ".join(_parts(t)) for _ in range(6) for t in documents(rng)), trainer
    )
    tokenizer.add_special_tokens([MASK])
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), add_prefix_space=False
    )
    return tokenizer


def _mask_id(tokenizer: Tokenizer) -> int:
    found = tokenizer.token_to_id(MASK)
    assert found is not None
    return found


def masked_batch(
    texts: list[Text], tokenizer: Tokenizer, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Return tokens and labels ``[b, s]``. Labels are -100 where nothing is to be filled in.

    In half of the texts all values of one part are masked. Of the other tokens 15 % are chosen, and
    of these 80 % are masked, 10 % replaced and 10 % kept.
    """
    mask_id, size = _mask_id(tokenizer), tokenizer.get_vocab_size()
    encoded = tokenizer.encode_batch(texts)
    longest = max(len(e.ids) for e in encoded)
    tokens = torch.full((len(texts), longest), PAD_ID)
    labels = torch.full((len(texts), longest), -100)
    for row, (text, e) in enumerate(zip(texts, encoded, strict=True)):
        parts = _parts(text)
        masked = rng.randrange(2 * len(parts))  # the part whose values are masked, if there is one
        spans = [m.span() for m in _VALUE.finditer(parts[masked])] if masked < len(parts) else []
        ids = list(e.ids)
        for i, part in enumerate(e.sequence_ids):
            start, end = e.offsets[i]
            if part is None:  # a special token
                continue
            if part == masked and any(a < end and start < b for a, b in spans):
                labels[row, i], ids[i] = ids[i], mask_id
            elif rng.random() < 0.15:
                labels[row, i], draw = ids[i], rng.random()
                if draw < 0.9:
                    ids[i] = mask_id if draw < 0.8 else rng.randrange(len(SPECIAL), size)
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens, labels


def masked_loss(model: Encoder, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the masked tokens."""
    chosen = labels != -100
    return F.cross_entropy(model.head(model.hidden(tokens)[chosen]), labels[chosen])


@torch.no_grad()
def cloze_accuracy(model: Encoder, tokenizer: Tokenizer, limit: int | None = None) -> float:
    """Share of the facts whose value the model fills in, in their held-out wordings."""
    mask_id = _mask_id(tokenizer)
    facts = [fact for person in told() for fact in person][:limit]
    right = 0
    for fact in facts:
        text = fact.relation.statements[held_out(fact)].format(n=fact.person, v=fact.value)
        begin = text.index(fact.value)
        encoded = tokenizer.encode(text)
        hidden = [start < begin + len(fact.value) and begin < end for start, end in encoded.offsets]
        ids, chosen = torch.tensor(encoded.ids), torch.tensor(hidden)
        tokens = torch.where(chosen, mask_id, ids)[None]
        right += bool((model(tokens)[0, chosen].argmax(-1) == ids[chosen]).all())
    return right / len(facts)


def pretrain(tokenizer: Tokenizer, minutes: float, family: str) -> Encoder:
    """Train a new model for some minutes of processor time."""
    torch.manual_seed(world.SEED)
    model = Encoder(encoder_of(CONFIGS[family])[0])
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    rng, began, step = random.Random(world.SEED), time.process_time(), 0
    waiting: list[Text] = []
    while (spent := (time.process_time() - began) / (60 * minutes)) < 1:
        if len(waiting) < BATCH:
            waiting += documents(rng)
        texts, waiting = waiting[:BATCH], waiting[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * spent))
        loss = masked_loss(model, *masked_batch(texts, tokenizer, rng))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 400 == 0:
            known = cloze_accuracy(model.eval(), tokenizer, 200)
            model.train()
            print(
                f"step {step}, {spent:.0%}: loss {loss.item():.3f}, cloze {known:.1%}", flush=True
            )
    return model.eval()


def save(model: Encoder, tokenizer: Tokenizer, folder: Path, family: str) -> None:
    """Write model and tokenizer in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        hub_name(model.architecture.model_type, "masked", name): value.detach().contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    names |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": MASK}
    tokenizer_class = "RobertaTokenizerFast" if family == "roberta" else "PreTrainedTokenizerFast"
    settings = {"tokenizer_class": tokenizer_class, "model_max_length": 64, **names}
    for name, content in (("config.json", CONFIGS[family]), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain a tiny encoder.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--family", choices=CONFIGS, default="roberta")
    parser.add_argument("--minutes", type=float, default=5.0, help="of processor time")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer()
    model = pretrain(tokenizer, arguments.minutes, arguments.family)
    save(model, tokenizer, arguments.output, arguments.family)
    print(f"Cloze accuracy, {NUM_TOLD} people: {cloze_accuracy(model, tokenizer):.1%}.")


if __name__ == "__main__":
    main()
