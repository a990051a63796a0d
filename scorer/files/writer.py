"""Raw values or tables -> a file or a folder, its kind by its suffix; whole or absent."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import gzip
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from scorer.faults import first_line
from scorer.files.arrow import as_dataset, as_frame, check_flat, for_text, framed
from scorer.files.kinds import COMPRESSIONS, DELIMITERS, JSON_SUFFIXES, is_array, suffix_in
from scorer.requirements import DATASET, require
from scorer.storage.atomic import is_stream, replacing
from scorer.storage.outputs import check_new_folder, check_writable
from scorer.storage.paths import to_path
from scorer.types import ScorerError

FOLDER = "/"  # how a path ends that is a folder for `datasets.load_from_disk`


def _write_parquet(table: pa.Table, temporary: Path) -> None:
    with temporary.open("wb") as stream:  # Arrow's own files do not say that a disk is full
        pq.write_table(table, stream, compression="zstd")
    try:
        pq.read_schema(temporary)
    except OSError as error:  # pyarrow writes lists that are nested deeper than it reads
        raise ValueError(error) from error


def _write_arrow(table: pa.Table, temporary: Path) -> None:
    with temporary.open("wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table.unify_dictionaries())


def _write_flat(separator: str, table: pa.Table, temporary: Path) -> None:
    frame = as_frame(table)
    # A row of one cell that is null would be a blank line, which is no row.
    null = '""' if frame.width == 1 else None
    header = pl.DataFrame({str(number): [name] for number, name in enumerate(frame.columns)})
    with temporary.open("wb") as stream:
        for part in (header, frame):  # a name is quoted as any other text, as an empty one must be
            part.write_csv(stream, separator=separator, include_header=False, null_value=null)


def _save_dataset(table: pa.Table, temporary: Path) -> None:
    dataset = as_dataset(table)
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # for what takes a moment
    try:
        dataset.save_to_disk(str(temporary))
    finally:
        if shown:
            datasets.enable_progress_bars()


TABLES: Mapping[str, Callable[[pa.Table, Path], None]] = {
    ".parquet": _write_parquet,
    ".arrow": _write_arrow,
    **{suffix: partial(_write_flat, delimiter) for suffix, delimiter in DELIMITERS.items()},
    FOLDER: _save_dataset,
}
FLAT = tuple(DELIMITERS)  # their columns hold text and numbers
OUTPUTS = (*(name + packed for packed in COMPRESSIONS for name in JSON_SUFFIXES), *TABLES)


def output_kind(path: str | Path) -> str:
    """Which of OUTPUTS a path ends in, or JSON Lines for a pipe or a device. Raises ScorerError where it is none."""
    if (suffix := suffix_in(str(path), OUTPUTS)) is not None:
        return suffix
    if is_stream(Path(path)):
        return ".jsonl"
    raise ScorerError(
        f"{path}: unknown kind of file; let it end in one of {', '.join(OUTPUTS)} (a folder for load_from_disk)"
    )


class RecordWriter:
    """Writes JSON values or a table to a path of any of OUTPUTS; it appears whole when the block ends without error.

    Strings that hold lone surrogates are written as JSON escapes. JSON and JSON Lines are streamed; for other kinds all
    rows are held in memory and framed at the end. Raises ScorerError for a kind that is not known, a path that
    cannot be written and a value that the kind cannot hold; EngineError where the disk is full.

    named: what errors call the file, if it goes elsewhere from `path`.
    """

    def __init__(self, path: str | Path, *, named: str | None = None) -> None:
        self.path = to_path(path)
        self.kind = output_kind(path)
        if self.kind == FOLDER:
            require(DATASET)
            check_new_folder(self.path)
        else:
            check_writable(self.path)
        self.name = str(self.path) if named is None else named
        self._files = contextlib.ExitStack()
        self._encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_json_value).encode
        self._table: pa.Table | None = None
        self._rows: list[Any] = []  # for a table
        self._written = 0
        self._finished = False

    @property
    def is_table(self) -> bool:
        """Whether the kind of file has columns, so that `write_table` keeps their types."""
        return self.kind in TABLES

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as files:
            self._temporary = files.enter_context(replacing(self.path, folder=self.kind == FOLDER))
            if not self.is_table:
                self._stream: BinaryIO = files.enter_context(self._temporary.open("wb"))
            if self.kind.endswith(".gz"):  # no time and no name inside: the same records give the same bytes
                packed: Any = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._stream, mtime=0)
                self._stream = cast(BinaryIO, files.enter_context(packed))
            elif self.kind.endswith(".zst"):
                packed = zstandard.ZstdCompressor(write_checksum=True).stream_writer(self._stream, closefd=False)
                self._stream = cast(BinaryIO, files.enter_context(packed))
            self._files = files.pop_all()
        return self

    def write(self, value: Any, *, text: str | None = None, source: str | None = None) -> None:
        """Write one record, a JSON value. Called inside the `with` block.

        text: the value as a line of JSON, which JSON and JSON Lines take as it is: a value has neither the digits that
        a float has no room for, nor keys that stand twice. source: where the record is from, to name it in an error.
        """
        record = f"{self.name}: record {self._written if source is None else source}"
        if self.is_table:
            if not isinstance(value, dict):
                raise ScorerError(f"{record} is no object; write to JSON Lines (.jsonl)")
            self._rows.append(value)
            return
        try:
            if text is None:
                text = self._encode(value)
            elif is_array(self.kind):
                _check_strict(text)
        except (TypeError, RecursionError) as error:
            raise ScorerError(f"{record} cannot be JSON ({first_line(error)})") from error
        except ValueError as error:
            why = "it holds a number that is infinite or NaN; mend it there, or write to .parquet"
            raise ScorerError(f"{record} cannot be JSON ({why})") from error
        if is_array(self.kind):
            text = (",\n" if self._written else "[\n") + text
        else:
            text += "\n"
        self._stream.write(text.encode("utf-8", "backslashreplace"))  # only lone surrogates cannot be encoded
        self._written += 1

    def write_table(self, table: pa.Table) -> None:
        """Write all records, as a table. Called inside the `with` block, once, where `is_table`."""
        self._table = table

    def finish(self) -> None:
        """Write what ends the file: what can't be framed shows here. Leaving the block does it too."""
        if self._finished:
            return
        self._finished = True
        if self.is_table:
            table = framed(self.name, self._rows) if self._table is None else self._table
            if self.kind in FLAT:
                check_flat(self.name, table)
                table = for_text(self.name, table)
            try:
                TABLES[self.kind](table, self._temporary)
            except (pa.ArrowException, ValueError) as error:  # such as an object without keys, in Parquet
                why = f"{self.name}: can't hold these records; write to JSON Lines (.jsonl)"
                raise ScorerError(f"{why} ({first_line(error)})") from error
        elif is_array(self.kind):
            self._stream.write(b"\n]\n" if self._written else b"[]\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._files:
                self.finish()
        else:
            self._files.__exit__(kind, error, trace)


def _check_strict(text: str) -> None:
    """Raise ValueError for a text with NaN or an infinity, which Python's json reads and JSON has not."""
    if "NaN" in text or "Infinity" in text:

        def refuse(name: str) -> None:
            raise ValueError(name)

        json.loads(text, parse_constant=refuse)


def _json_value(value: Any) -> str:
    """What Parquet can hold and JSON cannot, where text says the same."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise TypeError(f"it holds {type(value).__name__}; leave that column out, or write to .parquet")
