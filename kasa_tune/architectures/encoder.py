"""What an encoder computes, as data, and how it is read from a checkpoint's config.json.

An encoder is RoBERTa, BERT or DeBERTaV3. Their blocks are alike; see
:mod:`kasa_tune.components.models.encoder`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kasa_tune.architectures.files import read_object
from kasa_tune.architectures.reading import read_architecture
from kasa_tune.architectures.settings import Settings, named, shown

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Keys that change nothing of what is computed here: names, generation, labels, initialization.
_HARMLESS = frozenset(
    """
    architectures _name_or_path name_or_path transformers_version torch_dtype dtype bos_token_id
    eos_token_id cls_token_id mask_token_id unk_token_id use_cache initializer_range id2label
    label2id num_labels problem_type finetuning_task gradient_checkpointing output_attentions
    output_hidden_states output_past return_dict torchscript pruned_heads tie_word_embeddings
    task_specific_params legacy directionality pooler_fc_size pooler_num_attention_heads
    pooler_num_fc_layers pooler_size_per_head pooler_type adapters tokenizer_class
    chunk_size_feed_forward attn_implementation _attn_implementation_autoset
    """.split()
)


@dataclass(frozen=True)
class RelativePositions:
    """DeBERTa's disentangled attention (arXiv 2006.03654, 2111.09543).

    Args:
        buckets: half the rows of the table of relative positions.
        longest: the distance that the last bucket begins at.
        normalized: whether the table is layer-normalized.
    """

    buckets: int
    longest: int
    normalized: bool = True


@dataclass(frozen=True)
class EncoderArchitecture:
    """An encoder. The defaults are those of RoBERTa.

    Args:
        model_type: the family, by config.json's name: ``roberta``, ``bert`` or ``deberta-v2``.
        vocab_size, embed_dim, num_layers, num_heads, intermediate_dim: sizes.
        max_seq_len: the most tokens of a sequence.
        pad_id: token id of the padding.
        sep_id: token id of the separator, behind which BERT's second text begins.
        position_offset: row of the first token in the table of positions.
        type_vocab_size: rows of the table of token types. 0 if there is none.
        norm_eps: what the layer norms add to a variance.
        activation: of the MLP.
        dropout: of embeddings, and of the outputs of attention and MLP.
        attn_dropout: of attention weights.
        dropout_before, dropout_after: of the classification head, before its first linear and
            before its last one.
        relative: DeBERTa's relative positions, in place of a table of positions.
    """

    model_type: Literal["roberta", "bert", "deberta-v2"]
    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    intermediate_dim: int
    max_seq_len: int = 512
    pad_id: int = 1
    sep_id: int = 2
    position_offset: int = 2
    type_vocab_size: int = 1
    norm_eps: float = 1e-5
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    dropout: float = 0.1
    attn_dropout: float = 0.1
    dropout_before: float = 0.1
    dropout_after: float = 0.1
    relative: RelativePositions | None = None

    @property
    def head_activation(self) -> Literal["tanh", "gelu"]:
        """Of the classification head, between its two linears."""
        return "gelu" if self.relative else "tanh"

    @property
    def digest(self) -> str:
        """SHA-256 of all its values."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def read_encoder(folder: Path | str) -> EncoderArchitecture:
    """Read the architecture of an encoder's checkpoint in Hugging Face's layout.

    Args:
        folder: holds config.json.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the model is no supported encoder, or a value is missing, of a wrong type or
            not supported. The message names file and key.
    """
    path = Path(folder) / "config.json"
    return encoder_of(read_object(path), str(path))[0]


def encoder_of(
    config: Mapping[str, Any], name: str = "config.json"
) -> tuple[EncoderArchitecture, list[str]]:
    """Read an encoder from the content of a config.json; see :func:`read_encoder`.

    Returns:
        The architecture, and the keys that nothing is known about and that might change the result.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ENCODERS:
        raise ValueError(
            f"{name}: models of type {shown(kind)} are no supported encoder. Supported are "
            f"{', '.join(ENCODERS)}."
        )
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{name}: the checkpoint is quantized. Give the unquantized one, in bfloat16, float16 "
            "or float32."
        )
    settings = Settings(config, name)
    found = ENCODERS[kind](settings)
    known = settings.asked | _HARMLESS | {"model_type"}
    unknown = [
        named(key)
        for key, value in config.items()
        if key not in known and value not in (None, False, "", [], {})
    ]
    return found, sorted(unknown)


def digest_of(folder: Path | str) -> str:
    """SHA-256 of the architecture in a folder, of an encoder or a decoder.

    Raises:
        ValueError: as :func:`read_encoder` or
            :func:`~kasa_tune.architectures.reading.read_architecture`.
    """
    kind = read_object(Path(folder) / "config.json").get("model_type")
    return (read_encoder(folder) if kind in ENCODERS else read_architecture(folder)).digest


def _common(s: Settings) -> dict[str, Any]:
    """What all families call alike."""
    width, heads = s.size("hidden_size", 768), s.size("num_attention_heads", 12)
    if width % heads:
        raise s.wrong("num_attention_heads", f"a divisor of hidden_size, {width}")
    for key in ("is_decoder", "add_cross_attention"):
        s.must_be(key, False, default=False)
    dropout = _share(s, "hidden_dropout_prob", 0.1)
    return {
        "embed_dim": width,
        "num_heads": heads,
        "num_layers": s.size("num_hidden_layers", 12),
        "intermediate_dim": s.size("intermediate_size", 3072),
        "activation": s.one_of("hidden_act", _ACTIVATIONS, "gelu"),
        "dropout": dropout,
        "attn_dropout": _share(s, "attention_probs_dropout_prob", 0.1),
    }


def _roberta(s: Settings) -> EncoderArchitecture:
    found = _with_positions(s, vocab_size=50265, types=2, pad_id=1, sep_id=2)
    pad, rows = found["pad_id"], found.pop("rows")
    head = _share(s, "classifier_dropout", found["dropout"])
    return EncoderArchitecture(
        "roberta",
        position_offset=pad + 1,
        max_seq_len=rows - pad - 1,
        dropout_before=head,
        dropout_after=head,
        **found,
    )


def _bert(s: Settings) -> EncoderArchitecture:
    found = _with_positions(s, vocab_size=30522, types=2, pad_id=0, sep_id=102)
    rows = found.pop("rows")
    return EncoderArchitecture(
        "bert",
        position_offset=0,
        max_seq_len=rows,
        dropout_before=0.0,
        dropout_after=_share(s, "classifier_dropout", found["dropout"]),
        **found,
    )


def _with_positions(
    s: Settings, *, vocab_size: int, types: int, pad_id: int, sep_id: int
) -> dict[str, Any]:
    """What RoBERTa and BERT have in common, and ``rows`` of their table of positions."""
    s.must_be("position_embedding_type", "absolute", default="absolute")
    return _common(s) | {
        "vocab_size": s.size("vocab_size", vocab_size),
        "type_vocab_size": s.size("type_vocab_size", types),
        "norm_eps": s.number("layer_norm_eps", 1e-12),
        "pad_id": _id(s, "pad_token_id", pad_id),
        "sep_id": _id(s, "sep_token_id", sep_id),
        "rows": s.size("max_position_embeddings", 512),
    }


def _deberta(s: Settings) -> EncoderArchitecture:
    found = _common(s)
    s.must_be("relative_attention", True, default=False)
    s.must_be("share_att_key", True, default=False)
    s.must_be("position_biased_input", False, default=True)
    s.must_be("conv_kernel_size", 0, default=0)
    s.must_be("embedding_size", found["embed_dim"], default=found["embed_dim"])
    s.must_be("attention_head_size", None, default=None)
    s.must_be("pooler_hidden_act", "gelu", default="gelu")
    s.must_be("pooler_hidden_size", found["embed_dim"], default=found["embed_dim"])
    if s.get("type_vocab_size") not in (None, 0):
        raise s.wrong("type_vocab_size", "0")
    _check_terms(s)
    rows = s.size("max_position_embeddings", 512)
    longest = s.get("max_relative_positions")
    longest = rows if longest in (None, -1) else s.size("max_relative_positions")
    normalized = s.get("norm_rel_ebd")
    if normalized not in (None, "none", "layer_norm"):
        raise s.wrong("norm_rel_ebd", "none or layer_norm")
    return EncoderArchitecture(
        "deberta-v2",
        vocab_size=s.size("vocab_size", 128100),
        max_seq_len=rows,
        pad_id=_id(s, "pad_token_id", 0),
        sep_id=_id(s, "sep_token_id", 2),
        position_offset=0,
        type_vocab_size=0,
        norm_eps=s.number("layer_norm_eps", 1e-7),
        dropout_before=_share(s, "pooler_dropout", 0.0),
        dropout_after=_share(s, "cls_dropout", found["dropout"]),
        relative=RelativePositions(s.size("position_buckets"), longest, normalized == "layer_norm"),
        **found,
    )


def _check_terms(s: Settings) -> None:
    """See that both terms with positions are there. The hub has them as text, and transformers
    saves a list.
    """
    terms = s.get("pos_att_type")
    terms = terms.split("|") if isinstance(terms, str) else terms
    if not isinstance(terms, list) or sorted(map(str, terms)) != ["c2p", "p2c"]:
        raise s.wrong("pos_att_type", '"p2c|c2p"')


def _share(s: Settings, key: str, default: float) -> float:
    """A probability below 1."""
    value = s.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise s.wrong(key, "a number from 0 to below 1")
    return float(value)


def _id(s: Settings, key: str, default: int) -> int:
    """A token id."""
    value = s.get(key)
    if value is None:
        return default
    if type(value) is not int or not 0 <= value < 2**24:
        raise s.wrong(key, "a token id")
    return value


# By config.json's model_type.
ENCODERS: Mapping[str, Callable[[Settings], EncoderArchitecture]] = {
    "roberta": _roberta,
    "bert": _bert,
    "deberta-v2": _deberta,
}
