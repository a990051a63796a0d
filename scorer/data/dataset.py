"""The inputs of a run: what identifies each file, and how many records it holds."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorer.config import ScoreConfig
from scorer.data.reader import Check, _check_input, _read_file, _reading
from scorer.data.records import known_format
from scorer.storage.paths import absolute, local_copy, to_path
from scorer.types import ScorerError


@dataclass(frozen=True, slots=True)
class InputFile:
    """What tells whether a file is still the same: size in bytes, and SHA-256 of the bytes as they lie on disk.

    An object is not read for it: instead of a SHA-256 it has the ETag that its store gives to each content.
    """

    path: str
    size: int
    sha256: str | None
    etag: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What stays the same wherever a copy of the file lies."""
        return {"size": self.size} | ({"etag": self.etag} if self.etag else {"sha256": self.sha256})


def inspect_input(path: str | Path) -> InputFile:
    """Size and hash of an input file.

    Raises ScorerError: missing, not a file, unreadable, of unknown suffix, of a name or folder that is not UTF-8.
    """
    where = to_path(path)
    entry = _check_input(where)
    if entry is not None:
        return InputFile(str(where), entry["size"], None, entry["ETag"].strip('"'))
    with _reading(where), open(where, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return InputFile(str(path), file.tell(), digest)


def check_unchanged(inputs: Iterable[Mapping[str, Any]]) -> None:
    """Raise ScorerError for the first of a manifest's inputs that is not what it was."""
    for entry in inputs:
        if {"path": entry["path"]} | inspect_input(entry["path"]).identity != entry:
            raise ScorerError(f"{entry['path']} changed since it was scored: score it again")


def input_size(path: str | Path) -> int:
    """Bytes of an input file, which is not read for it. Raises ScorerError as `inspect_input` does."""
    where = to_path(path)
    entry = _check_input(where)
    return int(entry["size"]) if entry is not None else where.stat().st_size


def count_records(path: str | Path, check: Check | None = None, limit: int | None = None) -> int:
    """How many rows a file holds, without parsing JSON lines. `check` is as of `read_raw`; of an empty file not called.

    `limit` is of the check alone. Raises ScorerError as `read_raw` does.
    """
    where = to_path(path)
    _check_input(where)
    with local_copy(where) as file:
        rows, count = _read_file(where, file, 0, sys.maxsize, None), 0
        try:
            next(rows)
        except StopIteration as end:
            count = end.value
        if check is not None and count:
            check(where, _read_file(where, file, 0, 0, limit))
    return count


def _count(paths: list[str], config: ScoreConfig) -> list[int]:
    """How many rows each file has, of those that are not beyond the limit.

    Raises ScorerError for any file that scoring would fail on, but hours later.
    """
    counts: list[int] = []
    for path in paths:
        left = None if config.limit is None else config.limit - sum(counts)
        if left is not None and left <= 0:
            break
        counts.append(count_records(path, known_format(config.columns), left))
    if not sum(counts):
        raise ScorerError(f"{', '.join(paths)}: there are no records to score")
    return counts


def _inputs(inputs: list[InputFile]) -> list[dict[str, Any]]:
    return [{"path": absolute(i.path)} | i.identity for i in inputs]
