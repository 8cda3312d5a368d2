"""One command measures the base and runs on it: against completions computed otherwise, and what it refuses."""

import json
import shutil

import pytest

from kasa_tune import config, registry
from kasa_tune.components.adapters.state import load_adapter_state_dict
from kasa_tune.components.checkpoints import Checkpoint
from kasa_tune.tiny_world.evaluate import completer, load_model, load_rows, load_tokenizer
from kasa_tune.tiny_world.world import exact_match, fact_prompt

from .conftest import run_recipe

RUN = ["max_steps=8", "optimizer.lr=4e-2"]
FAST = [
    "--config",
    "tiny_evaluate",
    "tasks.0.limit=3",
    "tasks.0.max_new_tokens=8",
    "tasks.1.limit=40",
    "bootstrap.num_resamples=100",
]


def read(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def answers(folder, task, model) -> list[dict]:
    path = folder / "samples" / task / f"{model}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def value(results, task, model, metric="exact_match"):
    return results["tasks"][task]["results"][model][metric]["value"]


@pytest.fixture(scope="module")
def run(load_recipe, tmp_path_factory):
    """A KaSA run of eight large steps."""
    folder = tmp_path_factory.mktemp("kasa") / "run"
    return run_recipe(load_recipe("kasa_finetune_single_device"), folder, *RUN)


def test_base_and_runs_side_by_side(run, finetune, run_main, tmp_path, capsys):
    kasa = run
    lora = finetune(*RUN, name="lora", config_name="tiny_lora")
    out = tmp_path / "out"
    adapters = f"adapters={{kasa: {kasa.folder}, lora: {lora.folder}}}"
    assert run_main("evaluate_model", *FAST, adapters, f"output_dir={out}") == 0
    results, printed = read(out), capsys.readouterr().out
    facts = results["tasks"]["facts"]
    assert list(facts["results"]) == ["base", "kasa", "lora"]
    assert facts["num_samples"] == 40
    for model in ("base", "kasa", "lora"):
        rows = answers(out, "facts", model)
        shown = sum(row["exact_match"] for row in rows) / len(rows)
        assert value(results, "facts", model) == pytest.approx(shown)
        assert len(answers(out, "texts", model)) == 3
    # what was forgotten is what the base knew less what the run knows
    lost = value(results, "facts", "base") - value(results, "facts", "kasa")
    assert results["forgotten"]["kasa"]["facts"]["value"] == pytest.approx(lost)
    assert lost > 0.1  # eight large steps leave their mark
    difference = facts["differences_to_base"]["kasa"]["exact_match"]
    assert difference["value"] == pytest.approx(-lost)
    assert difference["low"] <= -lost <= difference["high"] < 0
    assert "texts" in results["learned"]["lora"]
    for words in ("learned", "kept", "facts", "kasa - base", str(out)):
        assert words in printed


def test_the_numbers_are_those_of_other_code(run, run_main, tmp_path):
    """The tiny world's own scoring, without caches or padding on the left, of base and run."""
    out = tmp_path / "out"
    run_main("evaluate_model", *FAST, f"adapters={{kasa: {run.folder}}}", f"output_dir={out}")
    rows = load_rows("facts_test.jsonl")[:40]
    cfg = config.load("tiny_kasa", [], config.FINETUNE)
    folder = cfg.checkpointer.checkpoint_dir
    tokenizer, models = load_tokenizer(folder), {"base": load_model(folder)}
    models["kasa"] = trained(cfg, Checkpoint(run.checkpoints[-1]), models["base"])
    for name, model in models.items():
        generate = completer(model, tokenizer, max_new_tokens=12)
        assert value(read(out), "facts", name) == pytest.approx(exact_match(generate, rows))
        texts = generate([fact_prompt(row["question"]) for row in rows])
        given = [row["answer"].strip() for row in answers(out, "facts", name)]
        assert given == [text.split("\n")[0].strip() for text in texts]


def trained(cfg, checkpoint, base):
    """The run's model by its own builder, with the adapter put in."""
    model = config.instantiate(cfg.model)
    model.load_state_dict(base.state_dict(), strict=False)
    load_adapter_state_dict(model, checkpoint.adapter)
    return model.eval()


def test_a_merged_model_does_what_the_run_does(run, run_main, tmp_path):
    merged, out = tmp_path / "merged", tmp_path / "out"
    run_main(
        "export_adapter", "--config", "merged_export", f"adapter_checkpoint={run.folder}",
        f"output_dir={merged}",
    )  # fmt: skip
    run_main("evaluate_model", *FAST, f"adapters={{run: {run.folder}}}", f"output_dir={out}")
    folder = f"checkpointer.checkpoint_dir={merged}"
    run_main("evaluate_model", *FAST, folder, "adapters=null", f"output_dir={tmp_path / 'alone'}")
    for task in ("texts", "facts"):
        of_run, of_merged = answers(out, task, "run"), answers(tmp_path / "alone", task, "base")
        assert [row["answer"] for row in of_run] == [row["answer"] for row in of_merged]
        assert of_run != answers(out, task, "base")
    with pytest.raises(ValueError, match="other base weights"):  # than the merged ones
        run_main("evaluate_model", *FAST, folder, f"adapters={{run: {run.folder}}}")


@pytest.mark.parametrize("kind", ["dora", "qcorda"])
def test_adapters_that_cannot_share_a_base_get_a_model_of_their_own(
    kind, corda, request, run_main, tmp_path
):
    if kind == "dora":
        run = corda("max_steps=4", "optimizer.lr=2e-2", config_name="tiny_dora")
    else:
        run = request.getfixturevalue("qcorda")("optimizer.lr=2e-2")
    out = tmp_path / "out"
    run_main("evaluate_model", *FAST, f"adapters={{own: {run.folder}}}", f"output_dir={out}")
    generate = [
        "--config", f"tiny_{'qcorda' if kind == 'qcorda' else 'lora'}_generate", "num_samples=3",
        "max_new_tokens=8", f"adapter_checkpoint={run.folder}", f"output_dir={tmp_path / 'texts'}",
    ]  # fmt: skip
    options = ["model.use_dora=True"] if kind == "dora" else []
    run_main("generate_text", *generate, *options)
    lines = (tmp_path / "texts" / "completions.jsonl").read_text().splitlines()
    tuned = [json.loads(line)["tuned"] for line in lines]
    assert [row["answer"].strip() for row in answers(out, "texts", "own")] == tuned


def test_any_builder_will_do(run, run_main, tmp_path):
    """A run's own model section: its adapters are left out of the base."""
    out = tmp_path / "out"
    cfg = config.load(run.folder / "config.yaml", [], config.FINETUNE)
    section = json.dumps(dict(cfg.model.items()), default=list)
    arguments = [f"adapters={{kasa: {run.folder}}}", f"output_dir={out}", f"model={section}"]
    run_main("evaluate_model", *FAST, *arguments)
    plain = tmp_path / "plain"
    run_main("evaluate_model", *FAST, f"adapters={{kasa: {run.folder}}}", f"output_dir={plain}")
    for model in ("base", "kasa"):
        assert answers(out, "facts", model) == answers(plain, "facts", model)


def test_every_kind_of_task_in_one_run(run_main, tmp_path):
    rows = {
        "qa": [{"question": "Where does Bela Orlin live?", "answer": ["Quay"]}],
        "math": [{"question": "1 + 1?", "answer": "#### 2"}],
        "mc": [{"question": "What?", "choices": ["bread", "soup"], "answer": 1}],
        "text": [{"text": "The old fox waits near the mill in the morning."}],
        "mt": [{"question_id": 1, "category": "math", "turns": ["Hello.", "Again."]}],
        "code": [{"prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()"}],
        "cs": [
            {
                "instruction": "Please answer the following question with true or false, "
                "question: is it?\n\nAnswer format: true/false",
                "input": "",
                "answer": "true",
            }
        ],
        "e2e": [{"mr": "name[Fox]", "ref": "The Fox."}, {"mr": "name[Fox]", "ref": "Fox."}],
    }
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / f"{name}.jsonl").write_text(text)
    kinds = {
        "qa": "QuestionAnswering, decoding: {num_beams: 3, length_penalty: 0.9}",
        "math": "MathProblems, decoding: {temperature: 0.7, top_p: 0.9}",
        "mc": "MultipleChoice",
        "text": "Perplexity",
        "mt": "MTBenchAnswers",
        "code": "CodeProblems, allow_code_execution: True, seconds: 20",
        "cs": "CommonsenseChoices",
        "e2e": "DataToText, metrics: [rouge_l, cider], tokenization: python",
    }
    nodes = []
    for name, kind in kinds.items():
        node = f"_component_: kasa_tune.components.evaluation.{kind}, name: {name}"
        node += f", data_file: {tmp_path / name}.jsonl"
        node += ", max_new_tokens: 6" if name not in ("mc", "text", "cs") else ""
        nodes.append(f"{{{node}}}")
    out = tmp_path / "out"
    arguments = ["--config", "tiny_evaluate", "adapters=null", f"output_dir={out}"]
    assert run_main("evaluate_model", *arguments, f"tasks=[{', '.join(nodes)}]") == 0
    tasks = read(out)["tasks"]
    assert list(tasks) == list(kinds)
    assert {name: list(task["results"]["base"]) for name, task in tasks.items()} == {
        "qa": ["exact_match", "f1"],
        "math": ["accuracy", "answered"],
        "mc": ["accuracy", "accuracy_norm"],
        "text": ["perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"],
        "mt": [],
        "code": ["pass@1"],
        "cs": ["accuracy", "accuracy_norm"],
        "e2e": ["rouge_l", "cider"],
    }
    (line,) = (out / "judge" / "mt" / "model_answer" / "base.jsonl").read_text().splitlines()
    answer = json.loads(line)
    assert (answer["model_id"], answer["question_id"]) == ("base", 1)
    assert len(answer["choices"][0]["turns"]) == 2
    assert isinstance(answer["tstamp"], float)


# --------------------------------------------------------------------------------- refused


@pytest.fixture
def no_weights(monkeypatch, load_recipe):
    """Fail a test that reads a weight."""

    def fail(*arguments, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("kasa_tune.components.models.base_weights.read_base_weights", fail)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["tasks.0.prompt='{inptu}'"],
            "Task texts, row 0 .*no column 'inptu'.*Did you mean 'input'",
        ),
        (["tasks.1.answer=question_id"], "Task facts, row 0 .*no column 'question_id'"),
        (["tasks.1.name=texts"], "Several tasks are called texts"),
        (["tasks.1.name=../x"], "letters, digits"),
        (["tasks.0.max_new_tokens=600"], "Task texts: max_new_tokens 600 leaves no room"),
        (
            ["tasks.0.decoding={num_beams: 3, temperature: 0.5}"],
            "Task texts: temperature 0.5 samples",
        ),
        (
            ["tasks.0={_component_: kasa_tune.components.evaluation.Bootstrap}"],
            "Bootstrap is no task",
        ),
        (["adapters={base: {folder}}"], "base is the name of the model without adapters"),
        (["adapters={x/y: {folder}}"], "part of names of files"),
        (["adapters={x: {folder}}"], "no finished checkpoint"),
    ],
)
def test_what_is_wrong_is_told_before_weights_are_read(
    overrides, words, run_main, tmp_path, no_weights
):
    (tmp_path / "folder" / "checkpoints").mkdir(parents=True)
    given = [text.replace("{folder}", str(tmp_path / "folder")) for text in overrides]
    arguments = ["--config", "tiny_evaluate", "adapters=null", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises((ValueError, TypeError, SystemExit), match=words) as error:
        run_main("evaluate_model", *arguments, *given)
    assert not isinstance(error.value, AssertionError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"), [("", "holds no rows"), ('{"question": "a", "answer": []}', "holds no text")]
)
def test_files_without_use(text, words, run_main, tmp_path, no_weights):
    (tmp_path / "facts.jsonl").write_text(text)
    arguments = ["--config", "tiny_evaluate", "adapters=null", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=f"Task facts.*{words}"):
        run_main("evaluate_model", *arguments, f"tasks.1.data_file={tmp_path / 'facts.jsonl'}")


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["tasks.1.data_file=/tmp/no_such_file.jsonl"], "tasks.1.data_file", "does not exist"),
        (["adapters.x=/tmp/no_such_run"], "adapters.x", "does not exist"),
        (
            ["tasks.0._component_=kasa_tune.components.evaluation.Perplexty"],
            "_component_",
            "Perplexity",
        ),
        (["tasks=[]"], "tasks", "an empty list"),
        (["tasks.0.limit=0"], "tasks.0.limit", "at least 1"),
        (["tasks.0.measures=both"], "tasks.0.measures", "learned, kept"),
        (["tasks.0.decoding.num_beam=3"], "tasks.0.decoding", "num_beams"),
        (["bootstrap.confidence=1"], "bootstrap.confidence", "below 1"),
        (["tasks.0.lmit=3"], "tasks.0.lmit", "Did you mean limit"),
    ],
)
def test_the_config_refuses(overrides, key, words):
    with pytest.raises(config.ConfigError) as error:
        config.load("tiny_evaluate", ["adapters=null", *overrides], config.EVALUATE)
    (problem,) = error.value.problems
    assert key in problem.key
    assert words in problem.text


def test_a_config_with_tasks_is_one_of_this_recipe_whatever_its_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(registry.find_config("tiny_evaluate").read_text())
    config.validate_file(path, ["adapters=null"])
    with pytest.raises(config.ConfigError, match="It is a key of generate_text"):
        config.validate_file(path, ["adapters=null", "num_samples=3"])


TASKS_ALONE = """\
output_dir: {out}
tasks:
  - _component_: kasa_tune.components.evaluation.QuestionAnswering
    name: facts
    data_file: kasa_tune://tiny_world/data/facts_test.jsonl
    prompt: "Q: {{question}} A:"
    max_new_tokens: 12
    limit: 20
device: cpu
"""


def test_a_run_or_a_folder_says_which_model_is_measured(run, run_main, tmp_path):
    base = shutil.copytree(registry.PACKAGE_ROOT / "tiny_world/model", tmp_path / "base")
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(TASKS_ALONE.format(out=tmp_path / "out"))
    run_main("evaluate_model", "--config", str(tasks), f"adapters={{kasa: {run.folder}}}")
    of_run = read(tmp_path / "out")
    assert value(of_run, "facts", "kasa") < value(of_run, "facts", "base")
    alone = [f"checkpoint_dir={base}", "dtype=fp32", f"output_dir={tmp_path / 'alone'}"]
    run_main("evaluate_model", "--config", str(tasks), *alone)
    assert value(read(tmp_path / "alone"), "facts", "base") == value(of_run, "facts", "base")
    with pytest.raises(config.ConfigError, match="give a run's output_dir, or the folder"):
        config.load(tasks, [])


def test_a_base_that_is_another_model_than_the_runs_is_refused(run, run_main, tmp_path):
    base = shutil.copytree(registry.PACKAGE_ROOT / "tiny_world/model", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rope_theta": 5e5}))
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(TASKS_ALONE.format(out=tmp_path / "out"))
    given = [f"adapters={{kasa: {run.folder}}}", f"checkpoint_dir={base}"]
    with pytest.raises((ValueError, SystemExit)):
        run_main("evaluate_model", "--config", str(tasks), *given)
    assert not (tmp_path / "out" / "results.json").exists()
