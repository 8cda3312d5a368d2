"""The table of docs/families.md: how far our decoder is from transformers, family by family.

python -m tests.parity.families_table docs/families.md
"""

import sys
import tempfile
from pathlib import Path

import torch

from kasa_tune.architectures import FAMILIES
from kasa_tune.components.evaluation.generation import complete
from tests.parity.decoder_families import CASES, load_ours, save_random, tokens

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEAD = (
    "| family | `model_type` | case | logits reach | difference, whole rows | packed | "
    "cached tokens equal |\n|---|---|---|---|---|---|---|"
)


def main(path: Path) -> None:
    """Write the table between its two marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = "\n".join(map(_row, CASES))
    path.write_text(f"{before}{BEGIN}\n{HEAD}\n{rows}\n{END}{after}", encoding="utf-8")


@torch.no_grad()
def _row(case: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        theirs = save_random(case, Path(folder))
        ours = load_ours(Path(folder))
    whole = [(ours(ids) - theirs(ids).logits).abs().max() for ids in (tokens(), tokens(length=8))]
    kind, _, words = case.partition(", ")
    return (
        f"| {FAMILIES[kind].title} | `{kind}` | {words or 'plain'} | "
        f"{theirs(tokens()).logits.abs().max():.0f} | {max(whole):.0e} | "
        f"{_packed(ours, theirs):.0e} | {_equal_tokens(ours, theirs)} |"
    )


def _packed(ours, theirs) -> torch.Tensor:
    """The largest difference when two samples share a row."""
    samples = [tokens(1, length) for length in (9, 8)]
    mask = torch.block_diag(*(torch.ones(s.shape[1], s.shape[1]).tril() for s in samples)).bool()
    positions = torch.cat([torch.arange(s.shape[1]) for s in samples])[None]
    packed = ours(torch.cat(samples, dim=1), mask=mask[None], input_pos=positions)
    alone = torch.cat([theirs(sample).logits for sample in samples], dim=1)
    return (packed - alone).abs().max()


def _equal_tokens(ours, theirs) -> str:
    """How many of 20 greedy tokens with a key-value cache are transformers'."""
    ids = tokens(2, 14)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 14:]
    found = torch.tensor(complete(ours, ids.tolist(), max_new_tokens=10, stop_tokens=[]))
    return f"{int((found == expected).sum())} of {expected.numel()}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
