"""Our LLaVA against transformers': logits with and without images, in batches, from a cache, and all
layouts of its files.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from kasa_tune.architectures import read_architecture
from kasa_tune.components.adapters.state import adapter_linears
from kasa_tune.components.evaluation.decoding import Decoding
from kasa_tune.components.evaluation.generation import generate
from kasa_tune.components.models import kasa_from_checkpoint
from kasa_tune.components.models.llava import Llava
from tests.parity.decoder_families import load_ours, saved_tensors
from tests.toy_llava import FEATURES, SIDE, TEXT, save_llava

TOLERANCE = 1e-4  # of logits that reach 7
VOCAB, IMAGE = TEXT["vocab_size"], 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder, transformers' model and ours."""
    folder = tmp_path_factory.mktemp("llava")
    theirs = save_llava(folder)
    return folder, theirs, load_ours(folder)


def pixels(count, seed=0):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def row(*parts, features=FEATURES):
    """Token ids of a row: numbers of words, and ``image`` for an image's placeholders."""
    words = torch.Generator().manual_seed(len(parts))
    ids = []
    for part in parts:
        ids += (
            [IMAGE] * features
            if part == "image"
            else torch.randint(4, VOCAB, (part,), generator=words).tolist()
        )
    return ids


ROWS = {
    "text only": ([row(9)], 0),
    "one image": ([row(4, "image", 7)], 1),
    "two images": ([row(2, "image", 3, "image", 5)], 2),
    "an image first": ([row("image", 7)], 1),
}


@pytest.mark.parametrize("case", ROWS)
@torch.no_grad()
def test_logits_are_those_of_transformers(pair, case):
    _, theirs, ours = pair
    rows, count = ROWS[case]
    ids, images = torch.tensor(rows), pixels(count) if count else None
    expected = theirs(input_ids=ids, pixel_values=images).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours(ids, images=images), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["one image", "two images"])
@torch.no_grad()
def test_an_image_changes_the_logits(pair, case):
    """Or the test above would pass without any."""
    rows, count = ROWS[case]
    one, other = (pair[2](torch.tensor(rows), images=pixels(count, seed)) for seed in (0, 1))
    assert (one - other)[:, -1].abs().max() > 0.1


@torch.no_grad()
def test_padded_rows_of_a_batch_are_those_of_transformers(pair):
    _, theirs, ours = pair
    rows = [rows[0] for rows, _ in ROWS.values()]
    images, width = pixels(4), max(map(len, rows))
    ids = torch.tensor([[*each, *[0] * (width - len(each))] for each in rows])
    mask = torch.tensor([[1] * len(each) + [0] * (width - len(each)) for each in rows])
    expected = theirs(input_ids=ids, pixel_values=images, attention_mask=mask).logits
    found = ours(ids, images=images)
    valid = mask.bool()
    torch.testing.assert_close(found[valid], expected[valid], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_cached_completions_are_those_of_transformers(pair, beams):
    _, theirs, ours = pair
    prompts = [rows[0] for rows, _ in ROWS.values()]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    every = pixels(4)
    expected = theirs.generate(
        input_ids=ids,
        pixel_values=every,
        attention_mask=(ids != 0).long(),
        max_new_tokens=8,
        num_beams=beams,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, width:]
    images = list(every.split([count for _, count in ROWS.values()]))
    decoding = Decoding(max_new_tokens=8, num_beams=beams)
    found = generate(ours, prompts, decoding, stop_tokens=[], images=images, batch_size=3)
    assert found == expected.tolist()


SETTINGS = {
    "class token": ({}, {"vision_feature_select_strategy": "full"}, FEATURES + 1),
    "last layer": ({}, {"vision_feature_layer": -1}, FEATURES),
    "second layer": ({}, {"vision_feature_layer": 2}, FEATURES),
    "gelu, no bias": (
        {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
        {"multimodal_projector_bias": False},
        FEATURES,
    ),
    "not a multiple of the patch": ({"image_size": 35}, {}, FEATURES),
}


@pytest.mark.parametrize("case", SETTINGS)
@torch.no_grad()
def test_other_settings_are_heeded(tmp_path, case):
    tower, settings, features = SETTINGS[case]
    theirs = save_llava(tmp_path, tower, **settings)
    ours = load_ours(tmp_path)
    side = tower.get("image_size", SIDE)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([row(4, "image", 7, features=features)])
    expected = theirs(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(ours(ids, images=images), expected, atol=TOLERANCE, rtol=0)


LAYOUTS = {
    "hub": ("language_model.model.", "language_model.lm_head.", "", "vision_tower.vision_model."),
    "saved by 5.x": ("language_model.model.", "language_model.lm_head.", "", "vision_tower."),
    "in memory, 4.52": (
        "model.language_model.",
        "lm_head.",
        "model.",
        "model.vision_tower.vision_model.",
    ),
    "in memory, 5.x": ("model.language_model.", "lm_head.", "model.", "model.vision_tower."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_of_the_files_are_read(pair, tmp_path, layout):
    folder, theirs, ours = pair
    text, head, connector, tower = LAYOUTS[layout]
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in (
            ("model.language_model.", text),
            ("lm_head.", head),
            ("model.multi_modal_projector.", f"{connector}multi_modal_projector."),
            ("model.vision_tower.", tower),
        ):
            if name.startswith(old):
                tensors[new + name.removeprefix(old).removeprefix("vision_model.")] = tensor.clone()
    shutil.copy(folder / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load_ours(tmp_path).state_dict()
    assert found.keys() == ours.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.state_dict().items())


def test_layers_that_are_not_computed_are_not_read(pair):
    folder, _, ours = pair
    assert len(ours.vision.layers) == 3
    stored = saved_tensors(folder)
    assert any(".layers.3." in name and "vision_tower" in name for name in stored)
    assert any("post_layernorm" in name for name in stored)


def test_adapters_are_attached_to_the_decoder_alone(pair):
    names = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = kasa_from_checkpoint(names, apply_to_mlp=True, rank=2, alpha=2, checkpoint_dir=pair[0])
    adapted = [name for name, _ in adapter_linears(model)]
    assert len(adapted) == 3 * 7
    assert all(name.startswith("layers.") for name in adapted)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {name for name in trained if not name.startswith("layers.")} == {
        f"connector.linear_{n}.{leaf}" for n in (1, 2) for leaf in ("weight", "bias")
    }


def test_placeholders_and_images_are_compared(pair):
    ours = pair[2]
    ids = torch.tensor([row(4, "image", 7)])
    with pytest.raises(ValueError, match=r"16 placeholders.* 0 images have 0 features"):
        ours(ids)
    with pytest.raises(ValueError, match=r"16 placeholders.* 2 images have 32 features"):
        ours(ids, images=pixels(2))
    with pytest.raises(ValueError, match=r"0 placeholders.* 1 images have 16 features"):
        ours(torch.tensor([row(9)]), images=pixels(1))
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\)"):
        ours(ids, images=pixels(1)[..., :24])


def test_a_batch_with_images_gives_gradients_to_the_adapters(pair):
    torch.manual_seed(0)
    model = kasa_from_checkpoint(["q_proj"], rank=2, alpha=2, checkpoint_dir=pair[0])
    model.load_state_dict(pair[2].state_dict(), strict=False)
    model(torch.tensor([row(4, "image", 7)]), images=pixels(1)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    assert any(grad.abs().max() > 0 for grad in grads)


def config_with(pair, tmp_path, **changes):
    """A folder whose config.json is the pair's with other values; a dot leads into a part."""
    config = json.loads((pair[0] / "config.json").read_text())
    for key, value in changes.items():
        part, _, leaf = key.rpartition("__")
        place = config[part] if part else config
        place[leaf] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_feature_layer": [1, 2]}, r"vision_feature_layer is \[1, 2\]"),
        ({"vision_feature_layer": -5}, "vision_feature_layer is -5"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"vision_config__model_type": "siglip_vision_model"}, "vision_config: model_type is"),
        ({"vision_config__hidden_size": -1}, "vision_config: hidden_size is -1"),
        ({"vision_config__num_attention_heads": 5}, "a divisor of hidden_size, 48"),
        ({"vision_config__patch_size": 64}, "image_size is 32"),
        ({"vision_config": 3}, "vision_config is 3"),
        ({"text_config__model_type": "qwen2"}, "text_config.model_type is 'qwen2'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already"),
        ({"image_token_index": None, "image_token_id": -3}, "image_token_id is -3"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(pair, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        read_architecture(config_with(pair, tmp_path, **changes))


def test_a_placeholder_beyond_the_vocabulary_is_refused(pair):
    found = read_architecture(pair[0])
    wrong = replace(found, vision=replace(found.vision, image_token=VOCAB))
    with pytest.raises(ValueError, match=f"token {VOCAB} .*has {VOCAB} tokens"):
        Llava(wrong)
