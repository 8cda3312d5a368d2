"""Pictures of a run: that they show its numbers, and that they are pictures."""

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from kasa_tune.components.reports import plots
from kasa_tune.components.reports.plots import DrawnSpectrum, loss_curve, singular_values

RUN = [
    {"step": 0, "val_loss": 3.0, "val_loss_base": 3.5},
    *({"step": step, "loss": 4.0 - step / 10, "lr": 1e-4} for step in range(1, 10)),
    {"step": 10, "loss": 2.5, "val_loss": 2.25},
]


def spectra():
    return {
        "layers.0.attn.q_proj": DrawnSpectrum(
            torch.linspace(9, 1, 9), torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.1])
        ),
        "layers.1.attn.q_proj": DrawnSpectrum(
            torch.linspace(7, 0, 8), torch.tensor([]), torch.tensor([0.3, 0.0])
        ),
    }


def draw_loss(path):
    loss_curve(RUN, path, title="a run")


def draw_singular_values(path):
    singular_values(spectra(), path, title="a run")


@pytest.fixture
def figure(monkeypatch):
    """The figure of the last picture, instead of its file."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    yield lambda: drawn[-1]
    for each in drawn:
        plt.close(each)


def lines_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


@pytest.mark.parametrize("draw", [draw_loss, draw_singular_values])
def test_files_are_pngs_with_something_on_them(draw, tmp_path):
    path = tmp_path / "picture.png"
    draw(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert 400 <= height <= 2000
    assert 700 <= width <= 3000
    inked = (pixels[..., :3] < 0.9).any(axis=-1).mean()
    assert 0.005 < inked < 0.5
    assert plt.get_fignums() == []


def test_loss_curve_shows_every_step_and_every_validation(figure):
    draw_loss(None)
    (axes,) = figure().get_axes()
    lines = lines_of(axes)
    assert lines["training, each step"] == [
        [line["step"], line["loss"]] for line in RUN if "loss" in line
    ]
    assert lines["validation, last 2.250"] == [[0, 3.0], [10, 2.25]]
    assert [y for _, y in lines["base model, validation 3.500"]] == [3.5, 3.5]
    assert axes.get_xlabel() == "step"
    assert "nats" in axes.get_ylabel()
    assert axes.get_title() == "a run"


def test_running_mean_weighs_the_past_geometrically(figure):
    draw_loss(None)
    losses = np.array([line["loss"] for line in RUN if "loss" in line])
    expected = [
        np.average(losses[: n + 1], weights=0.9 ** np.arange(n, -1, -1)) for n in range(len(losses))
    ]
    found = lines_of(figure().get_axes()[0])["training, running mean"]
    assert [y for _, y in found] == pytest.approx(expected)


def test_a_run_without_validation_has_no_line_for_it(figure):
    loss_curve([{"step": 1, "loss": 2.0}], None, title="one step")
    assert set(lines_of(figure().get_axes()[0])) == {
        "training, each step",
        "training, running mean",
    }


@pytest.mark.parametrize(
    "run", [[], [{"step": 0, "val_loss": 3.0}]], ids=["nothing", "no training"]
)
def test_a_run_that_has_not_trained_yet_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="not logged a training loss yet"):
        loss_curve(run, tmp_path / "picture.png", title="")
    assert not list(tmp_path.iterdir())


def test_singular_values_of_the_base_are_marked_where_removed(figure):
    draw_singular_values(None)
    left, right = figure().get_axes()
    base = [
        line.get_xydata().tolist()
        for line in left.get_lines()
        if line.get_label().startswith("layers.")
    ]
    assert base[0] == [[i, 10.0 - i] for i in range(1, 10)]
    marks = [line.get_xydata().tolist() for line in left.get_lines() if line.get_marker() == "x"]
    assert [[8, 2.0], [9, 1.0]] in marks  # the last two of nine
    updates = [line.get_ydata().tolist() for line in right.get_lines()]
    assert updates == [pytest.approx([0.5, 0.1]), pytest.approx([0.3, 0.0])]
    assert left.get_yscale() == "log"
    assert right.get_ylim()[0] == 0
    assert {text.get_text() for text in left.get_legend().get_texts()} == {*spectra(), "removed"}
