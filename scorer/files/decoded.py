"""Rows of Arrow data at positions, and the types that pyarrow can do that with.

pyarrow neither takes rows of views and of run-end encoded columns nor decodes dictionaries of views. Slices of views
that are put together would keep all the texts of their file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from scorer.files.arrow_types import without_views


def decoded_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of what `decoded` makes of batches: the values of runs, and no views inside dictionaries."""

    def decoded_type(kind: pa.DataType) -> pa.DataType:
        runs = pa.types.is_run_end_encoded(kind)
        return without_views(kind.value_type if runs else kind, dictionaries_only=True)

    return _mapped(schema, decoded_type)


def decoded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The record batch as one of `decoded_schema`, checked.

    Raises pyarrow.ArrowInvalid for values that are not of their type: false offsets would end the process. Dates and
    times of any number pass: `scorer.files.arrow.for_text` refuses those that have no text.
    """
    for column in batch.columns:
        column.validate(full=not pa.types.is_primitive(column.type))
    schema = decoded_schema(batch.schema)
    if schema == batch.schema:
        return batch
    kinds = [field.type for field in schema]
    return pa.record_batch([_values(c).cast(kind) for c, kind in zip(batch.columns, kinds, strict=True)], schema=schema)


def taken(rows: pa.Table, positions: np.ndarray) -> pa.Table:
    """The rows of a table, or of a record batch, at 0-based positions in any order. Every column keeps its type."""
    plain = _mapped(rows.schema, without_views)
    if plain == rows.schema:
        return rows.take(pa.array(positions))
    return rows.cast(plain).take(pa.array(positions)).cast(rows.schema)


def plain(table: pa.Table) -> pa.Table:
    """The table with plain texts and binary values in place of views."""
    return table.cast(_mapped(table.schema, without_views))


def _values(column: pa.Array) -> pa.Array:
    if not pa.types.is_run_end_encoded(column.type):
        return column
    rows = np.arange(column.offset, column.offset + len(column))
    runs = np.searchsorted(column.run_ends.to_numpy(), rows, side="right")
    return taken(pa.record_batch([column.values], ["values"]), runs).column(0)


def _mapped(schema: pa.Schema, to_type: Callable[[pa.DataType], pa.DataType]) -> pa.Schema:
    return pa.schema([field.with_type(to_type(field.type)) for field in schema], metadata=schema.metadata)
