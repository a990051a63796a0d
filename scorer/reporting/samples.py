"""The records at both ends of a ranking, with their texts, as data for the page.

Knows runs and their data, and reads no more records than are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from scorer.data.records import to_record
from scorer.runs.directory import Run
from scorer.selection.selection import Selection
from scorer.types import Record, ScorerError

GROUP_SIZE = 5  # records


@dataclass(frozen=True, slots=True)
class Sample:
    """A record: its values as one line, "kept" or why it was not, and the record itself where its data is there."""

    record_id: int
    values: str
    outcome: str
    record: Record | None


def samples(
    run: Run, records: pl.DataFrame, selection: Selection, by: str, keep: str | float | int, measures: Sequence[str]
) -> tuple[dict[str, list[Sample]], str]:
    """The kept records that rank first, and those with the highest and the lowest `by`, by title; and why no text can
    be shown, or "".

    records: the run's table of one row a record; those of `measures` that it has are shown.
    """
    ranked = records.filter(pl.col(by).is_finite()).sort(by, "record_id", descending=[True, False])
    count = min(GROUP_SIZE, max(1, ranked.height // 2))
    first = selection.kept.sort("rank").head(GROUP_SIZE).select(pl.col("record_id").cast(ranked.schema["record_id"]))
    groups = {
        f"First of the {selection.kept.height:,} kept at {keep}": first.join(
            ranked, on="record_id", maintain_order="left"
        ),
        f"Highest {by}": ranked.head(count),
        f"Lowest {by}": ranked.tail(count).reverse(),
    }
    ids = {i for group in groups.values() for i in group["record_id"]}
    reasons = dict(selection.rejected.filter(pl.col("record_id").is_in(ids)).select("record_id", "reason").iter_rows())
    names = [name for name in dict.fromkeys((by, *measures, "response_tokens")) if name in ranked.columns]
    found, fault = _read(run, ids)

    def sample(record_id: int, *values: float | None) -> Sample:
        shown = ", ".join(f"{name} {digits(v)}" for name, v in zip(names, values, strict=True) if v is not None)
        return Sample(record_id, shown, reasons.get(record_id, "kept"), found.get(record_id))

    rows = {title: group.select("record_id", *names).iter_rows() for title, group in groups.items()}
    return {title: [sample(*row) for row in group] for title, group in rows.items()}, fault


def digits(value: float) -> str:
    """A number as the page shows it: whole, or to four digits."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:,.4g}"


def _read(run: Run, ids: set[int]) -> tuple[dict[int, Record], str]:
    """The records by id; or none and the reason, where the data is gone or changed."""
    if not ids:
        return {}, ""
    try:
        with run.data as data:
            data.check_unchanged()
            rows = (raw for raw in data.rows(min(ids), max(ids) + 1) if raw.record_id in ids)
            return {raw.record_id: to_record(raw, data.reading) for raw in rows}, ""
    except ScorerError as error:
        return {}, str(error)
