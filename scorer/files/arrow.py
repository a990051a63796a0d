"""Arrow tables: of rows of a Parquet or Arrow file, from JSON values, and back to what JSON can hold.

What stays in Arrow passes through no Python value, so every type of column and the schema's metadata survive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from scorer.faults import first_line
from scorer.files.arrow_types import LISTS, alters, text_type
from scorer.files.decoded import decoded, decoded_schema, plain, taken
from scorer.files.kinds import ARROW_SUFFIXES, known_suffix
from scorer.files.tables import BATCH_ROWS, ipc_batches, parquet_batches, parquet_file, table_errors
from scorer.requirements import DATASET, require
from scorer.storage.paths import local_copy
from scorer.types import ScorerError

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # in a second
FIRST, LAST = -377_705_116_800, 971_890_963_199  # seconds from 1970 to the years -9999 and 32767


def is_table_file(path: Path) -> bool:
    """Whether `rows_at` can read a file."""
    return known_suffix(path) in (".parquet", *ARROW_SUFFIXES)


def rows_at(path: Path, positions: Sequence[int]) -> pa.Table:
    """The rows of a Parquet or Arrow file at `positions` (ascending, 0-based), with its schema and metadata.

    Run-end encoded columns are their values there, and views inside dictionaries plain. Raises ScorerError where it
    can't be read.
    """
    wanted = np.asarray(positions, dtype=np.int64)

    def chosen(batch: pa.RecordBatch, start: int) -> pa.RecordBatch:
        first, last = np.searchsorted(wanted, [start, start + batch.num_rows])
        return taken(decoded(batch), wanted[first:last] - start)

    def is_wanted(start: int, end: int) -> bool:
        return bool(np.ptp(np.searchsorted(wanted, [start, end])))

    is_parquet = known_suffix(path) == ".parquet"
    with local_copy(path) as copy, table_errors(path, "Parquet" if is_parquet else "Arrow"):
        if is_parquet:
            with parquet_file(copy) as file:
                batches = [chosen(batch, start) for start, batch in parquet_batches(file, BATCH_ROWS, is_wanted)]
                return pa.Table.from_batches(batches, schema=decoded_schema(file.schema_arrow))
        with open(copy, "rb") as stream:
            schema, stored = ipc_batches(stream)
            batches = [chosen(batch, start) for start, batch in stored]
            return pa.Table.from_batches(batches, schema=decoded_schema(schema))


def stacked(where: str, tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of several files as one, with the first one's metadata; a column that a table lacks is null there.

    Raises ScorerError, which names `where`, for columns whose types have none in common that keeps every value.
    """
    if len(tables) == 1:
        return tables[0]
    schema = tables[0].schema
    columns = schema.remove_metadata()
    if not all(table.schema.remove_metadata().equals(columns, check_metadata=True) for table in tables):
        tables = [plain(table) for table in tables]  # a view has no type in common with what is none
    unlike = f"{where}: the input files have different columns; write to JSON Lines (.jsonl)"
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ScorerError(f"{unlike} ({first_line(error)})") from error
    fields = []
    for field in table.schema:
        came = [part.schema.field(field.name) for part in tables if field.name in part.column_names]
        if (old := next((one.type for one in came if alters(one.type, field.type)), None)) is not None:
            kinds = f"{str(old)[:60]} would become {str(field.type)[:60]}"
            raise ScorerError(f"{unlike} (column '{field.name}': {kinds})")
        # Metadata may be of the values in that file: an Enum of Polars has its categories there.
        same = all(one.metadata == field.metadata for one in came)
        fields.append(field if same else field.remove_metadata())
    return table.cast(pa.schema(fields, metadata=schema.metadata))


def framed(where: str, rows: Sequence[Any]) -> pa.Table:
    """JSON objects as a table. Keys that are absent become nulls, and numbers a column's type, if they stay equal.

    Raises ScorerError, which names `where`, for rows that no table holds as they are.
    """
    unlike = f"{where}: these records do not fit into the columns of one table; write to JSON Lines (.jsonl)"
    try:
        frame = pl.from_dicts(rows, infer_schema_length=None) if rows else pl.DataFrame()
        if any("\0" in name for name in _names(pl.Struct(frame.schema))):
            raise ValueError("a key holds the character 0")  # for which Polars would print a trace
        table = frame.to_arrow()
    # ValueError: lone surrogates.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError, OverflowError) as error:
        raise ScorerError(f"{unlike} ({first_line(error)})") from error
    # Polars makes text of a number in a column of texts, and rounds large integers in a column of fractions.
    if frame.height != len(rows) or not all(map(_same, rows, frame.iter_rows(named=True))):
        raise ScorerError(unlike)
    return table


def _names(kind: Any) -> Iterator[str]:
    """The names of the fields in a type of Polars."""
    if isinstance(kind, pl.Struct):
        for field in kind.fields:
            yield field.name
            yield from _names(field.dtype)
    elif isinstance(kind, pl.List | pl.Array):
        yield from _names(kind.inner)


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
        if any(map(_is_far, _leaves(column.combine_chunks()))):
            raise ScorerError(f"{name} holds times of years that text can't hold; leave it out, or write to .parquet")
        try:
            columns.append(column.cast(text_type(name, field.type)))
        except pa.ArrowException as error:  # such as intervals
            raise ScorerError(f"{name} holds {field.type}, which text can't hold; write to .parquet") from error
    return pa.table(columns, names=table.column_names)


def _leaves(array: Any) -> Iterator[pa.Array]:
    """The arrays without others inside that an array is made of."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        yield from _leaves(array.storage)
    elif pa.types.is_dictionary(kind):
        yield from _leaves(array.dictionary)
    elif pa.types.is_map(kind):
        yield from chain(_leaves(array.keys), _leaves(array.items))
    elif pa.types.is_struct(kind):
        yield from chain.from_iterable(map(_leaves, array.flatten()))
    elif any(is_list(kind) for is_list in LISTS):
        yield from _leaves(array.flatten())
    else:
        yield array


def _is_far(array: pa.Array) -> bool:
    """Whether an array holds a time outside the years -9999 to 32767, or a day, of which Arrow makes a false text."""
    kind = array.type
    if not pa.types.is_temporal(kind) or pa.types.is_duration(kind) or pa.types.is_interval(kind):
        return False
    first, last = (0, 86_399) if pa.types.is_time(kind) else (FIRST, LAST)
    seconds = {"date32[day]": 1 / 86400, "date64[ms]": 1000}.get(str(kind)) or UNITS[kind.unit]
    bounds = pc.min_max(array.view(pa.int32() if kind.bit_width == 32 else pa.int64())).as_py()
    low, high = bounds["min"] or 0, bounds["max"] or 0
    return bool(low < first * seconds or high >= (last + 1) * seconds)


def check_flat(where: str, table: pa.Table) -> None:
    """Raise ScorerError, which names `where` and the column, for a column that holds lists or objects."""
    for field in table.schema:
        if pa.types.is_nested(field.type):
            raise ScorerError(f"{where}: column '{field.name}' holds lists or objects; write to JSON Lines (.jsonl)")


def as_frame(table: pa.Table) -> pl.DataFrame:
    """A Polars frame of the table, with its columns' names: of an empty one, Polars would make another."""
    names = table.column_names
    frame = cast(pl.DataFrame, pl.from_arrow(table.rename_columns([str(number) for number in range(len(names))])))
    return frame.rename(dict(zip(frame.columns, names, strict=True)))


def as_dataset(table: pa.Table) -> Any:
    """A `datasets.Dataset` of the table. Raises ScorerError where `datasets` is not installed."""
    require(DATASET)
    import datasets

    return datasets.Dataset(datasets.table.InMemoryTable(plain(table)))  # its own methods take no rows of views
