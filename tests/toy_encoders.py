"""Toy encoders: random ones of transformers, with the same weights on our road."""

from functools import partial

import torch

from kasa_tune.components import models
from kasa_tune.components.models.encoder_folder import take_head
from kasa_tune.components.models.loading import build_on_meta, load_base_weights

KINDS = ("roberta", "bert", "deberta-v2")
_COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 42,
}
SEP = {"roberta": 2, "bert": 3, "deberta-v2": 2}


def config_of(kind, **more):
    """A config of transformers."""
    import transformers

    if kind == "roberta":
        own = {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        own["layer_norm_eps"] = 1e-5
        return transformers.RobertaConfig(**_COMMON | own | more)
    if kind == "bert":
        return transformers.BertConfig(**_COMMON | {"sep_token_id": 3} | more)
    own = {
        "relative_attention": True,
        "share_att_key": True,
        "position_biased_input": False,
        "pos_att_type": "p2c|c2p",
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 8,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "pooler_hidden_act": "gelu",
        "pooler_dropout": 0,
    }
    return transformers.DebertaV2Config(**_COMMON | own | more)


def random_model(kind, task="SequenceClassification", seed=0, **more):
    """A random model of transformers, none of whose parameters is 0."""
    import transformers

    name = {"roberta": "Roberta", "bert": "Bert", "deberta-v2": "DebertaV2"}[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}For{task}")(config_of(kind, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def batch_of(kind):
    """Tokens, mask and token types ``[3, 34]`` of a long text, a pair and a short text."""
    pad, sep = (1 if kind == "roberta" else 0), SEP[kind]
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(5, 60, (3, 34), generator=generator)
    tokens, types = torch.full((3, 34), pad), torch.zeros(3, 34, dtype=torch.long)
    for row, length in enumerate((34, 20, 7)):
        tokens[row, :length] = words[row, :length]
        tokens[row, length - 1] = sep
    tokens[1, 9] = sep
    if kind == "bert":
        types[1, 10:20] = 1
    return tokens, (tokens != pad).long(), types


def our_model(folder, *, adapter="lora", num_labels=3, **options):
    """The model of a folder with adapters that have not started, and the folder's head."""
    options = {"attn_modules": ["q_proj", "v_proj"], "rank": 4, **options}
    build = partial(
        getattr(models, f"{adapter}_encoder_from_checkpoint"),
        checkpoint_dir=str(folder),
        num_labels=num_labels,
        **options,
    )
    model = build_on_meta(build, dtype=torch.float32)
    weights = models.EncoderFolder(folder).open()
    load_base_weights(model, weights, device=torch.device("cpu"), adapter_dtype=torch.float32)
    take_head(model.head, folder)
    return model.eval()
