"""The model card: what it says is so, what others wrote stays text, its commands and snippets work."""

import contextlib
import gc
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from kasa_tune.components.checkpoints import load_part, save_checkpoint
from kasa_tune.components.exchange.deviations import Deviation, Deviations
from kasa_tune.components.exchange.markdown import code, is_repository, text
from kasa_tune.components.exchange.model_card import Written, licence_of, model_card
from kasa_tune.components.exchange.peft_lora import write_peft
from kasa_tune.components.exchange.prompting import Prompting
from kasa_tune.components.exchange.trained_run import open_run
from tests.trained_runs import STEP, toy_run

HOSTILE = (
    "a | b\n\n# Owned <script>alert(1)</script> `x` [l](http://e) ![i](http://e)\n---\n$base {{x}}"
)
PROMPTING = Prompting("Q: <your text>\nA:", [1, 2], 'Q: say "it\'s" $5\nA:', "{{ x }}", turns=False)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    """Torchtune's checkpointer collects garbage after each file; digests stay in the test's folder."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def card_of(tmp_path, method="kasa", form="peft", change=lambda state: None, **options):
    """A card of a toy's run; ``change`` spoils the run's config first."""
    tmp_path.mkdir(exist_ok=True)
    run = toy_run(tmp_path, "llama2", method, **options.pop("run", {}))
    (checkpoint,) = (run.path / "checkpoints").iterdir()
    parts = {name: load_part(checkpoint, name) for name in ("adapter", "run")}
    change(parts["run"])
    save_checkpoint(checkpoint.parent, STEP, parts)
    opened = open_run(run.path)
    config = None
    errors = Deviations()
    if form == "peft":
        (tmp_path / "out").mkdir()
        pattern = {"rank_pattern": True} if options.pop("rank_pattern", False) else {}
        errors = write_peft(opened, tmp_path / "out", base_model=None, **pattern)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    written = Written(Path("name"), form, None, opened.check_base(), errors, PROMPTING, config)
    return model_card(opened, replace(written, **options))


def front_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def headings_and_tables(card):
    """What a Markdown reader finds: titles, cells of the table, raw HTML, links and images."""
    markdown_it = pytest.importorskip("markdown_it")
    parsed = markdown_it.MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    spans = [child for token in parsed for child in token.children or []]
    titles = [parsed[i + 1].content for i, t in enumerate(parsed) if t.type == "heading_open"]
    rows = sum(token.type == "tr_open" for token in parsed)
    kinds = {token.type for token in [*parsed, *spans]}
    html = {token.content for token in [*parsed, *spans] if "html" in token.type}
    return titles, rows, kinds, html


def test_texts_of_others_are_text(tmp_path):
    """A folder's name, settings, an adapter's and a layer's name that hold Markdown, HTML and lines."""

    def change(state):
        state["total_steps"] = HOSTILE
        state["config"]["adapter_checkpoint"] = f"/x/{HOSTILE}"
        state["config"]["dataset"] = {"source": HOSTILE, HOSTILE: ["${oc.env:HOME}", HOSTILE]}
        state["config"]["optimizer"] = {"lr": HOSTILE}

    plain = headings_and_tables(card_of(tmp_path / "plain"))
    errors = Deviations({HOSTILE: Deviation(1e-3, 1e-2)})
    options = {"folder": Path(HOSTILE.replace("/", "")), "errors": errors, "base_model": HOSTILE}
    card = card_of(tmp_path / "hostile", change=change, **options)
    titles, rows, kinds, html = headings_and_tables(card)
    assert titles[1:] == plain[0][1:]
    assert rows == plain[1]
    assert kinds - {"html_inline"} <= plain[2] | {"text_special"}
    assert html <= {"<code>", "</code>"}
    front = front_of(card)
    assert "base_model" not in front
    assert front["library_name"] == "peft"
    assert len(card.splitlines()) < 400


@pytest.mark.parametrize("char", ["|", "`", "<", ">", "*", "[", "]", "!", "#", "&", "\\", "~", "$"])
def test_characters_of_markup_are_written_as_numbers(char):
    assert char not in text(f"a{char}b").replace("&#", "")
    assert text("a_b.c-d e/f 1, (2)") == "a_b.c-d e/f 1, (2)"
    assert text("_a_") == "&#95;a&#95;"
    assert text("a\r\nb\x0bc\u2028d") == "a b c d"
    assert code("a_b/c.d") == "`a_b/c.d`"
    assert "`" not in code("a`b").replace("<code>", "")
    assert len(text("x" * 10**6)) < 300


@pytest.mark.parametrize(
    ("name", "fits"),
    {
        "meta-llama/Meta-Llama-3-8B": True,
        "gpt2": True,
        "/home/me/model": False,
        "./model": False,
        "a/b/c": False,
        "a--b/c": False,
        "a/..": False,
        "a\n/b": False,
        "a/b\n": False,
        "x" * 200: False,
        "": False,
    }.items(),
)
def test_what_a_repository_may_be_called(name, fits):
    assert is_repository(name) == fits
    huggingface_hub = pytest.importorskip("huggingface_hub")
    if fits:
        huggingface_hub.utils.validate_repo_id(name)


def test_metadata_are_as_the_hub_takes_them(tmp_path):
    (tmp_path / "base").mkdir()
    licence = (
        "---\nlicense: other\nlicense_name: toy\nlicense_link: LICENSE\ntags: [x]\n---\n# Toy\n"
    )
    (tmp_path / "base" / "README.md").write_text(licence)
    card = card_of(tmp_path, base_model="me/base")
    front = front_of(card)
    assert front == {
        "base_model": "me/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:me/base", "kasa", "lora", "transformers", "kasa_tune"],
        "license": "other",
        "license_name": "toy",
        "license_link": "LICENSE",
    }
    huggingface_hub = pytest.importorskip("huggingface_hub")
    data = huggingface_hub.ModelCard(card).data
    assert (data.base_model, data.license) == ("me/base", "other")


def test_a_base_without_a_name_is_left_out_and_it_is_said_what_to_set(tmp_path):
    """Nothing of this machine's folders stands in the card or the config."""
    data = {"dataset": {"source": "json", "data_files": f"{tmp_path}/secret/rows.jsonl"}}
    card = card_of(tmp_path, run=data)
    assert "base_model" not in front_of(card)
    assert "export again with `base_model=<owner>/<name>`" in card
    assert str(tmp_path) not in card
    assert "secret" not in card
    assert "rows.jsonl" in card
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None


@pytest.mark.parametrize(
    "content", ["", "---", "---\n- a\n---", "---\n[\n---", "---\na: " + "[" * 5000]
)
def test_a_base_card_of_another_form_has_no_licence(content, tmp_path):
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text(content)
    assert licence_of(tmp_path) == {}


def test_dora_is_called_what_it_is(tmp_path):
    card = card_of(tmp_path, "dora")
    assert "A DoRA on the unchanged base model" in card
    assert "A plain LoRA" not in card
    assert "vllm serve" not in card
    assert "llama-cli" not in card
    assert "export the run merged" in card
    assert "\nor\n" not in card


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_commands_name_the_dtype_of_training(dtype, name, tmp_path):
    card = card_of(tmp_path, base_model="me/base", run={"dtype": dtype})
    assert f"dtype=torch.{name})" in card
    assert f"vllm serve me/base --dtype {name} --enable-lora --max-lora-rank 8 " in card
    assert f"peft=<this folder>,dtype={name}`" in card
    assert getattr(torch, name).is_floating_point


def test_it_says_from_which_vllm_on_a_rank_pattern_is_read(tmp_path):
    assert "from 0.32 on" in card_of(tmp_path / "a", "corda_mixed", rank_pattern=True)
    assert "0.32" not in card_of(tmp_path / "b", "corda_mixed")


def commands(card, section):
    """The commands of a section, their lines joined."""
    lines = card.split(f"## {section}\n")[1].split("\n## ")[0].replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("curl")]


def test_the_request_holds_the_prompt(tmp_path):
    (words,) = commands(card_of(tmp_path), "Prompt")
    request = json.loads(words[words.index("-d") + 1])
    assert (request["model"], request["prompt"]) == ("tuned", PROMPTING.text)
    assert words[1].endswith("/v1/completions")


@pytest.mark.parametrize(
    ("prompting", "words"),
    [
        (replace(PROMPTING, turns=True), "`chat_template.jinja` of this folder. Start"),
        (PROMPTING, "of this folder, for one message of the user"),
        (replace(PROMPTING, of_base=True), "the base's own chat template give the same tokens"),
        (replace(PROMPTING, chat_template=None), "no chat template gives these tokens"),
        (replace(PROMPTING, text=None), '"prompt": [1, 2]'),
        ("it is <b>gone</b>", "How to prompt could not be found out: it is &#60;b&#62;gone"),
    ],
)
def test_what_it_says_of_prompts(prompting, words, tmp_path):
    assert words in card_of(tmp_path, prompting=prompting)


def test_its_snippet_knows_the_base(tmp_path):
    card = card_of(tmp_path)
    lines = card.split("## The base\n")[1].split("\n## ")[0].splitlines()
    snippet = "\n".join(line[4:] for line in lines if line.startswith("    "))
    snippet = snippet.replace("<folder of the base>", str(tmp_path / "base"))

    def printed():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(snippet, {})
        return out.getvalue().strip()

    assert printed() == "True"
    (file,) = (tmp_path / "base").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert printed() == "False"


@pytest.mark.parametrize("form", ["merged", "native"])
def test_other_forms_have_cards_too(form, tmp_path):
    card = card_of(tmp_path, form=form, base_model="me/base")
    front = front_of(card)
    relation = {"merged": "finetune", "native": "adapter"}[form]
    assert f"base_model:{relation}:me/base" in front["tags"]
    assert "lora" not in front["tags"]
    assert "$" not in card.replace("$5", "")
