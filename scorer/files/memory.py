"""Data in memory (a list of rows, a Hugging Face dataset, a pandas or Polars frame, an Arrow table) -> a file of it.

Scoring reads it as any other file, so its run is resumed and selected from like one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from scorer.types import ScorerError

BATCH_ROWS = 10_000  # of the file, whatever the batches of the data: the same content gives the same bytes


def is_in_memory(data: Any) -> bool:
    """Whether data is rows or a table, and not the paths of files."""
    items = data if isinstance(data, list | tuple) else (data,)
    return not all(isinstance(item, str | Path) for item in items)


def suffix_of(data: Any) -> str:
    """The suffix of the kind of file that `write` makes of data in memory."""
    return ".arrow" if _is_table(data) else ".jsonl"


def write(data: Any, file: BinaryIO) -> None:
    """Write data in memory to a file. Raises ScorerError where a row can't be written, naming it."""
    if _is_table(data):
        _write_table(data, file)
        return
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ScorerError(f"data: {type(data).__name__} is no rows; give paths, a list of dicts, a frame or a dataset")
    for number, row in enumerate(data):
        if not isinstance(row, dict | list):
            raise ScorerError(f"data: row {number} is a {type(row).__name__} and not a dict; give a list of dicts")
        try:
            _check_keys(row)
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ScorerError(f"data: row {number} can't be JSON ({error}); give values that can") from error
        file.write(line.encode("utf-8", "backslashreplace"))  # only lone surrogates can't be encoded


def _check_keys(value: Any) -> None:
    """Raise TypeError for a key that is no text, of which JSON would make one, perhaps that of another key."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list | tuple):
            _check_keys(item)


def _is_table(data: Any) -> bool:
    return hasattr(data, "__arrow_c_stream__") or (hasattr(data, "with_format") and hasattr(data, "num_rows"))


def _write_table(data: Any, file: BinaryIO) -> None:
    import pyarrow as pa

    if isinstance(getattr(data, "num_rows", None), dict):
        raise ScorerError(f"data: choose one of its splits: {', '.join(data)}")
    if getattr(data, "format", None) and data.format.get("type") == "custom":
        raise ScorerError("data: the dataset has a transform, which scoring would not see; map it first")
    try:
        tables = _tables(data)
        if (first := next(tables, None)) is None:
            raise ScorerError("data: there are no records to score")
        with pa.ipc.new_stream(file, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ScorerError(f"data: can't be written as Arrow ({error}); give a list of dicts") from error


def _tables(data: Any) -> Iterator[Any]:
    """Arrow tables of BATCH_ROWS rows, the last of fewer; one at least."""
    import pyarrow as pa

    from scorer.files.decoded import decoded, decoded_schema

    if hasattr(data, "with_format"):  # a dataset of Hugging Face, which reads what its indices choose
        yield from data.with_format("arrow").iter(batch_size=BATCH_ROWS)
        return
    reader = pa.RecordBatchReader.from_stream(data)
    held = decoded_schema(reader.schema).empty_table()
    for batch in reader:
        held = pa.concat_tables([held, pa.table(decoded(batch))])
        while held.num_rows > BATCH_ROWS:
            yield held.slice(0, BATCH_ROWS).combine_chunks()
            held = held.slice(BATCH_ROWS)
    yield held.combine_chunks()
