"""From a checkpoint's folder to its :class:`Architecture`, or to a sentence that says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kasa_tune.architectures import families
from kasa_tune.architectures.architecture import Architecture, Dropouts
from kasa_tune.architectures.files import read_object
from kasa_tune.architectures.settings import Settings, named, shown
from kasa_tune.architectures.vision import read_vision, text_part


class Family(NamedTuple):
    """A row of :data:`FAMILIES`: its title, its classes in transformers, and how it is read."""

    title: str
    class_names: tuple[str, ...]
    read: Callable[[Settings], Architecture]


# By config.json's model_type.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama", ("LlamaForCausalLM",), families.llama),
    "mistral": Family("Mistral", ("MistralForCausalLM",), families.mistral),
    "ministral3": Family("Ministral 3", ("Ministral3ForCausalLM",), families.ministral3),
    "gpt2": Family("GPT-2", ("GPT2LMHeadModel",), families.gpt2),
    "mixtral": Family("Mixtral", ("MixtralForCausalLM",), families.mixtral),
    "qwen2": Family("Qwen 2 and 2.5", ("Qwen2ForCausalLM",), families.qwen2),
    "qwen3": Family("Qwen 3", ("Qwen3ForCausalLM",), families.qwen3),
    "qwen3_moe": Family("Qwen 3, mixture of experts", ("Qwen3MoeForCausalLM",), families.qwen3_moe),
    "gemma": Family("Gemma", ("GemmaForCausalLM",), families.gemma),
    "gemma2": Family("Gemma 2", ("Gemma2ForCausalLM",), families.gemma2),
    "gemma3_text": Family("Gemma 3", ("Gemma3ForCausalLM",), families.gemma3),
    "phi3": Family("Phi 3 and 4", ("Phi3ForCausalLM",), families.phi3),
    "olmo2": Family("OLMo 2", ("Olmo2ForCausalLM",), families.olmo2),
    "olmo3": Family("OLMo 3", ("Olmo3ForCausalLM",), families.olmo3),
    "granite": Family("Granite 3", ("GraniteForCausalLM",), families.granite),
    "smollm3": Family("SmolLM 3", ("SmolLM3ForCausalLM",), families.smollm3),
    "glm": Family("GLM 4", ("GlmForCausalLM",), families.glm),
    "glm4": Family("GLM 4 0414", ("Glm4ForCausalLM",), families.glm4),
    "cohere": Family("Command R", ("CohereForCausalLM",), families.cohere),
    "cohere2": Family("Command R7B", ("Cohere2ForCausalLM",), families.cohere2),
    "nemotron": Family("Nemotron", ("NemotronForCausalLM",), families.nemotron),
    "stablelm": Family("StableLM", ("StableLmForCausalLM",), families.stablelm),
    "exaone4": Family("EXAONE 4", ("Exaone4ForCausalLM",), families.exaone4),
    "hunyuan_v1_dense": Family("Hunyuan, dense", ("HunYuanDenseV1ForCausalLM",), families.hunyuan),
    "ernie4_5": Family("ERNIE 4.5, dense", ("Ernie4_5ForCausalLM",), families.ernie),
    "internlm3": Family(
        "InternLM 3", ("InternLM3ForCausalLM", "LlamaForCausalLM"), families.internlm3
    ),
}
# Models that also see, whose part `text_config` is one of the families above.
_WITH_TEXT_PART = {"gemma3": "gemma3_text", "mistral3": None}
# Keys that say nothing about what the model computes, or that only matter for what is not done
# here: dropout in the base, caches, initialization, auxiliary losses, generation.
_HARMLESS = frozenset(
    """
    architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    eod_token_id boi_token_index eoi_token_index image_token_index
    use_cache initializer_range initializer_factor attention_dropout attn_dropout hidden_dropout
    hidden_dropout_prob dropout resid_pdrop embd_pdrop attn_pdrop classifier_dropout
    attention_probs_dropout_prob router_aux_loss_coef output_router_logits router_jitter_noise
    pretraining_tp tensor_parallel_degree output_attentions output_hidden_states return_dict
    torchscript chunk_size_feed_forward cross_attention_hidden_size is_decoder is_encoder_decoder
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    max_length min_length do_sample temperature top_k top_p num_beams repetition_penalty
    typical_p no_repeat_ngram_size length_penalty early_stopping bad_words_ids suppress_tokens
    begin_suppress_tokens forced_bos_token_id forced_eos_token_id num_return_sequences
    num_beam_groups diversity_penalty encoder_no_repeat_ngram_size exponential_decay_length_penalty
    remove_invalid_values return_dict_in_generate output_scores prefix pruned_heads
    tf_legacy_loss tokenizer_class use_bfloat16 tie_encoder_decoder add_cross_attention
    cache_implementation transformers.js_config auto_map is_llama_config
    kv_channels rope_ratio document_attention mup_base_width attn_implementation
    _attn_implementation _attn_implementation_autoset unsloth_version unsloth_fixed
    rotary_emb_base original_vocab_size max_window_layers layer_types sliding_window
    sliding_window_pattern no_rope_layer_interval no_rope_layers use_sliding_window
    hidden_act hidden_activation head_dim original_max_position_embeddings
    num_experts_per_tok mlp_only_layers
    n_ctx n_special predict_special_tokens summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout
    """.split()
)


class UnsupportedArchitectureError(ValueError):
    """A model that is none of the supported families."""


def read_architecture(folder: Path | str) -> Architecture:
    """Read the architecture of a checkpoint in Hugging Face's layout.

    Args:
        folder: holds config.json.

    Raises:
        FileNotFoundError: there is no config.json.
        UnsupportedArchitectureError: the model is of no supported family; the message lists them.
        ValueError: config.json is no JSON object, or a value is missing, of a wrong type or not
            supported; the message names file and key.
    """
    return read_with_settings(folder)[0]


def read_dropouts(folder: Path | str) -> Dropouts:
    """Read the dropouts that a checkpoint was trained with.

    Args:
        folder: holds config.json.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the model is of a family whose dropouts are not known here, or as
            :func:`read_architecture`.
    """
    architecture, settings = read_with_settings(folder)
    if architecture.model_type != "gpt2":
        raise ValueError(
            f"{settings.name}: model.base_dropout is for GPT-2; models of type "
            f"{architecture.model_type} are trained without dropouts of their own here. Leave it out."
        )
    return families.gpt2_dropouts(settings)


def unknown_keys(folder: Path | str) -> list[str]:
    """The keys of config.json that nothing is known about, and that might change the result.

    Raises:
        ValueError: as :func:`read_architecture`.
    """
    settings = read_with_settings(folder)[1]
    known = settings.asked | _HARMLESS
    return sorted(
        key
        for key, value in settings.values.items()
        if key not in known and value not in (None, False, "", [], {})
    )


def architecture_of(config: Mapping[str, Any], name: str = "config.json") -> Architecture:
    """Read the architecture from the content of a config.json; see :func:`read_architecture`.

    Args:
        config: the content.
        name: of the file, for messages.
    """
    return _read(config, name)[0]


def read_with_settings(folder: Path | str) -> tuple[Architecture, Settings]:
    """As :func:`read_architecture`, with the values that the architecture was read from."""
    path = Path(folder) / "config.json"
    try:
        return _read(read_object(path), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing. It says what the model is, and belongs beside the weights."
        ) from None


def _read(config: Mapping[str, Any], name: str) -> tuple[Architecture, Settings]:
    _check_head(config, name)
    values = dict(config)
    kind = values.get("model_type")
    if kind == "llava":
        _check_weights(config, name)
        vision = read_vision(config, name)
        found, settings = _read(text_part(config, name), name)
        return replace(found, vision=vision), settings
    if isinstance(kind, str) and kind in _WITH_TEXT_PART:
        text = values.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError(f"{name}: a model of type {kind} has a part text_config.")
        own = {"model_type": _WITH_TEXT_PART[kind]} if _WITH_TEXT_PART[kind] else {}
        # Whether the output projection is the embedding is said outside, whatever stands inside.
        key = "tie_word_embeddings"
        tied = {key: values[key]} if values.get(key) is not None else {}
        values, kind = {**text, **own, **tied}, (own or text).get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UnsupportedArchitectureError(
            f"{name}: models of type {shown(kind)} are not supported"
            f"{_class_words(config)}. Supported are {_supported()}."
        )
    for one in (config, values):
        _check_weights(one, name)
    settings = Settings(values, name)
    _check_class(values, kind, name)
    return FAMILIES[kind].read(settings), settings


def _check_weights(config: Mapping[str, Any], name: str) -> None:
    """Refuse quantized weights."""
    if config.get("quantization_config") is not None:
        given = config["quantization_config"]
        method = given.get("quant_method") if isinstance(given, Mapping) else given
        raise ValueError(
            f"{name}: the checkpoint is quantized already ({shown(method)}). Give the unquantized "
            "one, in bfloat16, float16 or float32."
        )


def _check_class(config: Mapping[str, Any], kind: str, name: str) -> None:
    """Refuse a file whose class and model_type are of two families."""
    for one in _classes(config, name):
        told = _OF_CLASS.get(_plain(one), ())
        if told and kind not in told:
            raise ValueError(
                f"{name}: architectures says {named(one)}, and model_type says {kind}. Correct "
                "the one that is wrong."
            )


def _plain(name: str) -> str:
    """A class's name, however its words are joined."""
    return name.replace("_", "").lower()


# The families of a class, by its plain name.
_OF_CLASS = {
    _plain(one): [kind for kind, row in FAMILIES.items() if one in row.class_names]
    for family in FAMILIES.values()
    for one in family.class_names
}


def _classes(config: Mapping[str, Any], name: str) -> list[str]:
    """The names of the model's classes."""
    classes = config.get("architectures")
    if classes is None:
        return []
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
        raise ValueError(f"{name}: architectures is {shown(classes)}; it must be a list of names.")
    return classes


def _check_head(config: Mapping[str, Any], name: str) -> None:
    """Refuse a model with another head than that of a language model."""
    classes = _classes(config, name)
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if classes and not any(one.endswith(causal) for one in classes):
        raise UnsupportedArchitectureError(
            f"{name}: {named(classes[0])} is not supported. Supported are language models: "
            f"{_supported()}."
        )


def _class_words(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    words = f" ({named(classes[0])})" if isinstance(classes, list) and classes else ""
    return words + (", because they run code of their own" if config.get("auto_map") else "")


def _supported() -> str:
    return ", ".join((*(title for title, _, _ in FAMILIES.values()), "LLaVA 1.5"))
