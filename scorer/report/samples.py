"""The records at both ends of a ranking, with their texts, as data for the page.

Knows runs and their data, and reads no more records than are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from scorer.data.records import to_record
from scorer.runs.directory import Run
from scorer.selection.ranking import Selection
from scorer.types import Record, ScorerError

GROUP_SIZE = 5  # records
MAX_CHARACTERS = 1500  # shown of a text


@dataclass(frozen=True, slots=True)
class Text:
    """What is shown of a text, and how many characters of it are cut."""

    role: str
    shown: str
    cut: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A record: its file and line, its values as one line, and "kept" or why it was not. No source: no texts."""

    record_id: int
    source: str
    values: str
    outcome: str
    texts: list[Text]


@dataclass(frozen=True, slots=True)
class Samples:
    """Groups of samples by title. fault: why no text can be shown, or ""."""

    groups: dict[str, list[Sample]]
    fault: str


def samples(
    run: Run, records: pl.DataFrame, selection: Selection, by: str, keep: str | float | int, measures: Sequence[str]
) -> Samples:
    """The kept records that rank first, and the records with the highest and the lowest `by`.

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
        record = found.get(record_id)
        return Sample(
            record_id,
            record.source if record else "",
            ", ".join(f"{name} {digits(v)}" for name, v in zip(names, values, strict=True) if v is not None),
            reasons.get(record_id, "kept"),
            _texts(record) if record else [],
        )

    shown = {
        title: [sample(*row) for row in group.select("record_id", *names).iter_rows()]
        for title, group in groups.items()
    }
    return Samples(shown, fault)


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
            return {raw.record_id: to_record(raw, data.columns) for raw in rows}, ""
    except ScorerError as error:
        return {}, str(error)


def _texts(record: Record) -> list[Text]:
    parts: list[tuple[str, str]] = []
    for turn in record.turns:
        parts += [(message.role, message.content) for message in turn.prompt]
        parts += [("input", turn.input)] if turn.input else []
        parts += [("response", turn.response)]
    return [Text(role, text[:MAX_CHARACTERS], max(0, len(text) - MAX_CHARACTERS)) for role, text in parts]
