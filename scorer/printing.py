"""Text that is printed on one line, whatever came in it: paths, columns, data, models and servers may hold anything."""

from __future__ import annotations

import re

# What ends or moves a line, or drives a terminal: control characters, line separators, the overrides of the direction
# of writing; and lone surrogates, which no encoding has.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MAX_CHARACTERS = 2000  # of an error


def printable(text: str) -> str:
    """The text on one line: what can't be printed is shown as Python escapes it."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def error_line(message: str) -> str:
    """An error's message, printable, and cut in the middle where it is longer than MAX_CHARACTERS."""
    line, half = printable(message.strip()), (MAX_CHARACTERS - 3) // 2
    return line if len(line) <= MAX_CHARACTERS else f"{line[:half]}...{line[-half:]}"
