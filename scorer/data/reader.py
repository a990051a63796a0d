"""One input file -> the raw values of its rows: a JSON array, JSON Lines or Parquet, plain or compressed.

Every row gets a record id, whatever is in it. Several files together are scorer.data.dataset's; what a prompt or a
response is, scorer.data.records'.

JSON Lines is read line by line. Parquet is read some thousand rows at a time, which holds the compressed bytes of one
row group in memory (Polars reads whole column chunks). A JSON array is parsed whole. An object of a store is copied to
the temporary folder for as long as its reader is open.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import orjson
import polars as pl
import zstandard

from scorer.data.formats import first_line, is_array, known_suffix
from scorer.storage.paths import exists, is_folder, is_remote, local_copy, object_info
from scorer.types import RowStatus, ScorerError

BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")  # little and big endian
BUFFER_BYTES = 1 << 16
PARQUET_BATCH_BYTES = 16 << 20  # on disk; every batch decodes its row group from the start, so not too small
PARQUET_BATCH_ROWS = 10_000


class RawRecord(NamedTuple):
    """One row as it came. `value` is the parsed JSON value or the Parquet row; of a line that is not JSON, its text."""

    record_id: int  # 0-based, over all inputs
    source: str  # "data.jsonl:17" (1-based line) or "data.json[16]", "data.parquet[16]" (0-based row)
    value: Any
    status: RowStatus = RowStatus.OK  # or BAD_JSON
    line: bytes | None = None  # where it is JSON; without its end

    @property
    def text(self) -> str | None:
        """The line that was read, None where there was none or it is not JSON."""
        return None if self.line is None else self.line.decode()


_Parsed = tuple[Any, RowStatus, bytes | None]  # value, status and line of a RawRecord
Rows = Generator[RawRecord, None, int]  # returns the record id after the file's last row


class Scan(NamedTuple):
    """What one pass over a file finds: its size in bytes, its SHA-256, its rows, the first, and whether one fits."""

    size: int
    sha256: str
    rows: int
    first: RawRecord | None
    fits: bool


class InputReader:
    """One input file, opened once, whose rows can be read any number of times.

    Raises ScorerError where the file can't be read, here and in every method.
    """

    def __init__(self, path: Path):
        self.path, self._suffix = path, known_suffix(path)
        self._values: list[Any] | None = None  # a scanned array, until it is read
        with contextlib.ExitStack() as files, read_errors(path):
            self._local = files.enter_context(local_copy(path))
            self._file: BinaryIO = files.enter_context(open(self._local, "rb", buffering=BUFFER_BYTES))
            self._files = files.pop_all()
        self.copied_bytes = self._local.stat().st_size if is_remote(path) else 0  # in the temporary folder

    def close(self) -> None:
        """Close the file, and remove the copy of an object."""
        self._values = None
        self._files.close()

    def scan(self, fits: Callable[[RawRecord], bool], limit: int | None, *, keep: bool) -> Scan:
        """Hash and count the file in one pass, and look for one of its first `limit` rows that `fits`.

        Lines are parsed until one fits, then counted only. keep: hold a parsed JSON array until it is read.
        """
        first, found, count = None, False, 0
        with read_errors(self.path):
            self._file.seek(0)
            hashed = _HashedFile(self._file)
            file = io.BufferedReader(hashed, BUFFER_BYTES)
            if self._suffix == ".parquet":
                count = self._height()
                rows: Iterable[RawRecord] = self.rows(0, 0, limit)
            else:
                is_lines, head, stream = self._sniff(file)
                if is_lines:
                    for number, line in _numbered(chain(head, stream)):
                        if not found and (limit is None or count < limit):
                            raw = RawRecord(count, f"{self.path}:{number}", *_parse_fast(line))
                            first, found = first or raw, fits(raw)
                        count += 1
                    rows = ()
                else:
                    values = self._array(head, stream)
                    count = len(values)
                    rows = self._array_rows(values, 0, 0, limit)
                    self._values = values if keep else None
            while file.read(BUFFER_BYTES):
                pass
            for raw in rows:
                first, found = first or raw, fits(raw)
                if found:
                    break
        return Scan(hashed.size, hashed.sha256.hexdigest(), count, first, found)

    def rows(self, first_id: int = 0, start: int = 0, stop: int | None = None, *, exact: bool = True) -> Rows:
        """The rows with `start <= record_id < stop`, where the file's first row has `first_id`.

        Lines that are skipped are not parsed, and rows of Parquet not decoded. Unless `exact`, lines are parsed faster,
        and integers of more than 64 bits may become floats.
        """
        with read_errors(self.path):
            if self._suffix == ".parquet":
                return (yield from self._parquet_rows(first_id, start, stop))
            if (values := self._values) is None:
                self._file.seek(0)
                is_lines, head, stream = self._sniff(self._file)
                if is_lines:
                    parsed = self._line_rows(
                        chain(head, stream), first_id, start, stop, _parse if exact else _parse_fast
                    )
                    return (yield from parsed)
                values = self._array(head, stream)
            self._values = None
            return (yield from self._array_rows(values, first_id, start, stop))

    def _sniff(self, file: BinaryIO) -> tuple[bool, list[bytes], Iterator[bytes]]:
        """Whether a JSON file has one record a line, the lines that were read to tell, and the rest, decompressed.

        The content decides: arrays and lines are found under either suffix.
        """
        stream = self._decompressed(file)
        head: list[bytes] = []
        filled: list[bytes] = []
        for line in stream:
            if not head and line[:2] in UTF16_BOMS:
                raise ScorerError(f"{self.path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            head.append(line if head else line.removeprefix(BOM))
            if not (text := head[-1].strip()):
                continue
            filled.append(text)
            if not is_array(self._suffix) and not filled[0].startswith(b"["):
                return True, head, stream
            if len(filled) == 2:
                return _parse_fast(filled[0])[1] is RowStatus.OK, head, stream
        return False, head, stream

    def _decompressed(self, file: BinaryIO) -> BinaryIO:
        if self._suffix.endswith(".gz"):
            return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=file, mode="rb")), BUFFER_BYTES)
        return io.BufferedReader(_ZstdReader(file), BUFFER_BYTES) if self._suffix.endswith(".zst") else file

    def _line_rows(
        self, lines: Iterable[bytes], first_id: int, start: int, stop: int | None, parse: Callable[[bytes], _Parsed]
    ) -> Rows:
        next_id, name = first_id, str(self.path)
        for number, line in _numbered(lines):
            if stop is not None and next_id >= stop:
                break
            if next_id >= start:
                yield RawRecord(next_id, f"{name}:{number}", *parse(line))
            next_id += 1
        return next_id

    def _array_rows(self, values: list[Any], first_id: int, start: int, stop: int | None) -> Rows:
        end = len(values) if stop is None else min(len(values), stop - first_id)
        for row in range(max(0, start - first_id), end):
            yield RawRecord(first_id + row, f"{self.path}[{row}]", values[row])
        return first_id + end

    def _array(self, head: list[bytes], stream: Iterator[bytes]) -> list[Any]:
        data = b"".join((*head, *stream))
        if not data.strip():
            return []
        if not data.lstrip().startswith(b"["):
            found = "a JSON object" if data.lstrip().startswith(b"{") else "other text"
            problem = f"{found} where an array is expected"
            raise ScorerError(f"{self.path}: {problem}; write [record, ...], or one record a line")
        try:
            return cast(list[Any], json.loads(data.decode("utf-8")))
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ScorerError(f"{self.path}: is not UTF-8 at line {line}; save it as UTF-8") from error
        except json.JSONDecodeError as error:
            problem, advice = f"line {error.lineno}, column {error.colno} ({error.msg})", "mend it, or write"
            raise ScorerError(f"{self.path}: invalid JSON at {problem}; {advice} one record a line") from error
        except (ValueError, RecursionError) as error:
            problem = first_line(error)
            raise ScorerError(f"{self.path}: JSON that cannot be read ({problem}); write one record a line") from error

    def _frame(self) -> pl.LazyFrame:
        return pl.scan_parquet(self._local, glob=False, hive_partitioning=False)

    def _height(self) -> int:
        return cast(int, self._frame().select(pl.len()).collect().item())

    def _parquet_rows(self, first_id: int, start: int, stop: int | None) -> Rows:
        # Slices and not LazyFrame.collect_batches: that one is marked unstable, and with the file in one row group it
        # held twice as much (900,000 rows, 300 MB on disk: 1,130 MiB at the peak against 410).
        frame, height = self._frame(), self._height()
        end = height if stop is None else min(height, stop - first_id)
        size = max(1, self._local.stat().st_size)
        batch = max(1, min(PARQUET_BATCH_ROWS, height * PARQUET_BATCH_BYTES // size))
        for offset in range(max(0, start - first_id), end, batch):
            rows = frame.slice(offset, min(batch, end - offset)).collect(engine="in-memory")
            for row, value in enumerate(rows.iter_rows(named=True), offset):
                yield RawRecord(first_id + row, f"{self.path}[{row}]", value)
        return first_id + end


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
    """The rows of a file as a table: CSV, or any format of InputReader. Raises ScorerError where it can't be read."""
    read: dict[str, Callable[[], pl.DataFrame]] = {
        ".csv": lambda: pl.read_csv(copy, glob=False, infer_schema_length=None),
        ".parquet": lambda: pl.read_parquet(copy, glob=False, hive_partitioning=False),
    }
    try:
        if path.suffix.lower() not in read:
            check_input(path)
            with contextlib.closing(InputReader(path)) as reader:
                return pl.from_dicts([raw.value for raw in reader.rows()], infer_schema_length=None)
        with local_copy(path) as copy:
            return read[path.suffix.lower()]()
    except (OSError, pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        raise ScorerError(f"{path}: can't be read as a table ({first_line(error)})") from error


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a file that cannot be read into ScorerError."""
    damaged = "the file is truncated or damaged; fetch or write it again"
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ScorerError(f"{path}: cannot be decompressed ({error}); {damaged}") from error
    except pl.exceptions.PolarsError as error:
        raise ScorerError(f"{path}: cannot be read as Parquet ({first_line(error)}); {damaged}") from error
    except OSError as error:
        raise ScorerError(f"{path}: cannot be read ({error.strerror or first_line(error)}); check the file") from error


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their 1-based numbers."""
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _parse(line: bytes) -> _Parsed:
    line = line.rstrip(b"\r\n")
    try:
        return json.loads(line.decode("utf-8")), RowStatus.OK, line
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, an integer of too many digits
        return line.decode("utf-8", "backslashreplace"), RowStatus.BAD_JSON, None


def _parse_fast(line: bytes) -> _Parsed:
    """The same, but an integer of more than 64 bits becomes a float."""
    try:
        return orjson.loads(line), RowStatus.OK, line.rstrip(b"\r\n")
    except ValueError:  # json takes more: NaN, infinity, lone surrogates
        return _parse(line)


class _HashedFile(io.RawIOBase):
    """Reads a file from where it is, and hashes each byte."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256, self.size = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self.sha256.update(memoryview(buffer)[:count])
        self.size += count
        return count


class _ZstdReader(io.RawIOBase):
    """All frames of a Zstandard file. zstandard's own reader ends a truncated frame as if it were whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            ended = self._frame is None or self._frame.eof
            data = (self._frame.unused_data if ended and self._frame else b"") or self._file.read(1 << 14)
            if not data and not ended:
                raise EOFError("the last Zstandard frame is not whole")
            if not data:
                return 0
            if ended:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
