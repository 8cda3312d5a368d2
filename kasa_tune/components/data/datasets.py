"""Named datasets: a row becomes one prompt string and one response string, and those become tokens.

Every builder takes ``(tokenizer, *, source, ..., split, train_on_input, **load_kwargs)`` like torchtune's and returns
a torchtune dataset; the prompt is masked unless ``train_on_input``. Local files: ``source: json``, ``data_files``.

A template is applied to the whole prompt as one string. torchtune's ``PromptTemplate`` instead tokenizes tag and text
piece by piece, which gives SentencePiece tokenizers a stray space token at every seam.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchtune.data import AlpacaToMessages, InputOutputToMessages, Message, QuestionAnswerTemplate
from torchtune.datasets import SFTDataset, TextCompletionDataset
from torchtune.modules.transforms import Transform

from kasa_tune.components.data.column_maps import check_different
from kasa_tune.components.data.conversations import ChatDataset, ConversationToMessages
from kasa_tune.components.data.csv_files import as_text

# Response beginnings that different tokenizers merge with different things.
_PROBES = ("", "0", "a", "Z", ".", "\n")


# ---------------------------------------------------------------------------------------------------- prompts


def prompt_tokens(
    tokenizer: Any,
    prompt: str,
    *,
    system: str | None = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """The tokens every training sample with this prompt starts with, whatever its response: what generation is fed.

    Training tokenizes prompt and response as two messages, and the seam depends on the tokenizer: SentencePiece puts a
    trailing space of the prompt into the response's first token, chat tokenizers open an assistant turn. So the
    prompt goes through the same ``tokenize_messages``, with an empty response, and tokens that a response would change
    are left off.

    Args:
        tokenizer: any torchtune ``ModelTokenizer`` with ``__call__(sample, inference)``.
        prompt: the text before the response, templates of the dataset already applied.
        system: text of a system message before it.
        earlier: pairs of a prompt and its response that come before it in the conversation.

    Returns:
        Token ids, the beginning-of-sequence token included, not cut to ``max_seq_len``.
    """
    limit, tokenizer.max_seq_len = tokenizer.max_seq_len, None
    try:
        candidates = []
        for response in _PROBES:
            messages = [
                Message(role=role, content=text, masked=role == "user")
                for pair in [*earlier, (prompt, response)]
                for role, text in zip(("user", "assistant"), pair)
            ]
            if system is not None:
                messages.insert(0, Message(role="system", content=system, masked=True))
            candidates.append(tokenizer({"messages": messages}, inference=True)["tokens"])
    finally:
        tokenizer.max_seq_len = limit
    shared = 0
    for column in zip(*candidates):
        if len(set(column)) > 1:
            break
        shared += 1
    return list(candidates[0][:shared])


class PromptResponseToMessages(Transform):
    r"""Row -> a masked user message, filled into a template, and an assistant message.

    Args:
        template: the prompt with column names in braces, e.g. ``"Question: {question}\n\nAnswer: "``.
        response: the column the model has to write.
        train_on_input: learn the prompt too.
        detokenize: undo Penn-Treebank spacing in the columns first (see :func:`detokenize_ptb`).
    """

    def __init__(
        self,
        template: str,
        response: str,
        *,
        train_on_input: bool = False,
        detokenize: bool = False,
    ) -> None:
        self.template, self.response = template, response
        self.train_on_input, self.detokenize = train_on_input, detokenize
        self.required_columns = [*dict.fromkeys(re.findall(r"{(\w+)}", template)), response]

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row, as generation needs it."""
        return re.sub(r"{(\w+)}", lambda match: self._text(row[match[1]]), self.template)

    def __call__(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        messages = [
            Message(role="user", content=self.prompt(sample), masked=not self.train_on_input),
            Message(role="assistant", content=self._text(sample[self.response])),
        ]
        return {"messages": messages}

    def _text(self, text: str) -> str:
        return detokenize_ptb(text) if self.detokenize else text


_PTB_RULES = [
    (re.compile(r"\s+([,.;:!?%)\]])"), r"\1"),  # "word ," -> "word,"
    (re.compile(r"([(\[£$])\s+"), r"\1"),  # "£ 20" -> "£20"
    (
        re.compile(r"(?<=\d)\s+-\s+(?=[\d£$])|(?<=\d)-\s+(?=[\d£$])"),
        "-",
    ),  # "20 - 25", "20- £25" -> "20-25"
    (
        re.compile(r"(?<=\w)\s+-\s+(?=(?:friendly|star|class|priced|rated)\b)"),
        "-",
    ),  # "family - friendly"
    (
        re.compile(r"\s+(n't|'(?:s|m|d|re|ve|ll)\b)"),
        r"\1",
    ),  # "it 's" -> "it's", "do n't" -> "don't"
    (re.compile(r"``\s*|\s*''"), '"'),
]


def detokenize_ptb(text: str) -> str:
    """Undo Penn-Treebank tokenization: spaces before punctuation and clitics, after currency signs, in ranges."""
    for pattern, replacement in _PTB_RULES:
        text = pattern.sub(replacement, text)
    return text


# ---------------------------------------------------------------------------------------------------- builders


def e2e_dataset(
    tokenizer: Any,
    *,
    source: str = "json",
    data_files: Any = None,
    split: str = "train",
    train_on_input: bool = False,
    template: str = "{mr}\n",
    detokenize: bool = False,
    **load_dataset_kwargs: Any,
) -> SFTDataset:
    """E2E NLG: a meaning representation (column ``mr``) and a sentence that says it (column ``ref``).

    Args:
        tokenizer: a torchtune ``ModelTokenizer``.
        source: ``json`` for local files, or a hub dataset with these columns.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``train[:10%]``.
        train_on_input: learn the meaning representation too.
        template: the prompt; ``{mr}`` stands for the meaning representation.
        detokenize: turn files with spaces around punctuation into natural text ("The Mill , ..." -> "The Mill, ...").
        load_dataset_kwargs: passed to ``datasets.load_dataset``.
    """
    transform = PromptResponseToMessages(
        template, "ref", train_on_input=train_on_input, detokenize=detokenize
    )
    return _sft(tokenizer, transform, source, data_files, split, load_dataset_kwargs)


def gsm8k_dataset(
    tokenizer: Any,
    *,
    source: str = "openai/gsm8k",
    name: str | None = None,
    data_files: Any = None,
    split: str = "train",
    train_on_input: bool = False,
    calculator: bool = True,
    **load_dataset_kwargs: Any,
) -> SFTDataset:
    r"""GSM8K: grade-school word problems (``question``) with worked solutions (``answer``, ending in ``#### number``).

    The prompt is torchtune's ``QuestionAnswerTemplate``: ``Question: ...\n\nAnswer: ``.

    Args:
        tokenizer: a torchtune ``ModelTokenizer``.
        source: the hub dataset, or ``json`` with ``data_files``; ``data_files`` alone means ``json`` too.
        name: hub configuration; default ``main`` for the hub's ``openai/gsm8k``.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``test``, ``train[:10%]``.
        train_on_input: learn the question too.
        calculator: keep the ``<<48/2=24>>`` annotations in the solutions; False removes them.
        load_dataset_kwargs: passed to ``datasets.load_dataset``.
    """
    if data_files is not None and source == "openai/gsm8k":
        source = "json"
    if source == "openai/gsm8k":
        load_dataset_kwargs["name"] = name or "main"
    elif name is not None:
        load_dataset_kwargs["name"] = name
    before, after = QuestionAnswerTemplate().template["user"]
    template = f"{before}{{question}}{after}"
    transform = _GSM8KToMessages(
        template, "answer", train_on_input=train_on_input, calculator=calculator
    )
    return _sft(tokenizer, transform, source, data_files, split, load_dataset_kwargs)


class _GSM8KToMessages(PromptResponseToMessages):
    def __init__(
        self, template: str, response: str, *, train_on_input: bool, calculator: bool
    ) -> None:
        super().__init__(template, response, train_on_input=train_on_input)
        self.calculator = calculator

    def _text(self, text: str) -> str:
        return text if self.calculator else re.sub(r"<<[^<>]*>>", "", text)


def alpaca_dataset(
    tokenizer: Any,
    *,
    source: str = "tatsu-lab/alpaca",
    data_files: Any = None,
    split: str = "train",
    train_on_input: bool = False,
    column_map: dict[str, str] | None = None,
    **load_dataset_kwargs: Any,
) -> SFTDataset:
    """Alpaca rows (``instruction``, ``input``, ``output``) in the published Alpaca prompt, from the hub or local JSON.

    torchtune's own builder with one difference: the prompt is not learned unless ``train_on_input`` says so.
    ``data_files`` with the default source means local JSON.
    """
    if data_files is not None and source == "tatsu-lab/alpaca":
        source = "json"
    check_different(column_map)
    transform = AlpacaToMessages(train_on_input=train_on_input, column_map=column_map)
    return _sft(tokenizer, transform, source, data_files, split, load_dataset_kwargs)


class LLMAdaptersToMessages(AlpacaToMessages):
    """Alpaca's messages in the exact layout of LLM-Adapters' ``finetune.py``, accidents included.

    Its prompt is a triple-quoted string inside indented code, so every line after the first starts with 16 spaces, and
    the first line ends in a linter comment that was meant for the source file. Models of the commonsense-170k papers
    were trained and scored with it.
    """

    def __init__(
        self, train_on_input: bool = False, column_map: dict[str, str] | None = None
    ) -> None:
        super().__init__(train_on_input=train_on_input, column_map=column_map)
        for key, prompt in self.template.items():
            first, *rest = prompt.split("\n")
            lines = [f"{first}  # noqa: E501", "", *(" " * 16 + line for line in rest[1:])]
            self.template[key] = "\n".join(lines)


def commonsense_dataset(
    tokenizer: Any,
    *,
    source: str = "json",
    data_files: Any = None,
    split: str = "train",
    train_on_input: bool = False,
    published_layout: bool = False,
    **load_dataset_kwargs: Any,
) -> SFTDataset:
    """LLM-Adapters' commonsense-170k rows: ``instruction``, ``input`` (may be empty), ``output``.

    Args:
        tokenizer: a torchtune ``ModelTokenizer``.
        source: ``json`` for local files, or a hub dataset with these columns.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``train[:10%]``.
        train_on_input: learn the prompt too (the published script does).
        published_layout: False takes the Alpaca prompt; True takes it with the indentation and the stray comment of the
            published script (see :class:`LLMAdaptersToMessages`), to compare with published numbers.
        load_dataset_kwargs: passed to ``datasets.load_dataset``.
    """
    kind = LLMAdaptersToMessages if published_layout else AlpacaToMessages
    transform = kind(train_on_input=train_on_input)
    return _sft(tokenizer, transform, source, data_files, split, load_dataset_kwargs)


def instruct_dataset(
    tokenizer: Any,
    *,
    source: str = "json",
    data_files: Any = None,
    split: str = "train",
    train_on_input: bool = False,
    column_map: dict[str, str] | None = None,
    new_system_prompt: str | None = None,
    **load_dataset_kwargs: Any,
) -> SFTDataset:
    """Rows with a prompt (``input``) that is used as it is and a response (``output``).

    Args:
        tokenizer: a torchtune ``ModelTokenizer``.
        source: ``json`` for local files, or a hub dataset with these columns.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``train[:10%]``.
        train_on_input: learn the prompt too.
        column_map: ``{"input": name, "output": name}`` when the columns have other names.
        new_system_prompt: a system message before every prompt.
        load_dataset_kwargs: passed to ``datasets.load_dataset``.
    """
    check_different(column_map)
    transform = InputOutputToMessages(
        train_on_input=train_on_input, column_map=column_map, new_system_prompt=new_system_prompt
    )
    return _sft(tokenizer, transform, source, data_files, split, load_dataset_kwargs)


input_output_dataset = instruct_dataset


def chat_dataset(
    tokenizer: Any,
    *,
    source: str = "json",
    data_files: Any = None,
    split: str = "train",
    conversation_style: str = "openai",
    conversation_column: str | None = None,
    tools_column: str = "tools",
    train_on_input: bool = False,
    new_system_prompt: str | None = None,
    **load_dataset_kwargs: Any,
) -> ChatDataset:
    """Conversations of several turns: what the assistant says is learned, in every turn.

    Each message is checked. One that holds null, a part that is not text, or what the tokenizer's chat template leaves
    out is refused with its row and number. Tool calls and tools need ``hf_tokenizer`` and a template that renders them.

    Args:
        tokenizer: a torchtune ``ModelTokenizer``.
        source: ``json`` for local files, or a hub dataset.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``train[:10%]``.
        conversation_style: ``openai`` (``role``, ``content``, ``tool_calls``) or ``sharegpt`` (``from``, ``value``).
        conversation_column: the column with the list of messages; default ``messages`` or ``conversations``.
        tools_column: the column with the tools the assistant may call, if the rows have it.
        train_on_input: learn the other messages too. A message with ``weight: 0`` is never learned.
        new_system_prompt: a system message in place of the rows' own.
        load_dataset_kwargs: passed to ``datasets.load_dataset``.
    """
    transform = ConversationToMessages(
        conversation_style,
        column=conversation_column,
        tools_column=tools_column,
        train_on_input=train_on_input,
        new_system_prompt=new_system_prompt,
    )
    return _sft(tokenizer, transform, source, data_files, split, load_dataset_kwargs, ChatDataset)


def completion_dataset(
    tokenizer: Any,
    *,
    source: str = "json",
    data_files: Any = None,
    split: str = "train",
    column: str = "text",
    add_eos: bool = True,
    **load_dataset_kwargs: Any,
) -> TextCompletionDataset:
    """Raw text (column ``text``): every token is learned, ``packed: True`` splits texts across rows by default.

    Args:
        tokenizer: a torchtune ``ModelTokenizer``.
        source: ``json`` or ``text`` (one text per line) for local files, or a hub dataset.
        data_files: path or paths of local files.
        split: e.g. ``train``, ``train[:10%]``.
        column: the column with the text.
        add_eos: end every text with the end-of-sequence token.
        load_dataset_kwargs: passed to ``datasets.load_dataset``.
    """
    kwargs = {"split": split, **load_dataset_kwargs}
    kwargs |= {} if data_files is None else {"data_files": data_files}
    kwargs |= as_text({"source": source, **kwargs})
    return TextCompletionDataset(tokenizer, source, column=column, add_eos=add_eos, **kwargs)


def _sft(
    tokenizer: Any,
    transform: Transform,
    source: str,
    data_files: Any,
    split: str,
    kwargs: dict,
    kind: type[SFTDataset] | None = None,
) -> Any:
    if data_files is not None:
        kwargs = {**kwargs, "data_files": data_files}
    kwargs = {**kwargs, **as_text({"source": source, "split": split, **kwargs})}
    return (kind or SFTDataset)(
        source=source, message_transform=transform, model_transform=tokenizer, split=split, **kwargs
    )
