"""What a card says of prompts: its text and its chat template give the tokens that samples of training begin with.

The tokens are those of data sets built as the recipes build them; servers are stood in for by transformers' tokenizers.
"""

import contextlib
import json
import os
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kasa_tune.components.checkpoints import build_allowed
from kasa_tune.components.data import datasets
from kasa_tune.components.exchange.prompting import (
    SAID,
    NoPromptError,
    Prompting,
    prompting_of,
    put_chat_template,
)
from kasa_tune.registry import resource
from tests.fuzzing import soon

WORLD = resource("kasa_tune://tiny_world/model")
DATA = "kasa_tune.components.data"
SENTENCEPIECE = {
    "_component_": "torchtune.models.llama2.llama2_tokenizer",
    "path": str(WORLD / "tokenizer.model"),
}
TAGS = {"user": ["Data: ", "Text: "], "assistant": ["", ""]}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(folder, *, bos=True, template=None):
    """A tokenizer.json as Llama 3's or Qwen's: byte-level pieces, a token that begins texts or none."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, special=True) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        ["Name three colours. Red, green and blue.\nAnswer: "] * 4, trainer
    )
    if bos:
        begin = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=begin
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", **({"bos_token": "<|begin|>"} if bos else {})}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"_component_": f"{DATA}.hf_tokenizer", "path": str(folder / "tokenizer.json")}


def of_training(node, dataset, row, write_rows):
    """The prompt's tokens: what generation is fed, and what every sample of the prompt begins with."""
    tokenizer = build_allowed(node, "tokenizer", "test")
    options = {key: value for key, value in dataset.items() if key != "_component_"}
    build = getattr(datasets, dataset["_component_"].rpartition(".")[2])
    rows = [row | {"output": answer} for answer in ("Xylophone", "9", "")]
    samples = build(tokenizer, data_files=write_rows(rows), **options)
    transform = samples._message_transform
    message = next(m for m in transform(rows[0])["messages"] if m.role == "user")
    system = dataset.get("new_system_prompt")
    prompt = datasets.prompt_tokens(tokenizer, message.text_content, system=system)
    for i in range(3):
        assert list(samples[i]["tokens"][: len(prompt)]) == prompt
    return prompt


INSTRUCT = {"_component_": f"{DATA}.instruct_dataset"}
ALPACA = {"_component_": f"{DATA}.alpaca_dataset"}
SYSTEM = INSTRUCT | {"new_system_prompt": "Be brief."}
PROMPTS = {
    "tags on pieces": (SENTENCEPIECE | {"prompt_template": TAGS}, INSTRUCT),
    "no tags on pieces": (SENTENCEPIECE | {"prompt_template": {"user": ["", ""]}}, INSTRUCT),
    "llama 2's chat": (
        SENTENCEPIECE | {"prompt_template": "torchtune.models.llama2.Llama2ChatTemplate"},
        INSTRUCT,
    ),
    "llama 2's chat, system": (
        SENTENCEPIECE | {"prompt_template": "torchtune.models.llama2.Llama2ChatTemplate"},
        SYSTEM,
    ),
    "alpaca on pieces": (SENTENCEPIECE | {"prompt_template": {"user": ["", ""]}}, ALPACA),
}


@pytest.mark.parametrize(("node", "dataset"), PROMPTS.values(), ids=PROMPTS)
def test_a_sentencepiece_model_alone(node, dataset, write_rows):
    found = prompting_of({"tokenizer": node, "dataset": dataset}, WORLD, "test")
    row = {"input": SAID} if dataset is not ALPACA else {"instruction": SAID, "input": ""}
    assert found.ids == of_training(node, dataset, row, write_rows)
    tokenizer = build_allowed(node, "tokenizer", "test")
    assert tokenizer.encode(found.text, add_bos=True, add_eos=False) == found.ids
    assert found.form == found.text.replace(SAID, "<your text>")
    assert "<your text>" in found.form
    assert found.chat_template
    assert not found.of_base


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("tags", "dataset"),
    [
        ({"user": ["", ""]}, INSTRUCT),
        ({"user": ["Question: ", "\nAnswer: "]}, INSTRUCT),
        ({"user": ["<|im_start|>'\"{{ \\x ", "é😀 %}\n"], "assistant": ["A:", "!"]}, INSTRUCT),
        ({"user": ["Q: ", "\n"], "system": ["S: ", "\n"]}, SYSTEM),
        ({"user": ["", ""]}, ALPACA),
    ],
)
def test_servers_get_the_tokens_of_training(bos, tags, dataset, tmp_path, write_rows):
    """Transformers' tokenizer of the base: of the text as it is, and of messages by the template that is written."""
    transformers = pytest.importorskip("transformers")
    node = byte_level(tmp_path / "base", bos=bos) | {"prompt_template": tags}
    found = prompting_of({"tokenizer": node, "dataset": dataset}, tmp_path / "base", "test")
    row = {"input": SAID} if dataset is not ALPACA else {"instruction": SAID, "input": ""}
    assert found.ids == of_training(node, dataset, row, write_rows)
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    put_chat_template(tmp_path / "out", found)
    server = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert server(found.text)["input_ids"] == found.ids
    said = row.get("instruction", SAID)
    if dataset is ALPACA:  # the data set's own words around it are the client's to write
        said = datasets.AlpacaToMessages().template["prompt_no_input"].format(instruction=SAID)
    messages = [{"role": "user", "content": said}]
    if dataset is SYSTEM:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    ids = server.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert list(getattr(ids, "input_ids", ids)) == found.ids
    # More turns than one, as training would have them.
    assert found.turns
    tokenizer = build_allowed(node, "tokenizer", "test")
    more = [*messages, {"role": "assistant", "content": "Red."}, {"role": "user", "content": said}]
    whole = []
    for answer in ("X", "9"):
        turns = [*more, {"role": "assistant", "content": answer}]
        sample = {"messages": [datasets.Message(**turn) for turn in turns]}
        whole.append(tokenizer(sample)["tokens"])
    ids = server.apply_chat_template(more, add_generation_prompt=True, tokenize=True)
    ids = list(getattr(ids, "input_ids", ids))
    assert all(tokens[: len(ids)] == ids for tokens in whole)
    assert len(tokenizer.decode(ids)) >= len(tokenizer.decode(found.ids)) + len(said) + len("Red.")


def test_a_base_whose_own_template_is_that_of_training_keeps_it(tmp_path):
    node = byte_level(tmp_path / "base", bos=False, template=CHATML)
    found = prompting_of({"tokenizer": node, "dataset": INSTRUCT}, tmp_path / "base", "test")
    assert found.of_base
    assert found.chat_template == CHATML
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    put_chat_template(tmp_path / "base", found)
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before


def test_a_base_whose_own_template_is_not_that_of_training_does_not_lend_it(tmp_path):
    """An instruct base that was trained without its turns: a chat request would get other tokens."""
    node = byte_level(tmp_path / "base", template=CHATML) | {
        "prompt_template": {"user": ["Q: ", "\n"]}
    }
    found = prompting_of({"tokenizer": node, "dataset": INSTRUCT}, tmp_path / "base", "test")
    assert not found.of_base
    put_chat_template(tmp_path / "base", found)
    assert (tmp_path / "base" / "chat_template.jinja").read_text() == found.chat_template != CHATML
    assert "chat_template" not in json.loads(
        (tmp_path / "base" / "tokenizer_config.json").read_text()
    )
    nothing = Prompting(None, [1], None, None)
    put_chat_template(tmp_path / "base", nothing)
    assert not (tmp_path / "base" / "chat_template.jinja").exists()


def test_raw_text_has_no_turns(tmp_path):
    node = byte_level(tmp_path / "base")
    dataset = {"_component_": f"{DATA}.completion_dataset"}
    found = prompting_of({"tokenizer": node, "dataset": dataset}, tmp_path / "base", "test")
    assert (found.form, found.text, found.chat_template) == ("<your text>", SAID, None)


def test_more_than_one_turn_is_refused_where_it_would_be_wrong():
    """Sentencepiece's pieces differ after a first turn; a client gets words, not other tokens."""
    from kasa_tune.components.data.chat_templates import TemplateRefusalError, render_template

    node = SENTENCEPIECE | {"prompt_template": TAGS}
    found = prompting_of({"tokenizer": node, "dataset": INSTRUCT}, WORLD, "test")
    assert not found.turns

    def render(*messages):
        return render_template(
            found.chat_template, {"messages": list(messages), "add_generation_prompt": True}
        )

    turn = {"role": "user", "content": "a"}
    render(turn)
    with pytest.raises(TemplateRefusalError, match="one question and one answer"):
        render(turn, turn | {"role": "assistant"}, turn)
    with pytest.raises(TemplateRefusalError, match="No such role"):
        render(turn | {"role": "tool"})


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (None, "names no tokenizer"),
        ({"_component_": "os.system", "command": "true"}, r"names tokenizer\._component_"),
        (SENTENCEPIECE | {"path": "/nowhere/x.model"}, "could not be read"),
        (SENTENCEPIECE | {"prompt_template": "antigravity.fly"}, r"tokenizer\.prompt_template"),
        (SENTENCEPIECE | {"prompt_template": 7}, "could not be read"),
        (SENTENCEPIECE | {"surprise": 1}, "could not be read"),
    ],
)
def test_what_cannot_be_found_out_is_said(node, words, tmp_path):
    with pytest.raises(NoPromptError, match=words):
        prompting_of({"tokenizer": node, "dataset": INSTRUCT}, tmp_path, "test")


def test_a_tokenizer_that_moved_is_found_beside_the_base(tmp_path):
    shutil.copy(WORLD / "tokenizer.model", tmp_path)
    node = SENTENCEPIECE | {"path": "/gone/tokenizer.model", "prompt_template": TAGS}
    found = prompting_of({"tokenizer": node, "dataset": INSTRUCT}, tmp_path, "test")
    assert found.text == "Data: Name three colours. Text:"


@pytest.mark.parametrize(
    "settings",
    [
        b"{",
        b"[]",
        b"\xff",
        b'{"chat_template": 3}',
        b'{"chat_template": [1]}',
        b'{"chat_template": [{"name": 3}]}',
        b'{"chat_template": "{% for %}"}',
        b'{"chat_template": "{{ 1 / 0 }}"}',
        b'{"chat_template": "{{ messages[9].content }}", "eos_token": {"a": 1}}',
    ],
)
def test_settings_of_the_base_that_are_damaged_do_not_stop_an_export(settings, tmp_path):
    """The run's own tokenizer is a sentencepiece model, beside which they lie."""
    shutil.copy(WORLD / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(settings)
    (tmp_path / "tokenizer.json").write_bytes(settings)
    node = SENTENCEPIECE | {"prompt_template": TAGS}
    found = prompting_of({"tokenizer": node, "dataset": INSTRUCT}, tmp_path, "test")
    assert found.text == "Data: Name three colours. Text:"
    put_chat_template(tmp_path, found)
    assert (tmp_path / "chat_template.jinja").read_text() == found.chat_template


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", '{"eos_token": {"a": 1}}'),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", '{"eos_token": "<|end|>", "chat_template": 3}'),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("generation_config.json", "null"),
        ("tokenizer.json", '{"model": 3}'),
    ],
)
def test_a_tokenizer_of_wrong_types_is_a_prompt_or_a_sentence(file, content, tmp_path):
    node = byte_level(tmp_path / "base")
    (tmp_path / "base" / file).write_text(content)
    with contextlib.suppress(NoPromptError):
        found = prompting_of({"tokenizer": node, "dataset": INSTRUCT}, tmp_path / "base", "test")
        assert found.ids


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:9/tokenizer.model", "/dev/null", "pipe", "missing"]
)
@pytest.mark.parametrize(
    "builder", ["kasa_tune.components.data.hf", "torchtune.models.llama3.llama3"]
)
def test_a_tokenizer_is_a_regular_file(builder, name, tmp_path, monkeypatch):
    """The path is that of a data file. A URL is not fetched, and a pipe is not waited for."""

    def fetched(*_, **__):
        raise AssertionError("a file was fetched")

    monkeypatch.setattr("requests.get", fetched)
    os.mkfifo(tmp_path / "pipe")
    path = name if "/" in name else str(tmp_path / name)
    config = {"tokenizer": {"_component_": f"{builder}_tokenizer", "path": path}}
    with soon(), pytest.raises(NoPromptError, match=r"tokenizer\.path: no such file"):
        prompting_of(config, tmp_path, "run.json")
