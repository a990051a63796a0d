"""Data that lies elsewhere than where it was scored: whether it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from scorer.data.dataset import InputFile, inspect_input
from scorer.files.reader import InputReader
from scorer.storage.paths import to_path
from scorer.types import ScorerError


def moved(inputs: Sequence[InputFile], paths: Sequence[str | Path]) -> tuple[InputFile, ...]:
    """The files `paths`, which are copies of `inputs` in their order.

    Raises ScorerError where the number of files, a size or a hash differs. Of an object and a local file only the sizes
    can be compared: see `unchecked`.
    """
    if len(paths) != len(inputs):
        names = ", ".join(entry.path for entry in inputs)
        raise ScorerError(f"data: {len(paths)} files where {len(inputs)} were scored: give copies of {names}, in order")
    found = tuple(map(inspect_input, paths))
    for entry, copy in zip(inputs, found, strict=True):
        if copy.size != entry.size:
            raise _not_same(copy, entry, f"it has {copy.size:,} bytes, and that had {entry.size:,}")
        if _comparable(entry, copy) and copy.identity != entry.identity:
            raise _not_same(copy, entry, "of the same size, but with another content")
    return found


def unchecked(inputs: Sequence[InputFile], found: Sequence[InputFile]) -> list[str]:
    """What is not known of data that took the place of `inputs`, as sentences."""
    if not inputs:
        return ["record ids are taken for row numbers of the data: the run can't tell whether it is what was scored"]
    return [
        f"{copy.path}: only its size could be compared with {entry.path}"
        for entry, copy in zip(inputs, found, strict=True)
        if not _comparable(entry, copy)
    ]


def count_rows(path: str | Path) -> int:
    """How many rows a file has. Raises ScorerError where it can't be read."""
    with closing(InputReader(to_path(path))) as reader:
        return reader.scan().rows


def _comparable(entry: InputFile, copy: InputFile) -> bool:
    return entry.identity.keys() == copy.identity.keys()


def _not_same(copy: InputFile, entry: InputFile, why: str) -> ScorerError:
    return ScorerError(f"{copy.path}: is not {entry.path} that was scored ({why}): give an unchanged copy")
