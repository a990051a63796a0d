"""Parquet and Arrow files, some thousand rows at a time: each row is a dictionary of Python values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import polars as pl

from scorer.files.kinds import first_line
from scorer.files.raw import FileRows, Found, RawRecord, Rows, first_fit
from scorer.files.streams import DAMAGED
from scorer.types import ScorerError

BATCH_ROWS = 10_000
PARQUET_BATCH_BYTES = 16 << 20  # on disk; every batch decodes its row group from the start, so not too small


class ParquetRows(FileRows):
    """The rows of a Parquet file. The compressed bytes of one row group are in memory."""

    def scan(self, file: BinaryIO, limit: int | None, *, keep: bool) -> Found:
        """Count the rows by the footer."""
        return Found(self._height(), *first_fit(self.rows(0, 0, limit, exact=True), self.source.fits))

    def rows(self, first_id: int, start: int, stop: int | None, *, exact: bool) -> Rows:
        """The rows; those that are skipped are not decoded."""
        # Slices and not LazyFrame.collect_batches: that one is marked unstable, and with the file in one row group it
        # held twice as much (900,000 rows, 300 MB on disk: 1,130 MiB at the peak against 410).
        frame, height = self._frame(), self._height()
        end = height if stop is None else min(height, stop - first_id)
        size = max(1, self.source.local.stat().st_size)
        batch = max(1, min(BATCH_ROWS, height * PARQUET_BATCH_BYTES // size))
        for offset in range(max(0, start - first_id), end, batch):
            rows = frame.slice(offset, min(batch, end - offset)).collect(engine="in-memory")
            for row, value in enumerate(rows.iter_rows(named=True), offset):
                yield RawRecord(first_id + row, f"{self.source.path}[{row}]", value)
        return first_id + end

    def _frame(self) -> pl.LazyFrame:
        return pl.scan_parquet(self.source.local, glob=False, hive_partitioning=False)

    def _height(self) -> int:
        return cast(int, self._frame().select(pl.len()).collect().item())


class ArrowRows(FileRows):
    """The rows of an Arrow IPC file or stream, which is mapped into memory and never read as a whole.

    pyarrow reads the batches, since Polars has no reader of streams by batches; Polars makes Python values of them, as
    it does for Parquet.
    """

    def scan(self, file: BinaryIO, limit: int | None, *, keep: bool) -> Found:
        """Count the rows by the headers of the batches."""
        with self._errors(), ipc_batches(self.source.local) as (_, batches):
            count = sum(batch.num_rows for batch in batches)
        return Found(count, *first_fit(self.rows(0, 0, limit, exact=True), self.source.fits))

    def rows(self, first_id: int, start: int, stop: int | None, *, exact: bool) -> Rows:
        """The rows; those that are skipped are not made Python values."""
        offset, skip = 0, max(0, start - first_id)
        last = None if stop is None else stop - first_id
        with self._errors(), ipc_batches(self.source.local) as (_, batches):
            for batch in batches:
                end = batch.num_rows if last is None else min(batch.num_rows, last - offset)
                for row in range(max(0, skip - offset), end, BATCH_ROWS):
                    part = batch.slice(row, min(BATCH_ROWS, end - row))
                    part.validate(full=True)  # Polars trusts the offsets of texts: false ones would end the process
                    for number, value in enumerate(self._frame(part).iter_rows(named=True), offset + row):
                        yield RawRecord(first_id + number, f"{self.source.path}[{number}]", value)
                offset += end
                if last is not None and offset >= last:
                    break
        return first_id + offset

    def _frame(self, batch: Any) -> pl.DataFrame:
        try:
            return pl.DataFrame(pl.from_arrow(batch, rechunk=False))
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            problem = f"a column has a type that Polars can't read ({first_line(error)[:120]})"
            raise ScorerError(f"{self.source.path}: {problem}; leave it out, or write another type") from error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            problem = f"cannot be read as Arrow ({first_line(error)})"
            raise ScorerError(f"{self.source.path}: {problem}; {DAMAGED}") from error


@contextlib.contextmanager
def ipc_batches(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema and the record batches of an Arrow IPC file or stream, mapped from the disk while the block runs."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            file = pa.ipc.open_file(mapped)
            yield file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            mapped.seek(0)
            stream = pa.ipc.open_stream(mapped)
            yield stream.schema, iter(stream)
