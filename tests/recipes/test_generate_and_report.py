"""What a person looks at after a run: completions and pictures."""

import json

import pytest

from kasa_tune import config
from kasa_tune.components.checkpoints import Checkpoint


def generate(*overrides: str) -> list[str]:
    return ["--config", "tiny_kasa_generate", "num_samples=3", "max_new_tokens=12", *overrides]


def test_base_and_tuned_completions_are_shown_side_by_side(finetune, run_main, tmp_path, capsys):
    run = finetune("max_steps=6", "optimizer.lr=1e-2")
    arguments = generate(f"adapter_checkpoint={run.folder}", f"output_dir={tmp_path / 'out'}")
    assert run_main("generate_text", *arguments) == 0
    records = [
        json.loads(line)
        for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()
    ]
    assert len(records) == 3
    printed = capsys.readouterr().out
    for record in records:
        assert list(record) == ["prompt", "reference", "base", "tuned"]
        assert record["prompt"].startswith("Data: name[")
        assert record["base"] != record["tuned"]
        assert f"tuned: {record['tuned']}" in printed
    assert len({record["prompt"] for record in records}) == 3


def test_the_base_shown_is_the_untouched_base(finetune, run_main, tmp_path):
    """Disabling the adapter must bring back the base model, not the base without its smallest components."""
    run = finetune("max_steps=2", "model.truncation_rank=30")
    outputs = {}
    for name, adapter in {"with": run.folder, "without": "null"}.items():
        folder = tmp_path / name
        run_main(
            "generate_text",
            *generate(
                f"adapter_checkpoint={adapter}", "model.truncation_rank=30", f"output_dir={folder}"
            ),
        )
        outputs[name] = [
            json.loads(line)["base"]
            for line in (folder / "completions.jsonl").read_text().splitlines()
        ]
    assert outputs["with"] == outputs["without"]


def test_prompts_of_ones_own(run_main, capsys):
    arguments = generate("adapter_checkpoint=null", "dataset=null", 'prompts=["name[Red Fox]"]')
    assert run_main("generate_text", *arguments) == 0
    assert "name[Red Fox]" in capsys.readouterr().out


def test_generation_refuses_what_it_cannot_do(finetune, run_main, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no finished checkpoint"):
        run_main("generate_text", *generate(f"adapter_checkpoint={tmp_path / 'empty'}"))
    run = finetune("max_steps=1")
    for other in ("rank: saved 8, now 4", "alpha: saved 16.*, now 256"):
        key, value = other[: other.index(":")], other.split()[-1]
        with pytest.raises(ValueError, match=key):
            run_main(
                "generate_text",
                *generate(f"adapter_checkpoint={run.folder}", f"model.{key}={value}"),
            )
    with pytest.raises(ValueError, match=r"max_new_tokens"):
        run_main("generate_text", *generate("adapter_checkpoint=null", "max_new_tokens=600"))


def test_report_draws_both_pictures_from_the_runs_own_config(finetune, run_main):
    run = finetune("max_steps=4", "run_val_every_n_steps=2")
    assert run_main("report_run", "--config", str(run.folder / "config.yaml")) == 0
    for name in ("loss_curve.png", "singular_values.png"):
        assert (run.folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (run.folder / name).stat().st_size > 10_000


def test_report_of_no_run(run_main, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        run_main("report_run", "--config", "tiny_kasa", f"output_dir={tmp_path}")


def test_the_report_measures_the_base_and_not_the_truncated_weight(finetune, load_recipe):
    """Removed singular values are the base's smallest ones."""
    run = finetune("max_steps=1", "model.truncation_rank=3")
    cfg = config.load(run.folder / "config.yaml", [], config.FINETUNE)
    spectra = load_recipe("report_run").drawn_spectra(cfg, Checkpoint(run.checkpoints[-1]))
    assert len(spectra) == 6
    for layer in spectra.values():
        assert layer.removed.tolist() == pytest.approx(layer.base[-3:].tolist(), rel=1e-3)
        assert len(layer.update) == 16
