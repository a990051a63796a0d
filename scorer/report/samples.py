"""The records at the ends of a ranking, with their texts, as HTML.

Knows runs and their data, and escapes every text; reads no more records than are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import polars as pl

from scorer.data.records import to_record
from scorer.report.html import digits
from scorer.runs.directory import Run
from scorer.selection.ranking import Selection
from scorer.types import Record, ScorerError

SAMPLES = 5  # shown of each end
TEXT = 1500  # characters of a text that are shown


def samples(
    run: Run, records: pl.DataFrame, selection: Selection, by: str, keep: str | float | int, measures: Sequence[str]
) -> Iterator[str]:
    """The records that rank first of those kept, and those with the highest and the lowest `by`, as HTML.

    records: the run's table of one row a record; `measures`, where it has them, are shown. If the data is gone or
    changed since, it is said instead of the texts.
    """
    ranked = records.filter(pl.col(by).is_finite()).sort(by, "record_id", descending=[True, False])
    count = min(SAMPLES, max(1, ranked.height // 2))
    first = selection.kept.sort("rank")["record_id"].head(SAMPLES).to_list()
    kept = pl.DataFrame({"record_id": first}, schema={"record_id": ranked.schema["record_id"]})
    ends = {
        f"First of the {selection.kept.height:,} kept at {keep}": kept.join(
            ranked, on="record_id", maintain_order="left"
        ),
        f"Highest {by}": ranked.head(count),
        f"Lowest {by}": ranked.tail(count).reverse(),
    }
    wanted = {i for end in ends.values() for i in end["record_id"]}
    outcomes = dict(
        selection.rejected.filter(pl.col("record_id").is_in(wanted)).select("record_id", "reason").iter_rows()
    )
    names = [name for name in dict.fromkeys((by, *measures, "response_tokens")) if name in ranked.columns]
    texts, fault = _texts(run, wanted)
    if fault:
        yield f'<p class="note">The texts can’t be shown: {escape(fault)}</p>'
    for title, end in ends.items():
        yield f"<h3>{escape(title)}</h3>"
        for row in end.select("record_id", *names).iter_rows(named=True):
            record = texts.get(row["record_id"])
            values = ", ".join(f"{name} {digits(row[name])}" for name in names if row[name] is not None)
            where = f" ({escape(record.source)})" if record else ""
            outcome = escape(outcomes.get(row["record_id"], "kept"))
            head = f"<b>record {row['record_id']}</b>{where}: {escape(values)}; <b>{outcome}</b>"
            yield f'<article><p class="head">{head}</p>{_shown(record) if record else ""}</article>'


def _texts(run: Run, wanted: set[int]) -> tuple[dict[int, Record], str]:
    """The wanted records, or why they can't be had."""
    if not wanted:
        return {}, ""
    try:
        with run.data as data:
            data.check_unchanged()
            rows = (raw for raw in data.rows(min(wanted), max(wanted) + 1) if raw.record_id in wanted)
            return {raw.record_id: to_record(raw, data.columns) for raw in rows}, ""
    except ScorerError as error:
        return {}, str(error)


def _shown(record: Record) -> str:
    parts: list[tuple[str, str]] = []
    for turn in record.turns:
        parts += [(message.role, message.content) for message in turn.prompt]
        parts += [("input", turn.input)] if turn.input else []
        parts += [("response", turn.response)]
    return "".join(f'<p class="role">{escape(role)}</p><pre dir="auto">{_cut(text)}</pre>' for role, text in parts)


def _cut(text: str) -> str:
    more = len(text) - TEXT
    return escape(text) if more <= 0 else f"{escape(text[:TEXT])}<i> … {more:,} more characters are cut</i>"
