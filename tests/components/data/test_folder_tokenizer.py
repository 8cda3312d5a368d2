"""The tokenizer of a checkpoint's folder: what is found, what is cut, and a sentence where nothing can be read."""

import json
import logging
import shutil

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from torchtune.data import Message

from kasa_tune.components.data import (
    build_tokenizer,
    tokenizer_files,
    tokenizer_from_checkpoint,
)
from kasa_tune.registry import resource

MARKS = ["<end>", "<turn>", "<stop>"]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CHAT = "{% for m in messages %}<turn>{{ m['content'] }}<stop>{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    vocabulary = {letter: i for i, letter in enumerate("abcdefgh ")}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", CONFIG)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<end>"})
    return tmp_path


def write(folder, name, values):
    (folder / name).write_text(json.dumps(values))


def stops(tokenizer):
    return [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.stop_tokens]


def test_a_base_model_gets_plain_text_that_ends_in_end_of_text(folder):
    tokenizer = tokenizer_from_checkpoint(str(folder))
    messages = [
        Message(role="user", content="ab", masked=True),
        Message(role="assistant", content="cd"),
    ]
    tokens, mask = tokenizer.tokenize_messages(messages)
    assert tokens == [0, 1, 2, 3, tokenizer.eos_id]
    assert mask == [True, True, False, False, False]


def test_a_line_says_what_a_missing_chat_template_means(folder, caplog):
    with caplog.at_level(logging.INFO):
        tokenizer_from_checkpoint(str(folder))
    assert "prompts and answers are plain text" in caplog.text
    assert "end-of-sequence token, <end> (9)" in caplog.text
    assert "tokenizer.chat_template_path=" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", CHAT),
        ("tokenizer_config.json", json.dumps({"eos_token": "<end>", "chat_template": CHAT})),
        ("chat_template.json", json.dumps({"chat_template": CHAT})),
    ],
)
def test_the_chat_template_is_found(folder, name, content):
    (folder / name).write_text(content)
    tokenizer = tokenizer_from_checkpoint(str(folder))
    assert tokenizer.chat_template == CHAT
    assert stops(tokenizer) == ["<end>", "<stop>"]
    other = folder / "other.jinja"
    other.write_text(CHAT + " ")
    given = tokenizer_from_checkpoint(str(folder), chat_template_path=str(other))
    assert given.chat_template == CHAT + " "


def test_stop_tokens_are_those_of_generation_config_and_else_of_config(folder):
    write(folder, "config.json", CONFIG | {"eos_token_id": [9, 10]})
    assert stops(tokenizer_from_checkpoint(str(folder))) == ["<end>", "<turn>"]
    write(folder, "generation_config.json", {"eos_token_id": 11})
    assert stops(tokenizer_from_checkpoint(str(folder))) == ["<end>", "<stop>"]


def test_without_a_named_end_the_first_stop_token_ends_texts(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="No end-of-sequence token"):
        tokenizer_from_checkpoint(str(folder))
    write(folder, "generation_config.json", {"eos_token_id": [11, 9]})
    tokenizer = tokenizer_from_checkpoint(str(folder))
    assert stops(tokenizer) == ["<stop>", "<end>"]
    assert tokenizer.encode("a") == [0, 11]


@pytest.mark.parametrize(("given", "cut"), [(None, 128), (100, 100), (128, 128), (4096, 128)])
def test_samples_are_cut_at_what_the_model_takes(folder, given, cut):
    assert tokenizer_from_checkpoint(str(folder), given).max_seq_len == cut
    node = {
        "_component_": "kasa_tune.components.data.tokenizer_from_checkpoint",
        "checkpoint_dir": str(folder),
        "max_seq_len": given,
    }
    assert build_tokenizer(node, longest=128).max_seq_len == cut


def test_a_base_model_may_have_a_sentencepiece_model(folder):
    (folder / "tokenizer.json").unlink()
    source = resource("kasa_tune://tiny_world/model/tokenizer.model")
    shutil.copy(source, folder / "tokenizer.model")
    tokenizer = tokenizer_from_checkpoint(str(folder), 4096)
    assert tokenizer.max_seq_len == 128
    assert tokenizer.encode("a b", add_bos=False, add_eos=True)[-1] == tokenizer.eos_id
    (folder / "chat_template.jinja").write_text(CHAT)
    with pytest.raises(ValueError, match="has a chat template, and no tokenizer"):
        tokenizer_from_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        (None, "", FileNotFoundError, "holds no tokenizer: there is no tokenizer.json"),
        ("tekken.json", "{}", ValueError, "has tekken.json and no tokenizer.json. Write a"),
        ("vocab.json", "{}", ValueError, "has vocab.json and no tokenizer.json. Write a"),
        ("tokenizer.model", "YQ== 0\nYg== 1\n", ValueError, "is a tiktoken file"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(folder, name, content, error, words):
    (folder / "tokenizer.json").unlink()
    if name:
        (folder / name).write_text(content)
    with pytest.raises(error) as raised:
        tokenizer_from_checkpoint(str(folder))
    assert words in str(raised.value)


def test_a_file_larger_than_any_tokenizers_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match=r"the limit for a tokenizer's files is 10"):
        tokenizer_from_checkpoint(folder)
