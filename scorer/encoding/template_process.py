"""Renders chat templates, which are programs from elsewhere: the process that `scorer.encoding.templates` starts.

The kernel holds it to its limits, since no check in Python sees all that a template can do: an endless loop, a filter
that pads to 10^11 characters, a text that doubles. It imports nothing of scorer, and so starts in a tenth of a second.
"""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
# Of a rendered text, in characters: those that the template may add, and how often it may write its input.
ADDED, TIMES = 1 << 20, 32
SIZE = struct.Struct("!Q")


class Generation(Extension):
    """The block that marks what the model generated, of which the text alone counts here."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja wants it

    def parse(self, parser: Parser) -> nodes.Node:
        """The node of the block."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    """Jinja's filter without the escaping of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> NoReturn:
    """What a template calls to refuse a conversation."""
    raise TemplateError(message)


@lru_cache(16)
def compiled(source: str) -> Template:
    """A template in the environment that transformers gives chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)


def rendered(common: dict[str, Any], request: bytes) -> str:
    """The text of a request: a pickled source, and the variables for it beside `common`."""
    source, variables = pickle.loads(request)
    text = compiled(source).render({**common, **variables})
    if len(text) > ADDED + TIMES * len(request):
        raise ValueError(f"{len(text)} characters, far more than the conversation has")
    return text


def limit(kind: int, value: int) -> None:
    """Lower a limit of this process, unless it is lower already."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main(seconds: int) -> None:
    """Answer requests from standard input, until it ends: b"1" and the text, or b"0" and why there is none.

    Requests come many at a time: the bytes of all, then the pickled variables that they share, then each; before each
    of these its size. The answers are written together. seconds: what one rendering may compute.
    """
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    while header := sys.stdin.buffer.read(SIZE.size):
        requests = io.BytesIO(sys.stdin.buffer.read(*SIZE.unpack(header)))
        common = pickle.loads(requests.read(*SIZE.unpack(requests.read(SIZE.size))))
        answers = io.BytesIO()
        while header := requests.read(SIZE.size):
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
            try:
                flag, answer = b"1", rendered(common, requests.read(*SIZE.unpack(header))).encode()
            except Exception as error:  # noqa: BLE001 (a template may raise anything)
                why = f"{type(error).__name__}: {str(error)[:200]}"
                flag, answer = b"0", why.encode("utf-8", "backslashreplace")
            answers.write(flag + SIZE.pack(len(answer)))
            answers.write(answer)
        sys.stdout.buffer.write(answers.getbuffer())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
