"""What the modules of an encoder are called in Hugging Face's checkpoints, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PREFIX = re.compile(r"(?:roberta|bert|deberta)\.")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
# Old checkpoints call the two parts of a layer norm so.
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
_TABLES = {
    "embeddings.word_embeddings": "tok_embeddings.words",
    "embeddings.position_embeddings": "tok_embeddings.positions",
    "embeddings.token_type_embeddings": "tok_embeddings.types",
    "embeddings.LayerNorm": "tok_embeddings.norm",
}
_IN_LAYER = {
    "attention.self.query": "attn.q_proj",
    "attention.self.key": "attn.k_proj",
    "attention.self.value": "attn.v_proj",
    "attention.output.dense": "attn.output_proj",
    "attention.output.LayerNorm": "attn_norm",
    "intermediate.dense": "mlp.w1",
    "output.dense": "mlp.w2",
    "output.LayerNorm": "mlp_norm",
}
_DEBERTA_IN_LAYER = _IN_LAYER | {
    f"attention.self.{name}_proj": _IN_LAYER[f"attention.self.{name}"]
    for name in ("query", "key", "value")
}
_RELATIVE = {
    "encoder.rel_embeddings": "relative.table",
    "encoder.LayerNorm": "relative.norm",
}
_MASKED = {
    "cls.predictions.transform.dense": "head.dense",
    "cls.predictions.transform.LayerNorm": "head.norm",
}
# The head's modules by family and task. A name in front has the prefix of the model.
_HEADS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("roberta", "classification"): {
        "classifier.dense": "head.dense",
        "classifier.out_proj": "head.out_proj",
    },
    ("bert", "classification"): {"pooler.dense": "head.dense", "classifier": "head.out_proj"},
    ("deberta-v2", "classification"): {
        "pooler.dense": "head.dense",
        "classifier": "head.out_proj",
    },
    ("roberta", "masked"): {"lm_head.dense": "head.dense", "lm_head.layer_norm": "head.norm"},
    ("bert", "masked"): _MASKED,
    ("deberta-v2", "masked"): _MASKED,
}
_MASKED_BIAS = {"roberta": "lm_head.bias", "bert": "cls.predictions.bias"}
_MASKED_BIAS["deberta-v2"] = _MASKED_BIAS["bert"]
# Parts of other tasks' heads and buffers, which no task here needs.
_OTHER = re.compile(
    r"(embeddings\.(position_ids|token_type_ids)$|pooler\.|classifier\.|lm_head\.|cls\."
    r"|mask_predictions\.|lm_predictions\.|qa_outputs\.)"
)


def encoder_name(model_type: str, task: str, key: str) -> str | None:
    """What a tensor of a checkpoint is called in our encoder.

    Args:
        model_type: of the architecture.
        task: ``classification`` or ``masked``.
        key: the tensor's name in the file, with or without the prefix of the family.

    Returns:
        None for a tensor that the model does not need: a buffer, or a head of another task. An
        unknown name comes back as it is.
    """
    prefixed = _PREFIX.match(key)
    rest = key[prefixed.end() if prefixed else 0 :]
    module, _, leaf = rest.rpartition(".")
    leaf = _OLD_LEAVES.get(leaf, leaf)
    if rest == _MASKED_BIAS[model_type] and task == "masked":
        return "head.bias"
    heads = _HEADS[model_type, task]
    # The pooler of a bare RoBERTa and that of BERT carry the prefix, DeBERTa's carries none.
    if module in heads and (model_type == "bert" or not prefixed):
        return f"{heads[module]}.{leaf}"
    tables = _TABLES | (_RELATIVE if model_type == "deberta-v2" else {})
    if model_type == "deberta-v2" and module == "embeddings.position_embeddings":
        return None  # which pretraining alone uses
    if module in tables:
        return f"{tables[module]}.{leaf}"
    if _OTHER.match(rest):
        return None
    layer = _LAYER.fullmatch(module)
    names = _DEBERTA_IN_LAYER if model_type == "deberta-v2" else _IN_LAYER
    if layer and layer[2] in names:
        return f"layers.{layer[1]}.{names[layer[2]]}.{leaf}"
    return key


def hub_name(model_type: str, task: str, name: str) -> str:
    """What a tensor of our encoder is called in transformers' model for a task.

    Args:
        model_type: of the architecture.
        task: ``classification`` or ``masked``.
        name: ours.

    Raises:
        KeyError: the encoder has no such tensor.
    """
    if name == "head.bias":
        return _MASKED_BIAS[model_type]
    module, _, leaf = name.rpartition(".")
    prefix = "deberta" if model_type == "deberta-v2" else model_type
    heads = {ours: theirs for theirs, ours in _HEADS[model_type, task].items()}
    if module in heads:
        inside = model_type == "bert" and heads[module].startswith("pooler")
        return f"{'bert.' if inside else ''}{heads[module]}.{leaf}"
    tables = {ours: theirs for theirs, ours in (_TABLES | _RELATIVE).items()}
    if module in tables:
        return f"{prefix}.{tables[module]}.{leaf}"
    _, number, rest = module.split(".", 2)
    used = _DEBERTA_IN_LAYER if model_type == "deberta-v2" else _IN_LAYER
    inner = {ours: theirs for theirs, ours in used.items()}  # of two, the last
    return f"{prefix}.encoder.layer.{number}.{inner[rest]}.{leaf}"


def usual_encoder_name(model_type: str, task: str, key: str) -> str:
    """What a tensor of a checkpoint is called in transformers' model for a task. Files may leave the prefix of the
    family out. A name that is not known comes back as it is.

    Args:
        model_type: of the architecture.
        task: ``classification`` or ``masked``.
        key: the tensor's name in the file.
    """
    ours = encoder_name(model_type, task, key)
    return key if ours is None or ours == key else hub_name(model_type, task, ours)
