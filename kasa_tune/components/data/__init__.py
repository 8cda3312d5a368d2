"""Datasets, tokenizers, batches, packing and fingerprints: from a config's data nodes to batches."""

from kasa_tune.components.data.batches import (
    EpochBatches,
    build_dataloader,
    collate,
    move_batch,
)
from kasa_tune.components.data.building import (
    MixedDataset,
    ShiftedDataset,
    build_dataset,
    check_batches,
    check_token_ids,
    count_truncated,
)
from kasa_tune.components.data.by_columns import by_columns_dataset
from kasa_tune.components.data.classification_data import ClassificationData, EncodedTexts
from kasa_tune.components.data.datasets import (
    LLMAdaptersToMessages,
    PromptResponseToMessages,
    alpaca_dataset,
    chat_dataset,
    commonsense_dataset,
    completion_dataset,
    detokenize_ptb,
    e2e_dataset,
    gsm8k_dataset,
    instruct_dataset,
    prompt_tokens,
)
from kasa_tune.components.data.encoder_tokenizer import EncoderTokenizer, encoder_tokenizer
from kasa_tune.components.data.fingerprints import data_fingerprint, tensors_digest, versions
from kasa_tune.components.data.folder_tokenizer import tokenizer_from_checkpoint
from kasa_tune.components.data.labelled_texts import LabelledTexts, labelled_texts
from kasa_tune.components.data.tokenizers import HFTokenizer, build_tokenizer, hf_tokenizer
from kasa_tune.components.data.training_data import Batch, TrainingData
from kasa_tune.components.data.visual import visual_dataset

__all__ = [
    "Batch",
    "ClassificationData",
    "EncodedTexts",
    "EncoderTokenizer",
    "EpochBatches",
    "HFTokenizer",
    "LLMAdaptersToMessages",
    "LabelledTexts",
    "MixedDataset",
    "PromptResponseToMessages",
    "ShiftedDataset",
    "TrainingData",
    "alpaca_dataset",
    "build_dataloader",
    "build_dataset",
    "build_tokenizer",
    "by_columns_dataset",
    "chat_dataset",
    "check_batches",
    "check_token_ids",
    "collate",
    "commonsense_dataset",
    "completion_dataset",
    "count_truncated",
    "data_fingerprint",
    "detokenize_ptb",
    "e2e_dataset",
    "encoder_tokenizer",
    "gsm8k_dataset",
    "hf_tokenizer",
    "instruct_dataset",
    "labelled_texts",
    "move_batch",
    "prompt_tokens",
    "tensors_digest",
    "tokenizer_from_checkpoint",
    "versions",
    "visual_dataset",
]
