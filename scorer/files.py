"""Files in and out: bytes on disk <-> the raw values of their rows (JSON arrays, JSON Lines, Parquet).

Every row of every file gets a record id, whatever is in it. It does not know what a prompt or a response is.
JSON Lines is read line by line. Parquet is read some thousand rows at a time, which holds the compressed bytes of one
row group in memory (Polars reads whole column chunks). A JSON array is parsed whole.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import polars as pl
import zstandard

from scorer.atomic import replacing
from scorer.types import RowStatus, ScorerError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
COMPRESSIONS = ("", ".gz", ".zst")
SUFFIXES = (*(name + packed for packed in COMPRESSIONS for name in JSON_SUFFIXES), ".parquet")
BOM = b"\xef\xbb\xbf"
PARQUET_BATCH_BYTES = 16 << 20  # on disk; every batch decodes its row group from the start, so not too small
PARQUET_BATCH_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One row as it came. `value` is the parsed JSON value or the Parquet row; of a line that is not JSON, its text."""

    record_id: int  # 0-based, over all inputs
    source: str  # "data.jsonl:17" (1-based line) or "data.json[16]", "data.parquet[16]" (0-based row)
    value: Any
    status: RowStatus = RowStatus.OK  # or BAD_JSON


@dataclass(frozen=True, slots=True)
class InputFile:
    """What tells whether a file is still the same: size in bytes, and SHA-256 of the bytes as they lie on disk."""

    path: str
    size: int
    sha256: str


Rows = Generator[RawRecord, None, int]  # returns the record id after the file's last row


def inspect_input(path: str | Path) -> InputFile:
    """Size and hash of an input file. Raises ScorerError: missing, not a file, unreadable, unknown suffix."""
    _check_input(Path(path))
    with _reading(Path(path)), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return InputFile(str(path), file.tell(), digest)


def read_raw(
    paths: Sequence[str | Path],
    *,
    start: int = 0,
    limit: int | None = None,
    check: Callable[[Path, Iterator[RawRecord]], None] | None = None,
) -> Iterator[RawRecord]:
    """The rows of all files in order, those with `start <= record_id < limit`.

    Skipped JSON lines are not parsed, skipped Parquet rows not decoded. `check`, where given, is called as each file is
    reached, with an iterator over the file's rows below `limit`, from its first. Raises ScorerError for a file-level
    fault, and where there is no row in all of the files.
    """
    files = [Path(path) for path in paths]
    for path in files:
        _check_input(path)
    next_id = 0
    for path in files:
        if limit is not None and next_id >= limit:
            return
        if check is not None:
            check(path, _read_file(path, next_id, next_id, limit))
        next_id = yield from _read_file(path, next_id, start, limit)
    if next_id == 0 and limit != 0:
        raise ScorerError(f"{', '.join(map(str, files)) or 'the inputs'}: hold no records; give at least one")


def count_records(paths: Sequence[str | Path]) -> int:
    """How many rows all files hold (0 if none), without parsing JSON lines. Raises ScorerError as `read_raw` does."""
    next_id = 0
    for path in map(Path, paths):
        _check_input(path)
        rows = _read_file(path, next_id, sys.maxsize, None)
        try:
            next(rows)
        except StopIteration as end:
            next_id = end.value
    return next_id


def _suffix(path: Path) -> str:
    """The known suffix that the name ends with, or ""."""
    return max((s for s in SUFFIXES if path.name.lower().endswith(s)), key=len, default="")


def _is_json(suffix: str) -> bool:
    return suffix.removeprefix(".json") in COMPRESSIONS


def _check_input(path: Path) -> None:
    if path.is_dir():
        raise ScorerError(f"{path}: is a folder; name the files in it")
    if not path.exists():
        raise ScorerError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise ScorerError(f"{path}: is not a regular file; copy the data to one")
    _check_suffix(path)


def _check_suffix(path: Path) -> None:
    if not _suffix(path):
        raise ScorerError(f"{path}: unknown kind of file; rename it to end in one of {', '.join(SUFFIXES)}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a file that cannot be read into ScorerError."""
    damaged = "the file is truncated or damaged; fetch or write it again"
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ScorerError(f"{path}: cannot be decompressed ({error}); {damaged}") from error
    except pl.exceptions.PolarsError as error:
        raise ScorerError(f"{path}: cannot be read as Parquet ({_line(error)}); {damaged}") from error
    except OSError as error:
        raise ScorerError(f"{path}: cannot be read ({error.strerror or _line(error)}); check the file") from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _read_file(path: Path, first_id: int, start: int, limit: int | None) -> Rows:
    with _reading(path):
        if _suffix(path) == ".parquet":
            return (yield from _parquet(path, first_id, start, limit))
        with _open(path) as stream:
            read = _json_lines if _is_json_lines(stream, _suffix(path)) else _json_array
        with _open(path) as stream:
            return (yield from read(path, stream, first_id, start, limit))


def _parquet(path: Path, first_id: int, start: int, limit: int | None) -> Rows:
    # Slices and not LazyFrame.collect_batches: that one is marked unstable, and with the file in one row group it held
    # twice as much (900,000 rows, 300 MB on disk: 1,130 MiB at the peak against 410).
    frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
    height: int = frame.select(pl.len()).collect().item()
    end = height if limit is None else min(height, limit - first_id)
    batch = max(1, min(PARQUET_BATCH_ROWS, height * PARQUET_BATCH_BYTES // max(1, path.stat().st_size)))
    for offset in range(max(0, start - first_id), end, batch):
        rows = frame.slice(offset, min(batch, end - offset)).collect(engine="in-memory")
        for row, value in enumerate(rows.iter_rows(named=True), offset):
            yield RawRecord(first_id + row, f"{path}[{row}]", value)
    return first_id + end


def _is_json_lines(stream: BinaryIO, suffix: str) -> bool:
    """Whether the text is one record a line. The content decides: both kinds are found under either suffix."""
    lines = (line.strip() for line in _lines(stream) if line.strip())
    first = next(lines, b"")
    if not first.startswith(b"[") and not _is_json(suffix):
        return True
    return next(lines, None) is not None and _parse(first)[1] is RowStatus.OK


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    for number, line in enumerate(stream):
        yield line if number else line.removeprefix(BOM)


def _parse(line: bytes) -> tuple[Any, RowStatus]:
    try:
        return json.loads(line.decode("utf-8")), RowStatus.OK
    except (ValueError, RecursionError):  # of ValueError: not UTF-8, not JSON, an integer of too many digits
        return line.rstrip(b"\r\n").decode("utf-8", "backslashreplace"), RowStatus.BAD_JSON


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
        raise ScorerError(f"{path}: JSON that cannot be read ({_line(error)}); write one record a line") from error
    end = len(values) if limit is None else min(len(values), limit - first_id)
    for row in range(max(0, start - first_id), end):
        yield RawRecord(first_id + row, f"{path}[{row}]", values[row])
    return first_id + end


def _open(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed."""
    if _suffix(path).endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if _suffix(path).endswith(".zst"):
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


class RecordWriter:
    """Writes raw values to a file, its format by its suffix; the file appears whole when the block ends without error.

    Strings that hold lone surrogates are written as JSON escapes. JSON and JSON Lines are streamed; for Parquet all
    rows are held in memory and framed at the end. Raises ScorerError for a suffix that is not known, a place that
    cannot be written and a value that the format cannot hold; EngineError where the disk is full.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _check_suffix(self.path)
        if self.path.is_dir():
            raise ScorerError(f"{path}: is a folder; name a file")
        if not self.path.parent.is_dir():
            raise ScorerError(f"{path}: there is no folder {self.path.parent}; create it")
        self._suffix = _suffix(self.path)
        self._files = contextlib.ExitStack()
        self._encode = json.JSONEncoder(ensure_ascii=False, default=_json_value).encode
        self._rows: list[Any] = []  # of Parquet
        self._written = 0

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

    def write(self, value: Any) -> None:
        """Write one record: a JSON value, or a Parquet row. Called inside the `with` block."""
        if self._suffix == ".parquet":
            if not isinstance(value, dict):
                raise ScorerError(f"{self.path}: record {self._written} is no object; write to JSON Lines (.jsonl)")
            self._rows.append(value)
        else:
            before = (",\n" if self._written else "[\n") if _is_json(self._suffix) else ""
            after = "" if _is_json(self._suffix) else "\n"
            try:
                text = before + self._encode(value) + after
            except (TypeError, RecursionError) as error:
                raise ScorerError(f"{self.path}: record {self._written} cannot be JSON ({_line(error)})") from error
            self._stream.write(text.encode("utf-8", "backslashreplace"))  # only lone surrogates cannot be encoded
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is not None:
            return self._files.__exit__(kind, error, trace)
        with self._files:
            if self._suffix == ".parquet":
                self._stream.write(_parquet_bytes(self.path, self._rows))
            elif _is_json(self._suffix):
                self._stream.write(b"\n]\n" if self._written else b"[]\n")
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
        raise ScorerError(f"{unlike} ({_line(error)})") from error
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
