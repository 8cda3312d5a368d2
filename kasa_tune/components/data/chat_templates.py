"""Chat templates: Jinja sources that come with a tokenizer, found and compiled in a sandbox."""

import datetime
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

_TEMPLATE_DATE = datetime.date(2024, 7, 26)  # the date Llama's own templates fall back to


def load_chat_template(folder: Path, path: str | None, settings: Mapping[str, Any]) -> str | None:
    """The source of the model's chat template, or None if it has none.

    Args:
        folder: where ``tokenizer.json`` is.
        path: the template's file, in place of ``chat_template.jinja`` in the folder.
        settings: the tokenizer's config, whose ``chat_template`` is used when there is no file.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: the template is not valid Jinja.
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"chat_template_path: no such file: {path}")
    file = Path(path) if path is not None else folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(
        source, list
    ):  # several named templates; the plain conversation is called default
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default", next(iter(named.values()), None))
    if source is not None:
        try:
            compile_template(source)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"The chat template in {file if file.is_file() else folder} is broken: {error}"
            ) from error
    return source


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what the assistant says; the text in it is kept as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in a sandbox with the functions such templates expect.

    ``strftime_now`` gives a fixed date: a run that is resumed tomorrow must see the tokens it saw today. Templates that
    ask whether it is defined get to use their own fallback.
    """
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals["raise_exception"] = _raise_exception
    if "strftime_now is defined" not in source:
        sandbox.globals["strftime_now"] = _TEMPLATE_DATE.strftime
    return sandbox.from_string(source)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
