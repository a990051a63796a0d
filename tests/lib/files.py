"""Names of every kind of file that holds JSON or a table, and rows to write into them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scorer.files.writer import RecordWriter

JSON_NAMES = [f"data{kind}{packed}" for kind in (".json", ".jsonl", ".ndjson") for packed in ("", ".gz", ".zst")]
NAMES = [*JSON_NAMES, "data.parquet"]
ROWS = [{"instruction": f"q{i}", "input": None, "output": "é🙂\x00 ‏ש" * i, "tags": [i]} for i in range(10)]


def write(path: Path, rows: Iterable[Any]) -> Path:
    with RecordWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return path
