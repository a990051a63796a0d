"""The score table -> which records to keep, in what order, and why each of the others was dropped.

Pure Polars: it knows column names and numbers, and nothing of files, models, or what a measure, a group or a flag
means. The one measure that it knows by name is `ifd`, which has an upper limit. scorer.scores.shares deals out sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random

import polars as pl

from scorer.scores.aggregate import measures_of, per_record
from scorer.scores.shares import exact_quotas, largest_remainder, paper_quotas, split_bounds
from scorer.selection.config import BUCKETS, SelectConfig
from scorer.types import ScorerError, one_of


@dataclass(frozen=True, slots=True)
class Selection:
    """What was kept and what was not: each record of the table is in one of the two frames, once.

    kept: record_id Int64, rank Int64 (1 is best, or drawn first, or most diverse), and every measure of the table,
        aggregated over the record's scored turns; in the order asked for.
    rejected: record_id Int64, reason String, by record_id. The reason is the status of a record of which no turn is
        scored; or null_score (`by`, or an ifd that has a limit, is null or not finite), the name of the first of
        `drop_flagged` that it bears, ifd_too_high, other_bucket, below_cut, or not_diverse.
    requested: how many records were asked for; there are fewer in `kept` where fewer could be ranked.
    total: how many records the table has, failed ones included.
    """

    kept: pl.DataFrame
    rejected: pl.DataFrame
    requested: int
    total: int


Spread = Callable[[pl.Series, int], Sequence[int]]


def select_records(
    scores: pl.DataFrame,
    config: SelectConfig,
    *,
    groups: pl.DataFrame | None = None,
    flags: pl.DataFrame | None = None,
    spread: Spread | None = None,
) -> Selection:
    """Select from a score table: record_id Int64, turn Int32, status String (RowStatus values), and numeric measures.

    One row is one turn; a record that failed as a whole has one row. A record can be kept if any of its turns is
    scored. A null or NaN is left out of a record's mean, min and max. A share of the records is rounded to the nearest
    number, halves up; equal values rank by record_id. The order of the rows does not matter.

    groups: record_id and `group`, any sortable dtype; records that it lacks make a group of their own, as null does.
        Needed for `per` and `per_cluster`. A group's size is that of all its records, failed ones included.
    flags: record_id and Boolean columns, some of them named by `drop_flagged`; null is not flagged.
    spread: given the record_ids of the pool, ascending, and a number, positions of so many diverse ones, best first.

    Raises ScorerError where `config.column` is no measure of the table, a key column is absent, or a turn stands twice.
    """
    one_of("by", config.column, measures_of(scores.schema))
    records = per_record(scores, config.aggregate)
    measures = measures_of(records.schema)
    limited = config.max_ifd is not None and "ifd" in measures and records["ifd"].count() > 0
    reason = _reasons(records, config, limited, flags)
    total = records.height
    group, sizes = _grouped(records["record_id"], groups if config.per or config.per_cluster else None)
    pool = pl.DataFrame({"position": pl.int_range(total, dtype=pl.UInt32, eager=True), "group": group})
    pool = pool.with_columns(value=records[config.column]).filter(reason.is_null())

    outcome = pl.zeros(total, pl.UInt8, eager=True)  # for records in the pool, an index into OUTCOMES
    if config.bucket is not None:
        outcome = outcome.scatter(pool["position"], OUTCOMES.index("other_bucket"))
        pool = _bucket(pool, config.bucket, _counts(pool["group"], len(sizes)))
        outcome = outcome.scatter(pool["position"], OUTCOMES.index("below_cut"))
    asked = _quotas(config, total, sizes)
    room = _counts(pool["group"], len(sizes))
    quotas = exact_quotas(sum(asked), sizes, room) if config.rounding == "exact" else list(map(min, asked, room))
    positions = _drawn(pool, quotas, config.seed) if config.random else _ranked(pool, quotas, bool(config.lowest))

    requested = sum(asked)
    if config.diverse is not None:
        if spread is None:
            raise ScorerError("diverse: diversity needs embeddings")
        requested = _count(config.size, total)
        if requested > sum(asked):
            raise ScorerError(f"diverse: {requested:,} records can't be kept of the {sum(asked):,} that rank first")
        outcome = outcome.scatter(positions, OUTCOMES.index("not_diverse"))
        positions = positions.sort()
        picked = spread(records["record_id"].gather(positions), min(requested, len(positions)))
        positions = positions.gather(pl.Series(picked, dtype=pl.UInt32))
    outcome = outcome.scatter(positions, OUTCOMES.index("kept"))

    kept = records[positions].with_row_index("rank", offset=1)
    kept = kept.select("record_id", pl.col("rank").cast(pl.Int64), *measures)
    rest = records.select("record_id", reason=reason.fill_null(pl.Series(OUTCOMES).gather(outcome)))
    rejected = rest.filter(reason.is_not_null() | (outcome != OUTCOMES.index("kept")))
    return Selection(kept.sort("record_id") if config.order == "input" else kept, rejected, requested, total)


OUTCOMES = ("below_cut", "other_bucket", "not_diverse", "kept")


def _reasons(records: pl.DataFrame, config: SelectConfig, limited: bool, flags: pl.DataFrame | None) -> pl.Series:
    """Why a record can't be ranked; null where it can."""
    unusable = pl.col(config.column).is_null() | pl.col(config.column).is_infinite()
    if limited:
        unusable |= pl.col("ifd").is_null()
    reasons = ["reason", pl.when(unusable).then(pl.lit("null_score"))]
    measures = (config.column, "ifd") if limited else (config.column,)
    table = records.select("record_id", "reason", *dict.fromkeys(measures))
    if config.drop_flagged:
        if flags is None or not set(config.drop_flagged) <= set(flags.columns):
            raise ScorerError(f"drop_flagged: the flags {', '.join(config.drop_flagged)} are not all there")
        borne = flags.select("record_id", *(pl.col(name).alias(f"flag {name}") for name in config.drop_flagged))
        table = table.join(borne, on="record_id", how="left", maintain_order="left")
        reasons += [pl.when(f"flag {name}").then(pl.lit(name)) for name in config.drop_flagged]
    if limited:
        reasons.append(pl.when(pl.col("ifd") >= config.max_ifd).then(pl.lit("ifd_too_high")))
    return table.select(pl.coalesce(reasons)).to_series()


def _grouped(ids: pl.Series, groups: pl.DataFrame | None) -> tuple[pl.Series, list[int]]:
    """The number of each record's group, by the order of the groups' keys (null last), and the groups' sizes."""
    if groups is None:
        return pl.zeros(len(ids), pl.UInt32, eager=True), [len(ids)] if len(ids) else []
    keys = ids.to_frame("record_id").join(groups, on="record_id", how="left", maintain_order="left").select("group")
    if keys.height != len(ids):
        raise ScorerError("a record stands in two groups")
    numbers = keys.unique().sort("group", nulls_last=True).with_row_index("number")
    joined = keys.join(numbers, on="group", how="left", maintain_order="left", nulls_equal=True)
    return joined["number"], _counts(joined["number"], numbers.height)


def _counts(group: pl.Series, groups: int) -> list[int]:
    counts = [0] * groups
    for number, count in group.value_counts().iter_rows():
        counts[number] = count
    return counts


def _count(keep: int | Fraction, total: int) -> int:
    return keep if isinstance(keep, int) else math.floor(keep * total + Fraction(1, 2))


def _quotas(config: SelectConfig, total: int, sizes: list[int]) -> list[int]:
    if isinstance(config.by_rank, Fraction) and config.rounding == "paper":
        return paper_quotas(config.by_rank, sizes)
    return largest_remainder(_count(config.by_rank, total), sizes) if sizes else [_count(config.by_rank, total)]


def _bucket(pool: pl.DataFrame, bucket: str, counts: list[int]) -> pl.DataFrame:
    """The rows of the pool in the third `bucket` of their group's values; equal values go by position."""
    part = BUCKETS.index(bucket)
    bounds = [[0, *split_bounds(count, len(BUCKETS))] for count in counts]
    start, end = (pl.Series([b[i] for b in bounds], dtype=pl.UInt32) for i in (part, part + 1))
    ascending = pool.sort("value", maintain_order=True)
    position, group = _places(ascending["group"], len(counts)), ascending["group"]
    return ascending.filter((position >= start.gather(group)) & (position < end.gather(group))).sort("position")


def _ranked(pool: pl.DataFrame, quotas: list[int], lowest: bool) -> pl.Series:
    """Positions of the best records of each group, best first; equal values go by position."""
    ranking = pool.sort("value", descending=not lowest, maintain_order=True)
    position = _places(ranking["group"], len(quotas))
    return ranking.filter(position < pl.Series(quotas, dtype=pl.UInt32).gather(ranking["group"]))["position"]


def _drawn(pool: pl.DataFrame, quotas: list[int], seed: int) -> pl.Series:
    """Positions in the order of drawing, group after group."""
    draw, begin, drawn = Random(seed), 0, []
    for quota, count in zip(quotas, _counts(pool["group"], len(quotas)), strict=True):
        drawn += [begin + i for i in draw.sample(range(count), quota)]
        begin += count
    return pool.sort("group", maintain_order=True)["position"].gather(pl.Series(drawn, dtype=pl.UInt32))


def _places(group: pl.Series, groups: int) -> pl.Series:
    """How many rows of the same group stand before each row."""
    if groups < 2:
        return pl.int_range(len(group), dtype=pl.UInt32, eager=True)
    return group.to_frame().select(pl.int_range(pl.len(), dtype=pl.UInt32).over("group")).to_series()
