"""The kinds of files that scorer reads and writes, by their suffixes."""

from __future__ import annotations

from pathlib import Path

from scorer.types import ScorerError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


COMPRESSIONS = ("", ".gz", ".zst")


SUFFIXES = (*(name + packed for packed in COMPRESSIONS for name in JSON_SUFFIXES), ".parquet")


def known_suffix(path: Path) -> str:
    """The suffix that says what kind of file it is, such as ".jsonl.gz". Raises ScorerError where it is not known."""
    known = [suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)]
    if not known:
        raise ScorerError(f"{path}: unknown kind of file; rename it to end in one of {', '.join(SUFFIXES)}")
    return max(known, key=len)


def is_array(suffix: str) -> bool:
    """Whether a file of this suffix is to hold one JSON array, compressed or not."""
    return suffix.removeprefix(".json") in COMPRESSIONS


def first_line(error: Exception) -> str:
    """The first line of the error's text."""
    return str(error).partition("\n")[0]
