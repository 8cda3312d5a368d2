"""Covariances of an encoder's inputs: hidden states of tokens alone, without padding and DeBERTa's table."""

from functools import partial

import torch

from kasa_tune.architectures.encoder import EncoderArchitecture, RelativePositions
from kasa_tune.components.adapters import CorDALinear, attach
from kasa_tune.components.corda.calibration import covariances, shared_inputs
from kasa_tune.components.models.encoder import Encoder
from kasa_tune.components.models.loading import build_on_meta

DEBERTA = EncoderArchitecture(
    "deberta-v2", 20, 8, 2, 2, 12, max_seq_len=16, pad_id=0, position_offset=0, type_vocab_size=0,
    relative=RelativePositions(4, 16),
)  # fmt: skip


def build():
    return attach(Encoder(DEBERTA, 2), CorDALinear, ["q_proj", "k_proj", "v_proj"], rank=2)


def test_the_table_of_positions_and_padding_do_not_count():
    groups = shared_inputs(build_on_meta(partial(build), dtype=torch.float32))
    assert groups == [tuple(f"layers.{i}.attn.{n}_proj" for n in "qkv") for i in range(2)]
    torch.manual_seed(0)
    model = build().eval()
    tokens = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0]])
    valid = tokens != 0
    with torch.no_grad():
        x = model.tok_embeddings(tokens)
        expected = []
        for layer in model.layers:
            rows = x[valid].double()
            expected.append(rows.T @ rows)
            x = layer(x, mask=valid)
    rounds = [[{"tokens": tokens, "valid": valid, "mask": valid}]]
    found = list(covariances(model, groups, rounds, wanted=lambda name, round: round == 0))
    assert [each.num_tokens for each in found] == [8, 8]
    for each, matrix in zip(found, expected, strict=True):
        torch.testing.assert_close(each.matrix.double(), matrix, rtol=1e-5, atol=1e-5)
