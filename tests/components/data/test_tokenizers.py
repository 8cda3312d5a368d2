"""tokenizer.json with a chat template: the ids of transformers, the mask of the assistant's turns, clear errors."""

import json
import os
import pickle
from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torchtune.data import Message

from kasa_tune.components.data.tokenizers import build_tokenizer, hf_tokenizer
from tests.fuzzing import bounded

CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant, got ' + m.role) }}{% endif %}{% endfor %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
DIALOGUE = [
    ("system", "Be brief."),
    ("user", "Who was there?"),
    ("assistant", "A little girl named Lily."),
    ("user", "Where did she play?  In the\n\npark, or é €?"),
    ("assistant", "In the park\nwith a ball."),
]


def messages(dialogue=DIALOGUE, masked_roles=("system", "user")):
    return [
        Message(role=role, content=text, masked=role in masked_roles) for role, text in dialogue
    ]


@pytest.fixture
def folder(real_data, tmp_path):
    """The stories260K tokenizer with the special tokens of chat templates added."""
    source = real_data / "models" / "stories260K" / "hf"
    content = json.loads((source / "tokenizer.json").read_text())
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    content["added_tokens"] += [
        {"id": 512 + i, "content": token, **flags} for i, token in enumerate(SPECIAL)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    return tmp_path


def tokenizer(folder, template=None, **kwargs):
    if template is not None:
        (folder / "template.jinja").write_text(template)
        kwargs["chat_template_path"] = str(folder / "template.jinja")
    return hf_tokenizer(str(folder / "tokenizer.json"), **kwargs)


def split(tok, tokens, mask):
    """Runs of (learned, text)."""
    runs = []
    for token, masked in zip(tokens, mask, strict=True):
        if runs and runs[-1][0] == (not masked):
            runs[-1][1].append(token)
        else:
            runs.append((not masked, [token]))
    return [(learned, tok.decode(ids, skip_special_tokens=False).strip()) for learned, ids in runs]


# ---------------------------------------------------------------------------------------------------- peers


@pytest.mark.parity
@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@pytest.mark.parametrize("length", [2, 3, 5])
def test_ids_are_those_of_transformers(folder, template, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    dialogue = DIALOGUE[5 - length :]
    plain = [{"role": role, "content": text} for role, text in dialogue]
    tok = tokenizer(folder, template)
    expected = theirs.apply_chat_template(
        plain, chat_template=template, tokenize=True, return_dict=True
    )["input_ids"]
    assert tok.tokenize_messages(messages(dialogue))[0] == expected
    opened = theirs.apply_chat_template(
        plain[:-1],
        chat_template=template,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    sample = {"messages": [*messages(dialogue[:-1]), Message(role="assistant", content="")]}
    assert tok(sample, inference=True)["tokens"] == opened


@pytest.mark.parity
@pytest.mark.parametrize(
    "text", ["Once upon a time", " two  spaces ", "a\nb\n\nc", "", "é€ 你好", "x<|im_end|>y"]
)
def test_text_is_encoded_and_decoded_as_transformers_does(folder, text):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tok = tokenizer(folder)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert tok.encode(text, add_bos=False, add_eos=False) == ids
    assert tok.encode(text) == [1, *ids, 2]
    assert tok.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.parity
def test_assistant_mask_is_that_of_a_template_with_generation_blocks(folder):
    """Transformers marks what stands between {% generation %} tags; here that is content and closing token."""
    transformers = pytest.importorskip("transformers")
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": role, "content": text} for role, text in DIALOGUE],
        chat_template=marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    tokens, mask = tokenizer(folder, marked).tokenize_messages(messages())
    assert tokens == theirs["input_ids"]
    assert [int(not masked) for masked in mask] == theirs["assistant_masks"]


# ---------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (CHATML, "A little girl named Lily.<|im_end|>", "In the park\nwith a ball.<|im_end|>"),
        (LLAMA3, "A little girl named Lily.<|eot_id|>", "In the park\nwith a ball.<|eot_id|>"),
    ],
)
def test_assistant_turns_are_learned_with_their_end(folder, template, first, second):
    tok = tokenizer(folder, template)
    tokens, mask = tok.tokenize_messages(messages())
    runs = split(tok, tokens, mask)
    assert [learned for learned, _ in runs] == [False, True, False, True]
    assert [text for learned, text in runs if learned] == [first, second]


def test_a_template_that_glues_turns_together(folder):
    tok = tokenizer(folder, INST)
    tokens, mask = tok.tokenize_messages(messages(DIALOGUE[1:]))
    assert [text for learned, text in split(tok, tokens, mask) if learned] == [
        "A little girl named Lily.</s>",
        "In the park\nwith a ball.</s>",
    ]


def test_masked_flags_are_followed(folder):
    tok = tokenizer(folder, CHATML)
    everything = tok.tokenize_messages(messages(masked_roles=()))[1]
    assert not any(everything)
    dialogue = messages()
    dialogue[2].masked = True
    runs = split(tok, *tok.tokenize_messages(dialogue))
    assert [text for learned, text in runs if learned] == ["In the park\nwith a ball.<|im_end|>"]


def test_trailing_messages_after_the_last_answer(folder):
    tok = tokenizer(folder, CHATML)
    runs = split(tok, *tok.tokenize_messages(messages([*DIALOGUE[1:3], ("user", "Why?")])))
    assert [learned for learned, _ in runs] == [False, True, False]
    assert "Why?" in runs[2][1]


def test_without_a_template_contents_stand_end_to_end(folder):
    tok = tokenizer(folder)
    tokens, mask = tok.tokenize_messages(
        messages([("user", "Once upon a time"), ("assistant", ", there was")])
    )
    assert tokens == tok.encode("Once upon a time, there was")
    prompt = tok.encode("Once upon a time", add_eos=False)
    assert mask == [True] * len(prompt) + [False] * (len(tokens) - len(prompt))
    two = tok.tokenize_messages(messages(DIALOGUE[1:]))[0]
    assert (two.count(tok.bos_id), two.count(tok.eos_id)) == (2, 2)


def test_a_space_before_the_answer_belongs_to_the_answer(folder):
    tok = tokenizer(folder)
    spaced = tok.tokenize_messages(messages([("user", "there was "), ("assistant", "a dog")]))
    moved = tok.tokenize_messages(messages([("user", "there was"), ("assistant", " a dog")]))
    assert spaced == moved
    assert spaced[0] == tok.encode("there was a dog")


def test_a_word_cut_by_the_seam_keeps_no_space(folder):
    """A prompt that ends inside a word: its tokens stay what they are alone, and the text comes back as it was."""
    tok = tokenizer(folder)
    tokens, mask = tok.tokenize_messages(
        messages([("user", "Once upon a ti"), ("assistant", "me, there was")])
    )
    prompt = tok.encode("Once upon a ti", add_eos=False)
    assert tokens != tok.encode("Once upon a time, there was")
    assert tokens[: len(prompt)] == prompt
    assert mask == [True] * len(prompt) + [False] * (len(tokens) - len(prompt))
    assert tok.decode(tokens) == "Once upon a time, there was"


def test_a_generation_prompt_that_ends_in_a_space(folder):
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    tok = tokenizer(folder, template)
    dialogue = messages(DIALOGUE[1:3])
    tokens, mask = tok.tokenize_messages(dialogue)
    start = tok({"messages": [dialogue[0], Message(role="assistant", content="")]}, inference=True)[
        "tokens"
    ]
    assert tokens == tok.encode(
        "<s>USER: Who was there? ASSISTANT: A little girl named Lily. ", False, False
    )
    assert tokens[: len(start)] == start
    assert mask == [True] * len(start) + [False] * (len(tokens) - len(start))


def test_an_open_turn_can_be_continued(folder):
    for template in (CHATML, LLAMA3, INST, None):
        tok = tokenizer(folder, template)
        whole, _ = tok.tokenize_messages(messages(DIALOGUE[1:3]))
        begun = [*messages(DIALOGUE[1:2]), Message(role="assistant", content="A little girl")]
        start = tok({"messages": begun}, inference=True)["tokens"]
        assert whole[: len(start)] == start
        assert tok.decode(start).endswith("A little girl")


def test_prompt_template_takes_the_place_of_the_chat_template(folder):
    tok = tokenizer(
        folder, CHATML, prompt_template={"user": ("Q: ", "\nA: "), "assistant": ("", "")}
    )
    tokens, mask = tok.tokenize_messages(messages([("user", "who?"), ("assistant", "Lily")]))
    assert tokens == tok.encode("Q: who?\nA: Lily")
    assert split(tok, tokens, mask)[1] == (True, "Lily</s>")


def test_longer_conversations_are_cut(folder):
    tokens, mask = tokenizer(folder, CHATML).tokenize_messages(messages())
    tok = tokenizer(folder, CHATML, max_seq_len=20)
    assert tok.tokenize_messages(messages()) == (tokens[:20], mask[:20])
    assert tok({"messages": messages(), "id": 3}) == {
        "tokens": tokens[:20],
        "mask": mask[:20],
        "id": 3,
    }


# ---------------------------------------------------------------------------------------------------- templates


def test_where_templates_are_looked_for(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": LLAMA3}))
    assert tokenizer(folder).chat_template == LLAMA3
    named = [{"name": "rag", "template": INST}, {"name": "default", "template": CHATML}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert tokenizer(folder).chat_template == CHATML
    (folder / "chat_template.jinja").write_text(INST)
    assert tokenizer(folder).chat_template == INST
    assert tokenizer(folder, LLAMA3).chat_template == LLAMA3


def test_a_template_that_rewrites_the_past_is_refused(folder):
    """As templates do that drop the reasoning of earlier turns."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if loop.last or m.role == 'user' %}{{ m.content }}"
        "{% else %}{{ 'dropped' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    tok = tokenizer(folder, template)
    with pytest.raises(ValueError, match=r"up to message 1 differently.*chat_template_path"):
        tok.tokenize_messages(messages(DIALOGUE[1:]))
    assert tok.tokenize_messages(messages(DIALOGUE[1:3]))[0]


def test_a_template_that_refuses_a_conversation(folder):
    with pytest.raises(ValueError, match=r"system, user.*only user and assistant, got system"):
        tokenizer(folder, INST).tokenize_messages(messages())


def test_a_template_cannot_reach_out_of_its_sandbox(folder):
    tok = tokenizer(
        folder, "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}"
    )
    with pytest.raises(ValueError, match="chat template"):
        tok.tokenize_messages(messages())


def test_the_date_in_a_template_does_not_change_from_day_to_day(folder):
    asks = (
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}{{ 'none' }}{% endif %}"
    )
    assert tokenizer(folder, asks + CHATML)._render([]).startswith("none")
    assert (
        tokenizer(folder, "{{ strftime_now('%d %b %Y') }}" + CHATML)
        ._render([])
        .startswith("26 Jul 2024")
    )


def test_broken_template(folder):
    with pytest.raises(ValueError, match=r"template.*broken"):
        tokenizer(folder, "{% for m in messages %}")


@pytest.mark.parametrize("source", ["{{ 'a' * 10**10 }}", "{% set x = 10 ** (10 ** 10) %}"])
def test_a_template_without_an_end_is_refused_when_the_tokenizer_is_built(folder, source):
    with pytest.raises(ValueError, match=r"chat template.*more than"):
        tokenizer(folder, source)


@pytest.mark.parity
@pytest.mark.parametrize(
    "head",
    [
        "{% if tools is not none %}[TOOLS]{% for t in tools %}{{ t }}{% endfor %}{% endif %}",
        "{% if tools is not none %}[TOOLS]{{ tools | tojson }}{% endif %}",
        "{% if documents is not none %}[DOCUMENTS]{{ documents | length }}{% endif %}",
    ],
)
def test_templates_see_tools_and_documents_as_transformers_passes_them(folder, head):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tok = tokenizer(folder, head + CHATML)
    dialogue = [{"role": role, "content": text} for role, text in DIALOGUE]
    expected = theirs.apply_chat_template(dialogue, chat_template=head + CHATML, tokenize=False)
    assert tok._render(dialogue) == expected


# ---------------------------------------------------------------------------------------------------- ids and files


def test_special_ids(folder):
    tok = tokenizer(folder, CHATML)
    assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.vocab_size) == (1, 2, 2, 512 + len(SPECIAL))
    assert tok.special_tokens["<|im_end|>"] == 513
    assert tok.stop_tokens == [2, 513]
    assert tokenizer(folder).stop_tokens == [2]
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 516]}')
    assert tokenizer(folder, LLAMA3).stop_tokens == [2, 516]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"pad_token": {"content": "<unk>"}, "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert (tokenizer(folder).pad_id, tokenizer(folder).eos_id) == (0, 513)


def test_no_bos_where_the_tokenizer_adds_none(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    tok = tokenizer(folder)
    assert tok.bos_id is None
    assert tok.encode("Once") == [403, 2]


def test_travels_to_worker_processes(folder):
    tok = tokenizer(folder, CHATML)
    tok.tokenize_messages(messages())
    copy = pickle.loads(pickle.dumps(tok))
    assert copy.tokenize_messages(messages()) == tok.tokenize_messages(messages())


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("tokenizer.json", None, FileNotFoundError, "tokenizer.json"),
        ("tokenizer.json", "{", ValueError, "not valid JSON"),
        ("tokenizer.json", "[]", ValueError, "JSON object"),
        ("tokenizer.json", "{}", ValueError, "no 'model' in it"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}', ValueError, "cannot be read"),
        ("tokenizer_config.json", None, ValueError, "No end-of-sequence token: set eos_token"),
        ("tokenizer_config.json", "{", ValueError, "not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": null}', ValueError, "No end-of-sequence token"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<end>"}',
            ValueError,
            "eos_token '<end>'.*not in tokenizer.json",
        ),
        ("tokenizer_config.json", '{"eos_token": {"text": "</s>"}}', ValueError, "eos_token in"),
        ("tokenizer_config.json", '{"eos_token": 2}', ValueError, "eos_token in .* got 2"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "bos_token": ["<s>"]}', ValueError, "bos"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": 3}', ValueError, "int 3"),
        ("tokenizer_config.json", "[" * 100_000, ValueError, "nested too deeply"),
        ("generation_config.json", '{"eos_token_id": "2"}', ValueError, "must be a token id"),
        ("generation_config.json", '{"eos_token_id": [2, null]}', ValueError, "must be a token id"),
        ("generation_config.json", '{"eos_token_id": [2, 517]}', ValueError, r"0 to 516"),
        ("generation_config.json", '{"eos_token_id": true}', ValueError, "must be a token id"),
        ("generation_config.json", "[]", ValueError, "JSON object"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", ValueError, "git lfs"),
    ],
)
def test_bad_files(folder, file, content, error, message):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(error, match=message):
        tokenizer(folder)


@pytest.mark.parametrize("key", ["tokenizer_config_path", "chat_template_path"])
def test_missing_files_that_were_asked_for(folder, key):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenizer(folder, **{key: str(folder / "nowhere")})


def test_images_are_refused(folder):
    picture = Message(
        role="user",
        content=[{"type": "image", "content": None}, {"type": "text", "content": "what?"}],
    )
    with pytest.raises(ValueError, match="image"):
        tokenizer(folder, CHATML).tokenize_messages([picture, *messages([("assistant", "a cat")])])


# ---------------------------------------------------------------------------------------------------- any builder

LLAMA2 = "torchtune.models.llama2.llama2_tokenizer"
TIKTOKEN = "torchtune.models.llama3.llama3_tokenizer"
OURS = "kasa_tune.components.data.hf_tokenizer"


@pytest.mark.parametrize(
    ("component", "file", "message"),
    [
        (LLAMA2, "tokenizer.json", "is a Hugging Face tokenizer.json: set .*hf_tokenizer"),
        (TIKTOKEN, "tokenizer.json", "is a Hugging Face tokenizer.json: set .*hf_tokenizer"),
        (LLAMA2, "ranks", "ranks is a tiktoken file.*llama3_tokenizer"),
        (TIKTOKEN, "spm", "spm is a SentencePiece model.*llama2_tokenizer"),
        (OURS, "spm", "spm is a SentencePiece model.*llama2_tokenizer"),
        (OURS, "ranks", "ranks is a tiktoken file.*llama3_tokenizer"),
        (LLAMA2, "pointer", "pointer of a git-lfs file.*git lfs pull"),
        (TIKTOKEN, "pointer", "pointer of a git-lfs file.*git lfs pull"),
        (OURS, "pointer", "pointer of a git-lfs file.*git lfs pull"),
        *((component, "empty", "empty is empty: fetch it again") for component in (LLAMA2, OURS)),
        (LLAMA2, "half", "no tokenizer file that is known, or it is damaged"),
        (OURS, "half.json", "not valid JSON"),
        (LLAMA2, "half.json", "JSON, but no Hugging Face tokenizer.json, or a damaged one"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_named(folder, real_data, component, file, message):
    spm = real_data / "models" / "stories260K" / "hf" / "tokenizer.model"
    content = (folder / "tokenizer.json").read_text()
    (folder / "spm").write_bytes(spm.read_bytes())
    (folder / "half").write_bytes(spm.read_bytes()[:3000])
    (folder / "half.json").write_text(content[: len(content) // 2])
    (folder / "ranks").write_text("IQ== 0\nIg== 1\n")
    (folder / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / "empty").write_text("")
    with pytest.raises(ValueError, match=message):
        build_tokenizer({"_component_": component, "path": str(folder / file), "max_seq_len": 64})


def test_any_builder_builds(folder, real_data, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    ours = build_tokenizer({"_component_": OURS, "path": "~/tokenizer.json", "max_seq_len": 8})
    assert (ours.max_seq_len, ours.eos_id) == (8, 2)
    (folder / "tokenizer.model").write_bytes(
        (real_data / "models" / "stories260K" / "hf" / "tokenizer.model").read_bytes()
    )
    theirs = build_tokenizer({"_component_": LLAMA2, "path": "~/tokenizer.model"})
    assert theirs.encode("Once upon", add_eos=False) == ours.encode("Once upon", add_eos=False)


def test_a_node_may_refer_to_other_keys_of_its_config(folder):
    cfg = OmegaConf.create(
        {"dir": str(folder), "t": {"_component_": OURS, "path": "${dir}/tokenizer.json"}}
    )
    assert build_tokenizer(cfg.t).eos_id == 2
    assert cfg.t.path == str(folder / "tokenizer.json")


@pytest.mark.parametrize("component", [LLAMA2, TIKTOKEN, OURS])
@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", ValueError, r"tokenizer\.path must be a path.*empty"),
        ("a\0b", ValueError, "NUL byte"),
        ("/nowhere/tokenizer.json", FileNotFoundError, r"tokenizer\.path: no such file"),
        ("/tmp", FileNotFoundError, r"tokenizer\.path: no such file"),
    ],
)
def test_paths_that_are_none(component, path, error, message):
    with pytest.raises(error, match=message):
        build_tokenizer({"_component_": component, "path": path})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = ["eos_token", "bos_token", "pad_token", "add_bos_token", "chat_template", "unk_token"]


@pytest.mark.fuzz
@bounded("folders", quick=60)
@given(
    config=st.dictionaries(st.sampled_from(KEYS), JSON | st.just("</s>")) | JSON,
    generation=st.fixed_dictionaries({"eos_token_id": JSON}) | JSON,
    cut=st.none() | st.integers(0, 12_000),
)
def test_any_content_of_its_files_gives_a_tokenizer_or_a_sentence(folder, config, generation, cut):
    before = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tokenizer.json").write_text(before if cut is None else before[:cut])
    said = ""
    try:
        tok = hf_tokenizer(str(folder / "tokenizer.json"))
    except ValueError as error:
        said = str(error)
    else:
        assert all(isinstance(id_, int) for id_ in tok.stop_tokens)
    finally:
        (folder / "tokenizer.json").write_text(before)
    assert len(said) < 600


def test_a_tiktoken_file_is_read_from_its_own_path(tmp_path, monkeypatch):
    """Tiktoken would copy it to a folder that all users share, and read the copy from then on."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    ranks = [bytes([i]) for i in range(256)]
    for more in ([b"ab"], [b"cd"]):
        lines = [f"{b64encode(token).decode()} {i}" for i, token in enumerate(ranks + more)]
        (tmp_path / "ranks").write_text("\n".join(lines))
        tokenizer = build_tokenizer({"_component_": TIKTOKEN, "path": str(tmp_path / "ranks")})
        assert tokenizer.encode("abcd", add_bos=False, add_eos=False).count(256) == 1
        assert tokenizer.decode([256]) == more[0].decode()
    assert not (tmp_path / "temporary").exists()
    assert "TIKTOKEN_CACHE_DIR" not in os.environ
