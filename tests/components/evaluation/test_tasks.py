"""Kinds of tasks with answers known beforehand: the numbers worked out by hand, and data that is refused."""

import json
import math
import shutil

import pytest

from kasa_tune.components.evaluation import (
    CodeProblems,
    CommonsenseAnswers,
    CommonsenseChoices,
    DataToText,
    MathProblems,
    MTBenchAnswers,
    MultipleChoice,
    Perplexity,
    QuestionAnswering,
)
from kasa_tune.components.evaluation.code_problems import pass_at_k
from kasa_tune.components.evaluation.commonsense import first_word, question_and_choices
from kasa_tune.components.evaluation.language_model import LogLikelihood


class Canned:
    """In place of a model: answers in order, likelihoods by text. It keeps what it was asked."""

    def __init__(self, answers=(), likelihoods=None):
        self.answers, self.likelihoods, self.asked = list(answers), likelihoods or {}, []

    def complete(self, prompts, decoding, *, stop=(), progress=None):
        self.asked += [(prompt, decoding, list(stop)) for prompt in prompts]
        given, self.answers = self.answers[: len(prompts)], self.answers[len(prompts) :]
        assert len(given) == len(prompts)
        if progress:
            progress(len(prompts))
        return given

    def log_likelihoods(self, pairs, *, progress=None):
        self.asked += pairs
        return [LogLikelihood(self.likelihoods[text.strip()], 1, False) for _, text in pairs]

    def rolling_log_likelihoods(self, texts, *, progress=None):
        return [LogLikelihood(*self.likelihoods[text], False) for text in texts]


@pytest.fixture
def data(tmp_path):
    """Write rows to a file, and return its path."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def values(scores):
    return {name: metric.value for name, metric in scores.metrics.items()}


# --------------------------------------------------------------------------------- questions


def test_question_answering(data):
    rows = [
        {"question": "Who?", "answer": ["The Fox", "Reynard"]},
        {"question": "Where?", "answer": "Rome"},
        {"question": "When?", "answer": {"value": "1999", "aliases": ["1999", "in 1999"]}},
    ]
    task = QuestionAnswering(name="qa", data_file=data(*rows), prompt="Q: {question} A:")
    model, done = Canned([" fox.", " in Paris", " 1998"]), []
    scores = task.run(model, done.append)
    assert values(scores) == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx(1 / 3)}
    assert [prompt.text for prompt, _, _ in model.asked] == [
        "Q: Who? A:",
        "Q: Where? A:",
        "Q: When? A:",
    ]
    assert model.asked[0][2] == ["\n"]
    assert scores.records[2] == {
        "prompt": "Q: When? A:",
        "references": ["1999", "in 1999"],
        "answer": " 1998",
        "exact_match": 0.0,
        "f1": 0.0,
    }
    assert sum(done) == task.num_steps == 3


def test_limit_and_columns(data):
    rows = [{"q": f"{i}", "texts": {"text": ["x"], "answer_start": [0]}} for i in range(5)]
    task = QuestionAnswering(
        name="qa", data_file=data(*rows), prompt="{q}", answer="texts", limit=2
    )
    assert [sample.references for sample in task.samples] == [["x"], ["x"]]


def test_gsm8k(data):
    rows = [
        {"question": "1?", "answer": "so 2 + 2 = <<2+2=4>>4\n#### 1,004"},
        {"question": "2?", "answer": "#### -3"},
        {"question": "3?", "answer": "#### 5.0"},
    ]
    task = MathProblems(name="gsm8k", data_file=data(*rows))
    scores = task.run(Canned(["It is 1004. ", "no idea", "2 + 3 = 5 and that is it: 5.00"]))
    assert values(scores) == {
        "accuracy": pytest.approx(2 / 3),
        "answered": pytest.approx(2 / 3),
    }
    assert [record["found"] for record in scores.records] == ["1004", None, "5"]
    assert [record["references"] for record in scores.records] == ["1004", "-3", "5"]


def test_math(data):
    rows = [
        {"problem": "a", "solution": r"thus $\boxed{\frac{1}{2}}$"},
        {"problem": "b", "solution": r"\boxed{(1,2)}"},
        {"problem": "c", "solution": r"\boxed{7}"},
    ]
    task = MathProblems(name="math", data_file=data(*rows), answers="math")
    scores = task.run(Canned([r"\boxed{0.5}", r"The answer is: $\left(1, 2\right)$.", "7"]))
    assert [record["accuracy"] for record in scores.records] == [1, 1, 0]
    assert scores.metrics["answered"].value == pytest.approx(2 / 3)


# --------------------------------------------------------------------------------- choices

SOCIAL = {
    "task": "social_i_qa",
    "instruction": "Please choose the correct answer to the question: Kim fell. Why?\n\n"
    "Answer1: she ran Answer2: Answer: none Answer3: no one knows\n\n"
    "Answer format: answer1/answer2/answer3",
    "input": "",
    "answer": "answer1",
}
WINO = {
    "task": "winogrande",
    "instruction": "Please choose the correct answer to fill in the blank to complete the given "
    "sentence: The cup hit the plate so _ broke first.\n\nOption1: cup Option2: plate "
    "Answer format: option1/option2",
    "input": "",
    "answer": "option2",
}
BOOL = {
    "task": "boolq",
    "instruction": "Please answer the following question with true or false, question: is it?\n\n"
    "Answer format: true/false",
    "input": "",
    "answer": "false",
}


def test_generated_commonsense_answers(data):
    task = CommonsenseAnswers(name="cs", data_file=data(SOCIAL, WINO, BOOL))
    model = Canned(["the correct answer is answer1", "option1 or option2", "It is not."])
    scores = task.run(model)
    assert [record["found"] for record in scores.records] == ["answer1", "option1", None]
    assert values(scores) == {
        "accuracy": pytest.approx(1 / 3),
        "answered": pytest.approx(2 / 3),
    }
    prompt = model.asked[0][0]
    assert prompt.chat
    assert prompt.text.startswith("Below is an instruction that describes a task.")
    assert SOCIAL["instruction"] in prompt.text


def test_the_published_layout_is_that_of_training(data):
    task = CommonsenseAnswers(name="cs", data_file=data(BOOL), published_layout=True)
    assert "# noqa: E501" in task.samples[0].prompt.text


def test_the_first_answer_word_counts():
    assert first_word("answer12", ["answer1", "answer2"]) == "answer1"
    assert first_word("nothing", ["true", "false"]) is None


def test_questions_are_put_as_lm_eval_puts_them(data):
    task = CommonsenseChoices(name="cs", data_file=data(SOCIAL, WINO, BOOL))
    social, wino, boolean = task.samples
    assert social.contexts == ["Q: Kim fell. Why?\nA:"] * 3
    assert social.texts == ["she ran", "Answer: none", "no one knows"]
    assert wino.contexts == ["The cup hit the plate so cup", "The cup hit the plate so plate"]
    assert wino.texts == ["broke first."] * 2
    assert wino.answer == 1
    assert boolean.contexts[0] == "Question: is it?\nAnswer:"
    assert boolean.texts == ["yes", "no"]
    assert boolean.answer == 1


def test_choices_by_likelihood_and_by_likelihood_per_letter(data):
    """-6 is above -8; per letter -8/8 is above -6/2."""
    rows = [
        {"question": "which?", "choices": ["ab", "abcdefgh"], "answer": 1},
        {"question": "who?", "choices": ["ab", "abcdefgh"], "answer": "ab"},
    ]
    task = MultipleChoice(name="mc", data_file=data(*rows))
    model = Canned(likelihoods={"ab": -6.0, "abcdefgh": -8.0})
    scores = task.run(model)
    assert values(scores) == {"accuracy": 0.5, "accuracy_norm": 0.5}
    assert [record["accuracy"] for record in scores.records] == [0, 1]
    assert model.asked[0] == ("Question: which?\nAnswer:", " ab")
    assert task.num_steps == 4


def test_labels_of_choices(data):
    row = {"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "key": "B"}
    task = MultipleChoice(name="arc", data_file=data(row), answer="key")
    assert task.samples[0].answer == 1


def test_every_row_of_the_eight_sets_can_be_asked_both_ways(real_data):
    files = sorted((real_data / "datasets" / "commonsense" / "test").glob("*.jsonl"))
    assert len(files) == 8
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        generated = CommonsenseAnswers(name="cs", data_file=str(file)).samples
        chosen = CommonsenseChoices(name="cs", data_file=str(file)).samples
        assert len(generated) == len(chosen) == len(rows)
        for row, sample in zip(rows, chosen, strict=True):
            written = " ".join(row["instruction"].split())
            if row["task"] in ("winogrande", "boolq", "hellaswag"):
                continue  # what follows the blank; yes and no; marks are taken out
            assert all(" ".join(text.split()) in written for text in sample.texts)
            assert row["answer"].endswith(str(sample.answer + 1))


def test_an_instruction_without_its_choices():
    with pytest.raises(ValueError, match="does not list the choices answer1, answer2"):
        question_and_choices("question: what? Answer1: a", ["answer1", "answer2"])


# --------------------------------------------------------------------------------- texts


def test_references_of_one_prompt_are_one_sample(data):
    rows = [{"mr": "a", "ref": "x y"}, {"mr": "b", "ref": "z"}, {"mr": "a", "ref": "x z"}]
    task = DataToText(
        name="e2e",
        data_file=data(*rows),
        metrics=["rouge_l", "cider"],
        tokenization="python",
        decoding={"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4},
    )
    assert [sample.references for sample in task.samples] == [["x y", "x z"], ["z"]]
    model = Canned([" x   y ", "q"])
    scores = task.run(model)
    assert [record["answer"] for record in scores.records] == ["x y", "q"]
    assert scores.metrics["rouge_l"].value == pytest.approx(0.5)
    assert scores.notes == {"tokenization": "python"}
    assert model.asked[0][1].num_beams == 10


def test_bleu_and_nist_of_texts(data):
    pytest.importorskip("sacrebleu")
    rows = [{"mr": "a", "ref": "The Mill, by the river, is not cheap."}]
    task = DataToText(name="e2e", data_file=data(*rows), metrics=["nist", "bleu"])
    scores = task.run(Canned(["the mill, by the river, is not cheap."]))
    assert list(scores.metrics) == ["bleu", "nist"]
    assert scores.metrics["bleu"].value == pytest.approx(1.0)
    # 11 tokens, `the` and the comma twice: 7 of log2(11) bits, and 4 of log2(11 / 2)
    unigrams = 7 * math.log2(11) + 4 * math.log2(11 / 2)
    assert scores.metrics["nist"].sums[0, 0] == pytest.approx(unigrams)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("sacrebleu", r"needs sacrebleu, not installed here: pip install 'kasa_tune\[evaluate\]'"),
        ("pycocoevalcap", r"needs pycocoevalcap, .*Or set tokenization: python"),
    ],
)
def test_a_missing_library_is_refused_before_the_data_is_read(monkeypatch, missing, words):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else object()
    )
    with pytest.raises(ValueError, match=words):
        DataToText(name="e2e", data_file="/nowhere")


def test_missing_java_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="needs java for meteor, rouge_l, cider"):
        DataToText(name="e2e", data_file="/nowhere")


# --------------------------------------------------------------------------------- perplexity


def test_perplexity(data):
    task = Perplexity(name="ppl", data_file=data({"text": "two words"}, {"text": "öne"}))
    scores = task.run(Canned(likelihoods={"two words": (-6.0, 4), "öne": (-2.0, 1)}))
    assert values(scores) == {
        "perplexity": pytest.approx(math.exp(8 / 5)),
        "word_perplexity": pytest.approx(math.exp(8 / 3)),
        "byte_perplexity": pytest.approx(math.exp(8 / 13)),
        "bits_per_byte": pytest.approx(8 / 13 / math.log(2)),
    }
    assert all(metric.lower_is_better for metric in scores.metrics.values())


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    task = Perplexity(name="ppl", data_file=str(tmp_path / "a.txt"))
    assert task.samples == ["one\ntwo\n"]


# --------------------------------------------------------------------------------- MT-Bench


def test_answers_are_written_as_the_judge_reads_them(data):
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 101, "category": "math", "turns": ["Add."]},
    ]
    task = MTBenchAnswers(name="mt", data_file=data(*rows))
    model = Canned(["five", " once", "twice "])  # the first turn, coldest first; then the second
    scores = task.run(model)
    assert scores.metrics == {}
    assert [record["question_id"] for record in scores.records] == [81, 101]
    assert scores.records[0]["choices"] == [{"index": 0, "turns": ["once", "twice"]}]
    assert scores.records[1]["choices"] == [{"index": 0, "turns": ["five"]}]
    assert [decoding.temperature for _, decoding, _ in model.asked] == [0.0, 0.7, 0.7]
    assert model.asked[2][0].earlier == (("Write.", "once"),)
    assert model.asked[2][0].text == "Again."
    assert task.num_steps == 3


# --------------------------------------------------------------------------------- code

HUMANEVAL = {
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP = {"text": "Write add.", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}


def test_pass_at_k_is_the_share_of_draws_that_have_one_that_passes():
    """Against counting all subsets."""
    from itertools import combinations

    for n, c, k in [(5, 2, 1), (5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 5), (3, 2, 2)]:
        drawn = list(combinations(range(n), k))
        share = sum(any(i < c for i in chosen) for chosen in drawn) / len(drawn)
        assert pass_at_k(n, c, k) == pytest.approx(share)


def test_code_is_not_run_unless_allowed(data):
    with pytest.raises(ValueError, match="allow_code_execution: True"):
        CodeProblems(name="code", data_file=data(HUMANEVAL))


@pytest.mark.slow
def test_programs_are_run_against_their_tests(data):
    task = CodeProblems(
        name="code",
        data_file=data(HUMANEVAL),
        allow_code_execution=True,
        num_samples=4,
        ks=[1, 2],
        decoding={"temperature": 0.8},
        seconds=20.0,
    )
    answers = ["    return a + b\n", "    return a - b\n", "    return (", "    return b + a"]
    scores = task.run(Canned(answers))
    assert scores.records[0]["results"] == ["passed", "failed", "failed", "passed"]
    assert "AssertionError" in scores.records[0]["errors"][1]
    assert "SyntaxError" in scores.records[0]["errors"][2]
    assert values(scores) == {"pass@1": pytest.approx(0.5), "pass@2": pytest.approx(1 - 1 / 6)}
    assert "audit hook" in scores.notes["network_cut_off_by"]


@pytest.mark.slow
def test_mbpp_and_answers_in_fences(data):
    task = CodeProblems(
        name="code",
        data_file=data(MBPP, MBPP),
        problems="mbpp",
        allow_code_execution=True,
        chat=True,
        seconds=20.0,
    )
    assert "assert add(0, 0) == 0" in task.samples[0].prompt.text
    fenced = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    scores = task.run(Canned([fenced, "def add(a, b): return 0"]))
    assert scores.records[0]["results"] == ["passed"]
    assert scores.metrics["pass@1"].value == 0.5


# --------------------------------------------------------------------------------- refused data

QA = {"prompt": "{question}"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        ("[]", "holds no rows"),
        ('{"question": "a"', "line 1 is no JSON"),
        ('{"question": "a", "answer": "b"}\n[1]\n', "line 2 is \\[1\\], and must be an object"),
        ("null\n", "line 1 is None, and must be an object"),
        ('{"question": "a"}', "row 0 .*: has no column 'answer'; its columns are question"),
        ('{"Question": "a", "answer": "b"}', "Did you mean 'Question'"),
        ('{"question": "a", "answer": []}', "row 0 .*: 'answer' holds no text"),
        ('{"question": "a", "answer": [1]}', "must hold a text or a list of texts, got \\[1\\]"),
        ('{"question": "a", "answer": null}', "must hold a text or a list of texts, got None"),
        ('{"question": "a", "answer": {"value": "b", "aliases": 3}}', "must hold a text or a list"),
        ('{"question": ["a"], "answer": "b"}', "'question' must hold text for the prompt"),
        ('{"question": "a", "answer": "b"}\n{"question": null, "answer": "b"}', "row 1 "),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, text, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"Task qa.*{words}"):
        QuestionAnswering(name="qa", data_file=str(path), **QA)


def test_a_file_that_is_not_in_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2 is not in UTF-8"):
        QuestionAnswering(name="qa", data_file=str(path), **QA)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Task qa: data_file .*none\.jsonl does not exist"):
        QuestionAnswering(name="qa", data_file=str(tmp_path / "none.jsonl"), **QA)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        QuestionAnswering(name="qa", data_file=str(tmp_path), **QA)


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        (MathProblems, {"question": "a", "answer": "7"}, "no number after ####"),
        (MathProblems, {"question": "a", "answer": 7}, "'answer' must hold text, got 7"),
        (MultipleChoice, {"question": "a", "choices": ["x"], "answer": 0}, "two texts or more"),
        (
            MultipleChoice,
            {"question": "a", "choices": ["x", "y"], "answer": 2},
            "neither the number",
        ),
        (
            MultipleChoice,
            {"question": "a", "choices": ["x", "y"], "answer": True},
            "neither the num",
        ),
        (CommonsenseAnswers, BOOL | {"answer": "maybe"}, "the instruction asks for"),
        (CommonsenseAnswers, {"instruction": "Why?", "answer": "x"}, "must end in 'Answer format"),
        (
            CommonsenseChoices,
            WINO | {"instruction": WINO["instruction"].replace("_", "x")},
            "blank _",
        ),
        (Perplexity, {"text": " "}, "'text' is empty"),
        (Perplexity, {"words": "a"}, "has no column 'text'"),
        (MTBenchAnswers, {"question_id": 1, "category": "math", "turns": "x"}, "'turns' must hold"),
        (MTBenchAnswers, {"category": "math", "turns": ["x"]}, "'question_id'"),
    ],
)
def test_rows_of_the_wrong_form(data, kind, row, words):
    with pytest.raises(ValueError, match=f"Task t, row 0 of .*: .*{words}"):
        kind(name="t", data_file=data(row))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"name": "../up"}, "letters, digits"),
        ({"name": ""}, "letters, digits"),
        ({"name": ".hidden"}, "begins with no dot"),
        ({"measures": "both"}, "measures must be learned, kept or null"),
        ({"prompt": "Who?"}, "names no column"),
        ({"prompt": " "}, "prompt is empty"),
        ({"stop": [""]}, "stop holds an empty text"),
        ({"normalization": "lower"}, "normalization must be squad, triviaqa, none"),
        ({"decoding": {"beams": 3}}, "decoding has no setting beams"),
        ({"decoding": {"num_beams": 0}}, "num_beams must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer"),
    ],
)
def test_settings_that_are_refused(data, more, words):
    path = data({"question": "a", "answer": "b"})
    with pytest.raises(ValueError, match=words):
        QuestionAnswering(**{"name": "qa", "data_file": path, "prompt": "{question}"} | more)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"ks": [2]}, "must lie between 1 and num_samples 1"),
        ({"num_samples": 2}, "would be equal: set decoding.temperature"),
        ({"seconds": 0.0}, "must be above 0"),
        ({"problems": "leetcode"}, "problems must be humaneval or mbpp"),
    ],
)
def test_settings_of_code_that_are_refused(data, more, words):
    with pytest.raises(ValueError, match=words):
        CodeProblems(name="c", data_file=data(HUMANEVAL), allow_code_execution=True, **more)


def test_no_room_for_answers(data):
    task = QuestionAnswering(name="qa", data_file=data({"question": "a", "answer": "b"}), **QA)
    task.check_length(33)
    with pytest.raises(ValueError, match=r"max_new_tokens 32 leaves no room .* at most 31"):
        task.check_length(32)


# --------------------------------------------------------------------------------- real data


def test_references_of_real_sets_are_right_answers(real_data):
    """Every row can be used, and what its author wrote is scored as right."""
    data = real_data / "datasets"
    solutions = [json.loads(line)["answer"] for line in (data / "gsm8k" / "test.jsonl").open()]
    task = MathProblems(name="gsm8k", data_file=str(data / "gsm8k" / "test.jsonl"))
    assert len(task.samples) == 1319
    assert values(task.run(Canned(solutions))) == {"accuracy": 1.0, "answered": 1.0}
    task = QuestionAnswering(name="nq", data_file=str(data / "nq_open" / "dev.jsonl"))
    assert len(task.samples) == 3610
    last = [sample.references[-1] for sample in task.samples]
    assert values(task.run(Canned(last)))["exact_match"] == 1.0


def test_other_real_sets_can_be_asked(real_data):
    data = real_data / "datasets"
    path = str(data / "mt_bench" / "questions.jsonl")
    assert MTBenchAnswers(name="mt", data_file=path).num_steps == 160
    path = str(data / "wikitext2" / "test.txt")
    assert len(Perplexity(name="wikitext", data_file=path).samples[0]) > 1_000_000
    path = str(data / "e2e" / "dev.jsonl")
    task = DataToText(name="e2e", data_file=path, metrics=["cider"], tokenization="python")
    assert len(task.samples) == 547
    assert sum(len(sample.references) for sample in task.samples) == 4672


@pytest.mark.slow
def test_the_official_tokens_and_meteor_are_those_of_the_library(data):
    """Against the library's own pipeline, where it and java are installed."""
    captions = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("needs java")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    rows = [
        {"mr": "a", "ref": "The Mill isn't cheap; it's near the river."},
        {"mr": "a", "ref": "Near the river you'll find The Mill, which is not cheap."},
        {"mr": "b", "ref": "Cotto serves (cheap) food for £20-25."},
        {"mr": "c", "ref": "Fine food."},
    ]
    answers = ["The Mill is near the river, and isn't cheap.", "Cotto serves food.", ""]
    task = DataToText(name="e2e", data_file=data(*rows), metrics=["meteor", "rouge_l", "cider"])
    metrics = task.score(answers)
    tokenizer = captions.PTBTokenizer()
    wanted = tokenizer.tokenize(
        {i: [{"caption": text} for text in each.references] for i, each in enumerate(task.samples)}
    )
    given = tokenizer.tokenize({i: [{"caption": text or "."}] for i, text in enumerate(answers)})
    for name, scorer in (("meteor", Meteor()), ("rouge_l", Rouge()), ("cider", Cider())):
        expected, _ = scorer.compute_score(wanted, given)
        assert metrics[name].value == pytest.approx(expected, rel=1e-9), name
