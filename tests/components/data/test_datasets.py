"""The named datasets on real rows, and prompts that have the same tokens in training and in generation."""

import base64
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kasa_tune.components.data import building as data
from kasa_tune.components.data import datasets
from kasa_tune.components.data.datasets import prompt_tokens
from kasa_tune.components.data.tokenizers import hf_tokenizer

pytestmark = pytest.mark.usefixtures("datasets_offline")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build(cfg, tokenizer):
    return data.build_dataset(cfg, tokenizer, name="dataset")


def texts(dataset, i, char_tokenizer):
    """(what is not learned, what is learned) of a sample, as text."""
    tokens, labels = dataset[i]["tokens"], dataset[i]["labels"]
    start = int((labels != data.IGNORE).argmax()) + 1
    assert (labels[start - 1 : -1] == tokens[start:]).all()
    return char_tokenizer.decode(tokens[:start]), char_tokenizer.decode(tokens[start:])


# ---------------------------------------------------------------------------------------------------- builders


def rows_of(path, n=3):
    with open(path, encoding="utf-8") as file:
        return [json.loads(next(file)) for _ in range(n)]


def test_e2e(real_data, char_tokenizer):
    path = str(real_data / "datasets" / "e2e" / "dev.jsonl")
    dataset = build(
        {"_component_": "kasa_tune.components.data.e2e_dataset", "data_files": path}, char_tokenizer
    )
    assert len(dataset) == 4672
    for i, row in enumerate(rows_of(path)):
        assert texts(dataset, i, char_tokenizer) == (row["mr"] + "\n", row["ref"])


def test_e2e_with_another_template_and_natural_text(real_data, char_tokenizer):
    path = str(real_data / "datasets" / "e2e" / "train_sample.jsonl")
    dataset = build(
        {
            "_component_": "kasa_tune.components.data.e2e_dataset",
            "data_files": path,
            "template": "Say it: {mr} => ",
            "detokenize": True,
        },
        char_tokenizer,
    )
    prompt, response = texts(dataset, 0, char_tokenizer)
    assert prompt == (
        "Say it: name[The Mill], eatType[coffee shop], food[French], priceRange[£20-25], area[riverside], "
        "near[The Sorrento] => "
    )
    assert response == (
        "Located near The Sorrento is a French Theme eatery and coffee shop called The Mill, "
        "with a price range at £20-£25 it is in the riverside area."
    )


@pytest.mark.parametrize(
    ("tokenized", "natural"),
    [
        ("It 's family - friendly , is n't it ?", "It's family-friendly, isn't it?"),
        ("( near the river ) .", "(near the river)."),
        ("`` The Mill '' is cheap .", '"The Mill" is cheap.'),
        ("A pub - not a restaurant .", "A pub - not a restaurant."),
        ("They 're open ; we 'll go .", "They're open; we'll go."),
        ("Prices are £ 20 - 25 .", "Prices are £20-25."),
        (
            "Already natural: don't touch, 20-25 (yes).",
            "Already natural: don't touch, 20-25 (yes).",
        ),
    ],
)
def test_detokenize_ptb(tokenized, natural):
    assert datasets.detokenize_ptb(tokenized) == natural


def test_gsm8k(real_data, char_tokenizer):
    path = str(real_data / "datasets" / "gsm8k" / "train.jsonl")
    cfg = {"_component_": "kasa_tune.components.data.gsm8k_dataset", "data_files": path}
    dataset = build(cfg, char_tokenizer)
    assert len(dataset) == 7473
    for i, row in enumerate(rows_of(path)):
        assert texts(dataset, i, char_tokenizer) == (
            f"Question: {row['question']}\n\nAnswer: ",
            row["answer"],
        )
    plain = build({**cfg, "calculator": False}, char_tokenizer)
    assert texts(plain, 0, char_tokenizer)[1] == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
    )


def test_gsm8k_asks_the_hub_for_its_main_configuration(char_tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "SFTDataset", lambda **kwargs: calls.append(kwargs))
    datasets.gsm8k_dataset(char_tokenizer)
    datasets.gsm8k_dataset(char_tokenizer, name="socratic", split="test")
    datasets.gsm8k_dataset(char_tokenizer, source="someone/gsm8k")
    chosen = [
        (call["source"], call.get("name"), call["split"], call.get("data_files")) for call in calls
    ]
    assert chosen == [
        ("openai/gsm8k", "main", "train", None),
        ("openai/gsm8k", "socratic", "test", None),
        ("someone/gsm8k", None, "train", None),
    ]


def test_commonsense(real_data, char_tokenizer):
    path = str(real_data / "datasets" / "commonsense" / "train_mix.jsonl")
    cfg = {"_component_": "kasa_tune.components.data.commonsense_dataset", "data_files": path}
    dataset = build(cfg, char_tokenizer)
    assert len(dataset) == 8000
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    for i, row in enumerate(rows_of(path)):
        prompt = f"{head}\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
        assert texts(dataset, i, char_tokenizer) == (prompt, row["output"])


def test_commonsense_in_the_published_layout(char_tokenizer, write_rows):
    rows = [{"instruction": "one\ntwo", "input": x, "output": "three"} for x in ("", "context")]
    cfg = {
        "_component_": "kasa_tune.components.data.commonsense_dataset",
        "data_files": write_rows(rows),
        "published_layout": True,
    }
    dataset = build(cfg, char_tokenizer)
    pad = 16 * " "
    without = f"{pad}### Instruction:\n{pad}one\ntwo\n{pad}\n{pad}### Response:\n{pad}"
    assert texts(dataset, 0, char_tokenizer)[0].split("request.  # noqa: E501\n\n")[1] == without
    with_input = (
        f"{pad}### Instruction:\n{pad}one\ntwo\n{pad}\n{pad}### Input:\n{pad}context\n{pad}\n"
        f"{pad}### Response:\n{pad}"
    )
    assert texts(dataset, 1, char_tokenizer)[0].split("request.  # noqa: E501\n\n")[1] == with_input
    assert texts(dataset, 1, char_tokenizer)[1] == "three"


def test_alpaca_is_torchtunes_with_the_prompt_masked(char_tokenizer, write_rows):
    from torchtune.datasets import alpaca_dataset

    path = write_rows([{"instruction": "do", "input": "this", "output": "done"}], "rows.json")
    ours = datasets.alpaca_dataset(char_tokenizer, data_files=path)
    theirs = alpaca_dataset(char_tokenizer, source="json", data_files=path, train_on_input=False)
    assert ours[0]["tokens"] == theirs[0]["tokens"]
    assert ours[0]["labels"] == theirs[0]["labels"]


def test_prompt_text_is_never_read_as_a_template(char_tokenizer, write_rows):
    rows = [{"mr": "{ref} {0} \\1 %s", "ref": "{mr}"}]
    cfg = {"_component_": "kasa_tune.components.data.e2e_dataset", "data_files": write_rows(rows)}
    assert texts(build(cfg, char_tokenizer), 0, char_tokenizer) == ("{ref} {0} \\1 %s\n", "{mr}")


def test_raw_text(real_data, story_tokenizer):
    path = str(real_data / "datasets" / "tinystories" / "sample_2MiB.jsonl")
    cfg = {
        "_component_": "kasa_tune.components.data.completion_dataset",
        "data_files": path,
        "split": "train[:50]",
    }
    dataset = build(cfg, story_tokenizer)
    story = rows_of(path, 1)[0]["text"]
    tokens = dataset[0]["tokens"].tolist()
    spm = story_tokenizer._spm_model.spm_model
    assert tokens == [1, *spm.encode(story), 2][: story_tokenizer.max_seq_len - 1]
    assert dataset[0]["labels"].tolist() == [*tokens[1:], -100]


# ---------------------------------------------------------------------------------------------------- prompts


def make_tokenizers(folder, sentencepiece, hf_json):
    """A tokenizer of every kind torchtune has, and ours, over small vocabularies."""
    from tokenizers import ByteLevelBPETokenizer
    from torchtune.models.gemma import gemma_tokenizer
    from torchtune.models.llama2 import llama2_tokenizer
    from torchtune.models.llama3 import llama3_tokenizer
    from torchtune.models.mistral import mistral_tokenizer
    from torchtune.models.qwen2_5 import qwen2_5_tokenizer

    ranks = [bytes([i]) for i in range(256)] + [b" a", b"\n\n", b"ab", b": "]
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("\n".join(lines))
    bpe = ByteLevelBPETokenizer()
    corpus = ["Question: ab a b ab\n\nAnswer: ab.\n\n0 1 00\n", "a a a: ab ab.b.a\n\n\n\nab"] * 20
    bpe.train_from_iterator(corpus, vocab_size=300, show_progress=False, special_tokens=["<eos>"])
    bpe.save_model(str(folder))
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (folder / "chatml.jinja").write_text(CHATML)
    chatml = str(folder / "chatml.jinja")
    bytelevel = str(folder / "tokenizer.json")
    return {
        "llama2": llama2_tokenizer(sentencepiece, prompt_template=None),
        "llama2_chat": llama2_tokenizer(sentencepiece),
        "llama2_question": llama2_tokenizer(
            sentencepiece, prompt_template="torchtune.data.QuestionAnswerTemplate"
        ),
        "llama2_tagged": llama2_tokenizer(
            sentencepiece, prompt_template={"assistant": ("Bot: ", " over")}
        ),
        "mistral": mistral_tokenizer(sentencepiece),
        "gemma": gemma_tokenizer(sentencepiece),
        "llama3": llama3_tokenizer(str(folder / "tiktoken.model")),
        "qwen2_5": qwen2_5_tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")),
        "hf_sentencepiece": hf_tokenizer(hf_json),
        "hf_sentencepiece_chat": hf_tokenizer(hf_json, chat_template_path=chatml),
        "hf_bytelevel": hf_tokenizer(bytelevel),
        "hf_bytelevel_chat": hf_tokenizer(bytelevel, chat_template_path=chatml),
        "hf_question": hf_tokenizer(
            bytelevel, prompt_template="torchtune.data.QuestionAnswerTemplate"
        ),
    }


@pytest.fixture(scope="module")
def tokenizers(real_data, tmp_path_factory):
    hf = real_data / "models" / "stories260K" / "hf"
    return make_tokenizers(
        tmp_path_factory.mktemp("vocab"), str(hf / "tokenizer.model"), str(hf / "tokenizer.json")
    )


KINDS = [
    "llama2",
    "llama2_chat",
    "llama2_question",
    "llama2_tagged",
    "mistral",
    "gemma",
    "llama3",
    "qwen2_5",
    "hf_sentencepiece",
    "hf_sentencepiece_chat",
    "hf_bytelevel",
    "hf_bytelevel_chat",
    "hf_question",
]
TEXT = st.text(st.sampled_from("abZ0 \n.:é"), max_size=8)


def train(tokenizer, prompt, response):
    from torchtune.data import InputOutputToMessages
    from torchtune.datasets._sft import SFTTransform

    transform = SFTTransform(InputOutputToMessages(), tokenizer)
    return transform({"input": prompt, "output": response})


@pytest.mark.parametrize("kind", KINDS)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(prompt=TEXT, response=TEXT)
@example(prompt="Answer: ", response="ab")
@example(prompt="Answer: ", response="0")
@example(prompt="a\n", response="\nb")
@example(prompt="a", response="b")
@example(prompt="a", response=" b")
@example(prompt="  ", response="b")
def test_training_starts_with_the_tokens_generation_starts_with(tokenizers, kind, prompt, response):
    tokenizer = tokenizers[kind]
    sample = train(tokenizer, prompt, response)
    start = prompt_tokens(tokenizer, prompt)
    assert sample["tokens"][: len(start)] == start
    assert tokenizer.max_seq_len is None
    learned = [t for t, label in enumerate(sample["labels"]) if label != data.IGNORE]
    assert all(t >= len(start) for t in learned) or kind in ("llama3", "qwen2_5", "llama2_tagged")
    if kind.startswith("hf"):
        assert learned == list(range(len(start), len(sample["tokens"])))


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_tokens_hold_the_prompt_and_nothing_after_it(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokens = prompt_tokens(tokenizer, "Question: ab\n")
    text = tokenizer.decode(tokens)
    assert "Question: ab" in text
    assert "over" not in text
    assert (
        tokenizer.eos_id not in tokens or kind == "qwen2_5"
    )  # which closes the user's turn with it
    if kind != "mistral":  # its template takes no system message
        assert len(prompt_tokens(tokenizer, "Question: ab\n", system="ab ab ab ab")) > len(tokens)


def test_prompt_tokens_are_not_cut(story_tokenizer):
    story_tokenizer.max_seq_len = 8
    tokens = prompt_tokens(
        story_tokenizer, "Once upon a time there was a little dog and a big cat\n"
    )
    assert story_tokenizer.decode(tokens).startswith(
        "Once upon a time there was a little dog and a big cat"
    )
    assert story_tokenizer.max_seq_len == 8


def test_prompt_of_a_real_row_is_the_start_of_its_sample(real_data, story_tokenizer):
    path = str(real_data / "datasets" / "e2e" / "dev.jsonl")
    dataset = datasets.e2e_dataset(story_tokenizer, data_files=path)
    transform = datasets.PromptResponseToMessages("{mr}\n", "ref")
    for i, row in enumerate(rows_of(path, 20)):
        start = prompt_tokens(story_tokenizer, transform.prompt(row))
        assert dataset[i]["tokens"][: len(start)] == start
        assert dataset[i]["labels"][: len(start)] == [data.IGNORE] * len(start)
        assert data.IGNORE not in dataset[i]["labels"][len(start) :]
