"""Raw values -> a file: a JSON array, JSON Lines or Parquet, by its suffix; whole or absent."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import gzip
import io
import json
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import polars as pl
import zstandard

from scorer.data.formats import first_line, is_array, written_suffix
from scorer.storage.atomic import check_writable, replacing
from scorer.storage.paths import to_path
from scorer.types import ScorerError


class RecordWriter:
    """Writes raw values to a file, its format by its suffix; the file appears whole when the block ends without error.

    Strings that hold lone surrogates are written as JSON escapes. JSON and JSON Lines are streamed; for Parquet all
    rows are held in memory and framed at the end. Raises ScorerError for a suffix that is not known, a path that
    cannot be written and a value that the format cannot hold; EngineError where the disk is full.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = to_path(path)
        self._suffix = written_suffix(self.path)
        check_writable(self.path)
        self._files = contextlib.ExitStack()
        self._encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_json_value).encode
        self._rows: list[Any] = []  # for Parquet
        self._written = 0
        self._finished = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as files:
            temporary = files.enter_context(replacing(self.path))
            self._stream: BinaryIO = files.enter_context(temporary.open("wb"))
            if self._suffix.endswith(".gz"):  # no time and no name inside: the same records give the same bytes
                packed: Any = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._stream, mtime=0)
                self._stream = cast(BinaryIO, files.enter_context(packed))
            elif self._suffix.endswith(".zst"):
                packed = zstandard.ZstdCompressor(write_checksum=True).stream_writer(self._stream, closefd=False)
                self._stream = cast(BinaryIO, files.enter_context(packed))
            self._files = files.pop_all()
        return self

    def write(self, value: Any, *, text: str | None = None, source: str | None = None) -> None:
        """Write one record: a JSON value, or a Parquet row. Called inside the `with` block.

        text: the value as a line of JSON, which JSON Lines take as it is: a value has neither the digits that a float
        has no room for, nor keys that stand twice. source: where the record is from, to name it in an error.
        """
        record = f"{self.path}: record {self._written if source is None else source}"
        if self._suffix == ".parquet":
            if not isinstance(value, dict):
                raise ScorerError(f"{record} is no object; write to JSON Lines (.jsonl)")
            self._rows.append(value)
        elif text is not None and not is_array(self._suffix):
            self._stream.write(f"{text}\n".encode())
        else:
            before = (",\n" if self._written else "[\n") if is_array(self._suffix) else ""
            after = "" if is_array(self._suffix) else "\n"
            try:
                encoded = before + self._encode(value) + after
            except (TypeError, RecursionError) as error:
                raise ScorerError(f"{record} cannot be JSON ({first_line(error)})") from error
            except ValueError as error:
                why = "it holds a number that is infinite or NaN; mend it there, or write to .parquet"
                raise ScorerError(f"{record} cannot be JSON ({why})") from error
            self._stream.write(encoded.encode("utf-8", "backslashreplace"))  # only lone surrogates cannot be encoded
        self._written += 1

    def finish(self) -> None:
        """Write what ends the file: what can't be framed shows here. Leaving the block does it too."""
        if self._finished:
            return
        self._finished = True
        if self._suffix == ".parquet":
            self._stream.write(_parquet_bytes(self.path, self._rows))
        elif is_array(self._suffix):
            self._stream.write(b"\n]\n" if self._written else b"[]\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is not None:
            return self._files.__exit__(kind, error, trace)
        with self._files:
            self.finish()
        return None


def _json_value(value: Any) -> str:
    """What Parquet can hold and JSON cannot, where text says the same."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise TypeError(f"it holds {type(value).__name__}; leave that column out, or write to .parquet")


def _parquet_bytes(path: Path, rows: list[Any]) -> memoryview:
    unlike = f"{path}: these records do not fit into the columns of one table; write to JSON Lines (.jsonl)"
    buffer = io.BytesIO()
    try:
        frame = pl.from_dicts(rows, infer_schema_length=None) if rows else pl.DataFrame()
        frame.write_parquet(buffer)
    except (pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:  # ValueError: lone surrogates
        raise ScorerError(f"{unlike} ({first_line(error)})") from error
    # Polars makes text of a number in a column of texts, and rounds large integers in a column of fractions.
    if frame.height != len(rows) or not all(map(_same, rows, frame.iter_rows(named=True))):
        raise ScorerError(unlike)
    return buffer.getbuffer()


def _same(value: Any, framed: Any) -> bool:
    """Whether a table holds a value as it was, but for keys that are absent (null there) and whole fractions."""
    if isinstance(value, dict) and isinstance(framed, dict):
        return all(_same(value.get(key), framed[key]) for key in framed) and value.keys() <= framed.keys()
    if isinstance(value, list) and isinstance(framed, list):
        return len(value) == len(framed) and all(map(_same, value, framed))
    alike = type(value) is type(framed) or {type(value), type(framed)} == {int, float}
    return alike and (value == framed or value != value)
