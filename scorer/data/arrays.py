"""The elements of a JSON array with the text of each, so that numbers and keys can be written as they came."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from scorer.data.reader import RawRecord
from scorer.storage.paths import local_copy
from scorer.types import RowStatus

BETWEEN = re.compile(r"[ \t\r\n,]*")  # the reader has found the array to be valid
LINE_END = re.compile(r"[ \t]*[\r\n][ \t\r\n]*")  # never inside a string, where JSON has escapes for them


def array_rows(path: Path, first_id: int = 0) -> Iterator[RawRecord]:
    """The elements of the JSON array that a file holds, with their texts on one line as `line`.

    The file is one that scorer.data.reader reads as an array. Its text is held in memory, but one value at a time.
    """
    with local_copy(path) as copy:
        text = _unpacked(copy).decode("utf-8-sig")
    decoder, row = json.JSONDecoder(), 0
    at = text.find("[") + 1
    while at and (at := BETWEEN.match(text, at).end()) < len(text) and text[at] != "]":  # type: ignore[union-attr]
        value, end = decoder.raw_decode(text, at)
        line = LINE_END.sub(" ", text[at:end]).encode()
        yield RawRecord(first_id + row, f"{path}[{row}]", value, RowStatus.OK, line)
        at, row = end, row + 1


def _unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        return gzip.decompress(data)
    if path.name.lower().endswith(".zst"):
        packed: Any = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        with packed.stream_reader(data, read_across_frames=True) as stream:
            return bytes(stream.read())
    return data
