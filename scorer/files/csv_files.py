"""CSV and TSV, row by row, every cell as the text that it is: "42" stays a text, and an empty cell is "".

Python's reader and not Polars': that one reads whole files, makes nulls of the cells that a short row lacks, and does
not say in which line a fault is.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from scorer.files.kinds import check_signature, plain
from scorer.files.raw import FileRows, Found, RawRecord, Rows, count_and_look
from scorer.files.streams import decompressed
from scorer.types import ScorerError

BOM = "\ufeff"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
CELL_CHARACTERS = 1 << 28  # at most: a quote that nothing closes would take the rest of the file into memory


class CsvRows(FileRows):
    """The rows below the header, which names the columns. Blank lines are no rows."""

    def scan(self, file: BinaryIO, limit: int | None, *, keep: bool) -> Found:
        """Count the rows: all are read, so that a fault in any of them shows here."""

        def raw(row: int, value: dict[str, str]) -> RawRecord:
            return RawRecord(row, f"{self.source.path}[{row}]", value)

        return count_and_look(self._read(file), raw, limit, self.source.fits)

    def rows(self, first_id: int, start: int, stop: int | None, *, exact: bool) -> Rows:
        """The rows. Those before `start` are split into cells, since a cell may hold the end of a line."""
        self.source.file.seek(0)
        count = 0
        for count, value in enumerate(self._read(self.source.file), 1):
            record_id = first_id + count - 1
            if stop is not None and record_id >= stop:
                return record_id
            if record_id >= start:
                yield RawRecord(record_id, f"{self.source.path}[{count - 1}]", value)
        return first_id + count

    def _read(self, file: BinaryIO) -> Iterator[dict[str, str]]:
        path, suffix = self.source.path, self.source.suffix
        delimiter = DELIMITERS[plain(suffix)]
        csv.field_size_limit(CELL_CHARACTERS)
        reader = csv.reader(_decoded(path, decompressed(file, suffix)), delimiter=delimiter, strict=True)
        cells = _cells(path, reader)
        number, header = next(cells, (0, []))
        _check_header(path, header, delimiter)
        for number, row in cells:
            if len(row) != len(header):
                raise ScorerError(
                    f"{path}: line {number}: {len(row)} cells, where the header has {len(header)}; mend that row "
                    "(a cell that holds the separator or the end of a line is to be in double quotes)"
                )
            yield dict(zip(header, row, strict=True))


def _cells(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the 1-based number of its first line."""
    while True:
        number = reader.line_num + 1
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
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise ScorerError(f"{path}: the header names the column '{twice}' twice; rename one")
    if len(header) == 1 and (other := next((mark for mark in ",\t;|" if mark in header[0]), None)):
        wrong = f"the cells are separated by {other!r}, not {delimiter!r}"
        raise ScorerError(f"{path}: {wrong}; write it with commas (.csv) or tabs (.tsv)")


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if number == 1:
            check_signature(path, "", line)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ScorerError(f"{path}: is not UTF-8 at line {number}; save it as UTF-8") from error
        yield text.removeprefix(BOM) if number == 1 else text
