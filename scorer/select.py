"""The score table -> which records to keep, in what order, and why each of the others was dropped.

Pure Polars: it knows column names and numbers, and nothing of files, models, or what a measure means. The one measure
that it knows by name is `ifd`, which has an upper limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from random import Random

import polars as pl

from scorer.config import one_of
from scorer.types import RowStatus, ScorerError

AGGREGATES: dict[str, Callable[[pl.Expr], pl.Expr]] = {
    "mean": pl.Expr.mean,
    "min": pl.Expr.min,
    "max": pl.Expr.max,
    "last": pl.Expr.last,
}
ORDERS = ("input", "rank")
KEYS = ("record_id", "turn", "status")
NOT_MEASURES = (*KEYS, "rank", "reason")  # the last two name columns of a Selection
SCORED = [status.value for status in RowStatus if status.scored]
# Digits are bounded, and exponents refused: Fraction("1e999999999") would take all memory.
NUMBER = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?|\.[0-9]{1,18})(%?)")


def parse_keep(value: str | int | float | Fraction) -> int | Fraction:
    """A share of the records as an exact Fraction (0 < share <= 1), or a number of records as an int (>= 1).

    "10%", "0.1", 0.1 and Fraction(1, 10) are one share; "5000" and 5000 one number. A decimal without "%" lies below 1,
    since 1.0 might mean one record or all of them. Anything else raises ScorerError.
    """
    keep: object = value
    if isinstance(value, str) and (match := NUMBER.fullmatch(value.strip())):
        number, percent = match.groups()
        if percent:
            keep = Fraction(number) / 100
        elif "." in number:
            keep = _below_one(Fraction(number))
        else:
            keep = int(number)
    elif isinstance(value, float) and math.isfinite(value):
        # The shortest decimal that reads back as this float is what was written; numpy's own repr is not a number.
        keep = _below_one(Fraction(float.__repr__(value)))
    return _checked_keep(keep, value)


def _below_one(share: Fraction) -> Fraction | None:
    return share if share < 1 else None


def _checked_keep(keep: object, shown: object) -> int | Fraction:
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return keep
    if isinstance(keep, Fraction) and 0 < keep <= 1:
        return keep
    raise ScorerError(
        f"keep: {str(shown)!r} is neither a share such as 10% (above 0%, at most 100%) nor a number of "
        "records such as 5000 (at least 1)"
    )


@dataclass(frozen=True, slots=True)
class SelectConfig:
    """Which records to keep. `keep` is what `parse_keep` gives.

    by: the numeric column to rank by; the highest values are kept, or with `lowest` the lowest.
    max_ifd: records whose ifd is not below it are dropped (Superfiltering, arXiv 2402.00530, keeps those below 1); None
        is no limit. A table without any ifd (of a protocol with no alone view) has nothing to limit.
    random: keep a sample, drawn by `seed` from the records that a ranking by `by` would have ranked.
    aggregate: how the scored turns of a record become one value, per column.
    order: of the kept records: as they came, or best first.
    """

    keep: int | Fraction
    by: str = "ifd"
    lowest: bool = False
    max_ifd: float | None = 1.0
    random: bool = False
    seed: int = 42
    aggregate: str = "mean"
    order: str = "input"

    def __post_init__(self) -> None:
        if not isinstance(self.keep, int | Fraction):
            raise ScorerError(f"keep: {self.keep!r} is not yet a share or a number; give parse_keep({self.keep!r})")
        _checked_keep(self.keep, self.keep)
        one_of("aggregate", self.aggregate, AGGREGATES)
        one_of("order", self.order, ORDERS)
        for name in ("lowest", "random"):
            if not isinstance(getattr(self, name), bool):
                raise ScorerError(f"{name}: {getattr(self, name)!r} is not True or False")
        limit = self.max_ifd
        if limit is not None and (
            not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < math.inf
        ):
            raise ScorerError(f"max_ifd: {limit!r} is not a number above 0 (or None, for no limit)")
        # random.Random takes -1 for 1, so that two seeds would draw one sample.
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ScorerError(f"seed: {self.seed!r} is not a whole number of at least 0")


@dataclass(frozen=True, slots=True)
class Selection:
    """What was kept and what was not: each record of the table is in one of the two frames, once.

    kept: record_id Int64, rank Int64 (1 is best, or drawn first), and every measure of the table, aggregated over the
        record's scored turns; in the order asked for.
    rejected: record_id Int64, reason String, by record_id. The reason is the status of a record of which no turn is
        scored; or null_score (`by`, or an ifd that has a limit, is null or not finite), ifd_too_high, or below_cut.
    requested: how many records `keep` asked for; there are fewer in `kept` where fewer could be ranked.
    total: how many records the table has, failed ones included.
    """

    kept: pl.DataFrame
    rejected: pl.DataFrame
    requested: int
    total: int


def choose(scores: pl.DataFrame, config: SelectConfig) -> Selection:
    """Select from a score table: record_id Int64, turn Int32, status String (RowStatus values), and numeric measures.

    One row is one turn; a record that failed as a whole has one row. A record can be kept if any of its turns is
    scored. A null or NaN is left out of a record's mean, min and max. A share of the records is rounded to the nearest
    number, halves up; equal values rank by record_id. The order of the rows does not matter.

    Raises ScorerError where `config.by` is no measure of the table, a key column is absent, or a turn stands twice.
    """
    if missing := [name for name in KEYS if name not in scores.columns]:
        raise ScorerError(f"not a score table: it has no column {', '.join(missing)}")
    measures = [name for name, dtype in scores.schema.items() if dtype.is_numeric() and name not in NOT_MEASURES]
    one_of("by", config.by, tuple(measures))

    # Sorted first, so that sums of floats, `last`, and a failed record's status come out alike for any order of rows.
    table = scores.select(*KEYS, *measures).sort("record_id", "turn")
    twice = table.filter(
        (pl.col("record_id") == pl.col("record_id").shift()) & (pl.col("turn") == pl.col("turn").shift())
    )
    if not twice.is_empty():
        record_id, turn = twice.row(0)[:2]
        raise ScorerError(f"not a score table: turn {turn} of record {record_id} stands in it twice")
    first_rows = table.select("record_id", reason="status").unique("record_id", keep="first", maintain_order=True)

    aggregate = AGGREGATES[config.aggregate]
    floats = [name for name in measures if scores.schema[name].is_float()]
    scored = table.filter(pl.col("status").is_in(SCORED)).with_columns(pl.col(floats).fill_nan(None))
    records = scored.group_by("record_id", maintain_order=True).agg(aggregate(pl.col(name)) for name in measures)

    limited = config.max_ifd is not None and "ifd" in measures and scored["ifd"].count() > 0
    records = records.with_columns(reason=_reason(config.by, config.max_ifd if limited else None))
    pool = records.filter(pl.col("reason").is_null()).drop("reason")

    total = first_rows.height
    requested = config.keep if isinstance(config.keep, int) else math.floor(config.keep * total + Fraction(1, 2))
    size = min(requested, pool.height)
    if config.random:
        positions = pl.Series(Random(config.seed).sample(range(pool.height), size), dtype=pl.UInt32)
    else:
        ranking = pl.arg_sort_by(config.by, "record_id", descending=[not config.lowest, False])
        positions = pool.select(ranking).to_series().head(size)
    kept = pool[positions].with_row_index("rank", offset=1)
    kept = kept.select("record_id", pl.col("rank").cast(pl.Int64), *measures)

    ids = ("record_id", "reason")
    rejected = pl.concat(
        [
            first_rows.join(records, on="record_id", how="anti"),
            records.filter(pl.col("reason").is_not_null()).select(ids),
            pool.join(kept, on="record_id", how="anti").select("record_id", reason=pl.lit("below_cut")),
        ]
    ).sort("record_id")
    return Selection(kept.sort("record_id") if config.order == "input" else kept, rejected, requested, total)


def _reason(by: str, max_ifd: float | None) -> pl.Expr:
    """Why a record with scores cannot be ranked; null where it can."""
    unusable = pl.col(by).is_null() | pl.col(by).is_infinite()
    if max_ifd is None:
        return pl.when(unusable).then(pl.lit("null_score"))
    unusable |= pl.col("ifd").is_null()
    return pl.when(unusable).then(pl.lit("null_score")).when(pl.col("ifd") >= max_ifd).then(pl.lit("ifd_too_high"))
