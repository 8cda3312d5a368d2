"""Chat templates: Jinja sources that come with a tokenizer, found, checked and rendered in a process of their own."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kasa_tune.components.data import template_process
from kasa_tune.components.data.template_process import CPU_SECONDS
from kasa_tune.components.data.tokenizer_files import load_json

_LONGEST_SOURCE = 1 << 20  # characters; published templates have up to 20,000
# A template that has taken so much CPU time in all may not take more than so much for a conversation on average.
# Published ones take less than a thousandth of a second.
_FREE_SECONDS, _MEAN_SECONDS = 60.0, 0.1
_START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


class TemplateRefusalError(ValueError):
    """A template does not take a conversation."""


class TemplateLimitError(TemplateRefusalError):
    """A template does not end in the time and memory it is given."""


def load_chat_template(folder: Path, path: str | None, settings: Mapping[str, Any]) -> str | None:
    """The source of the model's chat template, or None if it has none.

    Args:
        folder: where ``tokenizer.json`` is.
        path: the template's file, in place of ``chat_template.jinja`` in the folder.
        settings: the tokenizer's config, whose ``chat_template`` is used when there is no file,
            before that of ``chat_template.json``.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: the template is not text, too long, or not valid Jinja.
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"chat_template_path: no such file: {path}")
    file = Path(path) if path is not None else folder / "chat_template.jinja"
    if file.is_file():
        where = str(file)
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"The chat template {file} is not UTF-8 text: {error}") from error
    else:
        where = f"the tokenizer's config in {folder}"
        given = settings.get("chat_template")
        if given is None and (folder / "chat_template.json").is_file():
            where = str(folder / "chat_template.json")
            given = load_json(folder / "chat_template.json").get("chat_template")
        source = _default_template(given, where)
    if source is None:
        return None
    if len(source) > _LONGEST_SOURCE:
        raise ValueError(
            f"The chat template in {where} has {len(source):,} characters; the limit is {_LONGEST_SOURCE:,}."
        )
    try:
        check_template(source)
    except TemplateRefusalError as error:
        raise ValueError(f"The chat template in {where} is broken: {error}") from error
    return source


def _default_template(given: Any, where: str) -> str | None:
    """The template of plain conversations: the text itself, or the one called default of a list of named templates."""
    if given is None or isinstance(given, str):
        return given
    named = {}
    for entry in given if isinstance(given, list) else [given]:
        texts = isinstance(entry, Mapping) and (entry.get("name"), entry.get("template"))
        if not (texts and all(isinstance(text, str) for text in texts)):
            raise ValueError(
                f"chat_template in {where} must be text, or a list of {{name, template}}, got "
                f"{type(given).__name__} {given!r:.60}. Set chat_template_path to a Jinja file."
            )
        named[entry["name"]] = entry["template"]
    return named.get("default", next(iter(named.values()), None))


# ---------------------------------------------------------------------------------------------------- rendering


def check_template(source: str) -> None:
    """Compile a template. Raises TemplateRefusalError if it is not valid Jinja."""
    _process().ask(source, [])


def render_template(source: str, *variables: Mapping[str, Any]) -> list[str]:
    """The text of a template for each of several sets of variables, which are of JSON's types.

    ``tools`` and ``documents`` are None unless given, as in transformers: templates ask ``tools is not none``.

    Raises:
        TemplateRefusalError: the template raises an error.
        TemplateLimitError: it takes more time, memory or characters than
            :mod:`~kasa_tune.components.data.template_process` allows.
    """
    return _process().ask(source, [{"tools": None, "documents": None, **v} for v in variables])


class _TemplateProcess:
    """A running :mod:`~kasa_tune.components.data.template_process`, started anew after it was stopped by a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen | None = None
        self._seconds: dict[int, float] = {}  # of CPU time, by the hash of the template
        self._rendered: dict[int, int] = {}

    def ask(self, source: str, variables: Sequence[Mapping[str, Any]]) -> list[str]:
        request = json.dumps({"source": source, "variables": variables}) + "\n"
        with self._lock:
            try:
                reply = self._exchange(request)
            except (
                BaseException
            ):  # an answer that nobody has read must not answer the next question
                self.stop()
                raise
        if "texts" in reply:
            self._count(hash(source), reply["seconds"], len(variables))
            return reply["texts"]
        if "limit" in reply:
            raise TemplateLimitError(reply["limit"])
        raise TemplateRefusalError(reply["error"])

    def _count(self, template: int, seconds: float, rendered: int) -> None:
        """Add up what a template costs. One that stays under the limit for each conversation may still take days."""
        total = self._seconds[template] = self._seconds.get(template, 0.0) + seconds
        number = self._rendered[template] = self._rendered.get(template, 0) + rendered
        if total > _FREE_SECONDS and total > number * _MEAN_SECONDS:
            raise TemplateLimitError(
                f"it has taken {total:.0f} s for {number:,} conversations; the limit is {_MEAN_SECONDS} s for each "
                "on average"
            )

    def _exchange(self, request: str) -> Mapping[str, Any]:
        if self._running is None or self._running.poll() is not None:
            self._running = self._start()
        pipes = self._running
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        try:
            pipes.stdin.write(request)
            pipes.stdin.flush()
            reply = pipes.stdout.readline()
        except BrokenPipeError:
            reply = ""
        return json.loads(reply) if reply.endswith("\n") else {"limit": self._reason()}

    def _start(self) -> subprocess.Popen:
        # Its own session: a signal to all processes of a run must not reach it, the run may still need batches then.
        return subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-c",
                _START,
                template_process.__file__,
                *filter(None, sys.path),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,
        )

    def _reason(self) -> str:
        """Why the process has ended in the middle of a request."""
        code = self._running.wait() if self._running is not None else 0
        self._running = None
        if hasattr(signal, "SIGXCPU") and code == -signal.SIGXCPU:
            return f"it takes more than {CPU_SECONDS} s; a loop in it may have no end"
        return f"the process that renders it ended with status {code}, most likely out of memory"

    def stop(self) -> None:
        """End the process, if it runs."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None


_processes: dict[int, _TemplateProcess] = {}  # a forked process must not share its parent's pipes


def _process() -> _TemplateProcess:
    if os.getpid() not in _processes:
        _processes[os.getpid()] = _TemplateProcess()
    return _processes[os.getpid()]


@atexit.register
def _stop_own() -> None:
    if os.getpid() in _processes:
        _processes[os.getpid()].stop()
