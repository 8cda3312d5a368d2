"""The page of a run: that it is whole, loads and runs nothing, and shows whatever text as text."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest
import torch

from kasa_tune.components.reports import DrawnSpectrum, ReportedRun, read_folder, run_page
from kasa_tune.components.reports.run_files import LayerInput
from kasa_tune.components.reports.text import duration, number, shown
from tests.components.reports.reading_pages import Page

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></svg><iframe src=//evil.example>",
    "<!-- [x](javascript:alert(1)) **bold** &amp; ]]>",
    "\u202egnp.exe\u202c\u2066\u200b\ufeff\x00\x07\x1b[31m\x85\u2028",
    "half \ud800 of a pair",
    "# head\n| a | b |\n\ttabbed",
]
ALL_HOSTILE = "".join(HOSTILE)
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def hostile_run(name="a run", num_steps=30, text=ALL_HOSTILE):
    """A run in which every text that a file could hold is hostile."""
    names = [f"layers.{i}.{kind}{text}" for i in range(3) for kind in ("q", "k")] + [text]
    spectrum = DrawnSpectrum(torch.linspace(9, 1, 9), torch.ones(2), torch.linspace(1, 0, 4))
    metrics = [
        {"step": i, "loss": 5.0 / i, "lr": 1e-3, text: float(i), "note": text, "l2": float("nan")}
        for i in range(1, num_steps + 1)
    ]
    metrics += [
        {"step": 0, "val_loss": 3.0, "val_loss_base": 4.0},
        {"step": num_steps, "val_loss": 1},
    ]
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75}
    task = {"measures": text, "results": {text: {text: estimate, "f1": text}}}
    layer = {"round": 1, "singular_values": [3.0, 2.0, 1.0]}
    return ReportedRun(
        name + text,
        folder=text,
        about={text: text, "method": text},
        metrics=metrics,
        samples=[{"step": s, "prompt": text, "answer": text, text: text} for s in (0, text, None)],
        evaluations={text: {"tasks": {text: task, "bad": 3}}},
        phases={text: 3.0, "training": 100.0},
        layers={name: {**layer, "round": i % 3} for i, name in enumerate(names)},
        ranks={name: i for i, name in enumerate(names)},
        diagonals={10: dict.fromkeys(names, 1.0), 20: dict.fromkeys(names, 2.0)},
        spectra=dict.fromkeys(names, spectrum),
        words={"removed": text, "update": text},
        inputs={
            name: LayerInput([[1.0, 0.5], [0.5, 1.0]], 4, {text: [2.0, 1.0]}) for name in names
        },
    )


def page_of(*runs):
    text = HOSTILE[0]
    return run_page(list(runs), title=f"a page {text}", about=text, footer=text)


@pytest.fixture(scope="module", params=[1, 2], ids=["one run", "two runs"])
def content(request):
    return page_of(*(hostile_run(f"run {i}") for i in range(request.param)))


def test_a_page_is_well_formed_and_can_be_written(content):
    page = Page(content)
    assert page.faults == []
    content.encode()  # halves of surrogate pairs cannot be
    assert content.startswith("<!DOCTYPE html>")
    sections = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert len(sections) == len(set(sections)) == 11
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert links == [f"#{name}" for name in sections]


def test_a_page_loads_and_runs_nothing(content):
    page = Page(content)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "img", "link", "object", "embed", "base", "form", "use"}
    for tag, name, value in page.attributes():
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "style", "xlink:href", "action", "formaction"), (tag, name)
        assert name != "href" or value.startswith("#"), (tag, value)
    assert not re.search(r"url\(|@import|expression", page.style)
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_hostile_text_is_shown_as_text(content):
    text = Page(content).text
    for hostile in HOSTILE[:5]:
        assert hostile in text
    for hidden in ("U+202E", "U+2066", "U+200B", "U+FEFF", "U+0000", "U+001B", "U+2028", "U+D800"):
        assert hidden in text
    assert not set(content) & set("\u202e\u202c\u2066\u200b\ufeff\x00\x07\x1b\x85\u2028\ud800")
    assert "# head\n| a | b |\n\ttabbed" in text


def test_every_drawing_says_what_it_shows(content):
    drawings = [a for tag, a in Page(content).elements if tag == "svg" and "aria-hidden" not in a]
    assert len(drawings) > 20
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)


def test_colours_are_defined_for_light_and_dark(content):
    style = Page(content).style
    light, dark = style.partition("@media (prefers-color-scheme:dark)")[::2]
    used = set(re.findall(r"var\((--[\w-]+)\)", style))
    assert len(used) > 30
    for name in used:
        assert f"{name}:" in light, name
        assert f"{name}:" in dark, name


def test_a_long_run_stays_small_and_says_what_it_leaves_out():
    content = page_of(hostile_run(num_steps=50_000, text=""))
    assert len(content.encode()) < 2_000_000
    assert "50,000 points are drawn as 200 groups" in content


def test_a_run_that_says_little_is_a_page_too():
    page = Page(page_of(ReportedRun("short", "folder", metrics=[{"step": 1, "loss": 2.0}])))
    assert page.faults == []
    assert [a["id"] for tag, a in page.elements if tag == "section"] == ["summary", "losses"]


def test_samples_stand_by_prompt_and_what_they_share_stands_once():
    samples = [
        {
            "step": step,
            "prompt": prompt,
            "reference": "as it should be",
            "answer": f"{prompt}{step}",
        }
        for step in range(0, 100, 10)
        for prompt in "pq"
    ]
    text = Page(page_of(ReportedRun("run", "folder", samples=samples))).text
    assert text.count("as it should be") == 2
    for said in ("p0", "p30", "p60", "p90", "q0", "q90"):
        assert said in text
    assert "p10" not in text
    assert "12 more are in the run's folder" in text


def test_files_of_any_content_are_read(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(
        b'{"prompt": "a\xff", "answer": 1}\n[1]\n{"step": 3, "completion": "x"}\n{"torn'
    )
    (tmp_path / "phases.json").write_text('{"training": 3, "bad": "x", "worse": NaN, "less": -1}')
    (tmp_path / "decomposition.json").write_text("[" * 100_000)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "results.json").write_text(json.dumps({"tasks": {"t": {"results": []}}}))
    (tmp_path / "results.json").write_text('{"tasks": 3}')
    run = read_folder("run", tmp_path, [])
    assert [sample.get("step") for sample in run.samples] == [None, 3]
    assert run.phases == {"training": 3.0}
    assert run.layers == {}
    assert list(run.evaluations) == ["one/results.json"]
    assert Page(page_of(run)).faults == []


def test_numbers_and_times_in_words():
    assert [number(x) for x in (0.0, 3.0, 1234567.0, 0.123456, None, float("inf"))] == [
        "0", "3", "1,234,567", "0.1235", "–", "–",
    ]  # fmt: skip
    assert [duration(x) for x in (1.25, 59.0, 61.4, 3600.0, 7500.0)] == [
        "1.2 s", "59.0 s", "1 min 01 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
    assert shown("x" * 2000).endswith("… 800 characters more</span>")


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed (apt-get install chromium)")
@pytest.mark.parametrize(("width", "scheme"), [(400, 1), (1400, 0)], ids=["light", "dark"])
def test_a_browser_shows_the_page_and_refuses_nothing(tmp_path, width, scheme):
    """The style sheet applies under the page's own policy, nothing overflows, no script runs."""
    probe = (
        "<script>document.title=[document.documentElement.scrollWidth,"
        "getComputedStyle(document.querySelector('figure')).borderRadius].join()</script>"
    )
    content = page_of(hostile_run())
    digest = base64.b64encode(hashlib.sha256(probe[8:-9].encode()).digest()).decode()
    allowed = f"default-src 'none'; script-src 'sha256-{digest}'"
    probed = content.replace("default-src 'none'", allowed, 1).replace("</body>", f"{probe}</body>")
    (tmp_path / "page.html").write_text(probed, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    options += [f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom"]
    command = [BROWSER, *options, f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found, radius = re.search(r"<title>(\d+),([^<]*)</title>", done.stdout).groups()
    assert radius == "12px"
    assert int(found) <= max(width, 500)  # the narrowest window of a headless Chromium is 500 wide
    assert "Content Security Policy" not in done.stderr
