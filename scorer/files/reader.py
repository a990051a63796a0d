"""One input file -> the raw values of its rows, whatever kind of file it is.

Every row gets a record id, whatever is in it. Several files together are scorer.data.dataset's. An object of a store is
copied to the temporary folder for as long as its reader is open.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import polars as pl

from scorer.faults import faults_of
from scorer.files.csv_files import CsvRows
from scorer.files.json_files import JsonRows
from scorer.files.kinds import (
    ARROW_SUFFIXES,
    DELIMITERS,
    JSON_SUFFIXES,
    SIGNATURE_BYTES,
    check_signature,
    known_suffix,
    plain,
)
from scorer.files.raw import FileRows, Fits, RawRecord, Rows
from scorer.files.streams import BUFFER_BYTES, HashedFile, read_errors
from scorer.files.tables import ArrowRows, ParquetRows, parquet_file, table_errors
from scorer.storage.paths import exists, is_folder, is_remote, local_copy, object_info
from scorer.types import ScorerError

KINDS: dict[str, type[FileRows]] = {
    **dict.fromkeys(JSON_SUFFIXES, JsonRows),
    **dict.fromkeys(DELIMITERS, CsvRows),
    **dict.fromkeys(ARROW_SUFFIXES, ArrowRows),
    ".parquet": ParquetRows,
}


class Scan(NamedTuple):
    """What one pass over a file finds: its size in bytes, its SHA-256, its rows, the first, and whether one fits."""

    size: int
    sha256: str
    rows: int
    first: RawRecord | None
    fits: bool


class InputReader:
    """One input file, opened once, whose rows can be read any number of times.

    fits: whether a row is a sample; None: no row is. An object in a .json file that fits is one record, and one
    that does not may hold the records. records_at: the key at which it does, such as "data" or "result.rows".

    Raises ScorerError where the file can't be read, here and in every method.
    """

    def __init__(self, path: Path, *, fits: Fits | None = None, records_at: str | None = None):
        self.path, suffix = path, known_suffix(path)
        kind = KINDS[plain(suffix)]
        if records_at is not None and kind is not JsonRows:
            raise ScorerError(f"{path}: --records-at {records_at} is for JSON files: leave it out")
        with contextlib.ExitStack() as files, read_errors(path):
            local = files.enter_context(local_copy(path))
            self._file: BinaryIO = files.enter_context(open(local, "rb", buffering=BUFFER_BYTES))
            check_signature(path, suffix, self._file.read(SIGNATURE_BYTES))
            self.copied_bytes = local.stat().st_size if is_remote(path) else 0  # in the temporary folder
            self._rows = kind(path, self._file, suffix, fits or (lambda raw: False), records_at)
            self._files = files.pop_all()

    def close(self) -> None:
        """Close the file, and remove the copy of an object."""
        self._files.close()

    def scan(self, limit: int = sys.maxsize, *, keep: bool = False) -> Scan:
        """Hash and count the file in one pass, and look for one of its first `limit` rows that fits.

        keep: hold a parsed JSON document until it is read.
        """
        with read_errors(self.path):
            self._file.seek(0)
            hashed = HashedFile(self._file)
            file = io.BufferedReader(hashed, BUFFER_BYTES)
            found = self._rows.scan(file, limit, keep=keep)
            while file.read(BUFFER_BYTES):
                pass
        return Scan(hashed.size, hashed.sha256.hexdigest(), *found)

    def rows(self, first_id: int = 0, start: int = 0, stop: int = sys.maxsize, *, exact: bool = True) -> Rows:
        """The rows with `start <= record_id < stop`, where the file's first row has `first_id`.

        Lines that are skipped are not parsed, and rows of tables not decoded. Unless `exact`, lines are parsed faster,
        and integers of more than 64 bits may become floats.
        """
        with read_errors(self.path):
            return (yield from self._rows.rows(first_id, start, stop, exact=exact))


def check_input(path: Path) -> None:
    """Raise ScorerError for a path that is missing, no file, of unknown suffix or not UTF-8; nothing is opened."""
    if is_remote(path):
        known_suffix(path)
        object_info(path)
        return
    if is_folder(path):
        raise ScorerError(f"{path}: is a folder; name the files in it")
    if not exists(path):
        raise ScorerError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise ScorerError(f"{path}: is not a regular file; copy the data to one")
    name = os.fsencode(os.path.abspath(path))  # what a manifest keeps, as text
    try:
        name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ScorerError(f"{name.decode('utf-8', 'backslashreplace')}: is no UTF-8 name; rename it") from error
    known_suffix(path)


def read_table(path: Path) -> pl.DataFrame:
    """A file of any kind as a table, CSV with numbers where a whole column is. Raises ScorerError if it can't be."""
    check_input(path)
    suffix = plain(known_suffix(path))
    with faults_of(f"{path}: can't be read as a table"):
        if suffix == ".parquet":
            with local_copy(path) as copy, table_errors(path, "Parquet"), parquet_file(copy) as file:
                return cast(pl.DataFrame, pl.from_arrow(file.read()))
        if suffix in DELIMITERS:
            with local_copy(path) as copy:
                return pl.read_csv(copy, separator=DELIMITERS[suffix], glob=False, infer_schema_length=None)
        with contextlib.closing(InputReader(path)) as reader:
            return pl.from_dicts([raw.value for raw in reader.rows()], infer_schema_length=None)
