"""Logits of RoBERTa, BERT and DeBERTaV3 against transformers, with padding and pairs."""

from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_tune.architectures.encoder import read_encoder
from kasa_tune.architectures.encoder_names import encoder_name, hub_name
from kasa_tune.components.models import EncoderFolder, disentangled
from kasa_tune.components.models.encoder import Encoder
from tests.toy_encoders import KINDS, batch_of, our_model, random_model

pytestmark = pytest.mark.parity


def logits_of(theirs, kind):
    tokens, mask, types = batch_of(kind)
    with torch.no_grad():
        return theirs(input_ids=tokens, attention_mask=mask, token_type_ids=types).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(kind, tmp_path):
    theirs = random_model(kind, num_labels=3)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        got = our_model(tmp_path)(batch_of(kind)[0])
    expected = logits_of(theirs, kind)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cloze_equals_that_of_transformers(kind, tmp_path):
    theirs = random_model(kind, "MaskedLM")
    theirs.save_pretrained(tmp_path)
    ours = Encoder(read_encoder(tmp_path)).eval()
    ours.load_state_dict(dict(EncoderFolder(tmp_path, "masked").open()))
    tokens, mask, _ = batch_of(kind)
    with torch.no_grad():
        got = ours(tokens)
    expected = logits_of(theirs, kind)
    kept = mask.bool()
    torch.testing.assert_close(got[kept], expected[kept], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_of_transformers_comes_back(kind, tmp_path):
    for task, name in (("classification", "SequenceClassification"), ("masked", "MaskedLM")):
        for key in random_model(kind, name).state_dict():
            ours = encoder_name(kind, task, key)
            tied = "decoder" in key or "position_ids" in key
            assert (ours is None) == tied
            if ours is not None:
                assert hub_name(kind, task, ours) == key


@pytest.mark.parametrize("prefix", ["", "roberta."])
def test_bare_checkpoints_are_read_with_and_without_a_prefix(prefix, tmp_path):
    """What does not belong to the encoder is left: poolers, buffers, heads of other tasks."""
    theirs = random_model("roberta", num_labels=3)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        key.replace("roberta.", prefix): value
        for key, value in load_file(file).items()
        if not key.startswith("classifier")
    }
    tensors |= {f"{prefix}pooler.dense.weight": torch.ones(32, 32), "lm_head.bias": torch.ones(60)}
    tensors[f"{prefix}embeddings.position_ids"] = torch.ones(1, 42)
    save_file(tensors, file)
    model = our_model(tmp_path)
    with torch.no_grad():
        ours = model.hidden(batch_of("roberta")[0])
        tokens, mask, _ = batch_of("roberta")
        expected = theirs.roberta(tokens, mask).last_hidden_state
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert model.head.dense.weight.std().item() == pytest.approx(0.02, rel=0.2)  # a new head


# Each of these is right in one reading of the papers and wrong for the published checkpoints.
def test_the_comparison_notices_what_is_easily_mistaken(tmp_path):
    theirs = random_model("deberta-v2", num_labels=3)
    theirs.save_pretrained(tmp_path)
    expected, tokens = logits_of(theirs, "deberta-v2"), batch_of("deberta-v2")[0]

    def scores(self, q, k, mask):  # the paper's δ(j, i) in the third term
        relative, length = self._relative[0], q.shape[2]
        rows = relative.rows(length, q.device).expand(len(q), self.num_heads, length, length)
        q_table, k_table = (
            self._heads(linear(relative())) for linear in (self.q_proj, self.k_proj)
        )
        scale = (3 * self.head_dim) ** -0.5
        bias = (q @ k_table.mT).gather(-1, rows) + (k @ q_table.mT).gather(-1, rows).mT
        return bias.mul(scale).masked_fill(~mask[:, None, None, :], -1e9), scale

    model = our_model(tmp_path)
    with mock.patch.object(disentangled.DisentangledAttention, "_scores", scores), torch.no_grad():
        assert (model(tokens) - expected).abs().max() > 1e-3
    for change in (
        lambda m: setattr(m.head, "activation", torch.nn.Tanh()),
        lambda m: setattr(m.relative, "norm", torch.nn.Identity()),
        lambda m: setattr(m.relative, "longest", 20),
    ):
        model = our_model(tmp_path)
        change(model)
        with torch.no_grad():
            assert (model(tokens) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("roberta", lambda m: setattr(m.tok_embeddings, "offset", 0)),
        ("roberta", lambda m: setattr(m.layers[0].mlp, "activation", torch.nn.ReLU())),
        ("bert", lambda m: setattr(m.tok_embeddings, "sep_id", 59)),
        ("bert", lambda m: setattr(m.tok_embeddings, "tells_texts_apart", False)),
    ],
)
def test_positions_types_and_activations_count(kind, change, tmp_path):
    theirs = random_model(kind, num_labels=3)
    theirs.save_pretrained(tmp_path)
    model = our_model(tmp_path)
    change(model)
    with torch.no_grad():
        got = model(batch_of(kind)[0])
    assert (got - logits_of(theirs, kind)).abs().max() > 1e-4
