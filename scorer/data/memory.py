"""Data that is in memory: a list of rows, a Hugging Face dataset, a pandas or Polars frame, an Arrow table -> a file.

Scoring reads it as any other file, so a run of it is resumed and selected from like one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scorer.types import ScorerError

BATCH_ROWS = 10_000  # the same content gives the same file, however it was in batches before


def is_in_memory(data: Any) -> bool:
    """Whether data is rows or a table, and not paths."""
    if isinstance(data, str | Path) or data is None:
        return False
    if isinstance(data, list | tuple):
        return bool(data) and not all(isinstance(item, str | Path) for item in data)
    return _is_table(data) or isinstance(data, Iterable)


def suffix_of(data: Any) -> str:
    """The suffix of the file that `write` makes of data in memory."""
    return ".arrow" if _is_table(data) else ".jsonl"


def write(data: Any, path: Path) -> None:
    """Write data in memory to a file. Raises ScorerError where a row can't be written, naming it."""
    if _is_table(data):
        _write_arrow(data, path)
        return
    from scorer.data.writer import RecordWriter

    with RecordWriter(path) as writer:
        for number, row in enumerate(data):
            if not isinstance(row, dict | list):
                raise ScorerError(f"data: row {number} is {type(row).__name__} and not a dict; give a list of dicts")
            writer.write(row, source=f"row {number} of the data")


def _is_table(data: Any) -> bool:
    return hasattr(data, "__arrow_c_stream__") or (hasattr(data, "with_format") and hasattr(data, "num_rows"))


def _write_arrow(data: Any, path: Path) -> None:
    import pyarrow as pa

    if isinstance(getattr(data, "num_rows", 0), dict):
        raise ScorerError(f"data: choose one of its splits, {', '.join(data)}")
    try:
        batches = _batches(data)
        first = next(batches, None)
        if first is None:
            raise ScorerError("data: holds no rows; give at least one")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, first.schema) as writer:
            for batch in itertools.chain([first], batches):
                writer.write_table(batch)
    except (pa.ArrowException, TypeError) as error:
        raise ScorerError(f"data: can't be written as Arrow ({error}); give a list of dicts") from error


def _batches(data: Any) -> Iterator[Any]:
    """Tables of BATCH_ROWS rows, the last of fewer."""
    import pyarrow as pa

    if hasattr(data, "with_format"):  # a dataset, whose rows may be chosen and reordered by indices
        yield from data.with_format("arrow").iter(batch_size=BATCH_ROWS)
        return
    held = None
    for batch in pa.RecordBatchReader.from_stream(data):
        table = pa.table(batch)
        held = table if held is None else pa.concat_tables([held, table])
        while held.num_rows >= BATCH_ROWS:
            yield held.slice(0, BATCH_ROWS).combine_chunks()
            held = held.slice(BATCH_ROWS)
    if held is not None and held.num_rows:
        yield held.combine_chunks()
