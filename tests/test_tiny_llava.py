"""The embedded tiny LLaVA: pictures and answers that follow from them, weights of the script, what it knows."""

import json
import random
import re

import pytest
from safetensors import safe_open

from kasa_tune.components.data import tokenizer_from_checkpoint
from kasa_tune.components.data.visual import VisualPrompts
from kasa_tune.components.evaluation import LanguageModel, VisualQuestions
from kasa_tune.families.visual_tasks import KEPT_FAMILIES
from kasa_tune.tiny_world import evaluate, pretrain_llava, shapes

FOLDER = evaluate.HERE / "llava"


@pytest.fixture(scope="module")
def prompts():
    return VisualPrompts(tokenizer_from_checkpoint(str(FOLDER)))


@pytest.fixture(scope="module")
def model():
    return pretrain_llava.load(FOLDER).eval()


# --- pictures


def thing(shape, radius=6, place="top left", color="red", shift=(0, 0)):
    return shapes.Thing(shape, color, place, radius, shift, (0, 0, 0))


def covered(*things):
    """Pixels ``[side, side]`` that are not of the ground."""
    return (shapes.Picture(things, 50).draw() != 50).any(axis=2)


@pytest.mark.parametrize("radius", [5, 6])
def test_shapes_cover_their_areas(radius):
    square, circle, triangle = (covered(thing(s, radius)) for s in ("square", "circle", "triangle"))
    assert square.sum() == (2 * radius) ** 2
    assert abs(circle.sum() - 3.1416 * radius**2) <= 2 * radius
    assert abs(triangle.sum() - 2 * radius**2) <= 2 * radius
    assert (square & covered(thing("cross", radius)) == covered(thing("cross", radius))).all()
    assert len({covered(thing(shape, radius)).tobytes() for shape in shapes.SHAPES}) == 4


def test_a_thing_stays_in_its_corner_and_has_its_color():
    for index, place in enumerate(shapes.PLACES):
        for shift in (-1, 1):
            picture = shapes.Picture((thing("square", 6, place, "blue", (shift, shift)),), 20)
            pixels = picture.draw().reshape(2, 16, 2, 16, 3).transpose(0, 2, 1, 3, 4)
            corners = pixels.reshape(4, 16, 16, 3)
            assert [bool((corner != 20).any()) for corner in corners] == [
                i == index for i in range(4)
            ]
            assert tuple(corners[index][8, 8]) == shapes.COLORS["blue"]


# --- questions


NEXT = "circle square triangle cross circle red green blue yellow purple white red".split()


def answer_by_hand(question, things):
    """What follows from the things in a picture, by the words of a question."""
    words = re.findall(r"[a-z]+", question.lower().replace("crosses", "cross"))
    named = [word.removesuffix("s") if word != "cross" else word for word in words]
    chosen = [
        t
        for t in things
        if t.color in (*words, *([t.color] if not {*words} & {*shapes.COLORS} else ()))
        and t.shape in (*named, *([t.shape] if not {*named} & {*shapes.SHAPES} else ()))
        and (t.place in question or not any(place in question for place in shapes.PLACES))
    ]
    if "twin" in words:
        shape = NEXT[NEXT.index(chosen[0].shape) + 1]
        return f"{NEXT[NEXT.index(chosen[0].color) + 1]} {shape}"
    if words[:2] == ["how", "many"]:
        return shapes.NUMBERS[len(chosen)]
    if words[0] in ("is", "do", "does"):
        return "yes" if chosen else "no"
    if "in the" in question:
        return f"{chosen[0].color} {chosen[0].shape}" if chosen else "nothing"
    assert len(chosen) == 1
    return chosen[0].color if "color" in words else chosen[0].shape


@pytest.mark.parametrize("family", [*shapes.FAMILIES, *shapes.LEARNED])
def test_answers_follow_from_the_picture(family):
    questions, answers = shapes.questions(family, "a test"), set()
    for _ in range(300):
        seen, asked = next(questions)
        assert asked.answer == answer_by_hand(asked.question, seen.things), asked
        answers.add(asked.answer)
    assert len(answers) > 1


def test_pretraining_asks_all_families_but_the_one_to_learn_and_ends_in_a_description():
    rng, told = random.Random(0), set()
    for _ in range(300):
        seen, (*asked, described) = shapes.conversation(rng, 3)
        assert len(asked) == 3
        told |= {each.question.split()[0] for each in asked}
        assert "twin" not in " ".join(each.question for each in asked)
        parts = described.answer.split(", ")
        assert len(parts) == 4
        assert sum(part != "nothing" for part in parts) == len(seen.things)
    assert told >= {"Is", "What", "Which", "How"}
    assert (*shapes.FAMILIES,) == KEPT_FAMILIES


# --- the model


def test_it_is_small_and_its_files_are_those_of_the_script(tmp_path):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5e6
    pretrain_llava.save_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (FOLDER / path.name).read_text(), path.name
    norm = "vision_tower.vision_model.post_layernorm"
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {*file.keys()} == {
            *pretrain_llava.hub_names(), f"{norm}.weight", f"{norm}.bias",
        }  # fmt: skip


def test_only_answers_are_learned(prompts):
    drawn = [shapes.conversation(random.Random(0), 2)]
    tokens, labels, images = pretrain_llava.batch_of(drawn, prompts)
    assert images.shape == (1, 3, shapes.SIDE, shapes.SIDE)
    learned = labels[0][labels[0] != pretrain_llava.IGNORE].tolist()
    expected = "".join(f" {each.answer}</s>" for each in drawn[0][1])
    assert prompts.tokenizer.decode(learned, skip_special_tokens=False) == expected
    places = labels[0] != pretrain_llava.IGNORE
    assert tokens[0].roll(-1)[places].tolist() == learned


def test_it_knows_the_families_and_not_the_one_to_learn(model, prompts):
    found = pretrain_llava.accuracies(model, prompts, "a test", 200)
    for family in KEPT_FAMILIES:
        right, commonest = found[family]
        assert right > 0.85, family
        assert commonest < 0.7
    assert found["twins"][0] < 0.05


def test_completions_in_batches_are_the_likeliest_words(model, prompts):
    """Of questions of all lengths, against one pass over each row with its right answer."""
    path = evaluate.HERE / "data" / "shapes_calibration.jsonl"
    task = VisualQuestions(
        name="all", data_file=str(path), normalization="none", max_new_tokens=8, limit=60
    )
    task.check_prompts(prompts.tokenizer, model.max_seq_len)
    scores = task.run(LanguageModel(model, prompts.tokenizer, batch_size=7))
    families = [shapes.questions(family, "calibration") for family in shapes.FAMILIES]
    for number, record in enumerate(scores.records):
        seen, asked = next(families[number % len(families)])
        tokens, labels, images = pretrain_llava.batch_of([(seen, [asked])], prompts)
        chosen, wanted = model(tokens, images=images).argmax(dim=-1), labels != -100
        assert record["exact_match"] == float((chosen == labels)[wanted].all())
        assert record["references"] == [asked.answer]
    lines = path.read_text().splitlines()[:60]
    assert [json.loads(line)["answer"] for line in lines] == [
        record["references"][0] for record in scores.records
    ]
