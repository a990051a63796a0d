"""Parquet and Arrow files, some thousand rows at a time: each row is a dictionary of Python values.

pyarrow reads both: it raises for a damaged file, where Polars may end the process or print what went wrong inside it.
"""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from scorer.faults import first_line
from scorer.files.raw import FileRows, Found, RawRecord, Rows, look
from scorer.files.streams import DAMAGED
from scorer.types import EngineError, ScorerError

BATCH_ROWS = 10_000
PYTHON_ROWS = 500  # converted to Python values at a time
PARQUET_BATCH_BYTES = 16 << 20  # on disk

Batches = Iterator[tuple[int, Any]]  # record batches, each with the 0-based position of its first row


class TableRows(FileRows):
    """The rows of a file of columns. Dates, times and decimals are their text, as in JSON that is written of them."""

    kind: ClassVar[str]

    def scan(self, file: BinaryIO, limit: int, *, keep: bool) -> Found:
        """Count the rows by what the file says of its parts."""
        with table_errors(self.path, self.kind):
            found = look(self.rows(0, 0, limit, exact=True), self.fits)._replace(rows=self._height)
        self.file.seek(0)  # `file` reads from there, and the caller hashes it from its start
        return found

    def rows(self, first_id: int, start: int, stop: int, *, exact: bool) -> Rows:
        """The rows; those that are skipped are not made Python values."""
        skip, last = max(0, start - first_id), stop - first_id
        with table_errors(self.path, self.kind):
            for offset, batch in self._batches(skip, last):
                if len(set(batch.schema.names)) < batch.num_columns:
                    twice = Counter(batch.schema.names).most_common(1)[0][0]
                    raise ScorerError(f"{self.path}: two columns have the name '{twice}'; rename one")
                end = min(offset + batch.num_rows, last)
                for row in range(max(skip, offset), end, PYTHON_ROWS):
                    part = batch.slice(row - offset, min(PYTHON_ROWS, end - row))
                    for number, value in enumerate(python_rows(part), row):
                        yield RawRecord(first_id + number, f"{self.name}[{number}]", value)
                if end == last:
                    return stop
            return min(first_id + self._height, stop)

    @cached_property
    @abstractmethod
    def _height(self) -> int:
        """The number of rows."""

    @abstractmethod
    def _batches(self, start: int, stop: int) -> Batches:
        """The batches that hold the rows from `start` to `stop`, and maybe more."""


class ParquetRows(TableRows):
    """The rows of a Parquet file. The compressed bytes of one row group are in memory."""

    kind = "Parquet"

    @cached_property
    def _height(self) -> int:
        with parquet_file(self.file) as file:
            return sum(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))

    def _batches(self, start: int, stop: int) -> Batches:
        size = max(1, os.fstat(self.file.fileno()).st_size)
        with parquet_file(self.file) as file:
            most = max(1, min(BATCH_ROWS, file.metadata.num_rows * PARQUET_BATCH_BYTES // size))
            yield from parquet_batches(file, most, lambda first, end: first < stop and end > start)


class ArrowRows(TableRows):
    """The rows of an Arrow IPC file or stream. One record batch is in memory."""

    kind = "Arrow"

    @cached_property
    def _height(self) -> int:
        return sum(batch.num_rows for _, batch in ipc_batches(self.file)[1])

    def _batches(self, start: int, stop: int) -> Batches:
        return ipc_batches(self.file)[1]


def python_rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a record batch. A column is left out whose type, or whose values, Python can't hold.

    Raises pyarrow.ArrowInvalid for values that are not of their type, such as texts that are not UTF-8.
    """
    import pyarrow as pa

    from scorer.files.arrow_types import read_type
    from scorer.files.decoded import decoded

    batch = decoded(batch)
    columns = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        # ScorerError: there is no such type. ArrowException: a time zone that is not known here, for example.
        with contextlib.suppress(ScorerError, pa.ArrowException):
            columns[field.name] = column.cast(read_type(field.name, field.type)).to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] or [
        {} for _ in range(batch.num_rows)
    ]


@contextlib.contextmanager
def table_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises for a file of a kind into ScorerError, which names the file."""
    try:
        yield
    except ScorerError:
        raise
    except MemoryError as error:
        raise EngineError(f"{path}: this machine has too little memory for it ({first_line(error)})") from error
    except NotImplementedError as error:
        raise ScorerError(f"{path}: a column has a type that can't be selected from ({first_line(error)})") from error
    except Exception as error:  # of a damaged file pyarrow raises errors of any class
        raise ScorerError(f"{path}: cannot be read as {kind} ({first_line(error)}); {DAMAGED}") from error


def parquet_file(file: BinaryIO | Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, for a `with` block. A file that is open already stays open."""
    import pyarrow.parquet as pq

    # pre_buffer would read ahead in threads, which abort a process that ends while they do.
    return pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)


def parquet_batches(file: Any, most: int, wanted: Callable[[int, int], bool]) -> Batches:
    """The batches, of `most` rows at most, of the row groups of a Parquet file for whose bounds `wanted` is true."""
    end = 0
    for group in range(file.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        if wanted(start, end):
            for batch in file.iter_batches(most, row_groups=[group], use_threads=False):
                yield start, batch
                start += batch.num_rows
            if start != end:
                raise EOFError(f"row group {group} has {end - start:,} rows less than its footer says")


def ipc_batches(file: BinaryIO) -> tuple[Any, Batches]:
    """The schema and the batches of an Arrow IPC file or stream."""
    import pyarrow as pa

    # A file of pyarrow's own: it reads one of Python's in threads, which abort a process that ends while they do.
    source = pa.OSFile(f"/dev/fd/{file.fileno()}")
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)

    def batches() -> Batches:
        start = 0
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            yield start, batch
            start += batch.num_rows

    return reader.schema, batches()
