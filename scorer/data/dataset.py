"""The inputs of a run as one sequence of records: what identifies each file, how many rows it has, and its rows.

Each file is opened once and hashed, counted and checked in one pass; reading its rows later uses the same open file,
the same copy of an object, and the same parse of a JSON document.
"""

from __future__ import annotations

import hashlib
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from scorer.config import Reading
from scorer.data.columns import fits_format, unknown_format
from scorer.data.records import to_record
from scorer.files.kinds import known_suffix
from scorer.files.raw import RawRecord, Rows
from scorer.files.reader import InputReader, check_input
from scorer.files.streams import read_errors
from scorer.storage.paths import absolute, is_remote, object_info, to_path
from scorer.types import Record, ScorerError

# Files that one dataset keeps open, of those that a process may; the first is closed for another, and reopened to read.
OPEN_FILES = max(1, min(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
KEPT_ARRAY_BYTES = 256 << 20  # on disk; documents up to it (five times that in memory) stay parsed until they are read


@dataclass(frozen=True, slots=True)
class InputFile:
    """What tells whether a file is still the same: its size in bytes, and the SHA-256 of its bytes.

    An object is not read for it: it has the ETag that its store gives to each content. `modified_ns` is the time of the
    file's last change; while it and the size stay the same, the file is not hashed again.
    """

    path: str
    size: int
    sha256: str | None = None
    etag: str | None = None
    modified_ns: int | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What stays the same wherever a copy of the file lies."""
        return {"size": self.size} | ({"etag": self.etag} if self.etag else {"sha256": self.sha256})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        modified = {} if self.modified_ns is None else {"modified_ns": self.modified_ns}
        return {"path": self.path} | self.identity | modified


def inspect_input(path: str | Path, known: InputFile | None = None) -> InputFile:
    """What identifies an input file now. `known` where path, size and modification time are its own: no second hash.

    Raises ScorerError as `check_input` does, and where the file can't be read.
    """
    where = to_path(path)
    found = _stat(where)
    if found.etag:
        return found
    if known is not None and replace(known, sha256=None) == found:
        return known
    with read_errors(where), open(where, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return replace(found, size=file.tell(), sha256=digest)


def input_size(path: str | Path) -> int:
    """The bytes of an input file, which is not read. Raises ScorerError as `check_input` does."""
    return _stat(to_path(path)).size


def _stat(path: Path) -> InputFile:
    """What is known of a file without reading it. Raises ScorerError as `check_input` does."""
    if is_remote(path):
        known_suffix(path)
        info = object_info(path)
        return InputFile(absolute(path), info["size"], etag=info["ETag"].strip('"'))
    check_input(path)
    with read_errors(path):
        status = path.stat()
        return InputFile(absolute(path), status.st_size, modified_ns=status.st_mtime_ns)


class Dataset:
    """The files `paths`, read in order as one sequence of rows, up to `limit` of them.

    reading: how rows are read as samples. inputs, counts: what `inspect` found earlier. A path that can't be an input
    raises ScorerError at once.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        reading: Reading | None = None,
        limit: int | None = None,
        inputs: Sequence[InputFile] = (),
        counts: Sequence[int] = (),
    ):
        self._paths = [to_path(path) for path in paths]
        self.paths = list(map(str, paths))
        self.reading, self.limit = reading or Reading(), limit
        self._end = sys.maxsize if limit is None else limit
        self.inputs, self.counts = tuple(inputs), tuple(counts)
        self._readers: dict[int, InputReader] = {}
        for path in self._paths:
            check_input(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; reading opens them again."""
        while self._readers:
            self._readers.popitem()[1].close()

    def inspect(self, known: Sequence[InputFile] = (), counts: Sequence[int] = ()) -> None:
        """Find out `inputs`, and `counts` in the same pass, except of files that an earlier run of the data counted.

        known: the files of that run, which are not hashed again while they are unchanged. Raises ScorerError for a file
        that scoring would fail on later, and where there are no rows.
        """
        before = {entry.path: entry for entry in known}
        self.inputs, self.counts = (), tuple(counts)
        kept = 0  # bytes on disk of JSON documents that are held
        for number, path in enumerate(self._paths):
            left = self._end - sum(self.counts)
            if number < len(counts) or left <= 0:
                self.inputs += (inspect_input(path, before.get(absolute(path))),)
                continue
            found = _stat(path)
            kept += found.size
            scan = self._reader(number).scan(left, keep=kept <= KEPT_ARRAY_BYTES)
            if scan.first is not None and not scan.fits:
                raise unknown_format(path, scan.first, self.reading)
            self.inputs += (found if found.etag else replace(found, size=scan.size, sha256=scan.sha256),)
            self.counts += (scan.rows,)
        if not sum(self.counts):
            raise ScorerError(f"{', '.join(self.paths)}: there are no records to score")

    @property
    def height(self) -> int:
        """How many rows there are, up to the limit, by `counts`."""
        return min(sum(self.counts), self._end)

    def check_unchanged(self) -> None:
        """Raise ScorerError for the first file that is not what `inputs` says."""
        for entry in self.inputs:
            if inspect_input(entry.path, entry).identity != entry.identity:
                raise ScorerError(f"{entry.path} changed since it was scored: score it again")

    def rows(self, start: int = 0, stop: int | None = None, *, exact: bool = True) -> Iterator[RawRecord]:
        """The rows with `start <= record_id < stop` and below the limit, in order.

        Unless `exact`, integers of more than 64 bits may become floats. Rows that are skipped are not parsed, and a
        file of which `counts` says that all are skipped is not opened. Raises ScorerError where a file can't be read,
        where it has more or fewer rows than `counts` says, and where there is no row in all of the files.
        """
        stop = self._end if stop is None else min(stop, self._end)
        next_id = 0
        for number, path in enumerate(self._paths):
            if next_id >= stop:
                return
            count = self.counts[number] if number < len(self.counts) else None
            if count is not None and next_id + count <= start:
                next_id += count
                continue
            rows = self._reader(number).rows(next_id, start, stop, exact=exact)
            if count is not None:
                rows = _as_counted(path, rows, min(next_id + count, stop))
            next_id = yield from rows
        if next_id == 0 and stop:
            raise ScorerError(f"{', '.join(self.paths) or 'the inputs'}: hold no records; give at least one")

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The records of `rows`: see `scorer.data.records.to_record`."""
        return (to_record(raw, self.reading) for raw in self.rows(start, stop, exact=False))

    def _reader(self, number: int) -> InputReader:
        readers = self._readers
        if number not in readers:
            # Copies of objects may take half of the space that was free in the temporary folder.
            while len(readers) == OPEN_FILES or sum(each.copied_bytes for each in readers.values()) > _free_bytes():
                readers.pop(next(iter(readers))).close()
            fits, records_at = fits_format(self.reading), self.reading.records_at
            readers[number] = InputReader(self._paths[number], fits=fits, records_at=records_at)
        return readers[number]


def _free_bytes() -> int:
    return shutil.disk_usage(tempfile.gettempdir()).free


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
