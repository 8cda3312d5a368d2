"""Logits of our models against transformers, on one random checkpoint in Hugging Face layout per family."""

from functools import partial

import pytest
import torch

from kasa_tune.components import models
from kasa_tune.components.models.base_weights import read_base_weights
from kasa_tune.components.models.loading import build_on_meta, load_base_weights
from kasa_tune.components.models.streamed import StreamedWeights
from tests.parity.hf_families import FAMILIES, random_hf_model, tokens
from tests.toy_checkpoints import checkpointer

pytestmark = pytest.mark.parity


def our_model(folder, family):
    """The same checkpoint on our road: built on meta, read tensor by tensor, adapters at their start."""
    build = partial(
        getattr(models, f"kasa_{family.builder}"),
        attn_modules=["q_proj", "v_proj"],
        apply_to_mlp=True,
        rank=4,
        truncation_rank=0,
        **family.sizes,
    )
    model = build_on_meta(build, dtype=torch.float32)
    weights = read_base_weights(checkpointer(folder, ["model.safetensors"], family.model_type))
    assert isinstance(weights, StreamedWeights)
    load_base_weights(model, weights, device=torch.device("cpu"), adapter_dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tmp_path):
    theirs = random_hf_model(FAMILIES[family])
    theirs.save_pretrained(tmp_path / "hf")
    ours = our_model(tmp_path / "hf", FAMILIES[family])
    with torch.no_grad():
        expected, got = theirs(tokens()).logits, ours(tokens())
    assert expected.std() > 0.5
    torch.testing.assert_close(got.float(), expected.float(), rtol=1e-3, atol=1e-3)
