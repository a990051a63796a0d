"""The records of a JSON document with the text of each, so that numbers and keys can be written as they came."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

FILLED = re.compile(r"[^ \t\n\r]")  # the others may stand between values
LINE_END = re.compile(r"[ \t]*[\r\n][ \t\r\n]*")  # never inside a string, where JSON has escapes for them
DECODER = json.JSONDecoder()

MAX_DEPTH = 100  # of arrays and objects inside one another: what every parser and writer of JSON and tables can take
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
LARGE = re.compile(r"[0-9]{200}|[eE]\+?[0-9]{3}")  # is in every number that is larger than any float

Element = tuple[Any, str]  # a value and its text, on one line


def too_deep(text: bytes) -> bool:
    """Whether arrays and objects are nested deeper than MAX_DEPTH in a text, which may be no JSON.

    The text tells, before it is parsed: how deep a parser gets depends on the parser and on who calls it.
    """
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in STRING.sub(b"", text).translate(None, NOT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def overflows(text: str) -> bool:
    """Whether a number in a JSON text is larger than any float, so that parsers make an infinity of it."""
    if LARGE.search(text) is None:
        return False
    numbers: list[str] = []
    json.loads(text, parse_float=numbers.append, parse_int=numbers.append)
    return any(math.isinf(float(number)) for number in numbers)


def values(text: str) -> Iterator[Element]:
    """The values that follow one another in a text. Raises json.JSONDecodeError."""
    at = 0
    while found := FILLED.search(text, at):
        value, at = DECODER.raw_decode(text, found.start())
        yield value, LINE_END.sub(" ", text[found.start() : at])


def elements(text: str, keys: Sequence[str] = ()) -> Iterator[Element]:
    """The elements of the array that a text is, or that stands at `keys` inside one another in its object.

    One value is held at a time. Raises json.JSONDecodeError, and KeyError where a key is absent.
    """
    at = _next(text, 0)
    for key in keys:
        at = _value_at(text, at, key)
    at = _next(text, at + 1)
    while text[at] != "]":
        value, end = DECODER.raw_decode(text, at)
        yield value, LINE_END.sub(" ", text[at:end])
        at = _after(text, end, "]")
    if not keys and FILLED.search(text, at + 1):
        raise json.JSONDecodeError("Extra data", text, at + 1)


def _value_at(text: str, at: int, key: str) -> int:
    """Where the value of a key begins in the object that begins at `at`; of the last, where the key stands twice."""
    found, at = -1, _next(text, at + 1)
    while text[at] != "}":
        name, end = DECODER.raw_decode(text, at)
        value_at = _next(text, _next(text, end) + 1)  # after the colon
        found = value_at if name == key else found
        at = _after(text, DECODER.raw_decode(text, value_at)[1], "}")
    if found < 0:
        raise KeyError(key)
    return found


def _after(text: str, at: int, end: str) -> int:
    """Where the next item begins, or `end` stands, after an item that ends at `at`."""
    at = _next(text, at)
    if text[at] == end:
        return at
    if text[at] != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    following = _next(text, at + 1)
    if text[following] == end:
        raise json.JSONDecodeError("Illegal trailing comma", text, at)
    return following


def _next(text: str, at: int) -> int:
    """The position of the next character that is no white space."""
    if (found := FILLED.search(text, at)) is None:
        raise json.JSONDecodeError("Expecting value", text, len(text))
    return found.start()
