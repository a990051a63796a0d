"""Files in: bytes on disk -> the raw values of their rows (JSON arrays, JSON Lines, Parquet).

Every row of every file gets a record id, whatever is in it. It does not know what a prompt or a response is, nor how
files are written (scorer.data.writer).
JSON Lines is read line by line. Parquet is read some thousand rows at a time, which holds the compressed bytes of one
row group in memory (Polars reads whole column chunks). A JSON array is parsed whole. An object of a store is copied to
the temporary folder while it is read: one input at a time.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import polars as pl
import zstandard

from scorer.data.formats import first_line, is_array, known_suffix
from scorer.storage.paths import exists, is_folder, is_remote, local_copy, object_info, to_path
from scorer.types import RowStatus, ScorerError

BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")  # of either byte order
PARQUET_BATCH_BYTES = 16 << 20  # on disk; every batch decodes its row group from the start, so not too small
PARQUET_BATCH_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One row as it came. `value` is the parsed JSON value or the Parquet row; of a line that is not JSON, its text."""

    record_id: int  # 0-based, over all inputs
    source: str  # "data.jsonl:17" (1-based line) or "data.json[16]", "data.parquet[16]" (0-based row)
    value: Any
    status: RowStatus = RowStatus.OK  # or BAD_JSON
    text: str | None = None  # of a line that is JSON: the line itself, without its end


Rows = Generator[RawRecord, None, int]  # returns the record id after the file's last row
Check = Callable[[Path, Iterator[RawRecord]], None]  # of a file and its rows; raises ScorerError


def read_raw(
    paths: Sequence[str | Path],
    *,
    start: int = 0,
    limit: int | None = None,
    check: Check | None = None,
    counts: Sequence[int] = (),
) -> Iterator[RawRecord]:
    """The rows of all files in order, those with `start <= record_id < limit`.

    Skipped JSON lines are not parsed, skipped Parquet rows not decoded, and a file that is skipped whole is not opened
    where `counts`, of the rows of each of the first files, says so. `check`, where given, is called as each file is
    reached, with an iterator over the file's rows below `limit`, from its first. Raises ScorerError for a file-level
    fault, where a file has more or fewer rows than `counts` says, and where there is no row in all of the files.
    """
    files = [to_path(path) for path in paths]
    for path in files:
        _check_input(path)
    next_id = 0
    for number, path in enumerate(files):
        if limit is not None and next_id >= limit:
            return
        if number < len(counts) and next_id + counts[number] <= start:
            next_id += counts[number]
            continue
        with local_copy(path) as file:
            if check is not None:
                check(path, _read_file(path, file, next_id, next_id, limit))
            rows = _read_file(path, file, next_id, start, limit)
            if number < len(counts):
                rows = _as_counted(path, rows, min(next_id + counts[number], sys.maxsize if limit is None else limit))
            next_id = yield from rows
    if next_id == 0 and limit != 0:
        raise ScorerError(f"{', '.join(map(str, files)) or 'the inputs'}: hold no records; give at least one")


def read_table(path: Path) -> pl.DataFrame:
    """The rows of a file as a table: of CSV, or of any form that `read_raw` reads. Raises ScorerError as it does."""
    read: dict[str, Callable[[], pl.DataFrame]] = {
        ".csv": lambda: pl.read_csv(copy, glob=False, infer_schema_length=None),
        ".parquet": lambda: pl.read_parquet(copy, glob=False, hive_partitioning=False),
    }
    try:
        with local_copy(path) as copy:
            return read.get(path.suffix.lower(), lambda: _frame(path))()
    except (OSError, pl.exceptions.PolarsError, TypeError, ValueError, OverflowError) as error:
        raise ScorerError(f"{path}: can't be read as a table ({first_line(error)})") from error


def _frame(path: Path) -> pl.DataFrame:
    return pl.from_dicts([raw.value for raw in read_raw([path])], infer_schema_length=None)


def _check_input(path: Path) -> dict[str, Any] | None:
    """What the store knows of an object; None of a file."""
    if is_remote(path):
        known_suffix(path)
        return object_info(path)
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
    return None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
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


def _as_counted(path: Path, rows: Rows, end: int) -> Rows:
    """`rows`, of which the last is to be number `end` - 1: no row takes another's number."""
    found = None
    while found is None:
        try:
            raw = next(rows)
            if raw.record_id < end:
                yield raw
            else:
                found = raw.record_id + 1
        except StopIteration as last:
            found = last.value
    if found != end:
        raise ScorerError(f"{path}: changed while it was read; score it again when nothing writes it")
    return end


def _read_file(path: Path, file: Path, first_id: int, start: int, limit: int | None) -> Rows:
    with _reading(path):
        if known_suffix(path) == ".parquet":
            return (yield from _parquet(path, file, first_id, start, limit))
        with _open(file) as stream:
            if stream.read(2) in UTF16_BOMS:
                raise ScorerError(f"{path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
        with _open(file) as stream:
            read = _json_lines if _is_json_lines(stream, known_suffix(path)) else _json_array
        with _open(file) as stream:
            return (yield from read(path, stream, first_id, start, limit))


def _parquet(path: Path, file: Path, first_id: int, start: int, limit: int | None) -> Rows:
    # Slices and not LazyFrame.collect_batches: that one is marked unstable, and with the file in one row group it held
    # twice as much (900,000 rows, 300 MB on disk: 1,130 MiB at the peak against 410).
    frame = pl.scan_parquet(file, glob=False, hive_partitioning=False)
    height: int = frame.select(pl.len()).collect().item()
    end = height if limit is None else min(height, limit - first_id)
    batch = max(1, min(PARQUET_BATCH_ROWS, height * PARQUET_BATCH_BYTES // max(1, file.stat().st_size)))
    for offset in range(max(0, start - first_id), end, batch):
        rows = frame.slice(offset, min(batch, end - offset)).collect(engine="in-memory")
        for row, value in enumerate(rows.iter_rows(named=True), offset):
            yield RawRecord(first_id + row, f"{path}[{row}]", value)
    return first_id + end


def _is_json_lines(stream: BinaryIO, suffix: str) -> bool:
    """Whether the text is one record a line. The content decides: both kinds are found under either suffix."""
    lines = (line.strip() for line in _lines(stream) if line.strip())
    first = next(lines, b"")
    if not first.startswith(b"[") and not is_array(suffix):
        return True
    return next(lines, None) is not None and _parse(first)[1] is RowStatus.OK


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(stream):
        yield line if number else line.removeprefix(BOM)


def _parse(line: bytes) -> tuple[Any, RowStatus, str | None]:
    """Value, status and text of a RawRecord."""
    line = line.rstrip(b"\r\n")
    try:
        text = line.decode("utf-8")
        return json.loads(text), RowStatus.OK, text
    except (ValueError, RecursionError):  # of ValueError: not UTF-8, not JSON, an integer of too many digits
        return line.decode("utf-8", "backslashreplace"), RowStatus.BAD_JSON, None


def _json_lines(path: Path, stream: BinaryIO, first_id: int, start: int, limit: int | None) -> Rows:
    next_id = first_id
    for number, line in enumerate(_lines(stream), 1):
        if limit is not None and next_id >= limit:
            break
        if not line.strip():
            continue
        if next_id >= start:
            yield RawRecord(next_id, f"{path}:{number}", *_parse(line))
        next_id += 1
    return next_id


def _json_array(path: Path, stream: BinaryIO, first_id: int, start: int, limit: int | None) -> Rows:
    data = stream.read().removeprefix(BOM)
    if not data.strip():
        return first_id
    if not data.lstrip().startswith(b"["):
        found = "a JSON object" if data.lstrip().startswith(b"{") else "other text"
        raise ScorerError(f"{path}: {found} where an array is expected; write [record, ...], or one record a line")
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ScorerError(f"{path}: is not UTF-8 at line {line}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ScorerError(
            f"{path}: invalid JSON at {where} ({error.msg}); mend it, or write one record a line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ScorerError(f"{path}: JSON that cannot be read ({first_line(error)}); write one record a line") from error
    end = len(values) if limit is None else min(len(values), limit - first_id)
    for row in range(max(0, start - first_id), end):
        yield RawRecord(first_id + row, f"{path}[{row}]", values[row])
    return first_id + end


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed."""
    if known_suffix(path).endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if known_suffix(path).endswith(".zst"):
        return io.BufferedReader(_ZstdReader(path), 1 << 16)
    return open(path, "rb")


class _ZstdReader(io.RawIOBase):
    """All frames of a Zstandard file. zstandard's own reader ends a truncated frame as if it were whole."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
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

    def close(self) -> None:
        self._file.close()
        super().close()
