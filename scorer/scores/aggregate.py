"""A score table with a row for each turn -> a table with a row for each record.

Knows the key columns and the counts of tokens; all other numeric columns are measures, whatever they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from scorer.types import SCORED, ScorerError

KEYS = ("record_id", "turn", "status")
COUNTS = ("prompt_tokens", "response_tokens", "alone_tokens")  # of a record: the sums over its scored turns
MARGIN, OTHER_RESPONSE = "margin", "other_response"
NOT_MEASURES = (*KEYS, "tokens_hash", "rank", "reason")  # the last two name columns of a Selection


def measures_of(schema: Mapping[str, pl.DataType]) -> tuple[str, ...]:
    """The columns of a score table that hold numbers to rank by."""
    return tuple(name for name, dtype in schema.items() if dtype.is_numeric() and name not in NOT_MEASURES)


def per_record(scores: pl.DataFrame, aggregate: str = "mean", response: str | None = None) -> pl.DataFrame:
    """One row for each record of a score table, by record_id: record_id, reason (null where a turn is scored, else the
    status of the first turn), COUNTS, and the other measures over the scored turns by one of scorer.config.AGGREGATES.

    response: the turns that count, by a part of their name: chosen, rejected, reasoning or answer. None is all but the
    rejected ones. MARGIN is the measures of the chosen ones less those of the rejected ones, and the counts of the
    chosen ones. A record without such turns has the reason OTHER_RESPONSE.
    """
    if response == MARGIN:
        return _margin(per_record(scores, aggregate, "chosen"), per_record(scores, aggregate, "rejected"))
    scores = _of_response(scores, response)
    if missing := [name for name in KEYS if name not in scores.columns]:
        raise ScorerError(f"not a score table: it has no column {', '.join(missing)}")
    measures = measures_of(scores.schema)
    # Sorted, so that sums of floats, `last`, and the status of a failed record do not depend on the order of rows.
    table = scores.select(*KEYS, *measures)
    same = pl.col("record_id") == pl.col("record_id").shift()
    later = pl.col("turn") > pl.col("turn").shift()
    if not table.select(((pl.col("record_id") > pl.col("record_id").shift()) | (same & later)).all()).item():
        table = table.sort("record_id", "turn")
        twice = table.filter(same & ~later)
        if not twice.is_empty():
            record_id, turn = twice.row(0)[:2]
            raise ScorerError(f"not a score table: turn {turn} of record {record_id} occurs twice")
    scored = pl.col("status").is_in(SCORED)
    reason = pl.when(scored).then(None).otherwise("status").alias("reason")
    floats = [name for name in measures if scores.schema[name].is_float()]
    if not table.select(same.any()).item():  # grouping 10 million rows would take most of the time
        whole = [name for name in measures if name not in (*floats, *COUNTS)] if aggregate == "mean" else []
        one_turn = table.select("record_id", reason, *measures)
        return one_turn.with_columns(pl.col(floats).fill_nan(None), pl.col(whole).cast(pl.Float64))
    # Always marked as sorted: Polars would sum slices and gathered rows in different orders.
    turns = table.filter(scored).with_columns(pl.col(floats).fill_nan(None)).set_sorted("record_id")
    records = turns.group_by("record_id", maintain_order=True).agg(
        _total(name) if name in COUNTS else getattr(pl.col(name), aggregate)() for name in measures
    )
    first = table.select("record_id", "status").unique("record_id", keep="first", maintain_order=True)
    found = records.with_columns(found=True)
    joined = first.join(found, on="record_id", how="left", maintain_order="left")
    return joined.select("record_id", pl.when("found").then(None).otherwise("status").alias("reason"), *measures)


def check_response(scores: pl.DataFrame, response: str | None) -> None:
    """Raise ScorerError where no turn of a score table is one that `per_record` would count for `response`."""
    if response is None:
        return
    names = scores["response"].unique().drop_nulls().to_list() if "response" in scores.columns else []
    known = sorted({part for name in names for part in name.split("_")})
    if not {"chosen", "rejected"}.issubset(known) if response == MARGIN else response not in known:
        raise ScorerError(f"response: no turn here is {response}; they are {', '.join(known) or 'plain responses'}")


def _of_response(scores: pl.DataFrame, response: str | None) -> pl.DataFrame:
    """The turns that count; of a record without any, all of them, with the status OTHER_RESPONSE."""
    if "response" not in scores.columns or (response is None and scores["response"].null_count() == scores.height):
        return scores
    parts = pl.col("response").str.split("_").list
    counts = (~parts.contains("rejected") if response is None else parts.contains(response)).fill_null(response is None)
    marked = scores.with_columns(status=pl.when(counts).then("status").otherwise(pl.lit(OTHER_RESPONSE)))
    return marked.filter(counts | ~counts.any().over("record_id"))  # the others of a record tell nothing more


def _margin(chosen: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    """The measures of one table of records less those of another, where both have them."""
    joined = chosen.join(rejected, on="record_id", how="left", suffix=" rejected", maintain_order="left")
    measures = [name for name in measures_of(chosen.schema) if name not in COUNTS]
    reason = pl.coalesce("reason", "reason rejected").alias("reason")
    differences = [(pl.col(name) - pl.col(f"{name} rejected")).alias(name) for name in measures]
    return joined.with_columns(reason, *differences).select(chosen.columns)


def _total(name: str) -> pl.Expr:
    """The sum of a column; null where it has no value at all, of which Polars would make 0."""
    return pl.when(pl.col(name).count() > 0).then(pl.col(name).sum())


def check_ids(name: str, table: pl.DataFrame, keys: Sequence[str]) -> None:
    """Raise ScorerError unless every row of the table called `name` has a record_id, and `keys` of its own."""
    if missing := table["record_id"].null_count():
        raise ScorerError(f"{name}: {missing:,} rows have no record_id")
    if repeated := table.height - table.select(keys).n_unique():
        raise ScorerError(f"{name}: {repeated:,} rows repeat the {' and '.join(keys)} of another")


def check_same_ids(first: str, table: pl.DataFrame, second: str, other: pl.DataFrame, keys: Sequence[str]) -> None:
    """Raise ScorerError unless the tables called `first` and `second` have the same `keys`."""
    missing, new = table.join(other, on=keys, how="anti").height, other.join(table, on=keys, how="anti").height
    if missing or new:
        raise ScorerError(
            f"{second}: {missing:,} of the {table.height:,} rows of {first} are not in it, and {new:,} of its own are "
            "not there: give scores of the same data"
        )
