"""What the tiny RoBERTa knows, before and after a fine-tuning.

    python -m kasa_tune.tiny_world.cloze [RUN ...]

It prints the cloze accuracy on the facts of the world: of the shipped model, and of it with the
adapter of each run, whose head is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

from kasa_tune.architectures.encoder import read_encoder
from kasa_tune.components.exchange.trained_run import open_run
from kasa_tune.components.models import EncoderFolder
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.tiny_world.encoder import cloze_accuracy

HERE = Path(__file__).parent / "roberta"


def known(run: Path | None = None) -> float:
    """Return the cloze accuracy of the shipped model, with the adapter of a run if one is given."""
    state = dict(EncoderFolder(HERE, "masked").open())
    if run is not None:
        trained = open_run(run, checkpoint_dir=str(HERE))
        state |= {f"{name}.weight": trained.effective(name) for name in trained.linears}
    model = Encoder(read_encoder(HERE)).eval()
    model.load_state_dict(state)
    return cloze_accuracy(model, Tokenizer.from_file(str(HERE / "tokenizer.json")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the tiny RoBERTa for facts.")
    parser.add_argument("runs", nargs="*", type=Path, help="output folders of runs on it")
    print(f"before: {known():.1%}")
    for run in parser.parse_args().runs:
        print(f"{run}: {known(run):.1%}")


if __name__ == "__main__":
    main()
