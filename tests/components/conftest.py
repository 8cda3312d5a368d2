"""Tokenizers and data files for the tests of the data components; nothing here reaches the network."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest


class CharTokenizer:
    """One token per character, so that expected ids can be written down: bos 1, eos 2, no padding token."""

    def __init__(self, max_seq_len=None):
        self.max_seq_len = max_seq_len
        self.bos_id, self.eos_id, self.pad_id, self.vocab_size = 1, 2, -1, 3 + 0x250

    def encode(self, text, add_bos=True, add_eos=True):
        return [1] * add_bos + [3 + ord(c) for c in text] + [2] * add_eos

    def decode(self, ids):
        return "".join(chr(i - 3) for i in ids if i > 2)

    def tokenize_messages(self, messages, *, add_end_tokens=True):
        tokens, mask = [1], [True]
        for message in messages:
            ids = self.encode(
                message.text_content,
                add_bos=False,
                add_eos=message.role == "assistant" and add_end_tokens,
            )
            tokens += ids
            mask += [message.masked] * len(ids)
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def __call__(self, sample, inference=False):
        tokens, mask = self.tokenize_messages(sample.pop("messages"), add_end_tokens=not inference)
        return {**sample, "tokens": tokens, "mask": mask}


@pytest.fixture(scope="session")
def datasets_offline(tmp_path_factory):
    """Keep the Arrow files that `datasets` writes in a temporary folder."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf_datasets"))
    datasets.disable_progress_bars()
    yield
    patch.undo()


@pytest.fixture
def char_tokenizer():
    return CharTokenizer()


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets and models."""
    folder = os.environ.get("KASA_TUNE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("KASA_TUNE_DATA does not point to the folder of real data")
    return Path(folder)


@pytest.fixture
def story_tokenizer(real_data):
    """The Llama-2 tokenizer over the SentencePiece model of stories260K, without a chat template."""
    from torchtune.models.llama2 import llama2_tokenizer

    path = str(real_data / "models" / "stories260K" / "hf" / "tokenizer.model")
    return llama2_tokenizer(path, max_seq_len=512, prompt_template=None)


@pytest.fixture
def write_rows(tmp_path):
    """Write rows as JSON Lines (or one JSON list, by the file's suffix) and return the path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        text = (
            json.dumps(rows)
            if path.suffix == ".json"
            else "".join(json.dumps(row) + "\n" for row in rows)
        )
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def two_processes():
    """Called with a function and its arguments: what two processes that have met return, by rank."""
    yield from _processes(2)


@pytest.fixture(scope="session", params=[2, 3], ids="{} processes".format)
def processes(request):
    """Two processes that have met, then three."""
    yield from _processes(request.param)


@pytest.fixture(scope="session")
def two_by_two_processes():
    """Four processes of which two share a copy of the model."""
    yield from _processes(4, shards=2)


def _processes(size, **options):
    from tests.components.several_processes import Processes

    started = Processes(size, **options)
    yield started
    started.stop()
