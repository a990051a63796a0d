"""Some rows of a dataset, as they came: as raw records with their text, or as one Arrow table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from scorer.config import Reading
from scorer.data.dataset import Dataset
from scorer.files.arrow import for_text, framed, is_table_file, rows_at, stacked
from scorer.files.decoded import taken
from scorer.files.json_texts import overflows
from scorer.files.raw import RawRecord
from scorer.storage.paths import to_path
from scorer.types import RowStatus, ScorerError

BATCH_ROWS = 10_000  # of a table, converted to Python values at a time


class _Part(NamedTuple):
    """The rows of a subset in one file: `ids` ascending; the file's first row has the id `start`."""

    path: Path
    start: int
    ids: list[int]

    @property
    def positions(self) -> list[int]:
        return [i - self.start for i in self.ids]


class Subset:
    """The rows `ids` of a dataset, in that order. Files without any of them are not opened to write them.

    broken: the ids of those that were no JSON when they were scored. Any other that is none now raises ScorerError.
    """

    def __init__(self, data: Dataset, ids: Sequence[int], *, broken: Collection[int] = ()):
        self._data, self._ids, self._broken = data, list(ids), frozenset(broken)
        self._sorted = sorted(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def reading(self) -> Reading:
        """How scoring read the rows."""
        return self._data.reading

    def raw(self) -> Iterator[RawRecord]:
        """The rows as scoring read them: parsed JSON, or of a table's rows what Python holds."""
        return self._ordered(self._read(set(self._ids)))

    def records(self) -> Iterator[RawRecord]:
        """The rows with the text of each: all JSON has one. Of a table's rows, `value` is what JSON can hold.

        Raises ScorerError, which names the column, for binary values.
        """
        return self._ordered(chain.from_iterable(map(self._records, self._parts())))

    def table(self, where: str, *, wrapped: bool = False) -> pa.Table:
        """The rows as a table; those of Parquet files are filtered in Arrow.

        wrapped: a row that is no JSON object becomes one with the key `record`. Raises ScorerError, which names
        `where`, for rows that no table holds as they are.
        """
        tables: list[pa.Table] = []
        for in_table, group in groupby(self._parts(), key=lambda part: is_table_file(part.path)):
            parts = list(group)
            if in_table:
                tables += [rows_at(part.path, part.positions) for part in parts]
            else:
                records = chain.from_iterable(map(self._records, parts))
                tables.append(framed(where, [_object(raw, wrapped) for raw in records]))
        if not tables:  # of no rows, the columns
            paths = [path for path in map(to_path, self._data.paths) if is_table_file(path)]
            return rows_at(paths[0], []) if paths else pa.table({})
        table = stacked(where, tables)
        if self._ids == self._sorted:
            return table
        return taken(table, np.searchsorted(self._sorted, self._ids))

    def _ordered(self, rows: Iterator[RawRecord]) -> Iterator[RawRecord]:
        if self._ids == self._sorted:
            return rows
        held = {raw.record_id: raw for raw in rows}  # in the order of rank, which is not the file's
        return (held[i] for i in self._ids)

    def _parts(self) -> Iterator[_Part]:
        starts = [0, *accumulate(self._data.counts)]
        bounds = np.searchsorted(self._sorted, starts)
        for path, start, first, last in zip(self._data.paths, starts, bounds, bounds[1:], strict=False):
            if first < last:
                yield _Part(to_path(path), start, self._sorted[first:last])

    def _records(self, part: _Part) -> Iterator[RawRecord]:
        if is_table_file(part.path):
            table = for_text(str(part.path), rows_at(part.path, part.positions))
            values = chain.from_iterable(batch.to_pylist() for batch in table.to_batches(max_chunksize=BATCH_ROWS))
            for i, position, value in zip(part.ids, part.positions, values, strict=True):
                yield RawRecord(i, f"{part.path}[{position}]", value)
            return
        yield from self._read(set(part.ids), part.start, part.ids[-1] + 1)

    def _read(self, wanted: Collection[int], start: int = 0, stop: int | None = None) -> Iterator[RawRecord]:
        for raw in self._data.rows(start, stop):
            if raw.record_id in wanted:
                if raw.status is RowStatus.BAD_JSON and raw.record_id not in self._broken:
                    raise ScorerError(f"{raw.source}: was scored, but is read as bad_json now: score it again")
                yield raw


def _object(raw: RawRecord, wrapped: bool) -> dict[str, Any]:
    if raw.text is not None and overflows(raw.text):
        raise ScorerError(f"{raw.source} holds a number that no table holds; write to JSON Lines (.jsonl)")
    if isinstance(raw.value, dict):
        return raw.value
    if not wrapped:
        raise ScorerError(f"{raw.source} is no object; write to JSON Lines (.jsonl)")
    return {"record": raw.value}
