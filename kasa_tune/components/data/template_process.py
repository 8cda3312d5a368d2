"""The process that renders chat templates: Jinja in a sandbox, with bounded time and memory.

A chat template comes with a model, so it is code of somebody else. Jinja's sandbox keeps it away from the machine, but
not from endless loops or from ``'a' * 10**10``, and no check inside one process stops an operation of the interpreter
that has begun. So templates are rendered here, in a process of their own, which the operating system stops. It is run
as a script by :mod:`kasa_tune.components.data.chat_templates` and imports nothing of this package.

A request is a line of JSON, ``{"source": template, "variables": [{...}, ...]}``, and a reply is ``{"texts": [...]}`` or
``{"error": why}`` or ``{"limit": which}``, with the CPU time of the answer as ``seconds``. The end of the input ends
the process.
"""

import contextlib
import datetime
import functools
import json
import signal
import sys
import time
from typing import Any, TextIO

import jinja2
import jinja2.ext
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

CPU_SECONDS = 2  # for one conversation; ten thousand turns take a tenth of a second
_MEMORY = 1 << 30  # bytes of address space
_LONGEST_TEXT = 1 << 24  # characters of a rendered conversation
_TEMPLATE_DATE = datetime.date(2024, 7, 26)  # the date Llama's own templates fall back to


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what the assistant says; the text in it is kept as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

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


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render a template once for each set of variables of a request; without any it is only compiled."""
    try:
        template = compile_template(request["source"])
        texts = [template.render(**variables) for variables in request["variables"]]
    except MemoryError:
        return {"limit": f"it needs more than {_MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"limit": "it calls itself without end"}
    except Exception as error:  # templates call methods of strings and lists, which raise anything
        return {"error": f"{error}" or type(error).__name__}
    longest = max(map(len, texts), default=0)
    if longest > _LONGEST_TEXT:
        return {"limit": f"it renders {longest:,} characters; the limit is {_LONGEST_TEXT:,}"}
    return {"texts": texts}


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until there are no more. The limit on CPU time starts anew with each of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if resource is not None:
        _limit(resource.RLIMIT_AS, _MEMORY)
        _limit(resource.RLIMIT_CORE, 0)
    for line in requests:
        if resource is not None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + CPU_SECONDS)
        started = time.process_time()
        reply = answer(json.loads(line))
        reply["seconds"] = time.process_time() - started
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _limit(kind: int, value: int) -> None:
    """Lower the soft limit, as far as the hard one allows; where the system has no such limit, nothing is bounded."""
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(
            kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard)
        )


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
