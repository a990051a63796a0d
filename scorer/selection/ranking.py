"""The score table -> which records to keep, in what order, and why each of the others was dropped.

Knows column names and numbers; neither files nor models, nor what a measure, a group or a flag means. The only measure
that it knows by name is `ifd`, which has an upper limit. scorer.scores.shares computes quotas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random

import numpy as np
import polars as pl

from scorer.scores.aggregate import check_response, measures_of, per_record
from scorer.scores.shares import exact_quotas, largest_remainder, paper_quotas, split_bounds, to_count
from scorer.selection.config import BUCKETS, SelectConfig
from scorer.selection.selection import Selection
from scorer.types import RowStatus, ScorerError, one_of

REASONS = ("below_cut", "other_bucket", "not_diverse", "not_drawn", "kept")  # of the records that can be chosen
Diversify = Callable[[pl.Series, int], Sequence[int]]


def select_records(
    scores: pl.DataFrame,
    config: SelectConfig,
    *,
    groups: pl.DataFrame | None = None,
    flags: pl.DataFrame | None = None,
    diversify: Diversify | None = None,
) -> Selection:
    """Select from a score table: record_id Int64, turn Int32, status String (RowStatus values), and numeric measures.

    One row is one turn; a record that failed as a whole has one row. A record can be kept if any of its turns is
    scored, and drawn at random if it is JSON. A null or NaN is left out of a record's mean, min and max. A share of
    the records is rounded to the nearest number, halves up; equal values rank by record_id. The order of the rows does
    not matter.

    groups: record_id and `group`, any sortable dtype; records that it lacks are in the group null. Needed for `per` and
        `per_cluster`. The size of a group counts all its records, failed ones included.
    flags: record_id and Boolean columns, some of them named by `drop_flagged`; null is not flagged.
    diversify: takes the record_ids of the pool, ascending, and a number, and returns the positions of that many diverse
        records, best first.

    Raises ScorerError where `config.column` is no measure of the table, a key column is absent, or a turn occurs twice.
    """
    one_of("by", config.column, measures_of(scores.schema))
    check_response(scores, config.response)
    records = per_record(scores, config.aggregate, config.response)
    measures = measures_of(records.schema)
    limited = config.limit is not None and "ifd" in measures and records["ifd"].count() > 0
    reason = _reasons(records, config, limited, flags)
    total = records.height
    group, sizes = _grouped(records["record_id"], groups if config.per or config.per_cluster else None)
    pool = pl.DataFrame({"position": pl.int_range(total, dtype=pl.UInt32, eager=True), "group": group})
    pool = pool.with_columns(value=records[config.column]).filter(reason.is_null())

    passed_over = REASONS.index("not_drawn" if config.random else "below_cut")
    outcome = pl.repeat(passed_over, total, dtype=pl.UInt8, eager=True)  # for records in the pool, of REASONS
    if config.bucket is not None:
        outcome = outcome.scatter(pool["position"], REASONS.index("other_bucket"))
        pool = _bucket(pool, config.bucket, _counts(pool["group"], len(sizes)))
        outcome = outcome.scatter(pool["position"], passed_over)
    asked = _quotas(config, total, sizes)
    room = _counts(pool["group"], len(sizes))
    quotas = exact_quotas(sum(asked), sizes, room) if config.rounding == "exact" else list(map(min, asked, room))
    positions = _draw(pool, quotas, config.seed) if config.random else _ranked(pool, quotas, bool(config.lowest))

    requested = sum(asked)
    if config.diverse is not None:
        assert diversify is not None
        requested = to_count(config.size, total)
        if requested > sum(asked):
            raise ScorerError(f"diverse: {requested:,} records can't be kept of the {sum(asked):,} that rank first")
        outcome = outcome.scatter(positions, REASONS.index("not_diverse"))
        positions = _diverse(records["record_id"], positions, requested, diversify)
    outcome = outcome.scatter(positions, REASONS.index("kept"))

    kept = records[positions].select("record_id", pl.int_range(1, pl.len() + 1).alias("rank"), *measures)
    reason = reason.fill_null(pl.Series(REASONS).gather(outcome))
    rejected = records.select("record_id", reason=reason).filter(pl.col("reason") != "kept")
    ordered = kept.sort("record_id") if config.order == "input" else kept
    return Selection(ordered, rejected, requested, total, pool.height if config.random else None)


def _reasons(records: pl.DataFrame, config: SelectConfig, limited: bool, flags: pl.DataFrame | None) -> pl.Series:
    """Why a record can't be ranked, or drawn; null where it can."""
    any_record = config.random and config.bucket is None
    needed = [*([] if any_record else [config.column]), *(["ifd"] if limited else [])]
    status = pl.col("reason")
    reasons = [pl.when(status == RowStatus.BAD_JSON).then(status) if any_record and not limited else status]
    if needed:
        # A ranking by ifd takes no infinite value; of a limited ifd, infinity is too high.
        missing = [pl.col(name).is_null() for name in needed]
        infinite = [] if any_record else [pl.col(config.column).is_infinite()]
        reasons.append(pl.when(pl.any_horizontal(*missing, *infinite)).then(pl.lit("null_score")))
    measures = (config.column, "ifd") if limited else (config.column,)
    table = records.select("record_id", "reason", *dict.fromkeys(measures))
    if config.drop_flagged:
        if flags is None or not set(config.drop_flagged) <= set(flags.columns):
            raise ScorerError(
                f"drop_flagged: the flags {', '.join(config.drop_flagged)} are not all in the table of flags"
            )
        columns = flags.select("record_id", *(pl.col(name).alias(f"flag {name}") for name in config.drop_flagged))
        table = table.join(columns, on="record_id", how="left", maintain_order="left")
        reasons += [pl.when(f"flag {name}").then(pl.lit(name)) for name in config.drop_flagged]
    if limited:
        reasons.append(pl.when(pl.col("ifd") >= config.limit).then(pl.lit("ifd_too_high")))
    return table.select(pl.coalesce(reasons)).to_series()


def _grouped(ids: pl.Series, groups: pl.DataFrame | None) -> tuple[pl.Series, list[int]]:
    """The number of each record's group, by the order of the groups' keys (null last), and the groups' sizes."""
    if groups is None:
        return pl.zeros(len(ids), pl.UInt32, eager=True), [len(ids)] if len(ids) else []
    keys = ids.to_frame("record_id").join(groups, on="record_id", how="left", maintain_order="left").select("group")
    if keys.height != len(ids):
        raise ScorerError("groups: a record is in two groups; give each record one")
    numbers = keys.unique().sort("group", nulls_last=True).with_row_index("number")
    joined = keys.join(numbers, on="group", how="left", maintain_order="left", nulls_equal=True)
    return joined["number"], _counts(joined["number"], numbers.height)


def _counts(group: pl.Series, groups: int) -> list[int]:
    counts: list[int] = np.bincount(group.to_numpy(), minlength=groups).tolist()
    return counts


def _quotas(config: SelectConfig, total: int, sizes: list[int]) -> list[int]:
    if isinstance(config.by_rank, Fraction) and config.rounding == "paper":
        return paper_quotas(config.by_rank, sizes)
    return largest_remainder(to_count(config.by_rank, total), sizes) if sizes else [to_count(config.by_rank, total)]


def _bucket(pool: pl.DataFrame, bucket: str, counts: list[int]) -> pl.DataFrame:
    """The rows of the pool in the third `bucket` of their group's values; equal values go by position."""
    part = BUCKETS.index(bucket)
    bounds = [[0, *split_bounds(count, len(BUCKETS))] for count in counts]
    start, end = (pl.Series([b[i] for b in bounds], dtype=pl.UInt32) for i in (part, part + 1))
    ascending = pool.sort("value", maintain_order=True)
    rank, group = _rank_in_group(ascending["group"], len(counts)), ascending["group"]
    return ascending.filter((rank >= start.gather(group)) & (rank < end.gather(group))).sort("position")


def _ranked(pool: pl.DataFrame, quotas: list[int], lowest: bool) -> pl.Series:
    """Positions of the best records of each group, best first; equal values go by position."""
    ranking = pool.sort("value", descending=not lowest, maintain_order=True)
    rank = _rank_in_group(ranking["group"], len(quotas))
    return ranking.filter(rank < pl.Series(quotas, dtype=pl.UInt32).gather(ranking["group"]))["position"]


def _draw(pool: pl.DataFrame, quotas: list[int], seed: int) -> pl.Series:
    """Positions in the order of drawing, group after group."""
    random, start, rows = Random(seed), 0, []
    for quota, count in zip(quotas, _counts(pool["group"], len(quotas)), strict=True):
        rows += random.sample(range(start, start + count), quota)
        start += count
    return pool.sort("group", maintain_order=True)["position"].gather(pl.Series(rows, dtype=pl.UInt32))


def _diverse(ids: pl.Series, positions: pl.Series, size: int, diversify: Diversify) -> pl.Series:
    """Positions of the most diverse of the records at `positions`, best first."""
    positions = positions.sort()
    chosen = diversify(ids.gather(positions), min(size, len(positions)))
    return positions.gather(pl.Series(chosen, dtype=pl.UInt32))


def _rank_in_group(group: pl.Series, groups: int) -> pl.Series:
    """How many rows of the same group come before each row."""
    if groups < 2:
        return pl.int_range(len(group), dtype=pl.UInt32, eager=True)
    return group.to_frame().select(pl.int_range(pl.len(), dtype=pl.UInt32).over("group")).to_series()
