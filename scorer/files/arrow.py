"""Arrow tables: of rows of a Parquet or Arrow file, from JSON values, and back to what JSON can hold.

What stays in Arrow passes through no Python value, so every type of column and the schema's metadata survive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from scorer.files.kinds import ARROW_SUFFIXES, first_line, known_suffix
from scorer.files.tables import ipc_batches
from scorer.requirements import DATASET, require
from scorer.storage.paths import local_copy
from scorer.types import ScorerError

BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)


def is_table_file(path: Path) -> bool:
    """Whether `rows_at` can read a file."""
    return known_suffix(path) in (".parquet", *ARROW_SUFFIXES)


def rows_at(path: Path, positions: Sequence[int]) -> pa.Table:
    """The rows of a Parquet or Arrow file at `positions` (ascending, 0-based), with its schema and metadata.

    Raises ScorerError where it can't be read.
    """
    wanted = np.asarray(positions, dtype=np.int64)

    def chosen(batch: pa.RecordBatch, start: int) -> pa.RecordBatch:
        first, last = np.searchsorted(wanted, [start, start + batch.num_rows])
        return batch.take(pa.array(wanted[first:last] - start))

    try:
        with local_copy(path) as copy:
            if known_suffix(path) == ".parquet":
                with pq.ParquetFile(copy) as file:
                    batches = [chosen(batch, start) for start, batch in _parquet_batches(file, wanted)]
                    return pa.Table.from_batches(batches, schema=file.schema_arrow)
            with ipc_batches(copy) as (schema, stream):
                ends, batches = 0, []
                for batch in stream:
                    batches.append(chosen(batch, ends))
                    ends += batch.num_rows
                # The file is mapped only as long as it is open, so what is kept is copied.
                return pa.Table.from_batches([batch for batch in batches if batch.num_rows], schema=schema)
    except (pa.ArrowException, OSError) as error:
        raise ScorerError(f"{path}: cannot be read as a table ({first_line(error)})") from error


def _parquet_batches(file: pq.ParquetFile, wanted: Any) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches of the row groups that hold a wanted row, each with the position of its first row."""
    end = 0
    for group in range(file.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        if np.diff(np.searchsorted(wanted, [start, end])).any():
            for batch in file.iter_batches(row_groups=[group]):
                yield start, batch
                start += batch.num_rows


def stacked(where: str, tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of several files as one, with the first one's metadata; a column that a table lacks is null there.

    Raises ScorerError, which names `where`, for columns whose types have none in common that keeps every value.
    """
    if len(tables) == 1:
        return tables[0]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
        return table.replace_schema_metadata(tables[0].schema.metadata)
    except pa.ArrowException as error:
        why = f"{where}: the input files have different columns; write to JSON Lines (.jsonl)"
        raise ScorerError(f"{why} ({first_line(error)})") from error


def framed(where: str, rows: Sequence[Any]) -> pa.Table:
    """JSON objects as a table. Keys that are absent become nulls, and numbers a column's type, if they stay equal.

    Raises ScorerError, which names `where`, for rows that no table holds as they are.
    """
    unlike = f"{where}: these records do not fit into the columns of one table; write to JSON Lines (.jsonl)"
    try:
        frame = pl.from_dicts(rows, infer_schema_length=None) if rows else pl.DataFrame()
        table = frame.to_arrow()
    # ValueError: lone surrogates. PanicException: a name that holds the character 0.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError, OverflowError) as error:
        raise ScorerError(f"{unlike} ({first_line(error)})") from error
    # Polars makes text of a number in a column of texts, and rounds large integers in a column of fractions.
    if frame.height != len(rows) or not all(map(_same, rows, frame.iter_rows(named=True))):
        raise ScorerError(unlike)
    return table


def _same(value: Any, framed: Any) -> bool:
    """Whether a table holds a value as it was, but for keys that are absent (null there) and whole fractions."""
    if isinstance(value, dict) and isinstance(framed, dict):
        return all(_same(value.get(key), framed[key]) for key in framed) and value.keys() <= framed.keys()
    if isinstance(value, list) and isinstance(framed, list):
        return len(value) == len(framed) and all(map(_same, value, framed))
    alike = type(value) is type(framed) or {type(value), type(framed)} == {int, float}
    return alike and (value == framed or value != value)


def for_text(where: str, table: pa.Table) -> pa.Table:
    """The table with columns that JSON can hold: dates, times and decimals become text, all of their digits kept.

    Raises ScorerError, which names `where` and the column, for binary values and durations.
    """
    columns = []
    for field, column in zip(table.schema, table.columns, strict=True):
        name = f"{where}: column '{field.name}'"
        try:
            columns.append(column.cast(_text_type(name, field.type)))
        except pa.ArrowException as error:  # such as intervals
            raise ScorerError(f"{name} holds {field.type}, which text can't hold; write to .parquet") from error
    return pa.table(columns, names=table.column_names)


def _text_type(where: str, kind: pa.DataType) -> pa.DataType:
    """The type of what JSON holds for values of a type; types that it holds as they are come back."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _text_type(where, kind.storage_type)
    if types.is_dictionary(kind):
        return _text_type(where, kind.value_type)
    if types.is_struct(kind):
        return pa.struct([(field.name, _text_type(f"{where}, {field.name}", field.type)) for field in kind])
    if types.is_map(kind):
        return pa.list_(pa.struct([(f.name, _text_type(where, f.type)) for f in (kind.key_field, kind.item_field)]))
    if types.is_nested(kind):  # lists of any make
        return pa.large_list(_text_type(where, kind.value_type))
    return _flat_text_type(where, kind)


def _flat_text_type(where: str, kind: pa.DataType) -> pa.DataType:
    refused = {"binary data": BINARY, "durations": (pa.types.is_duration,)}
    for what, kinds in refused.items():
        if any(is_kind(kind) for is_kind in kinds):
            raise ScorerError(f"{where} holds {what}, which text can't hold; leave it out, or write to .parquet")
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return pa.string()
    return pa.float32() if pa.types.is_float16(kind) else kind


def check_flat(where: str, table: pa.Table) -> None:
    """Raise ScorerError, which names `where` and the column, for a column that holds lists or objects."""
    for field in table.schema:
        if pa.types.is_nested(field.type):
            raise ScorerError(f"{where}: column '{field.name}' holds lists or objects; write to JSON Lines (.jsonl)")


def as_dataset(table: pa.Table) -> Any:
    """A `datasets.Dataset` of the table. Raises ScorerError where `datasets` is not installed."""
    require(DATASET)
    import datasets

    return datasets.Dataset(datasets.table.InMemoryTable(table))
