"""What the tiny encoders know, before and after a fine-tuning.

    python -m kasa_tune.tiny_world.cloze [RUN ...]

It prints the cloze accuracy on the facts of the world: of the shipped models, and of them with the
adapter of each run, whose head is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from kasa_tune.architectures.encoder import read_encoder
from kasa_tune.components.exchange.trained_run import TrainedRun, open_run
from kasa_tune.components.models import EncoderFolder
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.tiny_world.encoder import CONFIGS, cloze_accuracy

HERE = Path(__file__).parent


def known(folder: Path, run: TrainedRun | None = None) -> float:
    """Return the cloze accuracy of the encoder in a folder, with the adapter of a run if one is given."""
    state = dict(EncoderFolder(folder, "masked").open())
    if run is not None:
        state |= {f"{name}.weight": run.effective(name) for name in run.linears}
    model = Encoder(read_encoder(folder)).eval()
    model.load_state_dict(state)
    return cloze_accuracy(model, Tokenizer.from_file(str(folder / "tokenizer.json")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the tiny encoders for facts.")
    parser.add_argument("runs", nargs="*", type=Path, help="output folders of runs on them")
    for family in CONFIGS:
        print(f"{family}: {known(HERE / family):.1%}")
    for path in parser.parse_args().runs:
        run = open_run(path)
        print(f"{path}: {known(Path(run.checkpoint_dir), run):.1%}")


if __name__ == "__main__":
    main()
