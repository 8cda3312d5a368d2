"""Rows with images: their text, what is learned of it, and rows that are refused with their number."""

import base64
import json
import shutil

import pytest
import torch
from torchtune.data._common import CROSS_ENTROPY_IGNORE_IDX as IGNORE

from kasa_tune.components.corda.calibration_data import draw_rounds, rows_digest
from kasa_tune.components.data import build_dataset, collate, tokenizer_from_checkpoint
from tests.toy_llava import FEATURES, SIDE, save_llava, write_images, write_tokenizer

IMAGE = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a LLaVA's config.json, its tokenizer and images."""
    folder = tmp_path_factory.mktemp("llava")
    assert write_tokenizer(folder) == IMAGE
    save_llava(folder)
    write_images(folder)
    return folder


@pytest.fixture
def tokenizer(place):
    return tokenizer_from_checkpoint(str(place))


def dataset(place, tokenizer, rows, **more):
    path = place / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    node = {
        "_component_": "kasa_tune.components.data.visual_dataset",
        "source": "json",
        "data_files": str(path),
        "split": "train",
    }
    return build_dataset(node | more, tokenizer, name="dataset")


def asked(image="0.png", question="What color is it?", answer="red"):
    return {"image": image, "question": question, "answer": answer}


def told(*values, image="0.png"):
    roles = ("human", "gpt")
    return {
        "image": image,
        "conversations": [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)],
    }


def learned(tokenizer, sample):
    """The text of what is learned, answer by answer."""
    parts, last = [], None
    for position, label in enumerate(sample["labels"].tolist()):
        if label == IGNORE:
            continue
        if last is None or position > last + 1:
            parts.append([])
        parts[-1].append(label)
        last = position
    return [tokenizer.decode(part, skip_special_tokens=False) for part in parts]


def text(tokenizer, sample):
    return tokenizer.decode(sample["tokens"], skip_special_tokens=False)


def test_a_question_becomes_llavas_prompt(place, tokenizer):
    sample = dataset(place, tokenizer, [asked()])[0]
    images = "<image>" * FEATURES
    expected = f"<s>USER: {images}\nWhat color is it? ASSISTANT: red</s>"
    assert text(tokenizer, sample) == expected
    assert learned(tokenizer, sample) == [" red</s>"]
    assert [image.source.name for image in sample["images"]] == ["0.png"]


def test_tokens_are_those_of_transformers_processor(place, tokenizer):
    """Its text is tokenized as a whole, with every placeholder written out."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(place)
    sample = dataset(place, tokenizer, [asked(answer="blue")])[0]
    images = "<image>" * FEATURES
    whole = f"<s>USER: {images}\nWhat color is it? ASSISTANT: blue</s>"
    assert sample["tokens"].tolist() == theirs(whole, add_special_tokens=False)["input_ids"]


def test_an_image_may_stand_in_its_row(place, tokenizer):
    content = (place / "1.png").read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    inline, of_file = (dataset(place, tokenizer, [asked(one)])[0] for one in (uri, "1.png"))
    assert inline["tokens"].tolist() == of_file["tokens"].tolist()
    (image,), (file,) = inline["images"], of_file["images"]
    assert torch.equal(image.load(), file.load())
    assert image.digest() == file.digest()
    for damaged in (uri[:60], uri.replace(";base64", ""), uri + "?"):
        with pytest.raises(
            ValueError, match=r"row 1: (the image in the row|an image inside a row)"
        ):
            dataset(place, tokenizer, [asked(), asked(damaged)])


def test_a_conversation_is_learned_answer_by_answer(place, tokenizer):
    row = told("Look: <image>\nWhat?", "red", "Sure?", "yes")
    sample = dataset(place, tokenizer, [row])[0]
    images = "<image>" * FEATURES
    expected = f"<s>USER: Look: {images}\nWhat? ASSISTANT: red</s>USER: Sure? ASSISTANT: yes</s>"
    assert text(tokenizer, sample) == expected
    assert learned(tokenizer, sample) == [" red</s>", " yes</s>"]


def test_rows_with_several_images_and_with_none(place, tokenizer):
    rows = [
        told("<image><image> Same?", "no", image=["0.png", "1.png"]),
        told("Hello?", "Hi.", image=[]),
    ]
    made = dataset(place, tokenizer, rows)
    both, none = made[0], made[1]
    assert (both["tokens"] == IMAGE).sum() == 2 * FEATURES
    assert "images" not in none
    batch = collate([none, both, made[0]], pad_id=0)
    assert batch["images"].shape == (4, 3, SIDE, SIDE)
    torch.testing.assert_close(batch["images"][0], both["images"][0].load())
    assert "images" not in collate([none], pad_id=0)


def test_a_system_sentence_and_other_columns(place, tokenizer):
    rows = [{"picture": "1.png", "q": "What?", "a": "green"}]
    columns = {"image": "picture", "question": "q", "answer": "a"}
    sample = dataset(place, tokenizer, rows, column_map=columns, system="Be brief.")[0]
    assert text(tokenizer, sample).startswith("<s>Be brief. USER: <image>")


REFUSED = {
    "missing": (asked(image="none.png"), "there is no image"),
    "too many placeholders": (told("<image><image> Same?", "no"), "1 images and 2 times <image>"),
    "too few": (told("What?", "no"), "1 images and 0 times <image>"),
    "no image": (told("<image> What?", "no", image=None), "0 images and 1 times <image>"),
    "in the answer": (asked(answer="<image>"), "an answer holds <image>"),
    "no answer": (asked(answer=None), "column 'answer' must hold text"),
    "an order": (told("<image> What?"), "each followed by its answer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_is_refused_with_its_number(place, tokenizer, case):
    wrong, words = REFUSED[case]
    right = told("<image> What?", "red") if "conversations" in wrong else asked()
    with pytest.raises(ValueError, match=f"row 2: .*{words}"):
        dataset(place, tokenizer, [right, right, wrong])


def test_roles_that_do_not_alternate_are_refused(place, tokenizer):
    row = told("<image> What?", "red")
    row["conversations"][1]["from"] = "human"
    with pytest.raises(ValueError, match="row 0: message 1 must be one with from: gpt"):
        dataset(place, tokenizer, [row])


def test_images_that_are_cut_off_are_refused(place):
    short = tokenizer_from_checkpoint(str(place), max_seq_len=12)
    with pytest.raises(ValueError, match=r"row 0 .*not within the first 12 .*max_seq_len"):
        dataset(place, short, [asked()])


def test_rows_with_images_are_not_packed(place, tokenizer):
    with pytest.raises(ValueError, match=r"dataset\.packed: rows with images"):
        dataset(place, tokenizer, [asked()], packed=True)


def test_other_values_are_refused(place, tokenizer):
    for key, value in (("image_aspect_ratio", "stretch"), ("column_map", {"picture": "a"})):
        with pytest.raises(ValueError, match=f"{key} "):
            dataset(place, tokenizer, [asked()], **{key: value})


def test_the_tokenizer_must_be_of_a_llava_model(place, tokenizer):
    tokenizer.vision = None
    with pytest.raises(ValueError, match="need the tokenizer of a LLaVA checkpoint"):
        dataset(place, tokenizer, [asked()])


def draw(made, length=64, **more):
    options = {"num_samples": 2, "concatenate": False, "rounds": 1, "seed": 0, "longest": 256}
    return draw_rounds(made, max_seq_len=length, **options | more)


def test_calibration_rows_keep_their_images(place, tokenizer):
    made = dataset(place, tokenizer, [asked(), asked("1.png", answer="green")])
    rounds = draw(made)
    assert all(len(row["images"]) == 1 for row in rounds[0])
    with pytest.raises(ValueError, match="Such rows are not cut"):
        draw(made, length=20)
    with pytest.raises(ValueError, match=r"calibration\.concatenate"):
        draw(made, concatenate=True)


def test_another_image_is_another_calibration(place, tokenizer, tmp_path):
    before = rows_digest(draw(dataset(place, tokenizer, [asked()]), num_samples=1))
    for path in place.glob("*.png"):
        shutil.copy(path, tmp_path)
    shutil.copy(place / "2.png", tmp_path / "0.png")
    made = dataset(place, tokenizer, [asked()], image_dir=str(tmp_path))
    assert rows_digest(draw(made, num_samples=1)) != before
