"""The rows of an input file as they came, and what a reader of one kind of file is given and gives.

The readers are in json_files, csv_files and tables; scorer.files.reader chooses one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar

from scorer.types import RowStatus


class RawRecord(NamedTuple):
    """One row as it came. `value` is the parsed JSON value or the table's row; of a line that is not JSON, its text."""

    record_id: int  # 0-based, over all inputs
    source: str  # "data.jsonl:17" (1-based line) or "data.json[16]", "data.parquet[16]" (0-based row)
    value: Any
    status: RowStatus = RowStatus.OK  # or BAD_JSON
    line: bytes | None = None  # where it is JSON; without its end

    @property
    def text(self) -> str | None:
        """The line that was read, None where there was none or it is not JSON."""
        return None if self.line is None else self.line.decode()


Rows = Generator[RawRecord, None, int]  # returns the record id after the file's last row
Item = TypeVar("Item")
Fits = Callable[[RawRecord], bool]  # whether a row is a sample, of a format that is known


class Found(NamedTuple):
    """What a look at a file's content finds: the number of its rows, the first, and whether one fits."""

    rows: int
    first: RawRecord | None
    fits: bool


@dataclass(frozen=True, slots=True)
class Source:
    """An input file that is open: `path` as the user named it, `local` on this machine's disk."""

    path: Path
    local: Path
    file: BinaryIO
    suffix: str  # one of scorer.files.kinds.READ
    fits: Fits
    records_at: str | None = None  # the key of the records in a JSON object, such as "result.rows"


class FileRows(ABC):
    """The rows of an open file of one kind. Raises ScorerError for content that is not of the kind."""

    takes_records_at: ClassVar[bool] = False

    def __init__(self, source: Source):
        self.source = source

    @abstractmethod
    def scan(self, file: BinaryIO, limit: int | None, *, keep: bool) -> Found:
        """Count the rows, and look for one that fits among the first `limit`.

        file: the source's, at its start; what is not read of it is read by the caller, who hashes it. keep: hold what
        was parsed until `rows` is called.
        """

    @abstractmethod
    def rows(self, first_id: int, start: int, stop: int | None, *, exact: bool) -> Rows:
        """As `scorer.files.reader.InputReader.rows`."""


def count_and_look(
    items: Iterator[Item], to_row: Callable[[int, Item], RawRecord], limit: int | None, fits: Fits
) -> Found:
    """Count items, and make rows of the first `limit` until one fits: `to_row` takes the record id and the item."""
    first, found, count = None, False, 0
    for count, item in enumerate(islice(items, limit), 1):
        raw = to_row(count - 1, item)
        first, found = first or raw, fits(raw)
        if found:
            break
    return Found(count + sum(1 for _ in items), first, found)


def first_fit(rows: Iterable[RawRecord], fits: Fits) -> tuple[RawRecord | None, bool]:
    """The first row, and whether one fits; nothing is read after the one that does."""
    first = None
    for raw in rows:
        first = first or raw
        if fits(raw):
            return first, True
    return first, False
