"""The rows of an input file as they came, and the interface of the readers of each kind of file.

The readers are in json_files, csv_files and tables; scorer.files.reader chooses one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, starmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

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
    """What a look at rows finds: how many there are, the first, and whether one fits."""

    rows: int
    first: RawRecord | None
    fits: bool


@dataclass(eq=False)
class FileRows(ABC):
    """The rows of an open file of one kind. Raises ScorerError for content that is not of the kind."""

    path: Path  # as the user named it
    file: BinaryIO  # on this machine's disk
    suffix: str  # one of scorer.files.kinds.READ
    fits: Fits
    records_at: str | None  # the key of the records in a JSON object, such as "result.rows"

    @cached_property
    def name(self) -> str:
        """The path as text, for the source of each row: that of a URL takes 5 µs to make."""
        return str(self.path)

    @abstractmethod
    def scan(self, file: BinaryIO, limit: int, *, keep: bool) -> Found:
        """Count the rows, and look for one that fits among the first `limit`.

        file: `self.file` at its start, hashed as it is read; the caller reads what is left. keep: as InputReader.scan.
        """

    @abstractmethod
    def rows(self, first_id: int, start: int, stop: int, *, exact: bool) -> Rows:
        """As `scorer.files.reader.InputReader.rows`."""


def rows_of(
    items: Iterable[Item], to_row: Callable[[int, Item], RawRecord], first_id: int, start: int, stop: int
) -> Rows:
    """The rows of a file's items, as `FileRows.rows`: `to_row` takes the record id and the item."""
    record_id = first_id
    for item in items:
        if record_id >= stop:
            break
        if record_id >= start:
            yield to_row(record_id, item)
        record_id += 1
    return record_id


def count_and_look(items: Iterator[Item], to_row: Callable[[int, Item], RawRecord], limit: int, fits: Fits) -> Found:
    """Count items, and make rows of the first `limit` until one fits."""
    found = look(starmap(to_row, enumerate(islice(items, limit))), fits)
    return found._replace(rows=found.rows + sum(1 for _ in items))


def look(rows: Iterable[RawRecord], fits: Fits) -> Found:
    """Read rows up to the first that fits."""
    found = Found(0, None, False)
    for raw in rows:
        found = Found(found.rows + 1, found.first or raw, fits(raw))
        if found.fits:
            break
    return found
