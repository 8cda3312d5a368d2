"""The embedded tiny model: reproducible data, weights that load everywhere, facts it knows, a task it does not."""

import base64
import io
import json
import re

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors import safe_open

from kasa_tune.tiny_world import evaluate, pretrain, pretrain_gpt2, task, world, write_data

MODEL = evaluate.HERE / "model"
GPT2 = evaluate.HERE / "gpt2"
DATA = evaluate.HERE / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return evaluate.load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model():
    return evaluate.load_model(MODEL)


# --- the world's text ---


def test_data_files_are_regenerated_byte_for_byte():
    files = write_data.data_files()
    assert {path.name for path in DATA.iterdir()} == set(files)
    for name, text in files.items():
        if name.startswith(("shapes_", "twins_")):  # the bytes of a PNG depend on the library
            made, written = map(with_pixels, (text, (DATA / name).read_text(encoding="utf-8")))
            assert made == written, name
        else:
            assert (DATA / name).read_bytes() == text.encode("utf-8"), name


def with_pixels(text):
    """Rows of JSON Lines with the pixels of their images."""
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        content = base64.b64decode(row["image"].partition(",")[2])
        row["image"] = Image.open(io.BytesIO(content)).convert("RGB").tobytes()
    return rows


def test_world_is_of_the_promised_size():
    facts = [fact for person in world.people() for fact in person]
    assert 1000 <= len(world.people()) <= 1500
    assert len({(fact.person, fact.relation.name) for fact in facts}) == len(
        facts
    )  # one answer to every question
    assert all(2 <= len(person) <= 4 for person in world.people())


def test_a_facts_held_out_question_is_not_in_the_corpus_but_the_fact_and_the_wording_are():
    asked = {}
    for index in [*range(15), *range(pretrain.SECOND_STAGE_PASS, pretrain.SECOND_STAGE_PASS + 5)]:
        for document in world.corpus(index, lookups=index >= pretrain.SECOND_STAGE_PASS):
            asked.update(re.findall(r"^Q: (.*\?) A: (.*)$", document))
    test, calibration = world.facts_test(), world.facts_calibration()
    assert not {row["question"] for row in test} & set(asked)
    assert not {row["question"] for row in test} & {row["question"] for row in calibration}
    seen = [row for row in calibration if asked.get(row["question"]) == row["answer"]]
    assert len(seen) / len(calibration) > 0.95  # a wording is missed in all passes once in (3/4)^20
    wordings = {wording for relation in world.RELATIONS for wording in relation.questions}
    names = re.compile(
        "|".join(sorted({fact.person for person in world.people() for fact in person}))
    )
    assert {names.sub("{n}", question) for question in asked} >= wordings


def test_corpus_passes_differ_and_repeat():
    assert world.corpus(3) == world.corpus(3)
    assert sorted(world.corpus(3)) != sorted(world.corpus(4))


def test_exact_match_counts_whole_answers():
    rows = [{"question": f"q{i}?", "answer": "red"} for i in range(4)]
    replies = {"Q: q0? A:": " red", "Q: q1? A:": "redder", "Q: q2? A:": "", "Q: q3? A:": "red "}
    assert world.exact_match(lambda prompts: [replies[prompt] for prompt in prompts], rows) == 0.5


# --- the task ---


def test_task_text_tells_every_slot_and_names_are_held_out():
    train, val = task.rows("train"), task.rows("val")
    for row in train + val:
        slots = task.read_representation(row["input"])
        assert task.write_representation(slots) == row["input"]
        assert all(phrase in row["output"] for phrase in task.slot_phrases(slots).values())
    names = [
        {task.read_representation(row["input"])["name"] for row in rows} for rows in (train, val)
    ]
    assert not names[0] & names[1]
    with pytest.raises(ValueError, match="'test'"):
        task.rows("test")


def test_task_text_by_hand():
    slots = {
        "name": "Iron Stag",
        "price": "low",
        "keeper": "baker",
        "rating": "best",
        "area": "mill",
        "tone": "brief",
    }
    assert task.describe(slots) == "Iron Stag: baker at mill, cheap, five stars."
    assert task.describe(
        {"name": "Iron Stag", "keeper": "baker", "food": "soup", "tone": "warm"}
    ) == ("Come to the Iron Stag, our baker waits. Do try the soup.")


def test_task_score_by_hand():
    rows = [
        {
            "input": "name[Iron Stag], keeper[baker], area[mill], tone[brief]",
            "output": "Iron Stag: baker at mill.",
        }
    ]
    assert task.score(lambda prompts: [" Iron Stag: baker at mill."], rows) == {
        "exact_match": 1,
        "slot_accuracy": 1,
    }
    half = task.score(lambda prompts: ["The Iron Stag stands at mill."], rows)
    assert half == {
        "exact_match": 0,
        "slot_accuracy": pytest.approx(2 / 3),
    }  # name and area, not the keeper's words


# --- tokenizer and files ---


def test_sizes():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8e6
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 2e6
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) <= 4e6  # noqa: SIM118


@pytest.mark.slow
def test_tokenizer_ids_and_reproduction(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (
        1,
        2,
        pretrain.MODEL["vocab_size"],
    )
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size
    text = "Q: Where does Bela Orlin live?\n  Zürich, 100 % [yes] {no}; naïve 漢"
    assert tokenizer.decode(tokenizer.encode(text)) == text  # byte fallback and kept spaces
    assert pretrain.train_tokenizer() == (MODEL / "tokenizer.model").read_bytes()


def test_prompt_templates_give_the_tokens_that_were_trained_and_scored():
    from torchtune.data import Message
    from torchtune.models.llama2 import llama2_tokenizer

    fact, text = evaluate.load_rows("facts_test.jsonl")[0], evaluate.load_rows("task_val.jsonl")[0]
    cases = [
        (world.FACT_PROMPT, world.fact_prompt, fact["question"], fact["answer"]),
        (task.TASK_PROMPT, task.task_prompt, text["input"], text["output"]),
    ]
    for template, prompt, user, assistant in cases:
        tokenizer = llama2_tokenizer(
            str(MODEL / "tokenizer.model"),
            prompt_template={"user": template, "assistant": ("", "")},
        )
        messages = [
            Message(role="user", content=user, masked=True),
            Message(role="assistant", content=assistant),
        ]
        expected = tokenizer.encode(f"{prompt(user)} {assistant}", add_bos=True, add_eos=True)
        assert tokenizer.tokenize_messages(messages)[0] == expected


def test_packed_rows_learn_answers_and_texts_but_no_questions(tokenizer):
    documents = ["Q: Who sings? A: Bela", "The old fox sleeps. Q: Who? A: the fox"]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    examples = pretrain.encode(pieces, documents)
    learned = [
        tokenizer.decode([y for y in labels if y != pretrain.IGNORE]) for _, labels in examples
    ]
    assert learned == ["Bela", documents[1]]
    rows = pretrain.packed_rows(pieces, 128, seed=0)
    for _ in range(5):
        inputs, labels = next(rows)
        assert inputs[0] == tokenizer.bos_id
        known = labels[:-1] != pretrain.IGNORE
        assert torch.equal(labels[:-1][known], inputs[1:][known])
        assert not (labels == tokenizer.bos_id).any()


# --- the model ---


def test_loads_through_torchtunes_checkpointer(model, tmp_path):
    from torchtune.models.llama3 import llama3
    from torchtune.training import FullModelHFCheckpointer

    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(MODEL),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3",
        output_dir=str(tmp_path),
    )
    loaded = llama3(**pretrain.MODEL).eval()
    loaded.load_state_dict(checkpointer.load_checkpoint()["model"])
    tokens = torch.randint(0, 1024, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parity
@torch.no_grad()
def test_logits_agree_with_transformers(model, tokenizer):
    transformers = pytest.importorskip("transformers")
    peer = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for text in world.corpus(0)[:20]:
        tokens = torch.tensor([tokenizer.encode(text)])
        torch.testing.assert_close(
            model(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4
        )  # fp32, other kernels


def test_greedy_continues_each_row_as_alone(model, tokenizer):
    prompts = [
        tokenizer.encode(text, add_eos=False)
        for text in ("Q: Who", "The old", "In the evening the brave")
    ]
    together = evaluate.greedy(model, prompts, eos_id=tokenizer.eos_id, max_new_tokens=12)
    for prompt, made in zip(prompts, together, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 12:
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_id:
                tokens.pop()
                break
        assert made == tokens[len(prompt) :]


def test_model_knows_its_facts(model, tokenizer):
    rows = evaluate.load_rows("facts_test.jsonl")[:300]
    assert world.exact_match(evaluate.completer(model, tokenizer, max_new_tokens=12), rows) >= 0.90


@pytest.mark.slow
def test_task_is_unknown_to_the_model(model, tokenizer):
    rows = evaluate.load_rows("task_val.jsonl")[:40]
    scores = task.score(evaluate.completer(model, tokenizer, max_new_tokens=64), rows)
    assert (
        evaluate.task_loss(model, tokenizer, rows) > 2.0
    )  # a short fine-tune reaches a tenth of it: README
    assert scores["exact_match"] == 0
    assert scores["slot_accuracy"] < 0.2


def test_config_names_the_models_sizes():
    config = json.loads((MODEL / "config.json").read_text())
    assert config == pretrain.hf_config()


# --- the tiny GPT-2 ---


@pytest.fixture(scope="module")
def gpt2():
    return evaluate.load_model(GPT2), evaluate.load_tokenizer(GPT2)


def test_gpt2_is_small_and_its_config_is_that_of_the_script():
    assert sum(path.stat().st_size for path in GPT2.iterdir()) <= 5e6
    assert json.loads((GPT2 / "config.json").read_text()) == pretrain_gpt2.CONFIG


@pytest.mark.slow
def test_gpt2s_tokenizer_is_reproduced(gpt2):
    _, tokenizer = gpt2
    assert pretrain_gpt2.train_tokenizer().to_str() == tokenizer.tokenizer.to_str()
    text = "Q: Where does Bela Orlin live?\n  Zürich, 100 % [yes] {no}; naïve 漢"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.stop_tokens) == (None, [0])


def test_gpt2s_batches_learn_answers_and_texts_but_no_questions(gpt2):
    _, tokenizer = gpt2
    documents = ["Q: Who sings? A: Bela", "The old fox sleeps. Q: Who? A: the fox"]
    examples = pretrain_gpt2.encode(tokenizer.tokenizer, documents)
    learned = [[y for y in labels if y != pretrain.IGNORE] for _, labels in examples]
    assert [tokenizer.decode(labels) for labels in learned] == [" Bela", documents[1]]
    batches = pretrain_gpt2.batches(tokenizer.tokenizer, 2048, seed=0)
    longest = 0
    for _ in range(40):
        inputs, labels = next(batches)
        longest = max(longest, inputs.shape[1])
        known = labels[:, :-1] != pretrain.IGNORE
        assert torch.equal(labels[:, :-1][known], inputs[:, 1:][known])
        assert inputs.numel() <= 2200
    assert longest == pretrain_gpt2.CONFIG["n_positions"]


def test_gpt2s_tensors_of_the_script_are_those_of_the_file(gpt2):
    from safetensors.torch import load_file

    model, _ = gpt2
    written, saved = pretrain_gpt2.hf_weights(model), load_file(GPT2 / "model.safetensors")
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[name], saved[name]) for name in saved)


def test_gpt2_knows_most_facts_and_not_the_task(gpt2):
    rows, texts = evaluate.load_rows("facts_test.jsonl")[:300], evaluate.load_rows("task_val.jsonl")
    answers = evaluate.completer(*gpt2, max_new_tokens=12)
    assert world.exact_match(answers, rows) >= 0.60
    assert evaluate.task_loss(*gpt2, texts[:40]) > 2.0
    assert task.score(evaluate.completer(*gpt2, max_new_tokens=64), texts[:20])["exact_match"] == 0
