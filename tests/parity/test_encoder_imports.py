"""Classifiers that PEFT trained: the trained logits come back, and what is lost is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_tune.components.adapters import load_adapter_state_dict
from kasa_tune.components.exchange.peft_import import open_peft
from kasa_tune.components.models import EncoderFolder
from tests.toy_encoders import KINDS, batch_of, our_model, random_model

pytestmark = pytest.mark.parity

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
TARGETS = {"roberta": ["query", "value"], "bert": ["query", "dense"], "deberta-v2": ["query_proj"]}
SAVED = {"roberta": None, "bert": ["classifier", "pooler"], "deberta-v2": ["classifier", "pooler"]}


def logits(model, kind):
    tokens, mask, types = batch_of(kind)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, token_type_ids=types).logits


def trained(kind, folder, **more):
    """Save a base without a head, and a classifier on it as PEFT does. Returns the logits of the latter."""
    import peft

    theirs = random_model(kind, num_labels=3)
    theirs.base_model.save_pretrained(folder / "base")  # without the prefix of the family
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[kind]}
    settings |= {"modules_to_save": SAVED[kind], "task_type": "SEQ_CLS"}
    model = peft.get_peft_model(theirs, peft.LoraConfig(**settings | more)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder / "peft")
    return logits(model, kind)


def imported(folder, **more):
    section = {
        "_component_": "kasa_tune.components.models.kasa_encoder_from_checkpoint",
        "checkpoint_dir": str(folder / "base"),
        **more,
    }
    return open_peft(folder / "peft", EncoderFolder(folder / "base").open(), section)


def our_logits(found, kind, folder):
    """Those of the model that an import describes, with what it found."""
    tensors = found.left_alone() | found.head
    for module in found.peft.layers:
        tensors |= found.tensors(module, **CPU)
    settings = {key: value for key, value in found.model.items() if not key.startswith("_")}
    settings.pop("checkpoint_dir")
    model = our_model(folder / "base", adapter=found.method, **settings)
    load_adapter_state_dict(model, tensors)
    with torch.no_grad():
        return model(batch_of(kind)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_trained_logits_come_back(kind, tmp_path):
    """The head is PEFT's, of three labels, where the config says two. BERT's MLP is adapted too."""
    more = {"target_modules": r".*layer.*(query|dense)"} if kind == "bert" else {}
    expected = trained(kind, tmp_path, **more)
    found = imported(tmp_path, num_labels=2)
    assert (found.model["num_labels"], found.model["train_pooler"]) == (3, True)
    got = our_logits(found, kind, tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - logits(random_model(kind, num_labels=3), kind)).abs().max() > 1e-2


def test_kasa_comes_back_with_its_head(tmp_path):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("needs a peft with KaSA (0.21)")
    expected = trained("roberta", tmp_path, kasa_config=peft.KasaConfig())
    found = imported(tmp_path)
    assert found.method == "kasa"
    got = our_logits(found, "roberta", tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_pooler_that_was_not_trained_is_the_bases(tmp_path):
    """PEFT trains modules that are called `classifier`, and BERT's checkpoint has the pooler."""
    expected = trained("bert", tmp_path, target_modules=["query"], modules_to_save=None)
    found = imported(tmp_path)
    assert found.model["train_pooler"] is False
    got = our_logits(found, "bert", tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def change(folder, key, value):
    """Another value of a tensor in the adapter's file, or none."""
    file = folder / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.{key}"]
    tensors |= {} if value is None else {f"base_model.model.{key}": value}
    save_file(tensors, file)


def test_what_is_lost_or_trained_besides_is_refused(tmp_path):
    trained("deberta-v2", tmp_path / "a", modules_to_save=None)
    with pytest.raises(ValueError, match=r"no pooler\.dense\.weight, .* trained scores are lost"):
        imported(tmp_path / "a")
    trained("roberta", tmp_path / "b", modules_to_save=["classifier", "intermediate"])
    with pytest.raises(ValueError, match=r"it trained roberta\.encoder\..* whole\. Beside"):
        imported(tmp_path / "b")
    trained("roberta", tmp_path / "c")
    change(tmp_path / "c", "classifier.out_proj.bias", torch.full((3,), float("nan")))
    with pytest.raises(ValueError, match=r"classifier\.out_proj\.bias holds NaN"):
        imported(tmp_path / "c")
    change(tmp_path / "c", "classifier.out_proj.bias", torch.zeros(2))
    with pytest.raises(ValueError, match=r"head\.out_proj\.weight is \(3, 32\), and \(2, 32\)"):
        imported(tmp_path / "c")
    change(tmp_path / "c", "classifier.out_proj.bias", None)
    with pytest.raises(ValueError, match=r"has no classifier\.out_proj\.bias"):
        imported(tmp_path / "c")
