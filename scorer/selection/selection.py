"""What a selection comes to: the records that are kept, those that are not, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from scorer.data.dataset import Dataset
from scorer.data.subset import Subset
from scorer.files.arrow import as_dataset, as_frame
from scorer.requirements import DATASET, require
from scorer.types import ScorerError

TABLE = "a table of the kept records"  # what an error is about


@dataclass(frozen=True, slots=True)
class Selection:
    """The records that are kept and those that are not: each record of the table is in one of the two frames, once.

    kept: record_id Int64, rank Int64 (1 is best, or drawn first, or most diverse), and every measure of the table,
        aggregated over the record's scored turns; in the order asked for.
    rejected: record_id Int64, reason String, by record_id. The reason is the status of a record that has no scored
        turn; or null_score (`by`, or an ifd that has a limit, is null or not finite), the first of
        `drop_flagged` that is set, ifd_too_high, other_bucket, below_cut, not_drawn, not_diverse, or in the end
        not_convertible, to the form that is written.
    requested: how many records were asked for; there are fewer in `kept` where fewer could be ranked.
    total: how many records the table has, failed ones included.
    drawn_from: how many records were drawn from at random; None where records were ranked.
    unchecked: what is not known of data that was named instead of the run's own, as sentences.
    """

    kept: pl.DataFrame
    rejected: pl.DataFrame
    requested: int
    total: int
    drawn_from: int | None = None
    unchecked: Sequence[str] = ()
    _open: Callable[[], Dataset] | None = field(default=None, repr=False, compare=False)

    def records(self) -> Iterator[Any]:
        """The kept records, in the order of `kept`: JSON values as they came, or rows of a table as dictionaries.

        Of a table, dates, times and decimals are text here, and columns that Python can't hold are absent; `to_polars`
        and `to_dataset` keep every type.
        """
        with self._kept_rows() as rows:
            yield from (raw.value for raw in rows.raw())

    def to_polars(self) -> pl.DataFrame:
        """The kept records as they came, a row each. Raises ScorerError for records that no table holds."""
        with self._kept_rows() as rows:
            return as_frame(rows.table(TABLE))

    def to_dataset(self) -> Any:
        """The same as a `datasets.Dataset`. Raises ScorerError where `datasets` is not installed."""
        require(DATASET)
        with self._kept_rows() as rows:
            return as_dataset(rows.table(TABLE))

    @contextmanager
    def _kept_rows(self) -> Iterator[Subset]:
        if self._open is None:
            raise ScorerError("this selection was made of scores alone: scorer.select has the records too")
        with self._open() as data:
            data.check_unchanged()
            yield Subset(data, self.kept["record_id"].to_list())
