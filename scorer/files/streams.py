"""Streams of bytes: decompressed, or hashed as they are read, and the errors of both."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from scorer.faults import first_line
from scorer.types import EngineError, ScorerError

BUFFER_BYTES = 1 << 16
ZSTD_BYTES = 1 << 11  # read at a time: zeros expand thirty thousand times
# Limits: a few compressed bytes may expand to any number of them, and a binary file may have no line ends.
LINE_BYTES = 256 << 20  # of a line, or of a row of CSV
DOCUMENT_BYTES = 1 << 30  # of a JSON document, which is parsed whole
DAMAGED = "the file is truncated or damaged; fetch or write it again"


def decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    """The content of a file, by the end of its suffix: .gz, .zst or neither."""
    if suffix.endswith(".gz"):
        return io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=file, mode="rb")), BUFFER_BYTES)
    return io.BufferedReader(_ZstdReader(file), BUFFER_BYTES) if suffix.endswith(".zst") else file


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a file that cannot be read into ScorerError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ScorerError(f"{path}: cannot be decompressed ({error}); {DAMAGED}") from error
    except MemoryError as error:
        raise EngineError(f"{path}: this machine has too little memory for it") from error
    except OSError as error:
        raise ScorerError(f"{path}: cannot be read ({error.strerror or first_line(error)}); check the file") from error


def pieces(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream; one that is longer than LINE_BYTES, in pieces of that length."""
    return iter(lambda: stream.readline(LINE_BYTES), b"")


def check_line(path: Path, number: int, size: int) -> None:
    """Raise ScorerError where a line or row, of which `size` bytes are read, has LINE_BYTES or more."""
    if size >= LINE_BYTES:
        raise ScorerError(
            f"{path}: line {number} has {LINE_BYTES >> 20} MiB or more; leave it out, or split the record"
        )


class HashedFile(io.RawIOBase):
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
            data = (self._frame.unused_data if ended and self._frame else b"") or self._file.read(ZSTD_BYTES)
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
