"""Reads what a selection needs besides scores: groups of records by a column of the data, and flags."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from scorer.data.dataset import Dataset
from scorer.data.messages import is_unicode
from scorer.runs.directory import FLAGS, Run
from scorer.runs.extras import read_extra
from scorer.selection.flags import SCORE_FLAGS, STORED, TEXT_FLAGS, score_flags, text_flags
from scorer.types import ScorerError


def column_groups(data: Dataset, column: str) -> pl.DataFrame:
    """record_id Int64, group String: the value of a column of the data, as JSON unless it is text; null if absent.

    Raises ScorerError where no record has the column.
    """
    ids, values = [], []
    for record_id, value in _column(data, column):
        ids.append(record_id)
        values.append(
            value  # a lone surrogate, which no table holds, is escaped by JSON
            if value is None or (isinstance(value, str) and is_unicode(value))
            else json.dumps(value, sort_keys=True, default=str)
        )
    if not any(value is not None for value in values):
        raise _no_value(data, column)
    return pl.DataFrame({"record_id": ids, "group": values}, schema={"record_id": pl.Int64, "group": pl.String})


def check_column(data: Dataset, column: str | None) -> None:
    """Raise ScorerError where no record has a value of `column`. Stops reading at the first."""
    if column is not None and all(value is None for _, value in _column(data, column)):
        raise _no_value(data, column)


def _column(data: Dataset, column: str) -> Iterator[tuple[int, Any]]:
    """The record id of each row, and its value of a column; None where it has none."""
    return ((raw.record_id, raw.value.get(column) if isinstance(raw.value, dict) else None) for raw in data.rows())


def _no_value(data: Dataset, column: str) -> ScorerError:
    return ScorerError(f"per: no record of {', '.join(data.paths)} has a value of '{column}'")


def flags(run: Run, data: Dataset | None, scores: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """record_id, and a Boolean column for each of `names`, some of scorer.selection.flags.FLAGS.

    Raises ScorerError where a flag needs what the run does not have.
    """
    of_scores = [name for name in names if name in SCORE_FLAGS]
    of_text = [name for name in names if name in TEXT_FLAGS]
    stored = [name for name in names if name in STORED]
    table = scores.select("record_id").unique().sort("record_id")
    found = []
    if of_scores:
        found.append(score_flags(scores, of_scores))
    if of_text and data is not None:
        found.append(text_flags(data.records(), of_text))
    if stored:
        found.append(read_extra(run, FLAGS, stored, " --flags"))
    for frame in found:
        table = table.join(frame, on="record_id", how="left", maintain_order="left")
    return table
