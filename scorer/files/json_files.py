"""JSON Lines, read line by line, and JSON documents, parsed whole: an array, an object around one, or objects in a row.

The content decides which of them a file is, whatever its suffix.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, cast

import orjson

from scorer.faults import first_line
from scorer.files import json_texts
from scorer.files.kinds import check_signature, is_array
from scorer.files.raw import FileRows, Found, RawRecord, Rows, count_and_look, look, rows_of
from scorer.files.streams import DOCUMENT_BYTES, LINE_BYTES, check_line, decompressed, pieces
from scorer.types import RowStatus, ScorerError

BOM = b"\xef\xbb\xbf"
BLANK_LINES = 1 << 20  # at most, before the first that is not blank: they are held in memory

TOO_DEEP = f"it nests deeper than {json_texts.MAX_DEPTH} levels"
Parsers = tuple[Callable[[bytes], Any], ...]  # each raises ValueError


class JsonRows(FileRows):
    """The lines of a JSON Lines file that are not blank, or the records of a JSON document."""

    _values: list[Any] | None = None  # of a scanned document, until they are read

    def scan(self, file: BinaryIO, limit: int, *, keep: bool) -> Found:
        """Count the records. Lines are parsed until one fits, then counted only."""
        is_lines, stream = self._sniff(file)
        if is_lines:
            return count_and_look(self._numbered(stream), partial(self._line_row, FAST), limit, self.fits)
        values = self._document(stream)
        self._values = values if keep else None
        return look(self._value_rows(values, 0, 0, limit), self.fits)._replace(rows=len(values))

    def rows(self, first_id: int, start: int, stop: int, *, exact: bool) -> Rows:
        """The records, with `line` if `exact`; unless so, lines are parsed faster."""
        values, self._values = self._values, None
        if values is None or exact:
            self.file.seek(0)
            is_lines, stream = self._sniff(self.file)
            if is_lines:
                to_row = partial(self._line_row, EXACT if exact else FAST)
                return rows_of(self._numbered(stream), to_row, first_id, start, stop)
            if exact:
                return self._text_rows(self._text(stream), first_id, start, stop)
            values = self._document(stream)
        return self._value_rows(values, first_id, start, stop)

    def _sniff(self, file: BinaryIO) -> tuple[bool, Iterator[bytes]]:
        """Whether the file has one record a line, and its decompressed `pieces`."""
        stream = pieces(decompressed(file, self.suffix))
        head: list[bytes] = []
        filled: list[bytes] = []
        for line in stream:
            if not head:
                check_signature(self.path, "", line)
            head.append(line if head else line.removeprefix(BOM))
            if not (text := head[-1].strip()):
                if len(head) > BLANK_LINES or len(line) > DOCUMENT_BYTES >> 3:
                    raise ScorerError(f"{self.path}: is blank up to line {len(head):,}; write it again")
                continue
            if not filled and is_array(self.suffix):
                self._check_start(text)
            filled.append(text)
            if self.records_at is not None:
                break
            if len(line) == LINE_BYTES and text.startswith(b"["):
                break  # longer than any record
            # An object that is alone on its line is not opened there: `{` by itself begins a document.
            if not is_array(self.suffix) and not filled[0].startswith(b"[") and filled[0] != b"{":
                return True, chain(head, stream)
            if len(filled) == 2:
                return _parse(filled[0], FAST)[1] is RowStatus.OK, chain(head, stream)
        return False, chain(head, stream)

    def _numbered(self, lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, with their 1-based numbers."""
        for number, line in enumerate(lines, 1):
            check_line(self.path, number, len(line))
            if line.strip():
                yield number, line

    def _line_row(self, parsers: Parsers, record_id: int, numbered: tuple[int, bytes]) -> RawRecord:
        return RawRecord(record_id, f"{self.name}:{numbered[0]}", *_parse(numbered[1], parsers))

    def _value_rows(self, values: list[Any], first_id: int, start: int, stop: int) -> Rows:
        end = min(len(values), stop - first_id)
        for row in range(max(0, start - first_id), end):
            yield RawRecord(first_id + row, f"{self.name}[{row}]", values[row])
        return first_id + end

    def _text_rows(self, text: str, first_id: int, start: int, stop: int) -> Rows:
        def to_row(record_id: int, element: json_texts.Element) -> RawRecord:
            source = f"{self.name}[{record_id - first_id}]"
            return RawRecord(record_id, source, element[0], RowStatus.OK, element[1].encode())

        with self._errors():
            return (yield from rows_of(self._elements(text), to_row, first_id, start, stop))

    def _elements(self, text: str) -> Iterable[json_texts.Element]:
        if not text:
            return ()
        if text.lstrip().startswith("[") and self.records_at is None:
            return json_texts.elements(text)
        keys = self._keys([value for value, _ in json_texts.values(text)])
        return json_texts.values(text) if keys is None else json_texts.elements(text, keys)

    def _document(self, stream: Iterator[bytes]) -> list[Any]:
        """The records of a document, which is parsed whole."""
        if not (text := self._text(stream)):
            return []
        with self._errors():
            values = [value for value, _ in json_texts.values(text)]
        found: Any = values if (keys := self._keys(values)) is None else values[0]
        for key in keys or ():
            found = found[key]
        return cast(list[Any], found)

    def _check_start(self, text: bytes) -> None:
        if not text.startswith((b"[", b"{")):
            line = text.partition(b"\n")[0][:60].decode("utf-8", "replace").strip()
            raise ScorerError(
                f"{self.path}: is not JSON: it starts with {line!r}; write [record, ...] or one record a line, "
                "or name it .csv if it is CSV"
            )

    def _text(self, stream: Iterator[bytes]) -> str:
        """The text of a document; "" where it is blank."""
        held, size = [], 0
        for piece in stream:
            held.append(piece)
            size += len(piece)
            if size > DOCUMENT_BYTES:
                line = 1 + sum(piece.count(b"\n") for piece in held)
                most = f"it is over {DOCUMENT_BYTES >> 20:,} MiB, the limit of a JSON document, in line {line:,}"
                raise ScorerError(f"{self.path}: {most}; write one record a line")
        data = b"".join(held)
        if not data.strip():
            return ""
        self._check_start(data.lstrip())
        if json_texts.too_deep(data):
            raise ScorerError(f"{self.path}: JSON that cannot be read ({TOO_DEEP}); write one record a line")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            number = data.count(b"\n", 0, error.start) + 1
            raise ScorerError(f"{self.path}: is not UTF-8 at line {number}; save it as UTF-8") from error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except json.JSONDecodeError as error:
            invalid = f"invalid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
            raise ScorerError(f"{self.path}: {invalid}; mend it, or write one record a line") from error
        except ValueError as error:  # such as an integer of more digits than Python reads
            problem = f"JSON that cannot be read ({first_line(error)})"
            raise ScorerError(f"{self.path}: {problem}; write one record a line") from error

    def _keys(self, values: list[Any]) -> tuple[str, ...] | None:
        """The keys at which the first value of a document holds the records: none where it is the array itself.

        None where the values, one at least, are the records.
        """
        path, at = self.path, self.records_at
        if len(values) > 1 or not isinstance(values[0], dict):
            if at is not None:
                what = "several JSON values" if len(values) > 1 else "an array, not an object around one"
                raise ScorerError(f"{path}: holds {what}: leave out --records-at {at}")
            if len(values) > 1 and not all(isinstance(value, dict) for value in values):
                raise ScorerError(f"{path}: holds several JSON values that are not all objects; write one array")
            return () if isinstance(values[0], list) else None
        return self._keys_in(values[0]) if at is None else self._keys_at(values[0], at)

    def _keys_in(self, document: dict[str, Any]) -> tuple[str, ...] | None:
        """The one key of an object that holds a list of objects; None where the object itself is a sample."""
        path, found = self.path, dict(_lists(document))

        def fits(row: dict[str, Any]) -> bool:
            return self.fits(RawRecord(0, "", row))

        top = [name for name in found if name in document]
        samples = [name for name in top if any(map(fits, found[name]))]
        if len(samples) == 1:  # so the object is a sample only if it is one even without that list
            rest = {key: value for key, value in document.items() if key != samples[0]}
            return None if fits(rest) else (samples[0],)
        if not samples and fits(document):
            return None
        if not found:
            if any(isinstance(value, str) for value in document.values()):
                return None  # of a format that is not known, unless the user names its columns
            raise ScorerError(f"{path}: an object without records: no list of objects is in it; write [record, ...]")
        if len(top) != 1:
            where, one = ", ".join(found), next(iter(found))
            raise ScorerError(f"{path}: an object with lists of records at {where}: choose one, --records-at {one}")
        return (top[0],)

    def _keys_at(self, document: dict[str, Any], key: str) -> tuple[str, ...]:
        """The keys of a list in an object: `key`, or the parts of "a.b" inside one another."""
        keys = (key,) if key in document else tuple(key.split("."))
        found: Any = document
        for part in keys:
            found = found.get(part) if isinstance(found, dict) else None
        if not isinstance(found, list):
            known = ", ".join(dict(_lists(document))) or "nowhere"
            raise ScorerError(f"{self.path}: --records-at {key}: no list is there; lists of objects are at: {known}")
        return keys


def _lists(document: dict[str, Any], before: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The lists of objects in an object and in the objects inside it, by their dotted keys; no empty ones."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _lists(value, f"{before}{key}.")
        elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield before + key, value


def _exact(line: bytes) -> Any:
    return json.loads(line.decode("utf-8"))


EXACT: Parsers = (_exact, orjson.loads)
FAST: Parsers = (orjson.loads, _exact)


def _parse(line: bytes, parsers: Parsers) -> tuple[Any, RowStatus, bytes | None]:
    """The value, the status and the line of a RawRecord; it is JSON if either parser reads it, whichever is the first.

    json reads NaN, infinities and lone surrogates too; orjson is faster, and makes floats of integers of over 64 bits.
    """
    line = line.rstrip(b"\r\n")
    if not json_texts.too_deep(line):
        for parse in parsers:
            try:  # not `suppress`, which takes longer than parsing
                return parse(line), RowStatus.OK, line
            except ValueError:  # no JSON, not UTF-8, an integer of too many digits
                continue
    return line.decode("utf-8", "backslashreplace"), RowStatus.BAD_JSON, None
