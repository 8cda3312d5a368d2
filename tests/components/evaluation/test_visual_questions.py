"""Questions about images: the VQA rule by closed forms and by its definition, letters, rows refused."""

import base64
import io
import itertools
import json
import random
import statistics

import pytest
from PIL import Image

from kasa_tune.components.evaluation import VisualChoices, VisualQuestions
from kasa_tune.components.evaluation.visual_answers import (
    chosen_letter,
    vqa_accuracy,
    vqa_normalized,
)
from tests.components.evaluation.test_tasks import Canned, data, values

assert data  # a fixture


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


# What the official script makes of each: worked out by hand from its rules.
NORMALIZED = {
    "The Dog.": "dog",
    " an\n apple\t": "apple",
    "none": "0",
    "Ten people": "10 people",
    "I dont know": "i don't know",
    "couldn'tve": "couldn't've",
    "black/white": "black white",
    "yes, it is": "yes it is",
    "yes,it is": "yes it is",
    "1,000 cars": "1000 cars",
    "1,000 well-known": "1000 wellknown",
    "well - known": "well known",
    "well-known - dogs": "wellknown dogs",
    "3.5 m": "3.5 m",
    "u.s.": "us",
    "what's that?": "what's that",
    "its": "its",
    "the": "",
}


@pytest.mark.parametrize("text", NORMALIZED)
def test_answers_are_normalized_as_vqa_does(text):
    assert vqa_normalized(text) == NORMALIZED[text]


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_of_ten_people_has_a_closed_form(count, expected):
    people = ["The cat"] * count + [f"dog {i}" for i in range(10 - count)]
    assert vqa_accuracy("cat.", people) == pytest.approx(expected, abs=1e-12)


def test_vqa_accuracy_is_the_mean_over_all_subsets_without_one():
    rng = random.Random(0)
    for _ in range(50):
        people = rng.choices("abcd", k=rng.randint(4, 12))
        subsets = itertools.combinations(people, len(people) - 1)
        expected = statistics.fmean(min(subset.count("b") / 3, 1) for subset in subsets)
        assert vqa_accuracy("b", people) == pytest.approx(expected, abs=1e-12)


OPTIONS = ["a dog", "two cats", "A bird", "none"]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("B", 1), (" b.", 1), ("(C)", 2), ("D: none", 3), ("A. a dog", 0), ("The answer is B.", 1),
        ("2 cats", 1), ("bird", 2), ("The dog", 0), ("E", None), ("A cat", None), ("", None),
        ("I see a dog", None), ("the", None),
    ],
)  # fmt: skip
def test_an_answer_names_an_option(answer, number):
    assert chosen_letter(answer, OPTIONS) == number


def test_short_answers(images, data):
    people = [{"answer": "Yes", "answer_id": i} for i in range(8)] + [{"answer": "no"}] * 2
    rows = [
        {"question": "Is it red?", "image": "a.png", "answers": people},
        {"question": "<image> and <image>?", "image": ["a.png", "b.png"], "answers": people},
        {"question": "Which?", "image": None, "answers": ["two", "2", "Two.", "three", "four"]},
    ]
    task = VisualQuestions(
        name="vqa", data_file=data(*rows), answer="answers", scoring="vqa", prompt="{question} Say."
    )
    model = Canned([" yes", " no", " the two!"])
    scores = task.run(model)
    assert values(scores) == {
        "vqa_accuracy": pytest.approx((1 + 0.6 + (3 * 2 / 3 + 2) / 5) / 3),
        "exact_match": 1.0,
    }
    prompts = [prompt for prompt, _, _ in model.asked]
    assert [prompt.text for prompt in prompts] == [
        "USER: <image>\nIs it red? Say. ASSISTANT:",
        "USER: <image> and <image>? Say. ASSISTANT:",
        "USER: Which? Say. ASSISTANT:",
    ]
    assert [[path.name for path in prompt.images] for prompt in prompts] == [
        ["a.png"], ["a.png", "b.png"], [],
    ]  # fmt: skip
    assert scores.records[1]["vqa_accuracy"] == pytest.approx(0.6)


def test_one_answer_and_an_image_inside_the_row(data):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    row = {"question": "What?", "image": uri, "answer": "a box"}
    task = VisualQuestions(name="exact", data_file=data(row), system="Be short.")
    model = Canned(["Box"])
    assert values(task.run(model)) == {"exact_match": 1.0}
    assert model.asked[0][0].text == "Be short. USER: <image>\nWhat? ASSISTANT:"
    assert model.asked[0][0].images == (file.getvalue(),)


def test_options(images, data):
    rows = [
        {"question": "What?", "image": "a.png", "choices": OPTIONS, "answer": answer}
        for answer in (1, "B", "two cats", "A bird")
    ]
    task = VisualChoices(name="letters", data_file=data(*rows))
    model = Canned(["B", "A", "Two cats", "perhaps"])
    scores = task.run(model)
    assert values(scores) == {"accuracy": 0.5, "answered": 0.75}
    assert [record["chosen"] for record in scores.records] == [1, 0, 1, None]
    assert model.asked[0][0].text == (
        "USER: <image>\nWhat?\nA. a dog\nB. two cats\nC. A bird\nD. none\n"
        "Answer with the option's letter from the given choices directly. ASSISTANT:"
    )


GOOD = {"question": "What?", "image": "a.png", "answer": "box"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (VisualQuestions, {"image": "none.png"}, "there is no image"),
        (VisualQuestions, {"image": 3}, "column 'image' must hold the path"),
        (VisualQuestions, {"image": "data:image/png,abc"}, "in base 64"),
        (
            VisualQuestions,
            {"image": "data:image/png;base64,iVBO"},
            "the image in the row is broken",
        ),
        (VisualQuestions, {"question": "<image><image>"}, "it has 1 images and 2 times <image>"),
        (VisualQuestions, {"answer": []}, "holds no text"),
        (VisualChoices, {"choices": ["one"]}, "must hold 2 to 26"),
        (VisualChoices, {"choices": ["one", "two"], "answer": "C"}, "neither the number"),
    ],
)
def test_rows_are_refused_with_their_number(images, data, kind, change, message):
    good = GOOD if kind is VisualQuestions else {**GOOD, "choices": ["box", "pen"]}
    path = data(good, {**good, **change})
    with pytest.raises(ValueError, match=rf"Task vqa, row 1 of .*{message}"):
        kind(name="vqa", data_file=path)


def test_settings_are_refused(images, data):
    path = data(GOOD)
    with pytest.raises(ValueError, match=r"row 0 .*at least 4 people"):
        VisualQuestions(name="vqa", data_file=path, scoring="vqa")
    for key in ("scoring", "normalization", "image_aspect_ratio"):
        with pytest.raises(ValueError, match=f"Task vqa: {key}"):
            VisualQuestions(name="vqa", data_file=path, **{key: "other"})


def test_a_model_that_does_not_see_is_refused(images, data):
    task = VisualQuestions(name="vqa", data_file=data(GOOD))
    with pytest.raises(ValueError, match=r"Task vqa: .*tokenizer of a LLaVA checkpoint"):
        task.check_prompts(object(), 128)
    json.dumps(task.run(Canned(["box"])).records)  # as they are written
