"""CSV and TSV, row by row, every cell as the text that it is: "42" stays a text, and an empty cell is "".

Python's reader and not Polars': that one reads whole files, makes nulls of the cells that a short row lacks, and does
not say in which line a fault is.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from scorer.files.kinds import DELIMITERS, check_signature, plain
from scorer.files.raw import FileRows, Found, RawRecord, Rows, count_and_look, rows_of
from scorer.files.streams import LINE_BYTES, check_line, decompressed, pieces
from scorer.types import ScorerError


class CsvRows(FileRows):
    """The rows below the header, which names the columns. Blank lines are no rows."""

    def scan(self, file: BinaryIO, limit: int, *, keep: bool) -> Found:
        """Count the rows: all are read, so that a fault in any of them shows here."""
        return count_and_look(enumerate(self._read(file)), self._row, limit, self.fits)

    def rows(self, first_id: int, start: int, stop: int, *, exact: bool) -> Rows:
        """The rows. Those before `start` are split into cells, since a cell may hold the end of a line."""
        self.file.seek(0)
        return rows_of(enumerate(self._read(self.file)), self._row, first_id, start, stop)

    def _row(self, record_id: int, numbered: tuple[int, dict[str, str]]) -> RawRecord:
        return RawRecord(record_id, f"{self.name}[{numbered[0]}]", numbered[1])

    def _read(self, file: BinaryIO) -> Iterator[dict[str, str]]:
        path, delimiter = self.path, DELIMITERS[plain(self.suffix)]
        csv.field_size_limit(LINE_BYTES)
        lines = _Lines(path, pieces(decompressed(file, self.suffix)))
        cells = _cells(path, csv.reader(lines, delimiter=delimiter, strict=True), lines)
        _, header = next(cells, (0, []))
        _check_header(path, header, delimiter)
        for number, row in cells:
            if len(row) != len(header):
                raise ScorerError(
                    f"{path}: line {number}: {len(row)} cells, where the header has {len(header)}; mend that row "
                    "(a cell that holds the separator or the end of a line is to be in double quotes)"
                )
            yield dict(zip(header, row, strict=True))


def _cells(path: Path, reader: Any, lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the 1-based number of its first line."""
    while True:
        number = lines.begin_row()
        try:
            row = next(reader, None)
        except csv.Error as error:
            problem = str(error).partition(" - ")[0]
            raise ScorerError(f"{path}: line {number}: this row is no CSV ({problem}); mend it") from error
        if row is None:
            return
        if row:
            yield number, row


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    """Raise ScorerError where a header names a column twice, or is no header of such a file."""
    if header and header[0].lstrip().startswith(("{", "[")):
        raise ScorerError(f"{path}: starts with {header[0].lstrip()[0]}, as JSON does; name it .json or .jsonl")
    if len(set(header)) < len(header):
        twice = Counter(header).most_common(1)[0][0]
        raise ScorerError(f"{path}: the header names the column '{twice}' twice; rename one")
    if len(header) == 1 and (other := next((mark for mark in ",\t;|" if mark in header[0]), None)):
        wrong = f"the cells are separated by {other!r}, not {delimiter!r}"
        raise ScorerError(f"{path}: {wrong}; write it with commas (.csv) or tabs (.tsv)")


class _Lines:
    """The lines of a file as text, up to LINE_BYTES of them for one row.

    A quote that nothing closes would otherwise take the rest of the file into memory.
    """

    def __init__(self, path: Path, lines: Iterator[bytes]):
        self._path, self._lines = path, lines
        self._number = self._first = self._size = 0

    def begin_row(self) -> int:
        """The 1-based number of the next line, with which a row begins."""
        self._first, self._size = self._number + 1, 0
        return self._first

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self._number += 1
            self._size += len(line)
            if self._number == 1:
                check_signature(self._path, "", line)
            check_line(self._path, self._first, self._size)
            try:
                text = line.decode("utf-8-sig" if self._number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ScorerError(f"{self._path}: is not UTF-8 at line {self._number}; save it as UTF-8") from error
            yield text
